"""The step x block timeline: signs beside colours, attention that was sparse, many cells at once."""

from __future__ import annotations

import re
import time

from hasten.bands import bands_of
from hasten.report_timeline import draw_timeline, swatch
from hasten.trace import Attended, Event, Run, Trace


def traced(steps: int, blocks: int) -> Trace:
    """Every other step reuses the second half of the blocks."""
    trace = Trace(runs=[Run(0, steps, [], 1.0, True)], structure={"net.blocks": blocks})
    for step in range(steps):
        half = blocks // 2
        trace.add(Event(0, step, 0, "net.blocks", "compute", (0, half), 0.5, 0.4))
        trace.add(Event(0, step, 0, "net.blocks", "reuse" if step % 2 else "compute", (half, blocks), 0.1, 0.4))
    return trace


def draw(trace: Trace, calls: list[Attended] | None = None) -> str:
    return draw_timeline(trace.runs[0], list(bands_of(trace, 0)), trace.runs[0].steps, calls or [])


def test_kinds_differ_in_more_than_colour() -> None:
    signs = {kind: re.findall(r'class="sign on-\w+" d="([^"]+)"', swatch(kind)) for kind in ("compute", "sparse", "reuse", "forecast", "skip")}
    assert signs["compute"] == [] and len({str(paths) for paths in signs.values()}) == 5


def test_titles_say_signal_against_limit() -> None:
    assert "step 1 of 2: blocks 3-4 reused; signal 0.1 against limit 0.4" in draw(traced(2, 4))


def test_only_computed_blocks_with_sparse_attention_are_drawn_apart() -> None:
    calls = [
        Attended(0, step, 0, f"net.blocks.{block}.attn1", block, "sparse" if block == 1 else "dense", 64, 0.25 if block == 1 else 1.0)
        for step in (0, 1)
        for block in (0, 1, 3)
    ]
    drawn = draw(traced(2, 4), calls)
    assert drawn.count('<rect class="sparse"') == 2
    assert "step 0 of 2: block 2 computed; attention sparse, 25.0% of the pairs" in drawn
    reused = [Attended(0, 1, 0, "net.blocks.3.attn1", 3, "sparse", 64, 0.25)]
    assert '<rect class="sparse"' not in draw(traced(2, 4), reused)


def test_fifty_steps_of_forty_blocks_are_quick() -> None:
    trace = Trace(runs=[Run(0, 50, [], 1.0, True)], structure={"net.blocks": 40})
    for step in range(50):
        for block in range(40):
            trace.add(Event(0, step, 0, "net.blocks", "reuse" if (step + block) % 2 else "forecast", (block, block + 1), 0.1, 0.4))
    began = time.perf_counter()
    drawn = draw(trace)
    assert drawn.count("<rect") == 2000 and drawn.count("<path") == 2
    assert time.perf_counter() - began < 2 and len(drawn) < 700_000
