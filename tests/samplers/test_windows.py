"""Windows cover a clip, and what they say of a frame adds up."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.part import parse
from hasten.recipe import Sampler
from hasten.samplers.windows import Blend, Windows, shares, starts, weights

PARTS = st.integers(1, 12).flatmap(
    lambda n: st.builds(
        Windows,
        frames=st.just(n),
        overlap=st.integers(0, n - 1),
        blend=st.sampled_from(["linear", "flat", "cosine"]),
        moving=st.booleans(),
    )
)


@given(part=PARTS, length=st.integers(1, 70), step=st.integers(0, 5))
def test_windows_cover_the_clip_evenly_and_overlap(part: Windows, length: int, step: int) -> None:
    begins = starts(part, length, step)
    assert begins[0] == 0 and list(begins) == sorted(set(begins))
    if length <= part.frames:
        assert begins == (0,)
        return
    assert begins[-1] == length - part.frames
    assert all(b - a <= part.distance for a, b in pairwise(begins)), "neighbours share what was asked for, or more"
    if not part.moving:
        assert len(begins) == -(-(length - part.frames) // part.distance) + 1, "no window more than needed"


@given(part=PARTS, length=st.integers(1, 70), step=st.integers(0, 5))
def test_shares_of_a_frame_add_up_to_one(part: Windows, length: int, step: int) -> None:
    begins = starts(part, length, step)
    if length < part.frames:
        return  # one window, and nothing is blended
    total = [0.0] * length
    for begin, own in zip(begins, shares(part, length, begins), strict=True):
        assert all(0 < share <= 1 for share in own)
        for i, share in enumerate(own):
            total[begin + i] += share
    assert total == pytest.approx([1.0] * length)


@pytest.mark.parametrize("blend", ["linear", "cosine"])
def test_of_two_windows_one_fades_out_as_the_other_fades_in(blend: Blend) -> None:
    part = Windows(frames=6, overlap=3, blend=blend)
    one, other = shares(part, 9, starts(part, 9))
    assert one[:3] == (1.0,) * 3 and other[3:] == (1.0,) * 3
    assert one[3] > one[4] > one[5] > 0 and one[4] == pytest.approx(0.5)
    assert one[3:] == pytest.approx(other[2::-1])
    assert weights(Windows(frames=6, overlap=3, blend="flat")) == (1.0,) * 6


def test_moving_windows_have_their_seams_elsewhere() -> None:
    part = Windows(frames=5, overlap=1, moving=True)
    even, odd = starts(part, 13, 0), starts(part, 13, 1)
    assert even == (0, 4, 8) and odd == (0, 2, 6, 8)
    assert starts(part, 13, 2) == even


def test_it_says_what_it_needs() -> None:
    assert parse(Sampler, {"kind": "windows", "frames": 7, "overlap": 3}, "test") == Windows(frames=7, overlap=3)
    with pytest.raises(ValueError, match=r"less than sampler.frames \(5\), got 5"):
        Windows(frames=5, overlap=5)
