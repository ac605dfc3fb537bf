"""Is a model what it is taken for? A few small evaluations before the first text, and what follows where it is not.

Everything is compared with the model's own call on the same tokens (`Family.own`). What fails is done without where
that is possible, and refused where it is not; every such thing is a sentence.

Shapes: m texts, N tokens of each, V logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hasten.caching.kv import Rows
from hasten.caching.store import KVStore, Pass
from hasten.canvas import Canvas
from hasten.errors import HastenError, ModelError, RefusedError
from hasten.pipelines.text import calls
from hasten.pipelines.text_models.family import Family
from hasten.pipelines.text_models.host import TextHost, rows_of

Check = Literal["followed", "windows", "batches", "blocks", "shift", "embeddings"]

SENTENCE = "def add(first, second):\n    return first + second\n\n\nprint(add(1, 2))\n"
"""What a model is asked about its shift. Any text that a language model finds likely would do."""

MARGIN = 0.5
"""Nats by which one reading of the logits must be the better one, and by which it must beat guessing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """holds None: it could not be measured, and `sentence` says why; otherwise `sentence` says what follows."""

    check: Check
    holds: bool | None
    sentence: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """host: what to generate with: the one that was given (with `caches` off where windows failed), or `Whole`.
    embeddings: `inputs_embeds` may be used in place of tokens."""

    host: TextHost
    findings: tuple[Finding, ...]

    @property
    def embeddings(self) -> bool:
        return any(finding.check == "embeddings" and finding.holds for finding in self.findings)

    @property
    def sentences(self) -> list[str]:
        """What the user should read. That embeddings are not taken matters to those who need them, and only then."""
        return [found.sentence for found in self.findings if found.holds is False and found.check != "embeddings"]


