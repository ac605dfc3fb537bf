"""How tokens are told apart: marks of every layout of latents, grids that arguments tell, masks that hide padding."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hasten.pipelines.attention.grids import grids_of, pictures
from hasten.pipelines.attention.masks import readable_keys, understand, with_padding
from hasten.pipelines.attention.sites import Site, Sites
from hasten.pipelines.attention.tokens import CROSS, TEXT_ONLY, Key, Learned, Learning, learn
from hasten.pipelines.host import Call, Layout
from hasten.sparse_attn.segments import Tokens, text, video


class Attend:
    """A processor that attends with what its module is given."""

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor) -> Tensor:
        q, k = q[:, None].float(), k[:, None].float()
        return torch.nn.functional.scaled_dot_product_attention(q, k, k)[:, 0]


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.processor = Attend()

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        found: Tensor = self.processor(self, q, k)
        return found


class Network(nn.Module):
    """Patches of latents [B, C, F, H, W] and text [B, n, D] in one sequence, twice through attention."""

    def __init__(self, order: str, patch: tuple[int, int, int], turn: tuple[int, int, int], mix: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.order, self.patch, self.turn, self.mix = Module(), Module(), order, patch, turn, mix

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        deep, high, wide = self.patch
        x = hidden_states.unfold(2, deep, deep).unfold(3, high, high).unfold(4, wide, wide).mean((-1, -2, -3))
        x = x.permute(0, *(2 + axis for axis in self.turn), 1).flatten(1, 3)
        x = x + x.mean(1, keepdim=True) if self.mix else x
        parts = {"v": x, "t": text, "p": torch.zeros(*x.shape[:1], 3, x.shape[2])}
        joined = torch.cat([parts[name] for name in self.order], 1)
        return self.second(self.first(joined, joined), joined)


def look(network: Network, **arguments: Any) -> dict[Key, Learned]:
    sites = Sites(network)

    def evaluate(call: Call, walk: Learning) -> None:
        with sites.walking(walk, everywhere=True):
            network(**call.kwargs)

    found = learn(Call(Layout.of(network), (), arguments), evaluate, {4}, math.prod(network.patch))[0]
    sites.detach()
    return found


@settings(max_examples=40, deadline=None)
@given(
    order=st.sampled_from(["v", "tv", "vt", "pvt", "tvp"]),
    patch=st.sampled_from([(1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 4, 4)]),
    turn=st.permutations(range(3)),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)).filter(lambda grid: math.prod(grid) >= 12),
    batch=st.integers(1, 2),
)
def test_any_order_and_any_patches(
    order: str, patch: tuple[int, int, int], turn: list[int], grid: tuple[int, int, int], batch: int
) -> None:
    """The range of the video and its grid, in the order in which its tokens stand."""
    sizes = [n * p for n, p in zip(grid, patch, strict=True)]
    latents = torch.randn(batch, 4, *sizes, generator=torch.Generator().manual_seed(0))
    network = Network(order, patch, tuple(turn))  # type: ignore[arg-type]
    found = look(network, hidden_states=latents, text=torch.ones(batch, 5, 4))
    lengths = {"v": math.prod(grid), "t": 5, "p": 3}
    assert len(found) == 2 and [each.layer for each in found.values()] == [0, 1]
    tokens = found[0, 0].q
    assert isinstance(tokens, Tokens) and tokens == found[0, 0].k == found[1, 0].q
    at = order.index("v")
    before, after = (sum(lengths[name] for name in part) for part in (order[:at], order[at + 1 :]))
    seen = [(s.length, s.queries) for s in tokens.segments]
    assert seen == [(n, kind) for n, kind in ((before, "dense"), (lengths["v"], "sparse"), (after, "dense")) if n]
    box = next(s.grid for s in tokens.segments if s.queries == "sparse")
    assert box is not None and math.prod(box) == math.prod(grid)
    if len(set(grid)) == 3 and min(grid) > 1:
        assert box == tuple(grid[axis] for axis in turn)


def test_what_was_mixed_before_is_video_only_where_nothing_else_fits() -> None:
    latents = torch.randn(1, 4, 2, 4, 6)
    alone = look(Network("v", (1, 2, 2), (0, 1, 2), mix=True), hidden_states=latents, text=torch.ones(1, 5, 4))
    assert alone[0, 0].q is not None and alone[0, 0].q.segments[0].grid == (2, 2, 3)
    joint = look(Network("tv", (1, 2, 2), (0, 1, 2), mix=True), hidden_states=latents, text=torch.ones(1, 5, 4))
    assert joint[0, 0].q is not None, "only the video was mixed, so its range is still seen"
    assert [(s.length, s.grid) for s in joint[0, 0].q.segments] == [(5, None), (12, (2, 2, 3))]


class Everything(Network):
    """A first block that mixes text and video."""

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        x = hidden_states.flatten(2).mT
        joined = torch.cat([text, x], 1)
        joined = joined + joined.mean(1, keepdim=True)
        self.first(joined, joined)
        self.second(x, text)
        found: Tensor = self.first(text, text)
        return found


def test_reasons() -> None:
    found = look(Everything("", (1, 1, 1), (0, 1, 2)), hidden_states=torch.randn(1, 4, 2, 4, 6), text=torch.ones(1, 5, 4))
    assert "mixed before it" in found[0, 0].reason and found[0, 0].q is None
    assert found[1, 0].reason == CROSS and found[0, 1].reason == TEXT_ONLY


def test_attention_leaves_tokens_apart_and_marks_rows() -> None:
    walk, q = Learning(), torch.zeros(1, 2, 4, 3)
    q[0, 1, 2, 0] = math.nan
    site = Site("one", 0, None, Sites(nn.Module()).walks)
    o = walk.attend(site, q, q, torch.ones(1, 2, 4, 5), {})
    assert o.shape == (1, 2, 4, 5) and bool(o[0, 1, 2].isnan().all()) and int(o.isnan().sum()) == 5
    assert walk.marks[0, 0].q.tolist() == [[False, False, True, False]]


# --- grids ------------------------------------------------------------------------------------------


def rows(*grids: tuple[int, int, int]) -> list[tuple[int, ...]]:
    return [(at, *place) for at, grid in enumerate(grids) for place in itertools.product(*map(range, grid))]


def test_pictures() -> None:
    assert pictures(rows((1, 3, 4))) == [(1, 3, 4)]
    assert pictures([place[1:] for place in rows((2, 3, 4))]) == [(2, 3, 4)]
    assert pictures(rows((1, 3, 4), (1, 2, 2))) == [(1, 3, 4), (1, 2, 2)], "a picture and a smaller reference"
    assert pictures([(0, 5 * y, 5 * x) for y in range(2) for x in range(3)]) == [(1, 2, 3)], "coarse positions"
    assert pictures([(0, 0, x) for x in range(6)]) == [(1, 1, 6)]
    assert pictures([(0, y, x) for x in range(3) for y in range(2)]) == [], "column by column is no picture"
    assert pictures([(0, 0, 0)] * 4) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"img_shapes": [[(1, 2, 6), (1, 2, 2)]]}, [(1, 2, 6), (1, 2, 2)]),
        ({"num_frames": 2, "height": 2, "width": 4}, [(2, 2, 4)]),
        ({"num_frames": 2, "height": 2, "width": 5}, []),
        ({"img_ids": torch.tensor(rows((1, 4, 4)))}, [(1, 4, 4)]),
        ({"ids": torch.tensor([(0, 0, 0, 0)] * 5 + rows((1, 4, 4)))[None]}, [(1, 4, 4)]),
        ({"img_ids": torch.rand(16, 3)}, []),
    ],
)
def test_grids_that_arguments_tell(arguments: dict[str, Any], expected: list[Any]) -> None:
    layout = Layout(tuple(arguments), "hidden_states", (), None)
    assert grids_of(Call(layout, (), arguments), 16, 5, 21) == expected


# --- masks ------------------------------------------------------------------------------------------

JOINT = Tokens((video(1, 2, 3), text(4)))
SHAPES = torch.Size((2, 3, 10, 8)), torch.Size((2, 3, 10, 8))


def padded(*lengths: int) -> Tensor:
    return torch.arange(10) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("form", ["bool", "inf", "finite", "rows", "two dimensions"])
def test_padding(form: str) -> None:
    keys = padded(8, 10) if form != "two dimensions" else padded(8, 8)
    mask = keys[:, None, None]
    mask = mask.expand(2, 1, 10, 10) if form == "rows" else keys[:1].expand(10, 10) if form == "two dimensions" else mask
    if form in ("inf", "finite"):
        hidden = -math.inf if form == "inf" else -10_000.0
        mask = torch.zeros(mask.shape).masked_fill(~mask, hidden)
    found = understand(mask, SHAPES, JOINT)
    assert (found.segments, found.reason) == ((1,), "")
    real = with_padding(JOINT, found, readable_keys(mask, SHAPES)).segments[1].valid
    assert real is not None and real.tolist() == ([2, 2] if form == "two dimensions" else [2, 4])


def test_masks_that_are_more_than_padding() -> None:
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    heads = padded(8, 8)[:, None, None].repeat(1, 3, 1, 1)
    heads[:, 1] = True
    holes = padded(10, 10).clone()
    holes[:, 6] = False
    biased = torch.zeros(2, 1, 1, 10)
    biased[..., 3] = -1.0
    for mask, why in ((causal, "differs"), (heads, "differs"), (holes[:, None, None], "in front of"), (biased, "adds numbers")):
        assert why in understand(mask, SHAPES, JOINT).reason
    assert understand(torch.ones(10, 10, dtype=torch.bool), SHAPES, JOINT) == understand(torch.zeros(10), SHAPES, JOINT)
    assert not understand(torch.zeros(10), SHAPES, JOINT).segments
