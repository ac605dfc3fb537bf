"""What sparse attention says: why it stays dense, what failed, and what was read."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor, nn

import hasten
from hasten.recipe import Recipe
from hasten.sparse_attn.layouts.swap import Swap
from hasten.sparse_attn.pattern import Pattern
from hasten.sparse_attn.scorers.pooled import Pooled
from hasten.sparse_attn.selectors.top import All
from tests.hosts import flux_arguments, small_flux, small_wan
from tests.pipelines.attention_recipes import FULL, PART, STOOD_FOR, changed
from tests.pipelines.attention_runs import SITES, generate
from tests.pipelines.seam_contract import loop

pytestmark = pytest.mark.filterwarnings("ignore:hasten")


@pytest.fixture(scope="module")
def wan() -> WanPipeline:
    return small_wan(layers=2)


@pytest.fixture(scope="module")
def plain(wan: WanPipeline) -> Tensor:
    return generate(wan)


# --- what cannot be, and what does not pay --------------------------------------------------------


def test_short_sequences_are_declined_with_one_word(wan: WanPipeline, plain: Tensor) -> None:
    with warnings.catch_warnings(record=True) as caught, hasten.accelerate(wan, changed(PART, min_tokens=None)) as session:
        warnings.simplefilter("always")
        assert torch.equal(generate(wan), plain) and torch.equal(generate(wan), plain)
    told = [str(w.message) for w in caught if "few to gain" in str(w.message)]
    assert len(told) == 1 and "8 tokens" in told[0]
    assert "attention part did nothing" in str(session.report())


def test_what_fails_is_dense_and_told(wan: WanPipeline, plain: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("hasten.sparse_attn.policy.pack", fail)
    with hasten.accelerate(wan, PART) as session:
        assert torch.equal(generate(wan), plain)
    assert sum("out of luck" in note for note in session.trace.notes) == 1


def test_a_layout_that_needs_a_grid_is_refused_without_one() -> None:
    """The positions of these tokens are random numbers, from which no grid can be read."""
    needs = changed(FULL, patterns=(Pattern(layout=Swap(), score=Pooled(), select=All()),))
    model = small_flux(layers=1, single_layers=1).transformer
    calls = [flux_arguments() | {"guidance": torch.tensor([3.5])}]
    with torch.no_grad():
        expected = model(**calls[0])[0]
    outputs, session = loop(model, needs, lambda step: calls, steps=2)
    assert all(torch.equal(output, expected) for (output,) in outputs)
    assert any("grid" in note and "stays dense" in note for note in session.trace.notes)


def test_a_network_that_refuses_nan_stays_dense(wan: WanPipeline, plain: Tensor) -> None:
    def check(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if bool(args[0].isnan().any()):
            raise ValueError("NaN in the latents")

    hook = wan.transformer.patch_embedding.register_forward_pre_hook(check)
    with hasten.accelerate(wan, PART) as session:
        assert torch.equal(generate(wan), plain)
    hook.remove()
    assert any("NaN in the latents" in note for note in session.trace.notes)


def test_gradients_are_left_alone(wan: WanPipeline) -> None:
    """Training inside an open session is dense and flows."""
    wan.transformer.requires_grad_(True)
    with hasten.accelerate(wan, PART):
        generate(wan)
        x = torch.randn(1, 16, 2, 4, 4, requires_grad=True)
        out = wan.transformer(hidden_states=x, timestep=torch.tensor([500]), encoder_hidden_states=torch.ones(1, 5, 32))[0]
        out.sum().backward()
    wan.transformer.requires_grad_(False)
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)


# --- the report -------------------------------------------------------------------------------------


def test_the_report_says_what_was_read(wan: WanPipeline) -> None:
    with hasten.accelerate(wan, changed(STOOD_FOR, warm=0.25)) as session:
        generate(wan)
    report = session.report()
    read = report.attention
    assert read is not None and read.calls == 16 and read.sparse == 12
    assert read.of_sparse is not None and read.of_sparse < read.density < 1
    assert read.recall is not None and read.lowest is not None and 0 < read.lowest <= read.recall <= 1
    text = str(report)
    assert "12 of 16 calls sparse" in text and "of the mass by estimate" in text and "branch 1 transformer" in text
    assert "  #" in text
    data = json.loads(report.to_json())["attention"]
    assert len(data["each"]) == 16 and [row["step"] for row in data["by_step"]] == [0, 1, 2, 3] * 2
    assert {row["site"] for row in data["by_layer"]} == set(SITES)
    page = report.to_html()
    assert page.count("of the pairs") >= 16 and "Share of pairs read" in page


def test_recall_is_unknown_where_nothing_stands_in(wan: WanPipeline) -> None:
    with hasten.accelerate(wan, PART) as session:
        generate(wan)
    assert all(call.recall is None for call in session.trace.attention)
    assert "is not known" in str(session.report())


def test_a_kind_of_attention_for_language_models_is_refused(wan: WanPipeline) -> None:
    from hasten.recipe import Attention

    class Other(Attention):
        kind = "other-attention-of-a-test"

    with pytest.raises(hasten.errors.UsageError, match="language models"):
        hasten.accelerate(wan, Recipe(name="other", attention=Other()))
