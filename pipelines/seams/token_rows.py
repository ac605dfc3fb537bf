"""Some tokens of a stream run through blocks whose other tokens are left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hasten.caching.stack import ChosenTokens
from hasten.pipelines.seams.structure import BlockCall, Stack


class TokenRows:
    """The chosen tokens of one stream on their way through a piece, without the others.

    index: int64 [count], which tokens. stream: [batch, tokens, channels] where the piece begins. lacked: what the others
    added to them at the last computed step, None where that is not known. Arguments that are indexed by
    token (rotary tables, per-token modulation) are cut to the same tokens: those with the stream's number of
    tokens as dimension 1, or as their only dimension of that size. Whether that is right on a network is proved there
    by running all tokens in another order, which must give the same output in that order.
    """

    def __init__(self, index: Tensor, stream: Tensor, lacked: Tensor | None = None) -> None:
        self.index, self.num, self.lacked = index, stream.shape[1], lacked
        self.tokens = stream.index_select(1, index)

    @property
    def share(self) -> float:
        """Part of all tokens that run."""
        return self.index.numel() / self.num

    def run(self, stack: Stack, block: nn.Module, call: BlockCall, added: Tensor | None) -> None:
        """Take the tokens through `block`. added: what the network has added to the whole stream since the last one."""
        if added is not None:
            self.tokens = self.tokens + added.index_select(1, self.index)
        slot = stack.slots[0]
        args = [self.tokens if slot == i else self._cut(value) for i, value in enumerate(call.args)]
        kwargs = {name: self.tokens if slot == name else self._cut(value) for name, value in call.kwargs.items()}
        self.tokens = stack.outputs(block(*args, **kwargs))[0]

    def lack(self, out: Tensor) -> ChosenTokens:
        """What the others added to these tokens in `out`, the stream behind blocks that all tokens ran through."""
        return ChosenTokens(self.index, out.index_select(1, self.index) - self.tokens)

    def put_into(self, stream: Tensor) -> Tensor:
        """`stream` with the chosen tokens replaced by what came out for them, and what they lacked before."""
        found = self.tokens if self.lacked is None else self.tokens + self.lacked
        return stream.index_copy(1, self.index, found.to(stream.dtype))

    def _cut(self, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._cut(inner) for inner in value)
        if not isinstance(value, Tensor) or self.num == 1:
            return value
        spots = [dim for dim, size in enumerate(value.shape) if size == self.num]
        if 1 in spots and value.ndim > 2:
            return value.index_select(1, self.index)
        return value.index_select(spots[0], self.index) if len(spots) == 1 else value


def not_token_wise(stacks: list[Stack], shapes: list[torch.Size], blocks: list[nn.Module]) -> str:
    """Why tokens cannot be run apart in these lists; empty when they can as far as one sees without trying."""
    if len(stacks) != 1 or len(stacks[0].slots) != 1:
        return "its blocks have more than one stream"
    if any(getattr(block, "_compiled_call_impl", None) is not None or hasattr(block, "_orig_mod") for block in blocks):
        return "its blocks are compiled, and every other number of tokens would be compiled anew"
    if len(shapes[0]) != 3:
        return f"its stream has {len(shapes[0])} dimensions, not [batch, tokens, channels]"
    return ""


def shuffled(num: int, device: torch.device) -> Tensor:
    """All token indices in a fixed order that moves every token but at most one."""
    return torch.arange(num, device=device).flip(0)
