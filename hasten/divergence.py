"""Where a drafted greedy text leaves the plain one, and whether rounding explains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hasten
from hasten.errors import UsageError
from hasten.recipe import Recipe

ROUNDINGS = 8
"""Roundings that two logits may move towards each other and still count as tied: forwards of other shapes move them by more or
less than the one that was measured."""


@dataclass(frozen=True)
class Divergence:
    """The first token of a row that is not the plain one.

    row; at: of the new tokens, from 0. plain, drafted: the two tokens; texts: the same as text, "" without a tokenizer. lead:
    by how much the plain token was ahead of the other, in plain decoding's logits behind the processors. drafted_lead: by how
    much the drafted run's token was ahead of its next best there; None where that is not known. rounding: by how much logits
    at this place move when the very same tokens are read in one forward in place of one by one: greatest of all tokens, and
    at least the last place of the plain token's logit in its dtype, which may stay where it is by luck.
    """

    row: int
    at: int
    plain: int
    drafted: int
    texts: tuple[str, str]
    lead: float
    drafted_lead: float | None
    rounding: float

    @property
    def tied(self) -> bool:
        """Is the lead so small that another order of adding may choose the other token? If not, something is wrong."""
        return self.lead <= ROUNDINGS * self.rounding

    def __str__(self) -> str:
        names = [f"{token} {text!r}" if text else str(token) for token, text in zip((self.drafted, self.plain), self.texts[::-1], strict=True)]
        why = "a tie: another order of adding explains it" if self.tied else "rounding does not explain it: look for a mistake"
        return (
            f"row {self.row}, new token {self.at}: {names[0]} in place of {names[1]}, which was ahead by {self.lead:.3g} where the"
            f" shape of a forward moves logits by {self.rounding:.2g}; {why}"
        )


def first_divergence(model: Any, inputs: dict[str, Tensor], recipe: Recipe | str, *, tokenizer: Any = None, **call: Any) -> list[Divergence | None]:
    """For each row, where greedy decoding with `recipe` first writes another token than without; None where it never does.

    model: a causal language model of transformers. inputs: input_ids and attention_mask int64 [B, L] on its device. tokenizer:
    to show tokens as text. call: arguments of `generate`, e.g. max_new_tokens. Runs the model three times for a row that differs.

    Raises `UsageError` for sampled calls, where texts differ by chance, and where the recipe drafts nothing in this call.
    """
    if call.get("do_sample"):
        raise UsageError("first_divergence compares greedy texts, and got do_sample=True. Sampled laws are compared by assert_lossless.")
    asked = {**inputs, **call, "do_sample": False}
    plain = model.generate(**asked, return_dict_in_generate=True, output_scores=True, output_logits=True)
    with hasten.accelerate(model, recipe) as run:
        made = model.generate(**asked)
        report: Any = run.report()
        leads: list[list[float]] = getattr(run, "leads", [[]])[-1] if report.calls.get("drafted") else []
    if not leads:
        raise UsageError(f"Nothing was drafted in this call, so there is nothing to compare. {' '.join(report.warnings)}")
    width = inputs["input_ids"].shape[1]
    texts, other = _equally_wide(plain.sequences[:, width:], made[:, width:], model, call)
    found: list[Divergence | None] = []
    for row, (one, two) in enumerate(zip(texts.tolist(), other.tolist(), strict=True)):
        at = next((at for at, pair in enumerate(zip(one, two, strict=True)) if pair[0] != pair[1]), None)
        found.append(None if at is None else _at(model, inputs, plain, leads, row, at, one, two[at], tokenizer))
    return found


def _at(
    model: Any, inputs: dict[str, Tensor], plain: Any, leads: list[list[float]], row: int, at: int, text: list[int], other: int,
    tokenizer: Any,
) -> Divergence:  # fmt: skip
    """What there is to say about new token `at` of a row, where `other` was written in place of what `text` has."""
    texts = ("", "") if tokenizer is None else (tokenizer.decode([text[at]]), tokenizer.decode([other]))
    own = leads[row][at] if at < len(leads[row]) else None
    if at >= len(plain.scores):  # plain decoding had stopped: no rounding does that
        return Divergence(row, at, text[at], other, texts, float("inf"), own, 0.0)
    scores = plain.scores[at][row].double()
    ids = inputs["input_ids"][row]
    ids = torch.cat([ids[inputs["attention_mask"][row].bool()] if "attention_mask" in inputs else ids, ids.new_tensor(text[:at])])
    with torch.no_grad():
        whole = model(input_ids=ids[None]).logits[0, -1]
    raw = plain.logits[at][row].double()
    moved, last_place = (whole.double() - raw).abs().max(), torch.finfo(whole.dtype).eps * raw[text[at]].abs()
    rounding = float(torch.maximum(moved, last_place))
    return Divergence(row, at, text[at], other, texts, float(scores[text[at]] - scores[other]), own, rounding)


def _equally_wide(one: Tensor, other: Tensor, model: Any, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """New tokens [B, new] of both, padded to the longer."""
    given = call.get("pad_token_id", model.generation_config.pad_token_id)
    pad, wide = -1 if given is None else int(given), max(one.shape[1], other.shape[1])
    first, second = (torch.nn.functional.pad(each, (0, wide - each.shape[1]), value=pad) for each in (one, other))
    return first, second
