"""The attention seam beyond one kind of tokens: text beside an image, levels of a UNet, padded text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.pipelines.attention.seam import AttentionSeam
from hasten.pipelines.session import Session
from tests.conformance.loop import Loop, assert_same, solver, turn
from tests.conformance.small import Inputs, Small, every
from tests.hosts import FLUX_CALL, UNET_CALL, small_flux, small_unet
from tests.pipelines.attention_recipes import FULL
from tests.pipelines.attention_runs import off

pytestmark = pytest.mark.filterwarnings("ignore:hasten")


def seam_of(session: Session) -> AttentionSeam:
    seam = session.gates[0].attention
    assert seam is not None
    return seam


def test_joint_attention_of_flux() -> None:
    pipe = small_flux(layers=1, single_layers=2)
    call = {**FLUX_CALL, "num_inference_steps": 2, "output_type": "latent"}
    expected = torch.as_tensor(pipe("a seven", generator=torch.Generator().manual_seed(0), **call)[0])
    with hasten.accelerate(pipe, FULL) as session:
        found = torch.as_tensor(pipe("a seven", generator=torch.Generator().manual_seed(0), **call)[0])
    assert off(found, expected) < 1e-5
    learned = list(next(iter(seam_of(session).learned.values())).values())
    assert [(s.queries, s.keys, s.grid) for s in learned[0].q.segments] == [  # type: ignore[union-attr]
        ("dense", "always", None), ("sparse", "select", (1, 16, 16))
    ]  # fmt: skip


def test_unet() -> None:
    """Convolutions mix all pixels, so the grid of a level goes by its number of tokens."""
    pipe = small_unet()
    call = {**UNET_CALL, "num_inference_steps": 2, "output_type": "latent"}
    expected = torch.as_tensor(pipe("a seven", generator=torch.Generator().manual_seed(0), **call)[0])
    with hasten.accelerate(pipe, FULL) as session:
        found = torch.as_tensor(pipe("a seven", generator=torch.Generator().manual_seed(0), **call)[0])
    assert off(found, expected) < 1e-5 and any(call.sparse for call in session.trace.attention)
    grids = {each.q.segments[0].grid for kind in seam_of(session).learned.values() for each in kind.values() if each.q}
    assert all(grid is not None and grid[0] == 1 and grid[1] == grid[2] for grid in grids)


class Padded:
    """Conformance inputs with another number of real text tokens in each branch."""

    def __init__(self, inner: Small, name: str) -> None:
        self.inner, self.name = inner, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def inputs(self, seed: int, size: int) -> Inputs:
        found = self.inner.inputs(seed, size)
        length = found["encoder_hidden_states"].shape[1]
        return {**found, self.name: (torch.arange(length) < 1 + seed % 4).long()[None]}

    def call(self, model: nn.Module, x: Tensor, t: float, conditioning: Inputs) -> Any:
        return self.inner.call(model, x, t, conditioning)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("HunyuanVideoTransformer3DModel", "encoder_attention_mask"),
        ("QwenImageTransformer2DModel", "encoder_hidden_states_mask"),
    ],
)
def test_padded_text_is_read_by_nobody(name: str, mask: str) -> None:
    small = Padded(every()[name], mask)
    model, loop = small.made(), Loop(steps=2)
    expected = turn(small, model, loop, solver(small))  # type: ignore[arg-type]
    scheduler = solver(small)  # type: ignore[arg-type]
    with hasten.accelerate(model, FULL, scheduler=scheduler) as session:
        found = turn(small, model, loop, scheduler)  # type: ignore[arg-type]
    assert_same(found, expected, 2e-5)
    assert session.trace.attention and all(call.sparse and call.density < 1 for call in session.trace.attention)
    assert not any("stay" in note for note in session.trace.notes)
