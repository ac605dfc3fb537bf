"""The report counts exactly what the trace says, warns loudly, and its page is safe and self-contained."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hasten.bands import bands_of
from hasten.caching.stack import StackReuse
from hasten.errors import OutputError, UsageError
from hasten.recipe import Recipe
from hasten.report import Report
from hasten.report_forms import readable_bytes
from hasten.samplers.guidance import GuidanceInterval
from hasten.trace import Action, Event, Run, Trace

NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def trace_of(
    actions: list[list[tuple[Action, tuple[int, int] | None]]],
    structure: dict[str, int],
    site: str = "transformer",
    run: int = 0,
    **fields: Any,
) -> Trace:
    """A finished one-branch run; actions[step] lists (action, blocks)."""
    times = [1 - step / len(actions) for step in range(len(actions))]
    trace = Trace(runs=[Run(run, len(actions), times, 1.5, True)], structure=structure)
    for step, decisions in enumerate(actions):
        for action, blocks in decisions:
            trace.add(Event(run, step, 0, site, action, blocks, **fields))
    return trace


def big_trace(steps: int = 50, blocks: int = 40, *, worst: bool = False) -> Trace:
    """Two branches; the second is sometimes answered by guidance. `worst`: every block decides for itself."""
    trace = Trace(structure={"transformer.blocks": blocks})
    for run in range(2):
        trace.runs.append(Run(run, steps, [1 - i / steps for i in range(steps)], 4.2 - run, True))
        for step in range(steps):
            for branch in range(2):
                signal = 0.02 + 0.1 * abs(math.sin(step / 3)) * (1 + branch)
                hit = 4 < step < steps - 2 and signal < 0.08
                if branch and step > 0.7 * steps:
                    trace.add(Event(run, step, branch, "transformer", "skip", why="guidance"))
                elif worst:
                    for block in range(blocks):
                        kind: Action = ("compute", "reuse", "forecast")[(block + step) % 3]
                        span = (block, block + 1)
                        trace.add(
                            Event(run, step, branch, "transformer.blocks", kind, span, signal, 0.08, 0.01)
                        )
                elif hit:
                    kind = "forecast" if step % 4 == 0 else "reuse"
                    trace.add(
                        Event(run, step, branch, "transformer.blocks", kind, (1, blocks), signal, 0.08, 0.001)
                    )
                else:
                    trace.add(
                        Event(
                            run,
                            step,
                            branch,
                            "transformer.blocks",
                            "compute",
                            (0, blocks),
                            signal,
                            0.08,
                            0.04,
                        )
                    )
    trace.hold(12_345_678)
    return trace


def test_whole_network_events_count_all_blocks() -> None:
    trace = trace_of(
        [[("compute", None)], [("reuse", None)], [("compute", None)], [("skip", None)]],
        {"transformer.blocks": 4},
    )
    report = Report(trace)
    assert report.totals == {"compute": 8, "reuse": 4, "forecast": 0, "skip": 4}
    assert report.computed_fraction == 0.5
    assert (report.nfe, report.evaluations) == (2.0, 4)


def test_ranges_count_their_blocks_and_uncovered_blocks_were_computed() -> None:
    actions: list[Any] = [
        [("compute", (0, 4))],
        [("reuse", (1, 4))],
        [("compute", (0, 1)), ("forecast", (1, 4))],
    ]
    report = Report(trace_of(actions, {"transformer.blocks": 4}, site="transformer.blocks"))
    assert report.totals == {"compute": 6, "reuse": 3, "forecast": 3, "skip": 0}
    assert report.nfe == pytest.approx(1.5)
    assert report.rows[1] == {
        "run": 0, "step": 1, "branch": 0, "site": "transformer.blocks",
        "compute": 1, "reuse": 3, "forecast": 0, "skip": 0,
    }  # fmt: skip


def test_a_decision_about_blocks_is_finer_than_one_about_the_network() -> None:
    trace = trace_of([[("compute", None)]], {"transformer.blocks": 4})
    trace.events.insert(0, Event(0, 0, 0, "transformer.blocks", "reuse", (1, 4)))
    assert [(b.start, b.stop, b.action) for b in bands_of(trace, 0)] == [(0, 1, "compute"), (1, 4, "reuse")]
    assert Report(trace).nfe == 0.25


def test_two_stacks_and_two_networks() -> None:
    """A stack without an event of its own was computed; each network counts only where it was called."""
    structure = {"transformer.double": 2, "transformer.single": 6, "transformer_2": 1}
    trace = trace_of([[("reuse", (0, 2))]], structure, site="transformer.double")
    trace.add(Event(0, 1, 0, "transformer_2", "compute"))
    report = Report(trace)
    assert report.totals == {"compute": 7, "reuse": 2, "forecast": 0, "skip": 0}
    assert report.nfe == pytest.approx(6 / 8 + 1)


def test_half_a_batch_counts_half() -> None:
    """Guidance on a pipeline that evaluates both branches in one batch; the lead block has no event of its own."""
    actions: list[Any] = [[("compute", (0, 4))], [("reuse", (1, 4))]]
    report = Report(trace_of(actions, {"transformer.blocks": 4}, site="transformer.blocks", share=0.5))
    assert report.totals == {"compute": 2.5, "reuse": 1.5, "forecast": 0, "skip": 4}
    assert report.nfe == pytest.approx(2.5 / 4) and report.evaluations == 2
    assert "for 50% of the batch, the rest skipped" in report.to_html()
    assert "compute 2.5, reuse 1.5, forecast 0, skip 4" in str(report)


def test_unknown_structure_is_sized_from_the_events() -> None:
    report = Report(trace_of([[("compute", (0, 5))], [("reuse", (2, 5))]], {}, site="net.blocks"))
    assert report.totals["compute"] == 7 and report.totals["reuse"] == 3
    assert Report(trace_of([[("compute", None)], [("reuse", None)]], {}, site="net")).computed_fraction == 0.5


def test_last_run_is_the_default_and_all_can_be_chosen() -> None:
    report = Report(big_trace())
    assert [run.index for run in report.runs] == [1] and report.seconds == {1: 3.2}
    assert report.of("all").seconds == {0: 4.2, 1: 3.2}
    assert report.of("all").evaluations == 2 * report.of(0).evaluations == 200
    assert {event["run"] for event in report.of(0).to_dict()["events"]} == {0}
    with pytest.raises(UsageError, match=r"no run 7; the runs are \[0, 1\]"):
        report.of(7)


def warning_of(trace: Trace, recipe: Recipe | None) -> str:
    return "\n".join(Report(trace, recipe).warnings)


def test_a_recipe_that_skipped_nothing_says_so_loudly() -> None:
    recipe = Recipe(name="inert", reuse=StackReuse())
    trace = trace_of([[("compute", None)]] * 3, {"transformer.blocks": 4}, signal=0.31, threshold=0.08)
    found = warning_of(trace, recipe)
    assert "This recipe skipped nothing: all 12 blocks" in found
    assert "signal of 0.31 against a limit of 0.08" in found
    guarded = trace_of([[("compute", None)]] * 3, {"transformer": 1}, signal=0.01, threshold=0.08)
    assert "3 signals were below their limit" in warning_of(guarded, recipe)
    assert str(Report(trace, recipe)).splitlines()[1].startswith("  !! WARNING: This recipe skipped nothing")
    assert "This recipe skipped nothing" in Report(trace, recipe).to_html()
    assert "Check that it fits" in warning_of(trace_of([[("compute", None)]], {}), recipe)
    assert warning_of(trace, None) == warning_of(trace, Recipe(name="plain")) == ""


def test_one_idle_part_of_two_is_named() -> None:
    recipe = Recipe(name="both", reuse=StackReuse(), guidance=GuidanceInterval())
    trace = trace_of([[("compute", None)], [("reuse", None)]], {"transformer.blocks": 4})
    assert "The recipe's guidance part skipped nothing" in warning_of(trace, recipe)


def test_other_warnings() -> None:
    assert "never called" in warning_of(Trace(), None)
    everything = trace_of([[("reuse", None)]], {"transformer": 1})
    assert "Nothing was computed" in warning_of(everything, None)
    stopped = trace_of([[("compute", None)]], {"transformer": 1})
    stopped.runs[0].finished, stopped.runs[0].steps = False, 9
    stopped.note("The device is slow.")
    assert Report(stopped).warnings == [
        "The device is slow.", "Run 0 has not finished (1 of 9 steps); the numbers cover that part."
    ]  # fmt: skip


def test_text_timeline() -> None:
    actions: list[Any] = [
        [("compute", None)],
        [("reuse", (1, 4))],
        [("forecast", (1, 4))],
        [("skip", None)],
        [("reuse", (2, 4))],
    ]
    trace = Trace(runs=[Run(0, 5, [], 1.0, True)], structure={"transformer.blocks": 4})
    for step, ((action, blocks),) in enumerate(actions):
        trace.add(Event(0, step, 0, "transformer.blocks" if blocks else "transformer", action, blocks))
    text = str(Report(trace, Recipe(name="mixed"), hardware={"device": "cpu"}, versions={"hasten": "0"}))
    assert "run 0 branch 0 transformer.blocks  #=~.=" in text
    assert "computed    40.0% of the block work, 2 of 5 evaluations" in text
    assert "mixed" in text and "device cpu" in text and text.isascii()
    wide = str(Report(trace_of([[("compute", None)]] * 230, {"transformer": 1})))
    assert "from step 200" in wide and max(map(len, wide.splitlines())) < 140


def test_json_is_strict(tmp_path: Path) -> None:
    trace = trace_of([[("compute", None)]], {"transformer": 1}, signal=math.nan, threshold=math.inf)
    extras = {"prompt": NASTY, "psnr": math.inf, "path": Path("x"), "nested": {"a": (1, math.nan)}}
    path = Report(trace, Recipe(name="x", reuse=StackReuse()), extras=extras).save(tmp_path / "r.json")
    data = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert data["events"][0]["signal"] is None and data["extras"]["nested"] == {"a": [1, None]}
    assert data["recipe"]["name"] == "x" and data["nfe"] == 1.0 and data["versions"]["hasten"]
    tool = [sys.executable, "-m", "json.tool", str(path)]
    assert subprocess.run(tool, capture_output=True, check=False).returncode == 0


class Page(HTMLParser):
    """Collects tags, and checks that they close in order."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_escapes_every_text(tmp_path: Path) -> None:
    trace = trace_of(
        [[("compute", None)], [("reuse", None)]], {NASTY: 1}, site=NASTY, why=NASTY, signal=1.0, threshold=2.0
    )
    trace.note(NASTY)
    (tmp_path / "a.png").write_bytes(b"x")
    media = [
        {"label": NASTY, "path": tmp_path / "a.png"},
        {"label": NASTY, "path": tmp_path / (NASTY.replace("/", "") + ".png")},
    ]
    extras = {"media": media, "metrics": {NASTY: NASTY}, NASTY: NASTY, "prompt": NASTY}
    page = Report(
        trace,
        Recipe(name=NASTY, paper=NASTY),
        hardware={NASTY: NASTY},
        versions={NASTY: NASTY},
        extras=extras,
    ).to_html()
    tags = Page(page).tags
    assert [tag for tag, _ in tags].count("script") == 1 and page.count("alert(1)") > 10
    assert all("onerror" not in attrs for _, attrs in tags)
    assert [attrs["src"] for tag, attrs in tags if tag == "img"] == ["data:image/png;base64,eA=="]
    assert "is not shown: No such file" in page


