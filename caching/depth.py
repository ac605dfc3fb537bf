"""Other tokens in other layers: what a KV policy that works layer by layer does during one call of the model.

Shapes: B texts, L slots; of one call m texts with N tokens each, n of which one layer computes; C channels of the stream
between layers; Hq, Hk heads, K keys, D, Dv head dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hasten.caching.store import Pass

Values = Callable[[Tensor], Tensor]
"""The values [m, N, Hk * Dv] that a layer's attention would make of its input [m, N, C], without the rest of the layer."""


class Depth:
    """Chooses, layer by layer, which of a call's tokens are computed, and says what the others are.

    valued: it asks for `Values`; a model of which they cannot be had is refused.
    """

    valued: bool = False

    def enter(self, layer: int, x: Tensor, now: Pass, values: Values | None) -> Tensor | None:
        """Which tokens `layer` computes: numbers of the call's tokens, int64 [m, n], N where there is none; None: all.

        x [m, N, C]: what goes into the layer. values: None until a call has computed all (and unless `valued`).
        """
        return None

    def leave(self, layer: int, x: Tensor, y: Tensor, index: Tensor | None, now: Pass) -> Tensor:
        """What goes into the next layer, [m, N, C]. y [m, n, C]: what the layer made of the tokens `index`."""
        return y

    def watch(self, layer: int, q: Tensor, keys: Tensor, now: Pass, scale: float) -> None:
        """Told of the attention of `layer`: q [m, Hq, n, D], keys [m, Hk, K, D]; `now` is the call of these n tokens."""


def put(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """A copy of x [m, N, C] with its rows `index` (int64 [m, n], N for none) replaced by y [m, n, C]."""
    wide = x.new_empty(x.shape[0], x.shape[1] + 1, x.shape[2])  # one more row, for what is none
    wide[:, :-1] = x
    return wide.scatter_(1, index[..., None].expand(-1, -1, x.shape[2]), y.to(x.dtype))[:, :-1]
