"""A prompt that a causal language model goes on with: who guessed each token, what a forward wrote, and whether it is the model's own text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hasten.errors import UsageError
from hasten.ui.engine.cancel import stoppable
from hasten.ui.engine.desk import Desk, Writer
from hasten.ui.engine.exactness import Exactness
from hasten.ui.engine.report import Report
from hasten.ui.engine.request import Decode
from hasten.ui.engine.work.pieces import Pieces

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.pipelines.decode.session import DecodeSession
    from hasten.recipe import Recipe
    from hasten.rounds import Round

SHOWN = 0.25
"""Seconds between two looks at the text, at least."""


def decode(ask: Decode, desk: Desk, report: Report) -> dict[str, Any]:
    """Result: {"output", "text", "tokens", "rounds", "drafters", "exact", "row", "trace", "warnings", "seconds"}.

    tokens: [{"text", "given", "by", "round", "lead"}]; by: the drafter that guessed it, "" for the model itself, None while that is
    not known; round: the forward behind the prompt that wrote it, from 1, 0 for the prompt's own. rounds: [{"drafted", "accepted",
    "written"}]. drafters: {name: [drafted, accepted]}. exact: `Exactness`. Where it drafts, the prompt is decoded plainly as well, with the same seed, and both are timed
    behind their first token. trace: the session's report, None for plain.
    """
    recipe = _drafting(desk.recipe(ask.recipe))
    writer = desk.language_model(ask.model, report)
    call = _call(ask, writer)
    report.phase("Reading the prompt")
    with stoppable(writer, report.check), _seeded(ask.seed, writer.model.device) as seed:
        writer.model.generate(**call | {"max_new_tokens": 2})  # the first forwards of a process are slower than all others
        seed()
        text = _Text(ask, writer, call, report)
        session = text.write(recipe, desk)
        plain = None
        if session is not None:
            seed()
            plain = _Text(ask, writer, call, report, "Decoding plainly, to compare")
            plain.write(None, desk)
    return _kept(ask, desk, recipe, session, text, plain)


def _drafting(recipe: Recipe) -> Recipe:
    """Raise `UsageError` unless it drafts, or does nothing at all."""
    if recipe.axes and recipe.draft is None:
        raise UsageError(f"Recipe {recipe.name or 'as YAML'!r} drafts nothing. Choose one that does, such as look-up or dyspec, or plain.")
    return recipe


def _call(ask: Decode, writer: Writer) -> dict[str, Any]:
    """Arguments of `generate`. Raises `UsageError` for a text that is longer than the model has places for."""
    inputs = writer.tokenizer([ask.prompt], return_tensors="pt")
    ids = inputs["input_ids"].to(writer.model.device)
    places = getattr(writer.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if places is not None and places < ids.shape[1] + ask.length:
        raise UsageError(f"The prompt has {ids.shape[1]:,} tokens and the model {places:,} places, so {ask.length:,} new ones do not fit. Ask for fewer, or shorten it.")
    drawn = {"do_sample": True, "temperature": ask.temperature, "top_k": ask.top_k or 0} if ask.temperature else {"do_sample": False}
    mask = inputs["attention_mask"].to(ids.device)
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": ask.length, **drawn}


@contextmanager
def _seeded(seed: int, device: Any) -> Iterator[Callable[[], Any]]:
    """Gives what begins the random numbers anew. Afterwards they go on as if nothing had been drawn."""
    import torch

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield lambda: torch.manual_seed(seed)


class _Text:
    """One text that is being written: a streamer of `generate`, which looks on and does nothing else.

    ids: new tokens. seconds: from the first of them to the last. words: how they read."""

    def __init__(self, ask: Decode, writer: Writer, call: dict[str, Any], report: Report, phase: str = "Writing") -> None:
        self.ask, self.writer, self.call, self.report, self.phase = ask, writer, call, report, phase
        self.ids: list[int] = []
        self.session: DecodeSession | None = None
        self._pieces = Pieces(writer.tokenizer, call["input_ids"][0].tolist())
        self._prompt, self._first, self._last, self._looked = True, 0.0, 0.0, 0.0

    def write(self, recipe: Recipe | None, desk: Desk) -> DecodeSession | None:
        """Write it, by a recipe that drafts or plainly. Gives the session, which is closed; None where there was none."""
        from hasten.pipelines.accelerate import accelerate

        self.report.phase(self.phase, self.call["max_new_tokens"])
        model = self.writer.model
        if recipe is None or not recipe.axes:
            model.generate(**self.call, streamer=self)
            return None
        with accelerate(model, recipe, limits=desk.limits) as session:
            self.session = session
            model.generate(**self.call, streamer=self)
        return self.session

    # --- what transformers asks of a streamer -----------------------------------------------------

    def put(self, value: Tensor) -> None:
        """The prompt, then tokens."""
        if self._prompt:
            self._prompt = False
            return
        self.ids += value.flatten().tolist()
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self.report.check()
        if self._last - self._looked >= SHOWN:
            self._looked = self._last
            self._tell()

    def end(self) -> None:
        """Nothing follows."""

    # --- what it looks like -----------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        return self._last - self._first

    @property
    def words(self) -> list[str]:
        return self._pieces.of(self.ids)

    @property
    def alone(self) -> bool:
        """Did the model write it without drafts, or leave them to transformers?"""
        return self.session is None or not self.session.calls.get("drafted")

    def forwards(self) -> list[Round]:
        """Rounds so far; none where it was written alone."""
        return [] if self.session is None else self.session.trace.rounds

    def tokens(self, leads: Sequence[float] = ()) -> list[dict[str, Any]]:
        """As the view draws them, the prompt as one."""
        by: list[tuple[str | None, int | None]] = [("", 0), *((name, at) for at, each in enumerate(self.forwards(), 1) for name in _guessers(each))]
        if self.alone:
            by = [("", at) for at in range(len(self.ids))]
        by += [(None, None)] * (len(self.ids) - len(by))  # of the round that is being written
        words = self.words
        new = [
            {"text": word, "given": False, "by": name, "round": at, "lead": leads[place] if place < len(leads) else None}
            for place, (word, (name, at)) in enumerate(zip(words, by, strict=False))
        ]
        return [{"text": self.ask.prompt, "given": True, "by": None, "round": None, "lead": None}, *new]

    def rounds(self) -> list[dict[str, int]]:
        """As the view draws them."""
        if self.alone:
            return [{"drafted": 0, "accepted": 0, "written": 1} for _ in self.ids[1:]]
        return [
            {"drafted": sum(each.drafted), "accepted": sum(map(bool, _guessers(each))), "written": sum(each.written)} for each in self.forwards()
        ]

    def _tell(self) -> None:
        if self.phase == "Writing":
            self.report.data(tokens=self.tokens(), rounds=self.rounds())
        self.report.step(len(self.ids), self.call["max_new_tokens"])


def _guessers(each: Round) -> tuple[str, ...]:
    """Who guessed each token that a forward wrote, "" for the model itself."""
    return each.by[0] if each.by else ("",) * sum(each.written)


def _kept(ask: Decode, desk: Desk, recipe: Recipe, session: DecodeSession | None, text: _Text, plain: _Text | None) -> dict[str, Any]:
    """The result, on the disk and as it is told."""
    leads = [lead for call in (session.leads if session is not None else []) for row in call for lead in row]
    exact, cost = _exactness(ask, session, text, plain, leads), session.report() if session is not None else None
    rounds, tokens, found = text.rounds(), text.tokens(leads), "".join(text.words)
    with desk.outputs.making(ask) as out:
        trace = out.json("trace.json", cost.to_dict()) if cost is not None else None
        out.text("text.txt", found + "\n")
        out.facts = {
            "text": found, "tokens": tokens, "rounds": rounds, "drafters": {name: list(pair) for name, pair in cost.drafters.items()} if cost else {},
            "exact": exact.to_dict(), "row": _row(ask, recipe, rounds, text, plain, exact), "trace": trace, "warnings": cost.warnings if cost else [],
        }  # fmt: skip
    return {"output": out.id, **out.facts, "seconds": text.seconds}


def _exactness(ask: Decode, session: DecodeSession | None, text: _Text, plain: _Text | None, leads: Sequence[float]) -> Exactness:
    drawn = ask.temperature > 0
    if session is None or text.alone:
        return Exactness("", "", drawn, len(text.ids))
    said = session.report().exactness
    lossy = said.removeprefix("lossy: ") if said.startswith("lossy") else ""
    found = Exactness(session.verifier.kind, lossy, drawn, len(text.ids))
    return found if drawn or plain is None else found.compared(text.ids, plain.ids, text.words, plain.words, leads)


def _row(ask: Decode, recipe: Recipe, rounds: list[dict[str, int]], text: _Text, plain: _Text | None, exact: Exactness) -> dict[str, Any]:
    """Numbers. speedup: of a token behind the first, for a drawn text may have another length than the plain one."""
    written, drafted = sum(each["written"] for each in rounds), sum(each["drafted"] for each in rounds)
    pace = [each.seconds / (len(each.ids) - 1) if each is not None and len(each.ids) > 1 else 0.0 for each in (text, plain)]
    return {
        "model": ask.model, "recipe": recipe.name or "custom", "seconds": text.seconds, "plain_seconds": plain.seconds if plain is not None else None,
        "speedup": pace[1] / pace[0] if all(pace) else None, "tokens": len(text.ids), "forwards": len(rounds),
        "tokens_per_forward": written / len(rounds) if rounds else 1.0, "drafts_per_forward": drafted / len(rounds) if rounds else 0.0,
        "exact_match": float(exact.verdict == "same") if exact.same is not None else None, "seed": ask.seed,
    }  # fmt: skip
