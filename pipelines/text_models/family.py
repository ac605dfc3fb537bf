"""What a family of masked language models is: where its config says what the engine must know, and how its authors call
it.

Shapes: m texts, N tokens of each, V logits of a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from hasten.canvas import TextFacts
from hasten.errors import ModelError, RefusedError, UsageError
from hasten.pipelines.text_models.host import TextHost


@dataclass(frozen=True, slots=True)
class Told:
    """What the caller knows of a model. None leaves it to the config, the tokenizer and the family.

    mask_token_id: the token for "not written yet". block: slots per block, of block-causal models only. shifted: the
    logits at a slot are about the next one.
    """

    mask_token_id: int | None = None
    block: int | None = None
    shifted: bool | None = None


@dataclass(frozen=True, slots=True)
class Sizes:
    """layers: with attention. heads: of keys. logits: of one token. tokens: of them those that the vocabulary has.
    context: positions at most."""

    layers: int
    heads: int
    logits: int
    tokens: int
    context: int


class Family(TextHost):
    """A kind of model. Subclasses say how it is told from others, what it is, and how it is called.

    names: its architectures in `config.architectures`, or names of its classes. types: its `config.model_type`.
    mask_token: that of the released checkpoints, where their configs do not have it. shifts: logits at a slot are about
    the next. block: slots per block where the config does not say it. causal: its mask is block-causal. in_interface:
    its attention goes through transformers' interface (None: transformers' own judgement).
    """

    names: ClassVar[tuple[str, ...]] = ()
    types: ClassVar[tuple[str, ...]] = ()
    mask_token: ClassVar[int | None] = None
    shifts: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    block: ClassVar[int | None] = None
    in_interface: ClassVar[bool | None] = False

    def __init__(self, model: nn.Module, facts: TextFacts) -> None:
        super().__init__(model, facts)
        self.tap.heads = self.sizes(model.config).heads

    @classmethod
    def named(cls, model: Any) -> bool:
        """Is this model one of this family, by its architecture or its class?"""
        return bool({type(model).__name__, *(getattr(model.config, "architectures", None) or ())} & set(cls.names))

    @classmethod
    def typed(cls, model: Any) -> bool:
        """Is it, by its config's model_type? Less sure: some families share one."""
        return getattr(model.config, "model_type", None) in cls.types

    @classmethod
    def of(cls, model: Any, tokenizer: Any = None, told: Told = Told()) -> Self:
        """The host for a model. Raises `ModelError`, `UsageError` or `RefusedError` with what is missing."""
        return cls(model, cls.read(model, tokenizer, told))

    @classmethod
    def read(cls, model: Any, tokenizer: Any, told: Told) -> TextFacts:
        """What the engine must know, from what the caller says, the config, the tokenizer and the family, in that
        order."""
        config, sizes = model.config, cls.sizes(model.config)
        if tokenizer is not None:
            sizes = Sizes(sizes.layers, sizes.heads, sizes.logits, min(sizes.tokens, len(tokenizer)), sizes.context)
        mask = mask_token(model, tokenizer, told, cls.mask_token_of(config), sizes.logits)
        ends = end_tokens(config, getattr(model, "generation_config", None), tokenizer)
        places = (config, getattr(model, "generation_config", None), tokenizer)
        pad = first(*(getattr(place, "pad_token_id", None) for place in places), *ends, 0)
        return TextFacts(
            layers=sizes.layers, vocab=sizes.logits, mask_id=mask, eos_ids=ends, pad_id=pad,
            forbidden=tuple(sorted({mask, *range(sizes.tokens, sizes.logits)})),
            shifted=cls.shifts if told.shifted is None else told.shifted, block=cls.block_of(config, told),
            context=sizes.context,
        )  # fmt: skip

    @classmethod
    def sizes(cls, config: Any) -> Sizes:
        """Numbers from the config, under the names that most families use."""
        refuse_windows(config)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        tokens = config.vocab_size
        return Sizes(config.num_hidden_layers, heads, tokens, tokens, config.max_position_embeddings)

    @classmethod
    def mask_token_of(cls, config: Any) -> int | None:
        """The mask token of the released checkpoints."""
        return cls.mask_token

    @classmethod
    def block_of(cls, config: Any, told: Told) -> int | None:
        """Slots per block; None for models in which every token sees all."""
        if not cls.causal:
            if told.block is not None:
                raise UsageError(
                    f"{cls.family} has no blocks of its own, got block={told.block}. Blocks to decode in are a part of"
                    " the recipe."
                )
            return None
        block = told.block or first(*(getattr(config, name, None) for name in ("block_size", "bd_size")), cls.block)
        if not isinstance(block, int) or block < 1:
            raise ModelError(f"The config of this {cls.family} does not say how long its blocks are. Pass block=.")
        return block

    @property
    def positions(self) -> Tensor:
        """Where the tokens of the call under way stand, int64 [m, N]; for models that do not take positions."""
        now, store = self.tap.now, self.tap.store
        assert now is not None and store is not None
        return torch.where(now.slots < store.slots, now.slots, 0)

    def interfaced(self) -> bool:
        return super().interfaced() if self.in_interface is None else self.in_interface

    def own(self, ids: Tensor) -> Tensor:
        """Logits [m, N, V] of whole rows without padding, ids int64 [m, N], by the authors' own call and mask.

        Nothing is followed or kept, and logits are as they come out, shifted or not.
        """
        return logits_of(self.model(input_ids=ids, use_cache=False))


def logits_of(given: Any) -> Tensor:
    """The logits of what a forward returned."""
    found: Tensor = given if isinstance(given, Tensor) else given.logits if hasattr(given, "logits") else given[0]
    return found


def block_causal(count: int, block: int | None, device: torch.device) -> Tensor:
    """May token i read token j? bool [N, N]."""
    number = torch.arange(count, device=device) // (block or count)
    return number[:, None] >= number[None, :]


def mask_token(model: Any, tokenizer: Any, told: Told, released: int | None, logits: int) -> int:
    """The token for "not written yet". Raises `ModelError` where nobody knows it."""
    places = (getattr(model, "config", None), getattr(model, "generation_config", None), tokenizer)
    known = [told.mask_token_id, *(getattr(place, "mask_token_id", None) for place in places), released]
    token = first(*known)
    name = type(model).__name__
    if token is None:
        raise ModelError(
            f"Nothing says which token of {name} is the mask: not its config nor its tokenizer. Pass mask_token_id=."
        )
    if not 0 <= token < logits:
        where = "you passed" if told.mask_token_id is not None else "its config, its tokenizer or its family says"
        raise ModelError(
            f"The mask token that {where}, {token}, is none of the {logits} of {name}. Pass the right mask_token_id=."
        )
    return int(token)


def end_tokens(*places: Any) -> tuple[int, ...]:
    """Tokens that end a text, by any of these (configs, generation configs, tokenizers)."""
    found: list[int] = []
    for place in places:
        given = getattr(place, "eos_token_id", None)
        found += [given] if isinstance(given, int) else list(given or ())
    return tuple(dict.fromkeys(found))


def refuse_windows(config: Any) -> None:
    """Refuse a model whose layers see a window only: what they may read is not a matter of blocks."""
    kinds: Iterable[str] = getattr(config, "layer_types", None) or ()
    odd = sorted(set(kinds) - {"full_attention"})
    if odd:
        raise RefusedError(
            f"This {getattr(config, 'model_type', 'model')} has layers of {', '.join(odd)}; text diffusion here follows"
            " full attention only."
        )


def first(*values: Any) -> Any:
    """The first that is not None; None where all are."""
    return next((value for value in values if value is not None), None)
