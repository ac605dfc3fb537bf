"""Keys and values of a batch of texts, kept by slot.

Shapes: B texts, L slots, one more place (number L, the bin) for what is no slot; m of the texts with N computed tokens
each; Hk key heads, D, Dv head dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hasten.caching.depth import Depth

Keep = Literal["store", "scratch", "none"]


@dataclass(slots=True)
class Pass:
    """One call of the model on some tokens of some texts.

    members int64 [m]: which texts. slots int64 [m, N]: where each token stands, L where there is none. ids int64 [m, N].
    keep: "store": the new keys and values take their places in the store, and everything in it is read; "scratch": they
    stand behind it for this call alone, so that drafts share their slots; "none": only the new ones are read.
    shadows: how many of the last tokens stand behind the store in any case: masks in the place of written slots.
    visible bool [m, N, K]: which keys a token reads, K = L + 1 for "store", and one more for each shadow, L + 1 + N for
    "scratch", N for "none"; None: all L slots, or all N tokens for "none".
    read int64 [m, R]: whose logits are wanted, as numbers of tokens, N where none; target int64 [m, R]: the slots that
    these logits are about, L where none.
    whole: the tokens are all the slots in order, so that nothing has to be gathered. run: the members as a slice, where
    they follow one another, so that what they read need not be copied. depth: chooses the tokens of each layer; work
    float64 [m]: token-layers computed so far, of a call with a depth.
    """

    members: Tensor
    slots: Tensor
    ids: Tensor
    keep: Keep
    visible: Tensor | None
    read: Tensor
    target: Tensor
    whole: bool = False
    run: slice | None = None
    depth: Depth | None = None
    work: Tensor | None = None
    shadows: int = 0

    @property
    def kept(self) -> int:
        """How many of the tokens, the first ones, take their places in a store."""
        return self.slots.shape[1] - self.shadows

    def part(self, index: Tensor, none: int) -> Pass:
        """The same call for some of its tokens: index int64 [m, n], N for none. none: the number of slots, L."""
        near = index.clamp(max=self.slots.shape[1] - 1)
        visible = self.visible
        if visible is not None:
            rows = visible.expand(len(index), -1, -1)
            visible = rows.gather(1, near[..., None].expand(-1, -1, rows.shape[2]))
        slots = torch.where(index < self.slots.shape[1], self.slots.gather(1, near), none)
        return replace(self, slots=slots, ids=self.ids.gather(1, near), visible=visible, whole=False)


class KVStore:
    """Per layer: keys [B, L + 1, Hk, D] and values [B, L + 1, Hk, Dv], made at the first call.

    present bool [B, L + 1]: slots that hold something. full: texts, known to the host, of which every slot does.
    A slot's place is its position: a canvas is rewritten where it stands (`refresh`), nothing is appended.
    """

    def __init__(self, texts: int, slots: int, device: torch.device) -> None:
        self.slots = slots
        self.present = torch.zeros(texts, slots + 1, dtype=torch.bool, device=device)
        self.full: set[int] = set()
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def note(self, done: Pass) -> None:
        """These tokens' keys and values are in the store from now on."""
        if done.keep == "store":
            self.present[done.members[:, None], done.slots[:, : done.kept]] = True
            self.present[:, self.slots] = False
            if done.whole and done.run is not None:
                self.full.update(range(done.run.start, done.run.stop))

    def forget(self, chosen: Tensor) -> None:
        """Drop slots, bool [B, L]: nobody reads them until they are computed again."""
        self.present[:, : self.slots] &= ~chosen
        self.full.clear()

    def positions(self) -> Tensor:
        """The position of what each place holds, int64 [B, L + 1]; -1 where it holds nothing."""
        return torch.where(self.present, torch.arange(self.slots + 1, device=self.present.device), -1)

    def exchange(self, layer: int, k: Tensor, v: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """Give the new rows k [m, Hk, N, D], v [m, Hk, N, Dv] of a layer; get what is read, [m, Hk, K, D | Dv]."""
        if now.keep == "none":
            return k, v
        if layer not in self.keys:
            shape = (self.present.shape[0], self.slots + 1, k.shape[1])
            self.keys[layer] = k.new_zeros(*shape, k.shape[3])
            self.values[layer] = v.new_zeros(*shape, v.shape[3])
        if now.keep == "store":
            self.refresh(layer, k, v, now)
        read = [self._of(store, now) for store in (self.keys[layer], self.values[layer])]
        if now.keep == "scratch" or now.shadows:
            behind = slice(now.kept if now.keep == "store" else 0, None)
            read = [torch.cat([store, new[:, :, behind].transpose(1, 2)], 1) for store, new in zip(read, (k, v), strict=True)]
        return read[0].transpose(1, 2), read[1].transpose(1, 2)

    def refresh(self, layer: int, k: Tensor, v: Tensor, now: Pass) -> None:
        """Write the rows of the slots `now.slots` over what stood there."""
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            rows = new[:, :, : now.kept].transpose(1, 2)
            if now.whole and now.run is not None:
                store[now.run, : self.slots] = rows
            else:
                store[now.members[:, None], now.slots[:, : now.kept]] = rows.to(store.dtype)

    def _of(self, store: Tensor, now: Pass) -> Tensor:
        """What the members read: a view where they follow one another."""
        mine = store[now.run] if now.run is not None else store[now.members]
        return mine if now.visible is not None else mine[:, : self.slots]

    @property
    def bytes(self) -> int:
        """Bytes held."""
        tensors = [*self.keys.values(), *self.values.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def numbered(chosen: Tensor, width: int, none: int) -> Tensor:
    """The columns `chosen` (bool [m, L]) as numbers int64 [m, width] in ascending order, filled up with `none`."""
    order = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return torch.where(chosen.gather(1, order), order, none)