class Whole(TextHost):
    """The model's own call on one whole text after the other: for attention that cannot be followed. No caches."""

    caches = False

    def __init__(self, family: Family) -> None:
        super().__init__(family.model, family.facts)
        self.own = family.own

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Nothing is put onto the model."""
        with torch.no_grad():
            yield

    def run(self, now: Pass, store: KVStore) -> Tensor:
        """As `TextHost.run`. Waits for the device. Raises `ModelError` where parts or drafts of texts are asked for."""
        real = now.slots < store.slots
        count = real.sum(1)
        place = torch.arange(now.slots.shape[1], device=now.slots.device)
        whole = ((now.slots == place) == (place < count[:, None])).all(1) & (now.keep == "none")
        lengths, right = torch.stack([count, whole.long()]).tolist()
        if not all(right):
            raise ModelError(
                f"The attention of {type(self.model).__name__} cannot be followed, so only whole texts can be"
                " evaluated: use a recipe without a cache and without drafts."
            )
        each = [self.own(now.ids[row : row + 1, :length]) for row, length in enumerate(lengths)]
        width = each[0].shape[-1]
        found = each[0].new_zeros(*now.slots.shape, width)
        for row, logits in enumerate(each):
            found[row, : lengths[row]] = logits[0]
        return rows_of(found, now.read)


def probe(family: Family, tokenizer: Any = None) -> Probe:
    """Ask the model. tokenizer: for its shift, which takes a text that means something.

    A model whose attention cannot be followed, or is not the same with padding beside it, is evaluated one whole text
    at a time. One whose windows differ from whole texts gets no caches. One that does not read what it is said to read
    is refused: `RefusedError`.
    """
    asked = _Probe(family)
    followed = asked.tried("followed", asked.followed)
    found = [followed]
    if followed.holds is not False:
        found += [asked.tried("windows", asked.windows)] if family.caches else []
        found += [asked.tried("batches", asked.batches)]
    blocks = asked.tried("blocks", asked.blocks)
    if blocks.holds is False:
        raise RefusedError(blocks.sentence)
    holds = {finding.check: finding.holds for finding in found}
    host: TextHost = family
    if holds["followed"] is False or holds["batches"] is False:
        host = Whole(family)
    elif holds.get("windows") is False:
        family.caches = False
    found += [blocks, asked.shift(tokenizer)]
    if isinstance(host, Family):
        found.append(asked.tried("embeddings", asked.embeddings))
    return Probe(host, tuple(found))


class _Probe:
    """The questions. Each gives a `Finding` or an error of the model."""

    def __init__(self, family: Family) -> None:
        self.host, self.name = family, type(family.model).__name__
        self.facts = dataclasses.replace(family.facts, shifted=False)  # logits as they come out
        block = family.facts.block or 7
        self.length = min(family.facts.context, block * max(3, 15 // block) - int(block > 2))
        generator = torch.Generator().manual_seed(0)
        never = set(family.facts.forbidden)
        usual = [token for token in range(min(family.facts.vocab, 1 << 16)) if token not in never]
        drawn = torch.randint(len(usual), (2, self.length), generator=generator)
        ids = torch.tensor(usual)[drawn]
        if family.facts.mask_id is not None:
            ids[:, 3::4] = family.facts.mask_id
        self.ids = ids.to(family.device)
        exact = next(family.model.parameters()).dtype in (torch.float32, torch.float64)
        self.tolerance = 1e-3 if exact else 5e-2

    def tried(self, check: Check, question: Callable[[], Finding]) -> Finding:
        """The answer; an error of the model itself is one, too."""
        try:
            with torch.no_grad():
                return question()
        except HastenError as error:
            return Finding(check, False, str(error))
        except Exception as error:  # noqa: BLE001 - remote code fails in its own ways
            hint = " Load it in float32." if "dtype" in str(error) else ""
            asked = f"{self.name} fails where its {check} are tried: {type(error).__name__}: {error}.{hint}"
            return Finding(check, False, asked)

    # --- questions ----------------------------------------------------------------------------------

    def followed(self) -> Finding:
        """Do our keys, masks and positions give the model's own logits?"""
        try:
            ours = self.whole(self.ids[:1], "none")
        except ModelError as error:
            rest = "As it is, its own call is used, one whole text at a time, without caches."
            return Finding("followed", False, f"{error} {rest}")
        wrong = self.error(ours, self.host.own(self.ids[:1]))
        sentence = (
            f"The attention of {self.name} could be followed, but gives other logits than its own call (relative error"
            f" {wrong:.2g}); its own call is used, one whole text at a time, without caches."
        )
        return self.finding("followed", wrong, sentence)

    def windows(self) -> Finding:
        """Are logits of a window the same when the rest is read from the store?"""
        canvas, store = self.canvas([self.ids[0]])
        whole = self.evaluate(canvas, canvas.used, "store", store)
        low = self.length // 2 // (self.facts.block or 1) * (self.facts.block or 1)
        part = (canvas.place >= low)[None]
        wrong = self.error(self.evaluate(canvas, part, "store", store), whole[:, low:])
        sentence = (
            f"{self.name} gives other logits for a window than for the whole text (relative error {wrong:.2g}), as if"
            " it did not use the positions it is given; it is evaluated without caches."
        )
        return self.finding("windows", wrong, sentence)

    def batches(self) -> Finding:
        """Is a text the same alone and beside a longer one?"""
        short = self.ids[1][: self.length - 5]
        alone = self.whole(short[None], "none")
        canvas, store = self.canvas([self.ids[0], short])
        beside = self.evaluate(canvas, canvas.used, "none", store)[1:, : len(short)]
        wrong = self.error(beside, alone)
        sentence = (
            f"{self.name} gives other logits for a text beside a longer one (relative error {wrong:.2g}); texts are"
            " evaluated one at a time, without caches."
        )
        return self.finding("batches", wrong, sentence)

    def blocks(self) -> Finding:
        """Does a token see the others of its block, and none of later blocks? By the model's own call."""
        changed = self.ids[:1].clone()
        changed[:, -1] = self.ids[1, 0]
        block = self.facts.block or self.length
        first = (self.length - 1) // block * block
        before, after = self.host.own(self.ids[:1]), self.host.own(changed)
        kind = f"blocks of {block}" if self.facts.block else "full attention"
        said = f"{self.name} is taken for a model of {kind}"
        if first and self.error(after[:, :first], before[:, :first]) > self.tolerance:
            return Finding("blocks", False, f"{said}, but sees later blocks. Pass another block=.")
        if first == self.length - 1:
            return Finding("blocks", True)
        if self.error(after[:, first:-1], before[:, first:-1]) < 1e-6:
            return Finding("blocks", False, f"{said}, but no token sees those behind it.")
        return Finding("blocks", True)

    def shift(self, tokenizer: Any) -> Finding:
        """Which slot are logits about? Measured on a known text, one token masked at a time."""
        try:
            with torch.no_grad():
                return self._shift(tokenizer)
        except Exception as error:  # noqa: BLE001 - a question that cannot be asked is not answered
            return Finding("shift", None, f"Shift not measured: {type(error).__name__}: {error}")

    def _shift(self, tokenizer: Any) -> Finding:
        if tokenizer is None or self.facts.mask_id is None:
            return Finding("shift", None, "Shift not measured: it takes a tokenizer and a mask token.")
        tokens = tokenizer(SENTENCE, add_special_tokens=False)["input_ids"][: self.facts.context]
        text, count = torch.tensor(tokens).to(self.ids), len(tokens)
        if count < 4:
            return Finding("shift", None, f"Shift not measured: the tokenizer makes {count} tokens of the sentence.")
        each = torch.eye(count, dtype=torch.bool, device=text.device)
        rows = text.repeat(count, 1).masked_fill(each, self.facts.mask_id)
        odds = self.host.own(rows).float().log_softmax(-1)
        at = torch.arange(1, count, device=text.device)
        here, before = (float(odds[at, place, text[1:]].mean()) for place in (at, at - 1))
        guess = -torch.tensor(float(odds.shape[-1])).log().item()
        if abs(here - before) < MARGIN or max(here, before) < guess + MARGIN:
            return Finding("shift", None, f"Shift not measured: {here:.2f} and {before:.2f} nats say too little.")
        measured, said = before > here, self.host.facts.shifted
        words = {True: "the slot behind it", False: "its own slot"}
        sentence = (
            f"{self.name} is taken for a model whose logits at a slot are about {words[said]}; on a known text they are"
            f" about {words[measured]} ({max(here, before):.2f} against {min(here, before):.2f} nats). Pass"
            f" shifted={measured}."
        )
        return Finding("shift", measured == said, "" if measured == said else sentence)

    def embeddings(self) -> Finding:
        """Can tokens be given as embeddings?"""
        table = self.host.model.get_input_embeddings()  # type: ignore[operator]

        def swap(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {"input_ids": None, "inputs_embeds": table(kwargs["input_ids"])}

        usual = self.whole(self.ids[:1], "none")
        hook = self.host.model.register_forward_pre_hook(swap, with_kwargs=True)
        try:
            wrong = self.error(self.whole(self.ids[:1], "none"), usual)
        finally:
            hook.remove()
        sentence = f"{self.name} does not take embeddings for tokens (relative error {wrong:.2g})."
        return self.finding("embeddings", wrong, sentence)

    # --- how they are asked -------------------------------------------------------------------------

    def canvas(self, texts: list[Tensor]) -> tuple[Canvas, KVStore]:
        canvas = Canvas.of([text.cpu() for text in texts], [0] * len(texts), self.facts, self.ids.device)
        return canvas, KVStore(len(texts), canvas.slots, self.ids.device)

    def whole(self, ids: Tensor, keep: Literal["store", "none"]) -> Tensor:
        canvas, store = self.canvas(list(ids))
        return self.evaluate(canvas, canvas.used, keep, store)

    def evaluate(self, canvas: Canvas, tokens: Tensor, keep: Any, store: KVStore) -> Tensor:
        """Logits [m, N, V] of these tokens, bool [m, L], of all texts."""
        width = int(tokens.sum(1).max())
        rows = Rows(list(range(len(tokens))), tokens, width, keep)
        now = calls.plain(rows, canvas, calls.Wanted(tokens, width), self.facts, store)
        with self.host.attached():
            return self.host.run(now, store)

    def error(self, got: Tensor, right: Tensor) -> float:
        """Mean over tokens of the relative error of their logits, each at most 1: a router that tips over at one token
        in low precision is no fault, positions that are wrong at all of them are."""
        got, right = got.float(), right.float()
        wrong = (got - right).norm(dim=-1) / right.norm(dim=-1).clamp(min=1e-12)
        return float(wrong.nan_to_num(1.0).clamp(max=1.0).mean())

    def finding(self, check: Check, wrong: float, sentence: str) -> Finding:
        holds = wrong <= self.tolerance
        return Finding(check, holds, "" if holds else sentence)

