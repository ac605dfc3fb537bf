"""A text that was drafted and verified: each token in the colour of who guessed it, and what each forward of the model wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from hasten.ui.views.exact import exact
from hasten.ui.views.markup import empty, number, seconds, share, text, view

Token = Mapping[str, Any]

OWN = "the model itself"
COLOURS = 4
"""Drafters that have a colour of their own; more begin again with the first."""


def decoding(about: Mapping[str, Any]) -> str:
    """HTML of one text.

    about: `tokens` ([{"text", "by", "round", "lead"}]; by: the drafter that guessed it, "" for the model itself, None where that is
    not known yet; round: the forward that wrote it, 0 for the prompt's; lead: how far its logit was ahead; `given`: true for the
    prompt), `rounds` ([{"drafted", "accepted", "written"}], the first is round 1), and of a text that is finished `drafters`
    ({name: [drafted, accepted]}), `exact` (`Exactness.to_dict()`), `row` and `warnings`. title: of the text.
    """
    tokens: Sequence[Token] = [token for token in about.get("tokens") or () if not token.get("given")]
    if not tokens:
        return empty("decoding", "Text", "No text yet: each token will have the colour of who guessed it.")
    rounds: Sequence[Mapping[str, Any]] = about.get("rounds") or ()
    names = list(dict.fromkeys(str(token["by"]) for token in tokens if token.get("by")))
    given = "".join(f'<span class="hv-given">{_words(token)}</span>' for token in about["tokens"] if token.get("given"))
    words = "".join(_token(token, at, names, rounds) for at, token in enumerate(tokens, 1))
    inner = (
        f'<div class="hv-head"><h3>{text(about.get("title") or "Coloured by who guessed it")}</h3>'
        f'<output class="hv-number">{_count(len(tokens), "token")} by {_count(len(rounds) + 1, "forward")}</output></div>'
        f"{_warnings(about)}<p class=\"hv-words\">{given}{words}</p>{_legend(tokens, names, about)}"
        f'<div class="hv-row hv-time"><span class="hv-number">token</span><input type="range" class="hv-range" data-keep="decoding-token" min="1"'
        f' max="{len(tokens)}" step="1" value="{len(tokens)}" aria-label="Token"></div><p class="hv-said" data-part="said"></p>'
        f"{_strip(tokens, names, rounds)}{_numbers(about)}{exact(about.get('exact') or {})}"
    )
    return view("decoding", "Text, coloured by who guessed each token", inner)


# --- the text ---------------------------------------------------------------------------------------------


def _words(token: Token) -> str:
    """A line break is shown as a sign, and breaks the line."""
    return text(str(token.get("text", "")).replace("\n", "↵\n")) or "·"


def _kind(token: Token, names: Sequence[str]) -> str:
    """Its class: the colour of who guessed it."""
    by = token.get("by")
    return "hv-by-new" if by is None else f"hv-by-{names.index(str(by)) % COLOURS + 1}" if by else "hv-by-own"


def _token(token: Token, at: int, names: Sequence[str], rounds: Sequence[Mapping[str, Any]]) -> str:
    told = text(_told(token, at, rounds))
    return f'<span class="hv-token {_kind(token, names)}" data-token data-round="{_round(token)}" title="{told}">{_words(token)}</span>'


def _round(token: Token) -> int:
    found = number(token, "round")
    return int(found) if found is not None else -1


def _told(token: Token, at: int, rounds: Sequence[Mapping[str, Any]]) -> str:
    """What is known of a token, in one line."""
    by, place, lead = token.get("by"), _round(token), number(token, "lead")
    who = "being written" if by is None else f"guessed by {by}" if by else "written by the model itself"
    ahead = f"; {lead:.3g} ahead of the next best in logits" if lead is not None else ""
    if place == 0:
        return f"Token {at}: {who}, behind the prompt{ahead}"
    if not 0 < place <= len(rounds):
        return f"Token {at}: {who}{ahead}"
    return f"Token {at}: {who}; {_of_round(rounds[place - 1], place)}{ahead}"


def _of_round(each: Mapping[str, Any], at: int) -> str:
    return f"forward {at}, {each.get('drafted', 0)} drafted, {each.get('accepted', 0)} accepted"


def _legend(tokens: Sequence[Token], names: Sequence[str], about: Mapping[str, Any]) -> str:
    """Shares of the text, and how many drafts of each were kept."""
    many, drafters = Counter(token.get("by") for token in tokens), about.get("drafters") or {}
    items = []
    for name in ("", *names, *(name for name in drafters if name not in names)):
        kind = _kind({"by": name}, names) if name in names or not name else "hv-by-new"
        kept = drafters.get(name) if name else None
        told = f"<span>({kept[1]:,} of {kept[0]:,} drafts kept)</span>" if kept else ""
        items.append(f'<li><i class="hv-swatch hv-token {kind}"></i>{text(name or OWN)} <b>{share(round(many[name] / len(tokens), 3))}</b>{told}</li>')
    return f'<ul class="hv-legend" aria-label="Who guessed the text: shares of its tokens">{"".join(items)}</ul>'


# --- what forwards wrote ----------------------------------------------------------------------------------


def _strip(tokens: Sequence[Token], names: Sequence[str], rounds: Sequence[Mapping[str, Any]]) -> str:
    """A bar for each forward, as high as it wrote tokens, in their colours."""
    if not rounds:
        return ""
    written = [int(each.get("written", 0)) for each in rounds]
    most, mean = max([*written, 1]), sum(written) / len(written)
    of_round: dict[int, list[str]] = {}
    for token in tokens:
        of_round.setdefault(_round(token), []).append(_kind(token, names))
    bars = "".join(_bar(each, at, of_round.get(at, []), most) for at, each in enumerate(rounds, 1))
    said = f"{mean:.3g} tokens per forward, {most} at most"
    return (
        f'<div class="hv-head hv-above"><h3>Tokens per forward</h3><span class="hv-number">{said}</span></div>'
        '<div class="hv-scroll" tabindex="0" role="group" aria-label="Drawing; scroll it sideways">'
        f'<div class="hv-strip" role="img" aria-label="{said}, over {_count(len(rounds), "forward")}">{bars}</div></div>{_table(rounds)}'
    )


def _bar(each: Mapping[str, Any], at: int, kinds: Sequence[str], most: int) -> str:
    parts = "".join(f'<b class="hv-token {kind}" style="flex-grow:{sum(1 for _ in same)}"></b>' for kind, same in groupby(kinds))
    told = f"{_of_round(each, at)}, {each.get('written', 0)} written".capitalize()
    return f'<i data-bar="{at}" title="{text(told)}" style="height:{100 * len(kinds) / most:.1f}%">{parts}</i>'


def _table(rounds: Sequence[Mapping[str, Any]]) -> str:
    """The same in numbers."""
    keys = ("drafted", "accepted", "written")
    lines = "".join(
        f'<tr><th scope="row">{at}</th>{"".join(f"<td>{text(each.get(key, 0))}</td>" for key in keys)}</tr>' for at, each in enumerate(rounds, 1)
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("forward", *keys))
    return (
        '<details><summary>Forwards as a table</summary><div class="hv-scroll hv-tall" tabindex="0" role="group" aria-label="Table of forwards">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div></details>"
    )


# --- numbers ----------------------------------------------------------------------------------------------


def _numbers(about: Mapping[str, Any]) -> str:
    """What is known of a text that is finished."""
    row: Mapping[str, Any] = about.get("row") or {}
    if not row:
        return ""
    speedup, plain = number(row, "speedup"), number(row, "plain_seconds")
    told = [
        ("recipe", str(row.get("recipe", ""))), ("tokens per forward", _figure(row, "tokens_per_forward")),
        ("drafts per forward", _figure(row, "drafts_per_forward")), ("forwards", f"{_figure(row, 'forwards')} behind the prompt"),
        ("took", seconds(number(row, "seconds"))), ("plainly", seconds(plain) if plain is not None else ""),
        ("speed", f"{speedup:.3g}× plain decoding" if speedup else ""),
    ]  # fmt: skip
    lines = "".join(f"<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>" for key, value in told if value)
    timed = '<p class="hv-hint">Times are of this one run, behind its first token; a busy machine shifts them.</p>' if plain is not None else ""
    return f'<dl class="hv-facts">{lines}</dl>{timed}'


def _figure(row: Mapping[str, Any], key: str) -> str:
    found = number(row, key)
    return f"{found:.3g}" if found is not None else ""


def _warnings(about: Mapping[str, Any]) -> str:
    return "".join(f'<p class="hv-warning">{text(sentence)}</p>' for sentence in about.get("warnings") or ())


def _count(many: int, what: str) -> str:
    return f"{many:,} {what}{'' if many == 1 else 's'}"
