"""Static scorers against their rules, asked for every pair of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from hasten.errors import RecipeError, UsageError
from hasten.sparse_attn.blocks import Blocks
from hasten.sparse_attn.layouts.layout import Identity, Layout
from hasten.sparse_attn.layouts.swap import Swap
from hasten.sparse_attn.layouts.tiles import Tiles
from hasten.sparse_attn.mask import causal
from hasten.sparse_attn.scorers.bands import AShape, Bands, BlockDiagonal, Radial
from hasten.sparse_attn.scorers.scorer import Scorer, View
from hasten.sparse_attn.scorers.window import Around, CrissCross, Neighbourhood, SlidingTile, windows
from hasten.sparse_attn.segments import Tokens, plain, text, video

Place = tuple[int, int, int]


def view_of(tokens: Tokens, layout: Layout) -> View:
    x = torch.zeros(1, 1, tokens.length, 2)
    blocks = layout.start().blocks(x, x, tokens, tokens)
    return View(x, x, blocks, tokens, tokens, 1.0)


def reads(part: Scorer, tokens: Tokens, layout: Layout) -> tuple[Tensor, Blocks]:
    view = view_of(tokens, layout)
    return part.start().scores(view)[0] == 0, view.blocks


def touched(rule: Callable[[Place, Place], bool], grid: Place, blocks: Blocks) -> Tensor:
    """Pairs of blocks of which any pair of tokens obeys the rule."""
    spots = [(t, h, w) for t in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])]
    order = torch.arange(len(spots)) if blocks.q.perm is None else blocks.q.perm[0]
    label = blocks.q.labels()[0].tolist()
    found = torch.zeros(blocks.q.count, blocks.k.count, dtype=torch.bool)
    for i, a in enumerate(order.tolist()):
        for j, b in enumerate(order.tolist()):
            if rule(spots[a], spots[b]):
                found[label[i], label[j]] = True
    return found


# --- neighbourhoods ---------------------------------------------------------------------------------


def natten(q: int, k: int, length: int, window: int, stride: int, dilation: int, *, is_causal: bool) -> bool:
    """Is k in q's window? Written from NATTEN's definition: windows live in residue classes, and share a leader."""
    if q % dilation != k % dilation:
        return False
    members = len(range(q % dilation, length, dilation))
    own, other, window = q // dilation, k // dilation, min(window, members)
    group = own // stride
    if is_causal:
        leader = min(group * stride + stride - 1, members - 1)
        return other <= own and leader - other < window
    leader = min(group * stride + stride // 2, members - 1)
    left, right = window // 2, window - window // 2 - 1
    centre = min(max(leader, left), members - 1 - right)
    return centre - left <= other <= centre + right


@given(
    st.integers(1, 30), st.integers(1, 12), st.integers(1, 6), st.integers(1, 4), st.booleans()
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_windows_are_nattens(length: int, window: int, stride: int, dilation: int, is_causal: bool) -> None:
    stride = min(stride, window)
    first, last = windows(length, window, stride, dilation, causal=is_causal)
    for q in range(length):
        expected = [k for k in range(length) if natten(q, k, length, window, stride, dilation, is_causal=is_causal)]
        assert list(range(int(first[q]), int(last[q]) + 1, dilation)) == expected
        assert is_causal or len(expected) == min(window, len(range(q % dilation, length, dilation)))


@given(st.integers(1, 40), st.integers(1, 15), st.integers(1, 5), st.booleans(), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_a_pair_of_blocks_is_read_where_any_of_its_tokens_are_neighbours(
    length: int, window: int, stride: int, is_causal: bool, block: int
) -> None:
    stride = min(stride, window)
    part = Neighbourhood(window=(window,), stride=(stride,), causal=(is_causal,))
    found, blocks = reads(part, plain(length), Identity(block=block))

    def rule(a: Place, b: Place) -> bool:
        return natten(a[2], b[2], length, window, stride, 1, is_causal=is_causal)

    assert torch.equal(found, touched(rule, (1, 1, length), blocks))


@pytest.mark.parametrize(
    ("window", "stride", "is_causal"),
    [
        ((3, 3, 3), (1, 1, 1), (False, False, False)), ((2, 4, 3), (2, 2, 1), (True, False, False)),
        ((3, 3), (1, 2), (False, False)), ((9, 9, 9), (1, 1, 1), (False, False, False)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tile", [(1, 1, 1), (2, 2, 3)])
def test_on_a_grid_too(
    window: tuple[int, ...], stride: tuple[int, ...], is_causal: tuple[bool, ...], tile: Place
) -> None:
    grid = (3, 5, 6)
    part = Neighbourhood(window=window, stride=stride, causal=is_causal)
    found, blocks = reads(part, Tokens((video(*grid),)), Tiles(tile=tile))
    skip = 3 - len(window)

    def rule(a: Place, b: Place) -> bool:
        axes = zip(a[skip:], b[skip:], grid[skip:], window, stride, is_causal, strict=True)
        return all(natten(q, k, n, w, s, 1, is_causal=c) for q, k, n, w, s, c in axes)

    assert torch.equal(found, touched(rule, grid, blocks))


@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.integers(2, 5), st.booleans(), st.integers(1, 6)
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_dilated_neighbours_are_all_read(
    length: int, window: int, stride: int, dilation: int, is_causal: bool, block: int
) -> None:
    stride = min(stride, window)
    part = Neighbourhood(window=(window,), stride=(stride,), dilation=(dilation,), causal=(is_causal,))
    found, blocks = reads(part, plain(length), Identity(block=block))

    def rule(a: Place, b: Place) -> bool:
        return natten(a[2], b[2], length, window, stride, dilation, is_causal=is_causal)

    assert not (touched(rule, (1, 1, length), blocks) & ~found).any()


def test_dilated_neighbours_of_other_residues_are_not_read() -> None:
    found, blocks = reads(Neighbourhood(window=(5,), dilation=(3,)), plain(31), Identity(block=1))
    needed = touched(lambda a, b: natten(a[2], b[2], 31, 5, 1, 3, is_causal=False), (1, 1, 31), blocks)
    assert not found[0, 1] and found[0, 3]
    assert found.sum() <= 1.1 * needed.sum()


def test_tiles_that_divide_the_window_make_it_exact() -> None:
    """With stride and window in whole tiles every query of a tile reads exactly the tiles of its window."""
    part = Neighbourhood(window=(6, 6, 6), stride=(2, 2, 2))
    found, blocks = reads(part, Tokens((video(8, 8, 8),)), Tiles(tile=(2, 2, 2)))
    assert (found.sum(1) * 8 == 6**3).all()
    assert blocks.q.count == 64


@pytest.mark.parametrize(
    "arguments",
    [{"window": (0,)}, {"window": (3, 3), "stride": (1,)}, {"window": (3,), "stride": (4,)}, {"window": (1, 2, 3, 4)}],
)
def test_windows_that_make_no_sense_are_refused(arguments: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises((ValidationError, RecipeError)):
        Neighbourhood(**arguments)


# --- tiles and groups -------------------------------------------------------------------------------


def test_sliding_tiles_read_whole_windows_of_tiles_everywhere() -> None:
    grid, tile = (2, 8, 12), (2, 2, 3)
    found, blocks = reads(SlidingTile(tile=tile, window=(1, 3, 3)), Tokens((video(*grid),)), Tiles(tile=tile))
    assert (found.sum(1) == 9).all()

    def rule(a: Place, b: Place) -> bool:
        axes = zip(a, b, grid, tile, (1, 3, 3), strict=True)
        return all(natten(q // s, k // s, n // s, w, 1, 1, is_causal=False) for q, k, n, s, w in axes)

    assert torch.equal(found, touched(rule, grid, blocks))


def test_sliding_tiles_on_a_grid_that_they_do_not_divide() -> None:
    found, blocks = reads(SlidingTile(tile=(2, 4, 4), window=(1, 3, 1)), Tokens((video(3, 9, 7),)), Tiles(tile=(2, 4, 4)))
    assert blocks.q.count == 12
    assert (found.sum(1) == 3).all()


@pytest.mark.parametrize("tile", [(1, 2, 2), (3, 1, 5)])
def test_groups_around_and_in_line(tile: Place) -> None:
    grid, group = (3, 6, 5), (1, 2, 2)
    tokens, layout = Tokens((video(*grid),)), Tiles(tile=tile)
    around, blocks = reads(Around(group=group, radius=(1, 0, 1)), tokens, layout)
    cross, _ = reads(CrissCross(group=group), tokens, layout)

    def near(a: Place, b: Place) -> bool:
        return all(abs(q // s - k // s) <= r for q, k, s, r in zip(a, b, group, (1, 0, 1), strict=True))

    def in_line(a: Place, b: Place) -> bool:
        return any(q // s == k // s for q, k, s in zip(a, b, group, strict=True))

    assert torch.equal(around, touched(near, grid, blocks))
    assert torch.equal(cross, touched(in_line, grid, blocks))


def test_a_cross_on_an_image_is_a_cross() -> None:
    found, _ = reads(CrissCross(group=(1, 1, 1)), Tokens((video(1, 4, 5),)), Tiles(tile=(1, 1, 1)))
    assert (found.sum(1) == 4 + 5 - 1).all()


# --- bands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("along", "layout"), [("space", Identity(block=7)), ("time", Swap(block=4))])
def test_bands_hold_their_share(along: str, layout: Layout) -> None:
    grid = (4, 5, 6)
    part = Bands.model_validate({"along": along, "share": 0.3, "sink": False})
    found, blocks = reads(part, Tokens((video(*grid),)), layout)
    reach = round(120 * (1 - math.sqrt(0.7)))

    def at(a: Place) -> int:
        cell = a[1] * 6 + a[2]
        return a[0] * 30 + cell if along == "space" else cell * 4 + a[0]

    expected = touched(lambda a, b: abs(at(a) - at(b)) <= reach, grid, blocks)
    assert torch.equal(found, expected)
    with_sink, _ = reads(part.model_copy(update={"sink": True}), Tokens((video(*grid),)), layout)
    assert torch.equal(with_sink, expected | touched(lambda a, b: b[0] == 0, grid, blocks))


def test_a_band_of_single_tokens_has_the_density_it_is_named_for() -> None:
    found, _ = reads(Bands(share=0.3, sink=False), Tokens((video(1, 1, 400),)), Identity(block=1))
    assert float(found.float().mean()) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("layout", [Identity(block=6), Identity(block=1), Tiles(tile=(1, 1, 6)), Tiles(tile=(2, 1, 6))])
def test_radial_bands_narrow_with_the_distance_of_frames(layout: Layout) -> None:
    grid, part = (9, 2, 6), Radial(decay=0.5, least=4, sink=False)
    found, blocks = reads(part, Tokens((video(*grid),)), layout)

    def rule(a: Place, b: Place) -> bool:
        return abs((a[1] - b[1]) * 6 + a[2] - b[2]) < part.reach(abs(a[0] - b[0]), 12)

    assert torch.equal(found, touched(rule, grid, blocks))
    with_sink, _ = reads(Radial(decay=0.5, least=4), Tokens((video(*grid),)), layout)
    assert torch.equal(with_sink, touched(lambda a, b: rule(a, b) or b[0] == 0, grid, blocks))


def test_radial_reach_is_the_papers() -> None:
    part = Radial(decay=0.2, least=128)
    assert part.reach(0, 3600) == part.reach(1, 3600) == 3600
    assert part.reach(2, 3600) == part.reach(3, 3600) == math.ceil(4096 / 4 * 0.2)
    assert part.reach(4, 3600) == 128, "never below a block"
    assert part.reach(32, 3600) == 128 and part.reach(33, 3600) == 0, "then every other distance only"


def test_radial_reads_a_smaller_share_of_longer_videos() -> None:
    densities = [
        float(reads(Radial(decay=0.5, least=8), Tokens((video(frames, 4, 16),)), Identity(block=8))[0].float().mean())
        for frames in (16, 64)
    ]
    assert densities[1] < 0.55 * densities[0]


def test_a_shape_is_a_sink_and_a_window() -> None:
    found, blocks = reads(AShape(sink=5, window=9), plain(50), Identity(block=4))
    expected = touched(lambda a, b: b[2] < 5 or abs(a[2] - b[2]) < 9, (1, 1, 50), blocks)
    assert torch.equal(found, expected)


def test_a_shape_counts_a_cache_of_keys() -> None:
    q, k = torch.zeros(1, 1, 8, 2), torch.zeros(1, 1, 64, 2)
    blocks = Identity(block=8).start().blocks(q, k, plain(8), plain(64))
    view = View(q, k, blocks, plain(8), plain(64), 1.0, causal(8, 64))
    found = AShape(sink=8, window=9).start().scores(view)[0, 0] == 0
    assert found.tolist() == [True, False, False, False, False, False, True, True]


def test_the_diagonal_is_the_diagonal_of_selectable_blocks() -> None:
    tokens = Tokens((text(64), video(2, 4, 8)))
    found, _ = reads(BlockDiagonal(), tokens, Identity(block=16))
    own = torch.eye(4, dtype=torch.bool)
    assert torch.equal(found[1:, 1:], own)
    wider, _ = reads(BlockDiagonal(reach=1), tokens, Identity(block=16))
    assert torch.equal(wider[1:, 1:], torch.ones(4, 4).triu(-1).tril(1).bool())


def test_other_numbers_of_blocks_are_matched_by_share() -> None:
    q, k = torch.zeros(1, 1, 64, 2), torch.zeros(1, 1, 32, 2)
    blocks = Identity(block=8).start().blocks(q, k, plain(64), plain(32))
    found = BlockDiagonal().start().scores(View(q, k, blocks, plain(64), plain(32), 1.0))[0] == 0
    assert torch.equal(found, torch.eye(4, dtype=torch.bool).repeat_interleave(2, 0))


# --- segments ---------------------------------------------------------------------------------------


def test_rules_hold_within_a_segment_and_others_are_read() -> None:
    tokens = Tokens((video(1, 4, 4, "left"), text(9), video(1, 4, 4, "right")))
    found, _ = reads(AShape(sink=0, window=1), tokens, Identity(block=4))
    assert torch.equal(found[:4, :4], torch.eye(4, dtype=torch.bool))
    assert found[:4, 5:].all() and found[5:, :4].all()


@pytest.mark.parametrize("part", [Radial(), Bands(), CrissCross(), Around(), SlidingTile(), Neighbourhood(window=(3, 3))])
def test_tokens_without_a_grid_are_refused(part: Scorer) -> None:
    with pytest.raises(UsageError, match="frames, height and width"):
        reads(part, plain(64), Identity(block=16))


def test_scores_are_kept_as_long_as_the_blocks_are_the_same() -> None:
    state, view = Radial().start(), view_of(Tokens((video(3, 4, 4),)), Identity(block=8))
    assert state.scores(view) is state.scores(view)
    assert state.scores(view_of(Tokens((video(3, 4, 4),)), Identity(block=16))).shape == (1, 3, 3)
