"""Prompts of text diffusion: tokens, texts or conversations become one list of token numbers each.

Everything that can be wrong with them is said here, before a model is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.canvas import TextFacts
from hasten.errors import LimitError, UsageError
from hasten.limits import Limits

Messages = Sequence[dict[str, Any]]
"""One conversation: `{"role": ..., "content": ...}` for each turn."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """ids: int64 [P_b] on the host, for each text b. width: of the prompts in the result, at least the longest of them,
    so that `sequences[:, width:]` is what was generated."""

    ids: tuple[Tensor, ...]
    width: int

    @property
    def lengths(self) -> list[int]:
        """P_b."""
        return [len(ids) for ids in self.ids]


def collect(
    input_ids: Any, attention_mask: Any, prompts: str | Sequence[str] | None,
    messages: Messages | Sequence[Messages] | None, tokenizer: Any, facts: TextFacts,
) -> Prompts:  # fmt: skip
    """The prompts, given in exactly one of three ways. Raises `UsageError` for anything else.

    input_ids: int64 [P] or [B, P], or lists of any lengths. attention_mask: same shape, 0 where there is padding, which
    may stand on either side. prompts: as they are, with the tokens that the tokenizer puts around a text. messages: one
    conversation or several, in the words of the tokenizer's chat template, up to where the answer begins.
    """
    given = {"input_ids": input_ids, "prompts": prompts, "messages": messages}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        got = " and ".join(named) or "none of them"
        raise UsageError(f"Pass one of input_ids, prompts and messages; got {got}.")
    if attention_mask is not None and input_ids is None:
        raise UsageError("attention_mask belongs to input_ids; leave it out with prompts or messages, which are not padded.")
    if input_ids is not None:
        return _of_ids(input_ids, attention_mask, facts)
    if tokenizer is None:
        raise UsageError(f"{named[0]} take a tokenizer, and this pipeline has none. Pass tokenizer= to it, or input_ids here.")
    if prompts is not None:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        for number, text in enumerate(texts, 1):
            if not isinstance(text, str):
                raise UsageError(f"prompts are texts, got {text!r} as number {number}. Pass tokens as input_ids.")
        return _packed([tokenizer(text)["input_ids"] for text in texts])
    return _packed([_said(turns, tokenizer) for turns in _conversations(messages)])


def check(prompts: Prompts, new: Sequence[int], facts: TextFacts, limits: Limits) -> None:
    """Raise `UsageError` or `LimitError` with the first thing that is wrong with these texts for this model."""
    limits.check_tokens(prompts.lengths, new)
    for number, (ids, more) in enumerate(zip(prompts.ids, new, strict=True), 1):
        if len(ids) + more > facts.context:
            why = "The prompt alone is longer" if len(ids) > facts.context else "Shorten it, or generate less"
            raise LimitError(
                f"Text {number} would have {len(ids):,} + {more:,} tokens, and the model has positions for {facts.context:,}."
                f" {why}."
            )
        if not len(ids) and facts.shifted:
            raise UsageError(
                f"Prompt {number} is empty, and the logits of this model are about the next token, so that nothing would say"
                " what the first one is. Give it at least one token."
            )
        _check_ids(number, ids, facts)


def _check_ids(number: int, ids: Tensor, facts: TextFacts) -> None:
    wrong = ids[(ids < 0) | (ids >= facts.vocab)]
    if len(wrong):
        raise UsageError(
            f"Prompt {number} has the token {int(wrong[0])}, and the model knows 0 to {facts.vocab - 1}. Is it of another"
            " tokenizer?"
        )
    masks = (ids == facts.mask_id).nonzero() if facts.mask_id is not None else ids[:0]
    if len(masks):
        raise UsageError(
            f"Prompt {number} has the mask token {facts.mask_id} at place {int(masks[0])}. Prompts are never written into, so"
            " that it would stay a mask for ever. Take it out; max_new_tokens says how much is written behind the prompt."
        )


def _of_ids(input_ids: Any, attention_mask: Any, facts: TextFacts) -> Prompts:
    if isinstance(input_ids, Tensor):
        return _of_tensor(input_ids, attention_mask, facts)
    if not isinstance(input_ids, Sequence) or isinstance(input_ids, str):
        raise UsageError(f"input_ids are whole numbers in a tensor or lists, got {type(input_ids).__name__}.")
    if attention_mask is not None:
        raise UsageError("attention_mask goes with a tensor of input_ids. Lists are not padded; leave it out.")
    rows = [input_ids] if input_ids and isinstance(input_ids[0], int) else list(input_ids)
    return _packed(rows)


def _of_tensor(input_ids: Tensor, attention_mask: Any, facts: TextFacts) -> Prompts:
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool or input_ids.dim() not in (1, 2):
        raise UsageError(
            f"input_ids are whole numbers of shape [P] or [B, P], got {input_ids.dtype} {list(input_ids.shape)}."
        )
    ids = input_ids.detach().cpu().long()
    ids = ids[None] if ids.dim() == 1 else ids
    if attention_mask is None:
        _refuse_padding(ids, facts)
        return Prompts(tuple(ids.unbind()), ids.shape[1])
    mask = torch.as_tensor(attention_mask).detach().cpu()
    mask = mask[None] if mask.dim() == 1 else mask
    if mask.shape != ids.shape:
        raise UsageError(f"attention_mask has the shape {list(mask.shape)}, and input_ids {list(ids.shape)}; they must agree.")
    keep = mask.bool()
    changes = (keep[:, 1:] ^ keep[:, :-1]).sum(1) + keep[:, :1].sum(1) + keep[:, -1:].sum(1)
    holes = (changes > 2).nonzero()
    if len(holes):
        raise UsageError(
            f"attention_mask of row {int(holes[0])} leaves out tokens within the prompt. Only padding on one or both sides can"
            " be left out; cut the others away."
        )
    return Prompts(tuple(row[kept] for row, kept in zip(ids, keep, strict=True)), ids.shape[1])


def _refuse_padding(ids: Tensor, facts: TextFacts) -> None:
    """Padding that nobody declared would be read as text."""
    if ids.shape[0] < 2 or ids.shape[1] == 0 or facts.pad_id in facts.eos_ids:
        return
    rows = ((ids[:, 0] == facts.pad_id) | (ids[:, -1] == facts.pad_id)).nonzero()
    if len(rows):
        raise UsageError(
            f"Row {int(rows[0])} of input_ids begins or ends with the padding token {facts.pad_id}. Pass attention_mask= as"
            " well, or a list of lists of any lengths."
        )


def _packed(rows: Sequence[Any]) -> Prompts:
    """Rows of numbers of any lengths."""
    found = []
    for number, row in enumerate(rows, 1):
        try:
            ids = torch.as_tensor(row).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            raise UsageError(f"Prompt {number} is no list of whole numbers: {str(row)[:60]!r}.") from None
        if ids.dim() != 1 or (len(ids) and (ids.is_floating_point() or ids.dtype == torch.bool)):
            raise UsageError(f"Prompt {number} must be one list of whole numbers, got {ids.dtype} {list(ids.shape)}.")
        found.append(ids.long())
    return Prompts(tuple(found), max(map(len, found), default=0))


def _conversations(messages: Any) -> list[Messages]:
    several = messages if messages and isinstance(messages[0], list | tuple) else [messages]
    for number, turns in enumerate(several, 1):
        if not turns or not all(isinstance(turn, dict) and "role" in turn and "content" in turn for turn in turns):
            raise UsageError(
                f"Conversation {number} must be a list of turns"
                ' such as {"role": "user", "content": "Hello"}, got ' + f"{str(turns)[:80]}."
            )
    return list(several)


def _said(turns: Messages, tokenizer: Any) -> list[int]:
    """A conversation in the words of the template. The template has the special tokens, so none are added."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("This tokenizer has no chat template, so it cannot take messages. Write the text and pass prompts=.")
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
