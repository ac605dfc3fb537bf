"""The predictions agree with arithmetic done elsewhere, and decline where there is nothing to gain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hasten.errors import UsageError
from hasten.sparse_attn.measure.roofline import (
    MACHINES,
    SHAPES,
    Machine,
    Shape,
    at_resolution,
    density_for,
    predict,
)

TERA = 1e12
PETA = 1e15

WORK = {  # self-attention and linear layers of one evaluation, in 1e15 FLOP; share of attention; 50 steps of a video
    "hunyuan-720p": (10.45, 1.62, 0.866, 603),
    "wan-14b-720p": (4.68, 1.84, 0.718, 652),
    "wan-14b-480p": (0.88, 0.80, 0.524, 168),
    "wan-1.3b-720p": (1.05, 0.20, 0.843, 125),
    "wan-1.3b-480p": (0.20, 0.085, 0.699, 28),
}

GAINS = {  # kernel rate in 1e12 FLOP/s -> speed-up of the whole at densities 10, 20, 30 %
    "hunyuan-720p": {350: (2.24, 1.77, 1.46), 450: (2.38, 1.95, 1.65), 550: (2.47, 2.09, 1.80)},
    "wan-14b-720p": {350: (1.75, 1.51, 1.33), 450: (1.82, 1.61, 1.44), 550: (1.86, 1.68, 1.53)},
    "wan-14b-480p": {350: (1.41, 1.30, 1.20), 450: (1.44, 1.34, 1.26), 550: (1.46, 1.38, 1.30)},
    "wan-1.3b-720p": {350: (2.14, 1.72, 1.44), 450: (2.26, 1.88, 1.61), 550: (2.35, 2.01, 1.75)},
    "wan-1.3b-480p": {350: (1.71, 1.48, 1.31), 450: (1.77, 1.58, 1.42), 550: (1.81, 1.64, 1.50)},
}
CEILINGS = {"hunyuan-720p": 5.4, "wan-14b-720p": 2.7, "wan-14b-480p": 1.8, "wan-1.3b-720p": 4.6, "wan-1.3b-480p": 2.6}
H100 = Machine("H100", 600 * TERA, 450 * TERA, 550 * TERA, 3.3e12, overhead=0.0)


@pytest.mark.parametrize("name", WORK)
def test_work_of_published_shapes(name: str) -> None:
    shape = SHAPES[name]
    attention, linear, share, video = WORK[name]
    assert shape.attention_flop / PETA == pytest.approx(attention, rel=0.02)
    assert shape.linear_flop / PETA == pytest.approx(linear, rel=0.03)
    assert shape.attention_share == pytest.approx(share, abs=0.01)
    total = 50 * shape.evaluations * (shape.attention_flop + shape.linear_flop) / PETA
    assert total == pytest.approx(video, rel=0.03)


@pytest.mark.parametrize("name", GAINS)
def test_gains_of_published_shapes(name: str) -> None:
    for rate, gains in GAINS[name].items():
        machine = replace(H100, sparse=rate * TERA)
        found = [predict(SHAPES[name], d, machine, dense_share=0.15) for d in (0.1, 0.2, 0.3)]
        assert [p.speedup for p in found] == pytest.approx(list(gains), rel=0.01)
        assert [p.ceiling for p in found] == pytest.approx([CEILINGS[name]] * 3, rel=0.03)


def test_the_kernel_alone() -> None:
    found = [predict(SHAPES["hunyuan-720p"], d, H100).kernel for d in (0.1, 0.2, 0.3)]
    assert found == pytest.approx([6.1, 3.4, 2.3], rel=0.02)


def test_short_sequences_are_declined_and_long_ones_are_not() -> None:
    long = SHAPES["hunyuan-720p"]
    short = predict(at_resolution(long, 2048), 0.2, "H100")
    assert not short.worthwhile and short.speedup < 1.1
    assert "2,048 tokens" in short.why and "as long as a dense one" in short.why
    middle = predict(at_resolution(long, 4096), 0.2, replace(H100, overhead=1e-4))
    assert not middle.worthwhile and middle.kernel > 1
    assert "% of the time" in middle.why and "less than 1.10x" in middle.why
    assert predict(long, 0.2, "H100").worthwhile
    assert not predict(long, 1.0, "H100").worthwhile, "everything read by a slower kernel"


def test_more_costs_more() -> None:
    shape = SHAPES["wan-14b-720p"]
    base = predict(shape, 0.2, "H200").speedup
    assert predict(shape, 0.3, "H200").speedup < base
    assert predict(shape, 0.2, "H200", planning=0.1).speedup < base
    assert predict(shape, 0.2, "H200", waste=1.5).speedup < base
    assert predict(shape, 0.2, "H200", dense_share=0.2).speedup < base
    assert predict(shape, 0.2, replace(MACHINES["H200"], overhead=0.1)).speedup < base
    assert predict(shape, 0.2, "H200").ceiling == pytest.approx(predict(shape, 0.3, "H200").ceiling)


def test_attention_alone_has_no_ceiling() -> None:
    call = Shape("one call", 32_768, 1, 24, 128)
    found = predict(call, 0.2, H100)
    assert found.speedup == pytest.approx(found.kernel) and found.ceiling == float("inf")


def test_moving_bytes_bounds_what_can_be_gained() -> None:
    call = Shape("one call", 4096, 1, 8, 128)
    slow = replace(H100, bandwidth=1e9)
    assert predict(call, 0.05, slow, planning=0.0).kernel == pytest.approx(1.0), "both wait for memory"


def test_density_for_is_the_inverse() -> None:
    shape = SHAPES["hunyuan-720p"]
    density = density_for(shape, 2.0, "H100")
    assert density is not None
    assert predict(shape, density, "H100").speedup == pytest.approx(2.0, rel=0.02)
    assert density_for(shape, 50.0, "H100") is None


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match="above 0 and up to 1; got 0"):
        predict(SHAPES["hunyuan-720p"], 0.0, "H100")
    with pytest.raises(UsageError, match="no rates for 'H10'.*H100"):
        predict(SHAPES["hunyuan-720p"], 0.1, "H10")
    assert predict(SHAPES["hunyuan-720p"], 0.1, "NVIDIA H200 NVL").why.count("H200") == 1
