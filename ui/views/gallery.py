"""Results of earlier runs as cards, with a search box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.ui.views.markup import data, empty, source, text, view


def gallery(about: Mapping[str, Any]) -> str:
    """HTML of the cards.

    about: `items` ([{"id", "title", optional "recipe", "model", "when", "note", "thumb" (URL of a picture), "text" (shown where there is no picture)}], newest first).
    The box filters by words, each of which must be in a card. A click sends `select` with {"id"}.
    """
    items: Sequence[Mapping[str, Any]] = about.get("items") or ()
    if not items:
        return empty("gallery", "History", "Nothing here yet. Whatever you generate is kept here, newest first.")
    cards = "".join(map(_card, items))
    inner = (
        '<div class="hv-head"><label class="hv-choice"><span>Search</span> <input type="search" data-keep="gallery-search"'
        ' placeholder="prompt, recipe, model" autocomplete="off"></label>'
        f'<output class="hv-number" data-part="count" aria-live="polite">{len(items)} result{"" if len(items) == 1 else "s"}</output></div>'
        f'<ul class="hv-results">{cards}</ul><p class="hv-empty" data-none hidden>No result has all these words.</p>'
    )
    return view("gallery", "History", inner)


def _card(item: Mapping[str, Any]) -> str:
    title = str(item.get("title") or item["id"])
    facts = [str(item[key]) for key in ("model", "recipe", "note", "when") if item.get(key)]
    picture = f'<img loading="lazy" alt="" src="{source(item["thumb"])}">' if item.get("thumb") else f'<span class="hv-blank">{text(str(item.get("text") or "")[:240])}</span>'
    return (
        f'<li data-words="{text(" ".join([title, *facts]).lower())}"><button type="button" data-send="{data({"id": item["id"]})}">'
        f'<span class="hv-thumb">{picture}</span><span class="hv-title">{text(title)}</span><span class="hv-facts-line">{text(" · ".join(facts))}</span></button></li>'
    )
