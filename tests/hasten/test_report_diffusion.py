"""The account of generated texts: sums, warnings, forms."""

from __future__ import annotations

import json

import pytest

from hasten.recipe import Recipe
from hasten.report_diffusion import Generation, TextDiffusionReport, together
from hasten.samplers.commit import Threshold, Unmask

RECIPE = Recipe(name="fast", commit=Unmask(rule=Threshold()))


def cost(computed: float = 40.0, guide: int = 0) -> Generation:
    return Generation(
        steps=4, prompt=(3, 5), written=(8, 4), evaluations=(4, 2), computed=(computed, 20.0), anew=(80.0, 40.0),
        sequential=(160.0, 80.0), seconds=0.5, guide=guide,
    )  # fmt: skip


def report(*generations: Generation, **more: object) -> TextDiffusionReport:
    return TextDiffusionReport(list(generations), RECIPE, "Model", "family", **more)  # type: ignore[arg-type]


def test_sums() -> None:
    found = report(cost(), cost())
    assert (found.steps, found.written, found.evaluations) == (8, 24, 12)
    assert found.tokens_per_forward == 2
    assert found.token_layers == 120
    assert found.computed_fraction == 0.5
    assert found.of_sequential == 0.25


def test_a_recipe_that_saved_nothing_says_so() -> None:
    assert not report(cost()).warnings
    dear = report(cost(computed=240.0), cache="dual", exact=False)
    assert [warning.split(":")[0] for warning in dear.warnings] == ["fast saved nothing", "The cache 'dual' saved nothing"]
    assert "!! WARNING" in str(dear)
    assert report().warnings == ["Nothing was generated, so this recipe did nothing."]


def test_forms() -> None:
    found = report(cost(guide=7), notes=["A note."], bytes_held=2048)
    assert "7 tokens computed by the guiding model" in str(found)
    assert "A note." in str(found)
    assert "2.0 KiB" in str(found)
    data = json.loads(found.to_json())
    assert data["tokens_per_forward"] == 2
    assert data["generations"][0]["written"] == [8, 4]
    page = found.to_html()
    assert "A note." in page
    assert "Text by text" in page


def test_together() -> None:
    one, two = report(cost(), bytes_held=5, notes=["a"]), report(cost(), bytes_held=9, notes=["a", "b"])
    found = together([one, two])
    assert len(found.generations) == 2
    assert found.bytes_held == 9
    assert found.notes == ["a", "b"]
    assert "generation 1" in str(found)
    assert found.of_sequential == pytest.approx(one.of_sequential)
