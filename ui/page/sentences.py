"""The little HTML that is no view: headlines, one result, a model's facts. Everything is escaped by the views' own helpers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.ui.views.markup import source, text, view


def heading() -> str:
    """The head of the page."""
    return (
        '<header class="hv hp-head"><h1>hasten</h1>'
        "<p>Skip work that barely changes the picture, and see exactly what was skipped.</p></header>"
    )


def said(sentence: str, kind: str = "note") -> str:
    """One sentence. kind: note, good or warning."""
    return f'<p class="hv hp-said hp-{text(kind)}">{text(sentence)}</p>' if sentence else ""


def headline(big: str, small: str, prompt: str = "") -> str:
    """A result in a few words."""
    quoted = f'<p class="hp-prompt">“{text(prompt)}”</p>' if prompt else ""
    return view("headline", "Result in short", f'{quoted}<p class="hp-big">{text(big)}</p><p class="hv-hint">{text(small)}</p>')


def picture(url: str, kind: str, name: str, note: str = "", *, tiny: bool = False, file: str = "") -> str:
    """One picture or clip, as large as there is room. kind: video, image or preview. tiny: enlarged without smoothing.
    file: name to download it by, "" for none."""
    media = (
        f'<video src="{source(url)}" controls autoplay loop muted playsinline aria-label="{text(name)}"></video>'
        if kind == "video"
        else f'<img src="{source(url)}" alt="{text(name)}">'
    )
    link = f'<a class="hv-button" href="{source(url)}" download="{text(file)}">Download</a>' if file else ""
    caption = f'<figcaption><span>{text(note)}</span>{link}</figcaption>'
    return view("picture", name, f'<figure class="hp-picture{" hp-tiny" if tiny else ""} hp-{text(kind)}">{media}{caption}</figure>')


def waiting(sentence: str, name: str = "Result") -> str:
    """Where a result will stand."""
    return view("picture", name, f'<p class="hv-empty">{text(sentence)}</p>')


def facts(rows: Sequence[tuple[str, str]], name: str) -> str:
    """Numbers with their names; those that are not known are left out."""
    told = "".join(f"<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>" for key, value in rows if value not in ("", "–"))
    return view("facts", name, f'<dl class="hv-facts">{told}</dl>') if told else ""


def model_words(card: Mapping[str, Any]) -> str:
    """What a picker says of a model: where it is, its licence, whether it fits."""
    size = f"{card['bytes'] / 1e9:.{0 if card['where'] == 'remote' else 1}f} GB" if card["bytes"] >= 1e8 else f"{card['bytes'] / 1e6:.1f} MB"
    where = {"bundled": "Comes with hasten", "folder": "In your models folder"}.get(card["where"], "On this disk" if card["ready"] else "Not on this disk")
    parts = [f"{where}, {'about ' if card['where'] == 'remote' else ''}{size}.", f"Licence: {card['licence']}." if card["licence"] else "", str(card["fit"])]
    if card["where"] == "remote":
        parts.append(str(card["note"]))
    return said(" ".join(part for part in parts if part), "note" if card["fits"] is not False else "warning")
