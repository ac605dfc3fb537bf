"""A small causal model that says what it would have written: the guide of Guided Diffusion.

Shapes: B texts, L slots, V tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hasten.canvas import PAD, Canvas, TextFacts
from hasten.errors import ModelError, UsageError


class Guide:
    """FlashDLM's guide (arXiv 2505.21467): one causal evaluation of the proposed text, whose best token after each slot is
    what it would write into the next one. It never writes anything itself.

    model: a causal language model of transformers with the vocabulary of the guided one. evaluations, tokens: calls of it
    so far, and tokens computed in them, of all texts. tokenizer, own: the guide's and the guided model's, to compare them.
    Raises `UsageError` where the vocabularies differ.
    """

    def __init__(self, model: Any, facts: TextFacts, tokenizer: Any = None, own: Any = None) -> None:
        config = getattr(model, "config", None)
        if config is None or not callable(getattr(model, "forward", None)):
            raise ModelError(f"The guide must be a causal language model of transformers, got {type(model).__name__}.")
        if getattr(model, "training", False):
            raise UsageError("The guide is in training mode, which changes its output. Call guide.eval() first.")
        size = _same_words(getattr(config, "vocab_size", None), facts, tokenizer, own)
        self.model, self.facts = model, facts
        self.forbidden = torch.tensor([token for token in facts.forbidden if token < size], dtype=torch.int64)
        self.context = int(getattr(config, "max_position_embeddings", None) or facts.context)
        self.evaluations, self.tokens = 0, 0

    def check(self, longest: int) -> None:
        """Raise `UsageError` where a text of so many tokens is too long for it."""
        if longest > self.context:
            raise UsageError(
                f"The guide has positions for {self.context:,} tokens, and a text would have {longest:,}. Generate less."
            )

    @torch.no_grad()
    def __call__(self, proposed: Tensor, canvas: Canvas) -> Tensor:
        """What it would write, int64 [B, L], after proposed int64 [B, L]; -1 at the first slot."""
        self.evaluations += 1
        self.tokens += proposed.numel()
        shown = torch.where(canvas.status == PAD, self.facts.pad_id, proposed)  # behind the end: a causal model never looks
        first = int(canvas.slots > 1)
        logits = self.model(input_ids=shown[:, : max(1, canvas.slots - first)], use_cache=False).logits
        self.forbidden = self.forbidden.to(logits.device)
        best = logits.index_fill(-1, self.forbidden, -float("inf")).argmax(-1)
        return torch.nn.functional.pad(best, (1, 0), value=-1)[:, : canvas.slots]


def _same_words(size: Any, facts: TextFacts, tokenizer: Any, own: Any) -> int:
    """The guide's number of tokens. Refuses one whose numbers mean other words: tokenizers decide where both are known, else
    the sizes must agree."""
    known = tokenizer is not None and own is not None
    least = 1 + max(set(range(facts.vocab)) - set(facts.forbidden))
    if not isinstance(size, int) or size < least or not known and size != facts.vocab:
        raise UsageError(
            f"The guide has {size} tokens and the guided model {facts.vocab}: their vocabularies differ, so that what one"
            " writes means nothing to the other. Take a guide with the same tokenizer."
        )
    if not known or tokenizer is own:
        return size
    mine, theirs = own.get_vocab(), tokenizer.get_vocab()
    for word, number in sorted(mine.items(), key=lambda item: item[1]):
        if number not in facts.forbidden and theirs.get(word) != number:
            raise UsageError(
                f"The token {word!r} is number {number} to the guided model and {theirs.get(word)} to the guide. Take a guide"
                " with the same tokenizer."
            )
    return size
