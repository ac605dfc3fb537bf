"""Sparse attention on every transformer class of diffusers at a tiny size: which calls are reached, and that they are right."""

from __future__ import annotations

import functools

import pytest
import torch

from hasten.pipelines.attention.seam import AttentionSeam
from hasten.sparse_attn.segments import Tokens
from tests.conformance.loop import NAMES, Loop, Result, accelerated, assert_same, built, distance, plain
from tests.conformance.test_restore import attributes
from tests.pipelines.attention_recipes import FULL, PART

LOOP = Loop(steps=2)
TOLERANCE = 2e-5
"""Of float32 after a network of a few blocks, when every attention adds its terms in another order."""

DENSE = {
    "AceStepTransformer1DModel": "its mask differs between queries or heads",
    "AnyFlowFARTransformer3DModel": "requires the 'flex' attention backend",
    "Kandinsky6SRTransformer3DModel": "no attention among its video tokens was found",
    "MochiTransformer3DModel": "",
    "PriorTransformer": "no attention among its video tokens was found",
    "RFD4ProteinaTransformer": "its mask adds numbers to the scores",
    "SanaTransformer2DModel": "no attention among its video tokens was found",
    "SanaVideoTransformer3DModel": "no attention among its video tokens was found",
    "SanaWMTransformer3DModel": "attention calls outside of processors stay dense",
    "T5FilmDecoder": "no attention among its video tokens was found",
    "WanAnimate2Transformer3DModel": "no attention among its video tokens was found",
}
"""Class -> why some or all of its attention stays dense. Sana's is linear; Kandinsky 6 SR's, FAR's and Wan-Animate 2's is
FlexAttention; the prior has no sequence of latents."""

NOT_AT_ALL = set(DENSE) - {"AceStepTransformer1DModel", "MochiTransformer3DModel"}
"""Nothing is sparse on these."""

VIDEO = (2, 4, 4)
IMAGE = (1, 4, 4)
EXPECTED = {
    "WanTransformer3DModel": [("video", VIDEO)],
    "HunyuanVideoTransformer3DModel": [("video", VIDEO), ("text", None)],
    "HunyuanVideo15Transformer3DModel": [("video", (2, 8, 8)), ("text", None)],
    "CogVideoXTransformer3DModel": [("text", None), ("video", VIDEO)],
    "LTXVideoTransformer3DModel": [("video", VIDEO)],
    "MochiTransformer3DModel": [("video", VIDEO), ("text", None)],
    "FluxTransformer2DModel": [("text", None), ("video", IMAGE)],
    "Flux2Transformer2DModel": [("text", None), ("video", IMAGE)],
    "SD3Transformer2DModel": [("video", IMAGE), ("text", None)],
    "PixArtTransformer2DModel": [("video", IMAGE)],
    "QwenImageTransformer2DModel": [("text", None), ("video", IMAGE)],
    "Kandinsky5Transformer3DModel": [("video", VIDEO)],
    "Krea2Transformer2DModel": [("text", None), ("video", IMAGE)],
    "ZImageTransformer2DModel": [("video", IMAGE), ("text", None)],
}
"""Class -> segments of its first sparse call, and their grids: orders differ, and none of them is written down anywhere
but here."""


PADDED = {"HunyuanImageTransformer2DModel", "HunyuanVideoTransformer3DModel"}
"""Some of its text is padding here, which nobody reads."""


@functools.cache
def dense(name: str) -> Result:
    """The loop without hasten."""
    return plain(name, LOOP)


def seam_of(found: object) -> AttentionSeam:
    seam = found.session.gates[0].attention  # type: ignore[attr-defined]
    assert isinstance(seam, AttentionSeam)
    return seam


@pytest.mark.parametrize("name", NAMES)
def test_everything_read_is_dense_attention_and_nothing_is_left_behind(name: str) -> None:
    model = built(name)[1]
    expected = dense(name)  # first, because networks keep notes (position tables) of their own
    plain(name, LOOP)
    before = attributes(model)
    found = accelerated(name, FULL, LOOP)
    assert_same(found, expected, TOLERANCE)
    sparse = [call for call in found.session.trace.attention if call.sparse]  # type: ignore[union-attr]
    assert bool(sparse) != (name in NOT_AT_ALL), found.session.trace.notes  # type: ignore[union-attr]
    assert all((call.density == 1 or name in PADDED) and call.recall is None for call in sparse)
    told = " ".join(found.session.trace.notes)  # type: ignore[union-attr]
    assert DENSE.get(name, "") in told and ("stay dense" in told or "stays dense" in told) == bool(DENSE.get(name))
    after = attributes(model)
    assert_same(plain(name, LOOP), expected, tolerance=0)
    own = {key for key, number in attributes(model).items() if number != after.get(key)}  # made anew in each run
    own |= {"pos_embed.freqs"}  # a list of tensors that Qwen-Image 2.1 makes anew, sometimes at the same address
    assert after.keys() == before.keys()
    assert not [key for key, number in after.items() if number != before[key] and key not in own]


@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_AT_ALL))
def test_a_part_of_it_is_something_else(name: str) -> None:
    """Fails where calls are not reached, or where reading all is taken for reading a part."""
    found, expected = accelerated(name, PART, LOOP), dense(name)
    assert all(bool(torch.isfinite(value).all()) for value in found.outputs.values())
    assert max(distance(expected.outputs[key], found.outputs[key]) for key in expected.outputs) > 1e-4
    sparse = [call for call in found.session.trace.attention if call.sparse]  # type: ignore[union-attr]
    assert any(call.density < 1 for call in sparse)


@pytest.mark.parametrize("name", EXPECTED)
def test_segments_and_grids_are_found(name: str) -> None:
    learned = [each for kind in seam_of(accelerated(name, FULL, LOOP)).learned.values() for each in kind.values()]
    tokens = next(each.q for each in learned if each.q is not None)
    assert [(segment.name.split()[0], segment.grid) for segment in tokens.segments] == EXPECTED[name]
    assert sorted(each.layer for each in learned if each.q is not None) == list(range(sum(each.q is not None for each in learned)))


def test_keys_of_self_attention_are_its_queries() -> None:
    learned = [each for kind in seam_of(accelerated("SD3Transformer2DModel", FULL, LOOP)).learned.values() for each in kind.values()]
    assert all(isinstance(each.q, Tokens) and each.q == each.k for each in learned)
