"""Every transformer class of the installed diffusers is built small, or named with the reason why not."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from pathlib import Path

import diffusers
from diffusers import ModelMixin
from diffusers.models import transformers

from tests.conformance.small import EXCLUDED, every

MEASURED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "conformance.json"


def classes() -> set[str]:
    """Names of all `ModelMixin`s that are defined below `diffusers.models.transformers`."""
    modules = [
        importlib.import_module(f"{transformers.__name__}.{m.name}")
        for m in pkgutil.iter_modules(transformers.__path__)
    ]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, ModelMixin) and value.__module__ == module.__name__
    }


def test_every_class_is_described_or_excluded() -> None:
    described = set(every()) | set(EXCLUDED)
    new, gone = sorted(classes() - described), sorted(described - classes())
    assert not new, (
        f"diffusers {diffusers.__version__} has {new}: describe them in tests/conformance/models, or exclude them"
    )
    assert not gone, (
        f"diffusers {diffusers.__version__} does not have {gone}: take them out of tests/conformance/models"
    )
    assert not set(every()) & set(EXCLUDED)


def test_at_least_sixty_classes_and_a_reason_for_the_others() -> None:
    assert len(every()) >= 60
    assert all(len(reason.split()) >= 5 for reason in EXCLUDED.values())


def test_measured_table_is_of_these_classes() -> None:
    """docs/conformance.md is made of this file; `PYTHONPATH=. python benchmarks/conformance.py` writes it."""
    document = json.loads(MEASURED.read_text(encoding="utf-8"))
    assert {row["model"] for row in document["rows"]} == set(every())
    assert document["excluded"].keys() == EXCLUDED.keys()
    assert all(
        row["network"] and row["network_loss"] < 1e-4 and row["blocks_loss"] < 1e-4
        for row in document["rows"]
    )
    assert all(row["blocks"] or row["why"] for row in document["rows"])
