"""Every recipe on whole pipelines of every kind: it does something or says why not, and leaves no trace."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch

import hasten
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.recipes import acts_on, catalogue
from hasten.samplers.windows import Windows
from hasten.sparse_attn.policy import SparseAttention
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


ACTING = [entry for entry in catalogue() if entry.recipe.axes]
TEXT = [entry for entry in ACTING if acts_on(entry.recipe) in ("language models", "text diffusion")]
STUDENTS = [entry for entry in ACTING if entry.recipe.adapter is not None and entry.recipe.reuse is None]
CLIPS = [entry for entry in ACTING if isinstance(entry.recipe.sampler, Windows)]
SPARSE = [entry for entry in ACTING if isinstance(entry.recipe.attention, SparseAttention)]


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("entry", [entry for entry in ACTING if entry not in (*TEXT, *STUDENTS, *CLIPS)], ids=lambda entry: entry.name)
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


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("entry", STUDENTS, ids=lambda entry: entry.name)
def test_a_student_of_other_weights_is_refused(entry: Any, name: str) -> None:
    pipe, plain = host(name)
    with pytest.raises(RefusedError, match="is a distilled student"):
        hasten.accelerate(pipe, entry.recipe)
    assert torch.equal(run(pipe, name), plain)


@pytest.mark.parametrize("entry", CLIPS, ids=lambda entry: entry.name)
def test_recipes_of_long_clips_are_for_clips_and_say_so_of_short_ones(entry: Any) -> None:
    pipe, plain = host("wan")
    with pytest.warns(UserWarning, match="it is the plain run"), hasten.accelerate(pipe, entry.recipe):
        assert torch.equal(run(pipe, "wan"), plain)
    for name in ("pixart", "flux", "unet"):
        with pytest.raises(RefusedError, match="cannot be asked about windows of frames"):
            hasten.accelerate(host(name)[0], entry.recipe)


@pytest.mark.parametrize("entry", TEXT, ids=lambda entry: entry.name)
def test_recipes_of_texts_are_refused_in_words(entry: Any) -> None:
    pipe, plain = host("wan")
    with pytest.raises(UsageError, match="language models|no seam on a denoiser"):
        hasten.accelerate(pipe, entry.recipe)
    assert torch.equal(run(pipe, "wan"), plain)


@pytest.mark.parametrize("name", ["wan", "pixart", "flux"])
@pytest.mark.parametrize("entry", SPARSE, ids=lambda entry: entry.name)
def test_sparse_attention_that_is_not_allowed_to_decline_acts(entry: Any, name: str) -> None:
    pipe, plain = host(name)
    recipe = entry.recipe.replace({"attention.min_tokens": 0})
    with hasten.accelerate(pipe, recipe) as session:
        result = run(pipe, name)
    assert torch.isfinite(result).all()
    sparse = [call for call in session.trace.attended(0) if call.sparse]
    assert sparse, session.trace.notes
    assert all(0 < call.density <= 1 for call in sparse if call.density is not None)
    assert torch.equal(run(pipe, name), plain)


def test_windows_that_hold_everything_are_named() -> None:
    pipe, _ = host("wan")
    with pytest.warns(UserWarning, match="left out nothing"), hasten.accelerate(
        pipe, "neighbourhood:window=[100000],min_tokens=0"
    ) as session:
        run(pipe, "wan")
    assert any("left out nothing" in warning for warning in session.report().warnings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with hasten.accelerate(pipe, "semantic:q_size=4,k_size=2,warm=0,min_tokens=0") as session:
            run(pipe, "wan")
    said = [str(w.message) for w in caught] + session.report().warnings
    assert not any("left out nothing" in text for text in said)
