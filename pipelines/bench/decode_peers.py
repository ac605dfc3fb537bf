"""transformers' own drafters, as settings of `generate`, and how often they let the model read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class Count:
    """Forwards of the model, and the drafts that they read."""

    forwards: int = 0
    drafts: int = 0


@dataclass(frozen=True, slots=True)
class Peer:
    """One setting. what: "prompt look-up" or "assisted". family: "text" where no network drafts, else "model". allowed: drafts
    of a round at most. arguments: of `generate`; assistant: the drafting model, whose generation config gets `assisting`."""

    name: str
    what: str
    family: str
    allowed: int
    arguments: dict[str, Any] = field(default_factory=dict)
    assistant: Any = None
    assisting: dict[str, Any] = field(default_factory=dict)

    def call(self, model: Any, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`generate` with this setting. The assistant changes its own numbers while it runs, so each call sets them again."""

        def generate(**inputs: Any) -> Tensor:
            more = dict(self.arguments)
            if self.assistant is not None:
                more["assistant_model"] = self.assistant
                for name, value in self.assisting.items():
                    setattr(self.assistant.generation_config, name, value)
            return plain(**inputs, **more)

        return generate

    @contextmanager
    def counting(self, model: Any) -> Iterator[Count]:
        """Count forwards of `model` while this is open. The first forward of a call reads the prompt and its first drafts; every
        token behind the last one written is a draft."""
        count = Count()

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            count.forwards += 1
            past = kwargs.get("past_key_values")
            started = past is not None and past.get_seq_length() > 0
            if ids is not None and started:
                count.drafts += ids.shape[1] - 1

        handle = model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield count
        finally:
            handle.remove()


def peers(assistant: Any = None) -> list[Peer]:
    """The settings that are measured. assistant: a small causal model with the same tokenizer."""
    found = [
        Peer(f"prompt look-up, {drafts} tokens, n-grams up to {longest}", "prompt look-up", "text", drafts, {
            "prompt_lookup_num_tokens": drafts, "max_matching_ngram_size": longest,
        })
        for drafts, longest in ((10, 2), (10, 4), (16, 2), (16, 4))
    ]  # fmt: skip
    if assistant is None:
        return found
    steady = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    for drafts in (5, 8):
        found.append(Peer(f"assisted, {drafts} tokens", "assisted", "model", drafts, {}, assistant, steady | {"num_assistant_tokens": drafts}))
    default = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.4, "num_assistant_tokens": 20}
    found.append(Peer("assisted, as transformers has it", "assisted", "model", 20, {}, assistant, default))
    return found
