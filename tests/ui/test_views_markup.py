"""Views as text: whatever a user wrote stays text, empty states say why, and no URL leaves this machine."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import pytest

from hasten.errors import UsageError
from hasten.ui.views import markup, page
from hasten.ui.views.canvas import canvas
from hasten.ui.views.decoding import decoding
from hasten.ui.views.density import density
from hasten.ui.views.front import front
from hasten.ui.views.gallery import gallery
from hasten.ui.views.loss import loss
from hasten.ui.views.metrics import metrics
from hasten.ui.views.player import player
from hasten.ui.views.progress import progress, queue
from hasten.ui.views.timeline import timeline

NASTY = "</b><img src=x onerror=alert(1)>\"'`${alert(1)}{{alert(1)}}"
PIXEL = "data:image/png;base64,iVBORw0KGgo="
RUN = {"index": 0, "steps": 2, "times": [1.0, 0.5], "seconds": 1.0, "finished": True}
EVENT = {"run": 0, "step": 0, "branch": 0, "site": NASTY, "action": "compute", "blocks": None, "seconds": 0.4, "why": NASTY}
CALL = {"run": 0, "step": 0, "branch": 0, "site": NASTY, "layer": 0, "action": "sparse", "tokens": 64, "density": 0.25}

VIEWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "player": (player, {"runs": [{"label": NASTY, "url": PIXEL}, {"label": "b", "url": PIXEL}], "kind": "image", "group": NASTY}),
    "metrics": (metrics, {"rows": [{"recipe": NASTY, "seconds": 1.0, "speedup": 2.0, "reads": NASTY, "skipped": "all but " + NASTY}],
                          "by_frame": {NASTY: [30.0, 31.0]}, "group": NASTY}),
    "timeline": (timeline, {"runs": [RUN], "events": [EVENT], "structure": {NASTY: 1}, "title": NASTY, "warnings": [NASTY],
                            "phases": [{"name": NASTY, "seconds": 1}], "download": NASTY}),
    "density": (density, {"runs": [RUN], "attention": [CALL]}),
    "front": (front, {"rows": [{"recipe": NASTY, "speedup": 2.0, "psnr_median": 30.0}], "budget": 30}),
    "canvas": (canvas, {"tokens": [{"text": NASTY, "step": 0}, {"text": NASTY, "step": None}, {"text": NASTY, "given": True}], "title": NASTY}),
    "decoding": (decoding, {
        "tokens": [{"text": NASTY, "given": True}, {"text": NASTY, "by": "", "round": 0, "lead": 0.5}, {"text": NASTY, "by": NASTY, "round": 1},
                   {"text": NASTY, "by": None, "round": None}],
        "rounds": [{"drafted": NASTY, "accepted": NASTY, "written": 1}], "drafters": {NASTY: [2, 1], "b": [1, 0]}, "title": NASTY,
        "exact": {"verdict": "differs", "headline": NASTY, "sentence": NASTY}, "row": {"recipe": NASTY, "seconds": 1.0}, "warnings": [NASTY]}),
    "progress": (progress, {"state": "running", "phase": NASTY, "message": NASTY}),
    "queue": (queue, {"jobs": [{"id": NASTY, "title": NASTY, "state": NASTY, "detail": NASTY}]}),
    "loss": (loss, {"rows": [{"step": 0, NASTY: 1.0}, {"step": 1, NASTY: 0.5}], "series": [NASTY], "samples": [{"step": 1, "url": PIXEL}]}),
    "gallery": (gallery, {"items": [{"id": NASTY, "title": NASTY, "recipe": NASTY, "thumb": PIXEL}]}),
}  # fmt: skip


VOID = {"input", "img", "br", "line", "rect", "circle", "path", "polyline"}
"""Tags that need no end."""


class Tags(HTMLParser):
    """All tags with their attributes, and that every tag is closed."""


    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", VIEWS)
def test_what_a_user_wrote_stays_text(name: str) -> None:
    make, about = VIEWS[name]
    html = make(about)
    tags = Tags(html).found
    assert "alert(1)" in html, "the text is shown at all"
    assert all(not key.startswith("on") for _, attrs in tags for key in attrs)
    assert [attrs.get("src") for tag, attrs in tags if tag == "img"] == html.count('src="data:') * [PIXEL]
    assert sum(tag == "b" for tag, _ in tags) == html.count("<b>") + html.count("<b ")
    assert not any(tag == "script" for tag, _ in tags)


@pytest.mark.parametrize("name", VIEWS)
def test_nothing_to_show_is_said(name: str) -> None:
    html = VIEWS[name][0]({})
    Tags(html)
    assert f'data-view="{name}"' in html
    assert any(words in html for words in ("hv-empty", "hv-note", "Nothing is running"))


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_has_a_name_for_screen_readers_and_controls_have_one(name: str) -> None:
    make, about = VIEWS[name]
    tags = Tags(make(about)).found
    assert tags[0][1]["aria-label"]
    for tag, attrs in tags:
        if tag == "input" and attrs.get("type") == "range":
            assert attrs["aria-label"]


@pytest.mark.parametrize(
    "url",
    ["https://example.org/a.png", "//example.org/a.png", "javascript:alert(1)", "data:text/html,x", "http://127.0.0.1.example.org/", "", None, 7,
     "data:image/svg+xml,<svg/>", "/\\example.org", "/\t/example.org"],
)  # fmt: skip
def test_sources_of_other_hosts_are_refused(url: Any) -> None:
    with pytest.raises(UsageError, match="files of this server"):
        markup.source(url)


def test_sources_of_this_server_are_not() -> None:
    for url in ("/gradio_api/file=/a.png", "http://127.0.0.1:7860/a.mp4", "http://localhost/a", PIXEL, "blob:x"):
        assert markup.source(url) == url


def test_numbers_in_words() -> None:
    assert [markup.seconds(v) for v in (None, 0.123456, 9.999, 48.13, 725, 3 * 3600 + 59.6)] == [
        "–", "0.123 s", "10.0 s", "48.1 s", "12 min 05 s", "3 h 01 min",
    ]  # fmt: skip
    assert markup.decibel(None, identical=True) == "identical" and markup.decibel(31.25) == "31.2 dB"
    assert markup.share(0.244) == "24.4 %"
    assert markup.number({"a": float("nan"), "b": True, "c": "3", "d": 2}, "a") is None
    assert [markup.number({"b": True, "c": "3", "d": 2}, key) for key in "bcd"] == [None, None, 2.0]


def test_a_page_of_views_stands_alone() -> None:
    html = page.alone("All", "views", [make(about) for make, about in VIEWS.values()], [NASTY])
    assert "default-src &#x27;none&#x27;" in html and html.count("<script>") == 1
    body = html.partition("</head>")[2]
    assert "http://" not in body.replace("http://www.w3.org", "") and "https://" not in body
    with pytest.raises(UsageError, match="allowed: .mp4"):
        page.embedded(page.Path("a.svg"))


def test_the_timeline_is_the_report_again() -> None:
    """What a view draws is counted from the data of a report, which JSON has carried."""
    from hasten.report import Report
    from hasten.trace import Event, Run, Trace

    trace = Trace(runs=[Run(0, 4, [], 2.0, True)], structure={"net.blocks": 3})
    for step in range(4):
        trace.add(Event(0, step, 0, "net.blocks", "reuse" if step % 2 else "compute", (0, 3), 0.1, 0.2, None if step % 2 else 0.5))
    html = timeline(json.loads(Report(trace).to_json()))
    assert html.count('<rect class="compute"') == 3 and html.count('<rect class="reuse"') == 3  # two cells and a legend
    assert "computed <b>50 %</b>" in html and "reused <b>50 %</b>" in html
    assert "whole evaluations <b>1 s</b>" in html and "everything else <b>1 s</b>" in html
    assert "signal 0.1 against limit 0.2" in html


def test_density_says_when_attention_was_dense() -> None:
    assert "Attention was dense: no plan acted" in density({"runs": [RUN], "attention": [CALL | {"action": "dense", "density": 1.0}]})
    assert "25.0% of the pairs" in density({"runs": [RUN], "attention": [CALL]})


def test_a_drafted_text_is_counted_by_who_guessed_it() -> None:
    tokens = [
        {"text": "a\n", "by": "", "round": 0, "lead": 0.5}, {"text": "b", "by": "look-up", "round": 1}, {"text": "c", "by": "x", "round": 1},
        {"text": "d", "by": "", "round": 1, "lead": 2.0}, {"text": "e", "by": None, "round": None},
    ]  # fmt: skip
    html = decoding({"tokens": tokens, "rounds": [{"drafted": 8, "accepted": 2, "written": 3}], "drafters": {"look-up": [6, 1], "x": [2, 1]}})
    titles = [attrs["title"] for tag, attrs in Tags(html).found if "data-token" in attrs]
    assert titles[0] == "Token 1: written by the model itself, behind the prompt; 0.5 ahead of the next best in logits"
    assert titles[1] == "Token 2: guessed by look-up; forward 1, 8 drafted, 2 accepted" and titles[4] == "Token 5: being written"
    assert "the model itself <b>40 %</b>" in html and "look-up <b>20 %</b><span>(1 of 6 drafts kept)</span>" in html
    assert html.count("data-bar=") == 1 and "3 tokens per forward, 3 at most" in html and "a↵\n" in html
    assert [attrs["class"].split()[-1] for _, attrs in Tags(html).found if "data-token" in attrs] == [
        "hv-by-own", "hv-by-1", "hv-by-2", "hv-by-own", "hv-by-new",
    ]  # fmt: skip
    assert "hv-exact" not in html and "hv-exact-same" in decoding({"tokens": tokens, "exact": {"verdict": "same"}})


def test_front_keeps_what_nothing_beats() -> None:
    rows = [
        {"recipe": "a", "speedup": 2.0, "psnr_median": 40.0}, {"recipe": "b", "speedup": 3.0, "psnr_median": 35.0},
        {"recipe": "c", "speedup": 2.5, "psnr_median": 30.0}, {"recipe": "d", "speedup": 4.0, "psnr_median": None},
        {"recipe": "steps", "speedup": 1.5, "psnr_median": 39.0, "control": "fewer_steps"},
    ]  # fmt: skip
    html = front({"rows": rows})
    assert "4 trials, 2 of them on the front" in html
    best = [attrs["data-recipe"] for tag, attrs in Tags(html).found if tag == "button" and "on the front" in str(attrs.get("aria-label"))]
    assert best == ["a", "b"]
    assert [attrs["tabindex"] for tag, attrs in Tags(html).found if tag == "button"].count("0") == 1
    with pytest.raises(UsageError, match="speedup or seconds"):
        front({"rows": rows, "across": "joy"})


def test_progress_speaks_at_quarters_only() -> None:
    def said(step: int) -> str:
        html = progress({"state": "running", "phase": "Denoising", "step": step, "steps": 50})
        return html.partition('data-part="said">')[2].partition("<")[0]

    assert len({said(step) for step in range(51)}) == 5


def test_long_logs_are_thinned() -> None:
    html = loss({"rows": [{"step": at, "loss": 1 / (at + 1)} for at in range(20_000)]})
    assert html.count('data-axis="') == 2 and len(html) < 60_000
    assert "Step 19999" in html
    assert html.count('data-axis="') - 1 == loss({"rows": [{"step": 0, "loss": -1.0}, {"step": 1, "loss": 1.0}]}).count('data-axis="')
