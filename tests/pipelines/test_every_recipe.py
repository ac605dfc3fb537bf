"""Every recipe on whole pipelines of every kind: it does something or says why not, and leaves no trace."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch

import hasten
from hasten.pipelines.recipes import catalogue
from tests.hosts import (
    FLUX_CALL,
    PIXART_CALL,
    UNET_CALL,
    WAN_CALL,
    small_flux,
    small_pixart,
    small_unet,
    small_wan,
)  # fmt: skip

STEPS = 16
"""Enough that the warm-up of every recipe is over."""

HOSTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "wan": (lambda: small_wan(layers=2), WAN_CALL),
    "pixart": (lambda: small_pixart(layers=2), PIXART_CALL),
    "flux": (lambda: small_flux(layers=1, single_layers=2), FLUX_CALL),
    "unet": (small_unet, UNET_CALL),
}


@cache
def host(name: str) -> tuple[Any, torch.Tensor]:
    """One pipeline of each kind for all recipes, and its plain result."""
    pipe = HOSTS[name][0]()
    return pipe, run(pipe, name)


def run(pipe: Any, name: str) -> torch.Tensor:
    call = {**HOSTS[name][1], "num_inference_steps": STEPS, "output_type": "latent"}
    output = pipe("a seven", generator=torch.Generator().manual_seed(3), **call)
    return torch.as_tensor(output[0])


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("entry", [entry for entry in catalogue() if entry.recipe.axes], ids=lambda entry: entry.name)
def test_it_acts_or_says_why_not_and_leaves_no_trace(entry: Any, name: str) -> None:
    pipe, plain = host(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with hasten.accelerate(pipe, entry.recipe) as session:
            result = run(pipe, name)
        report = session.report()
    assert torch.isfinite(result).all() and result.shape == plain.shape
    told = [str(w.message) for w in caught if str(w.message).startswith("hasten:")]
    acted = not torch.equal(result, plain)
    assert acted or told, "without any effect and without a word"
    if not acted:
        assert report.warnings or session.trace.notes, "the report says it, too"
    assert torch.equal(run(pipe, name), plain), "the plain result afterwards is bit-identical"
