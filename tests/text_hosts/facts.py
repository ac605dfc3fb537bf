"""What the tests know about a family, independently of the adapters: ids, masks, positions, and the authors' own
call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

VOCAB, MASK, EOS, PAD = 96, 95, 94, 93
"""Ids of every small copy: 0 to 92 are ordinary tokens."""


@dataclass(frozen=True)
class Facts:
    """B batch, N tokens, V width of the head.

    kind, block: which keys a token may read (all; those of its block and the blocks before; itself and before).
    shifted: the logits at i are about the token at i + 1. context: the longest sequence.
    positions: how a forward on a subset of rows is told where they stand: `argument` (position_ids), `module` (only
    through the rotary module), `lost` (position_ids are taken and not used). padding: how the forward itself can be
    told to leave out keys: a 2-D mask (`keys`), one or another 4-D mask (`pairs`), or not at all (`none`).
    tapped: its attention is torch's function, so that it can be caught. embeds: `inputs_embeds` works.
    plain: the authors' call on whole rows of one length without padding: (model, ids [B, N]) -> logits [B, N, V].
    told: what its config does not say and a caller must.
    """

    kind: Literal["full", "block", "causal"]
    shifted: bool
    context: int
    positions: Literal["argument", "module", "lost"]
    padding: Literal["keys", "pairs", "none"]
    plain: Callable[[Any, Tensor], Tensor]
    block: int | None = None
    tapped: bool = True
    embeds: bool = True
    mask: int = MASK
    eos: int = EOS
    pad: int | None = PAD
    vocab: int = VOCAB
    told: Mapping[str, Any] = field(default_factory=dict)


class Host(NamedTuple):
    """A small copy and what is known about it."""

    model: Any
    facts: Facts


def filled(model: nn.Module, seed: int) -> Any:
    """The model in eval mode with weights from `seed`, large enough that every token depends on every token it reads.

    Zero-initialised parts (adaLN, output layers) become random, too; norms stay near one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                weight.copy_(noise * 1.5 / weight.shape[-1] ** 0.5)
            else:
                weight.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()


def block_causal(count: int, block: int) -> Tensor:
    """[N, N] bool: may i read j?"""
    number = torch.arange(count) // block
    return number[:, None] >= number[None, :]