def test_page_asks_for_nothing_outside() -> None:
    page = Report(big_trace(), Recipe(name="a", reuse=StackReuse())).to_html()
    assert not re.findall(r"(?:https?:)?//|@import|<link|url\((?!#)", page)
    for _, attrs in Page(page).tags:
        assert all(str(attrs[key]).startswith("data:") for key in ("src", "href") if key in attrs)
    assert (
        "default-src &#x27;none&#x27;" in page
        and "prefers-color-scheme:dark" in page
        and "width=device-width" in page
    )


def test_page_embeds_media_and_metrics(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "c.gif", "d.webm"):
        (tmp_path / name).write_bytes(b"data")
    media = [{"label": name, "path": tmp_path / name} for name in ("a.mp4", "b.mp4", "c.gif", "d.webm")]
    metrics = [{"metric": "psnr", "median": 31.25, "worst": None}, {"metric": "ssim", "median": 0.98}]
    page = Report(big_trace(), extras={"media": media, "metrics": metrics}).to_html()
    assert page.count("<video") == 2 and "data:image/gif" in page and "Play or pause all" in page
    assert "d.webm is not shown: a page shows" in page
    assert "<td>31.25</td><td>-</td>" in page


@pytest.mark.parametrize("worst", [False, True])
def test_page_stays_small_and_quick(worst: bool) -> None:
    report = Report(big_trace(worst=worst), Recipe(name="a", reuse=StackReuse()))
    began = time.perf_counter()
    page = report.to_html()
    assert len(page.encode()) < 1_500_000
    assert time.perf_counter() - began < 5
    Page(page)


