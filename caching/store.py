"""Keys and values of a batch of texts, kept by slot.

Shapes: B texts, L slots, one more place (number L, the bin) for what is no slot; m of the texts with N computed tokens
each; Hk key heads, D, Dv head dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Keep = Literal["store", "scratch", "none"]


@dataclass(slots=True)
class Pass:
    """One call of the model on some tokens of some texts.

    members int64 [m]: which texts. slots int64 [m, N]: where each token stands, L where there is none. ids int64 [m, N].
    keep: "store": the new keys and values take their places in the store, and everything in it is read; "scratch": they
    stand behind it for this call alone, so that drafts and shadows share their slots; "none": only the new ones are read.
    visible bool [m, N, K]: which keys a token reads, K = L + 1 for "store", L + 1 + N for "scratch", N for "none"; None:
    all of them.
    read int64 [m, R]: whose logits are wanted, as numbers of tokens, N where none; target int64 [m, R]: the slots that
    these logits are about, L where none.
    whole: the tokens are all the slots in order, so that nothing has to be gathered.
    """

    members: Tensor
    slots: Tensor
    ids: Tensor
    keep: Keep
    visible: Tensor | None
    read: Tensor
    target: Tensor
    whole: bool = False


class KVStore:
    """Per layer: keys [B, L + 1, Hk, D] and values [B, L + 1, Hk, Dv], made at the first call.

    present bool [B, L + 1]: slots that hold something. Policies may clear it (`forget`).
    """

    def __init__(self, texts: int, slots: int, device: torch.device) -> None:
        self.slots = slots
        self.present = torch.zeros(texts, slots + 1, dtype=torch.bool, device=device)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._all = torch.arange(texts, device=device)

    def note(self, done: Pass) -> None:
        """These tokens' keys and values are in the store from now on."""
        if done.keep == "store":
            self.present[done.members[:, None], done.slots] = True
            self.present[:, self.slots] = False

    def forget(self, chosen: Tensor) -> None:
        """Drop slots, bool [B, L]: nobody reads them until they are computed again."""
        self.present[:, : self.slots] &= ~chosen

    def exchange(self, layer: int, k: Tensor, v: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """Give the new rows k [m, Hk, N, D], v [m, Hk, N, Dv] of a layer; get what is read, [m, Hk, K, D | Dv]."""
        if now.keep == "none":
            return k, v
        if layer not in self.keys:
            shape = (self.present.shape[0], self.slots + 1, k.shape[1])
            self.keys[layer] = k.new_zeros(*shape, k.shape[3])
            self.values[layer] = v.new_zeros(*shape, v.shape[3])
        held = (self.keys[layer], self.values[layer])
        everyone = len(now.members) == len(self._all)
        if now.keep == "store":
            where = (now.members[:, None], now.slots)
            for store, new in zip(held, (k, v), strict=True):
                store[where] = new.transpose(1, 2).to(store.dtype)
        read = [store if everyone else store[now.members] for store in held]
        if now.keep == "scratch":
            read = [torch.cat([store, new.transpose(1, 2)], 1) for store, new in zip(read, (k, v), strict=True)]
        return read[0].transpose(1, 2), read[1].transpose(1, 2)

    @property
    def bytes(self) -> int:
        """Bytes held."""
        tensors = [*self.keys.values(), *self.values.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
