"""Work is counted alike for plain and accelerated runs: evaluations, operations and bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from hasten.pipelines.bench.candidates import ours
from hasten.pipelines.bench.shots import shoot
from hasten.pipelines.work import watch
from tests.hosts import small_wan
from tests.pipelines.bench_calls import CALL, SAMPLES


def test_work_agrees_with_the_report() -> None:
    pipe = small_wan()
    with watch(pipe) as plain:
        shoot(pipe, SAMPLES[0], CALL)
    with watch(pipe, weigh_at=plain.calls) as same:
        shoot(pipe, SAMPLES[0], CALL)
    with watch(pipe, weigh_at=plain.calls) as half:
        shot = shoot(pipe, SAMPLES[0], CALL, ours("every-other", "every-other"))
    assert plain.calls == half.calls == 8 and same.flops == plain.flops > 0
    assert half.flops / plain.flops == shot.computed_fraction == 0.5
    assert half.growth is not None and same.growth is not None
    assert shot.latents is not None and shot.bytes_held
    beyond, latents = half.growth - same.growth, shot.latents.nbytes
    assert shot.bytes_held <= beyond <= shot.bytes_held + 2 * latents, (
        "beyond the plain run only the cache grows"
    )


def test_attention_on_the_cpu_is_counted() -> None:
    pipe = small_wan(layers=1)
    q = torch.randn(1, 2, 8, 12)

    def attend(*_: Any) -> None:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)

    with watch(pipe) as plain:
        shoot(pipe, SAMPLES[0], CALL)
    handle = pipe.transformer.blocks[0].register_forward_pre_hook(attend)
    with torch.no_grad(), watch(pipe) as more:
        shoot(pipe, SAMPLES[0], CALL)
    handle.remove()
    assert more.flops - plain.flops == 8 * 2 * (2 * 2 * 8 * 8 * 12), "two products in each of eight calls"


def test_a_call_that_breaks_off_stops_the_counting() -> None:
    pipe = small_wan(layers=1)
    with pytest.raises(ZeroDivisionError), watch(pipe):
        pipe.transformer.blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
        shoot(pipe, SAMPLES[0], CALL)
    assert _get_current_dispatch_mode_stack() == []
    assert not pipe.transformer._forward_pre_hooks