def test_plot_scales_hold_any_signal() -> None:
    """Equal, zero, negative, tiny-to-huge and non-finite signals all give a page with finite numbers."""
    for signals in ([0.0, 0.0], [1e-9, 1e9], [-1.0, 1.0], [math.nan, 0.5], [5.0, 5.0], [math.inf, math.nan]):
        trace = Trace(runs=[Run(0, 2, [], 1.0, True)], structure={"net": 1})
        for step, signal in enumerate(signals):
            trace.add(Event(0, step, 0, "net", "compute", None, signal, 0.1))
        page = Report(trace, versions={"a": "b"}).to_html()
        assert not re.search(r'(?:x|y|points|cx|cy)[12]?="[^"]*(?:nan|inf)', page)


def test_save_chooses_by_suffix(tmp_path: Path) -> None:
    report = Report(big_trace())
    for name in ("r.txt", "r.json", "r.HTML"):
        assert report.save(tmp_path / name).read_text(encoding="utf-8").endswith("\n")
    assert (tmp_path / "r.txt").read_text() == f"{report}\n"
    with pytest.raises(UsageError, match=r"'\.htm'; allowed: \.txt, \.json, \.html\. Did you mean '\.html'"):
        report.save(tmp_path / "r.htm")
    with pytest.raises(OutputError, match="does not exist"):
        report.save(tmp_path / "no" / "r.txt")


def test_bytes_held_are_the_most_there_ever_were() -> None:
    trace = big_trace(2, 2)
    for now in (300, 50_000_000, 40):
        trace.hold(now)
    assert Report(trace).bytes_held == 50_000_000 and "47.7 MiB" in str(Report(trace))


def test_a_report_without_any_run() -> None:
    report = Report(Trace())
    assert report.computed_fraction == 1.0 and report.nfe == 0.0 and "WARNING" in str(report)
    Page(report.to_html())
    json.loads(report.to_json())


def test_readable_bytes() -> None:
    sizes = {
        0: "0 B",
        1023: "1023 B",
        1024: "1.0 KiB",
        12_345_678: "11.8 MiB",
        3 * 2**30: "3.0 GiB",
        2**60: "1048576.0 TiB",
    }
    assert {num: readable_bytes(num) for num in sizes} == sizes
