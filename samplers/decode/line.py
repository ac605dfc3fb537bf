"""A chain of drafts whose places are guessed all at once.

Shapes: B rows, W places, V tokens of the vocabulary. Node i + 1 is the guess at place i, the one behind node i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.samplers.decode.coupling import coupled
from hasten.samplers.decode.draws import sample
from hasten.samplers.decode.proposal import _SEAL, Proposal
from hasten.samplers.decode.tree import Warp


class Line:
    """A proposal that is one chain, in the making: what a drafter thinks of each place is known before any is drawn.

    root int64 [B]: last committed token of every row. logits [B, W, V]: of the places. where bool [B, W]: places that a row has room
    for, from the left. warp: processors and temperature of the call; None: softmax alone. assumed int64 [B, W]: tokens that
    processors which look at the prefix see in the places before; others do not look at them. They must not depend on the draws
    that `redrawn` is given for these places or later ones.

    laws float32 [B, W, V]: what is drawn from. They do not depend on what is drawn, so that a draw of one place says nothing of the
    next one's law.
    """

    def __init__(self, root: Tensor, logits: Tensor, where: Tensor, warp: Warp | None, assumed: Tensor, source: str) -> None:
        self.root, self.where, self.source = root[:, None], where, source
        place = torch.arange(logits.shape[1], device=root.device).expand(len(root), -1)
        before = torch.cat([self.root, assumed[:, :-1]], 1)
        warped = logits.float() if warp is None else warp(logits, place, before, place - 1)
        self.laws = torch.softmax(warped, -1)
        self._parent = torch.nn.functional.pad(place, (1, 0), value=-1)
        self._slot = torch.nn.functional.pad(place, (0, 1), value=-1)

    def drawn(self) -> Proposal:
        """Every place drawn from its law."""
        return self._drawn(sample(self.laws, 1, "iid")[..., 0])

    def redrawn(self, before: Proposal, node: Tensor, there: Tensor) -> Proposal:
        """The same, and the token of `node` int64 [B, W] of an earlier proposal as often as their laws allow; `there` bool [B, W]:
        where there is such a node. Right as long as nothing was decided by that node since it was drawn, and it is used once."""
        token, held = before.tokens.gather(1, node), there & before.valid.gather(1, node)
        return self._drawn(coupled(self.laws, before.law_of(node, self.laws.shape[-1]), token, held))

    def best(self) -> Proposal:
        """The most probable tokens, as points."""
        return self.points(self.laws.argmax(-1))

    def points(self, tokens: Tensor) -> Proposal:
        """Tokens int64 [B, W] that were chosen in any way."""
        tokens, valid, score = self._chain(tokens)
        return Proposal(tokens, self._parent, valid, score, sources=(self.source,))

    def _drawn(self, tokens: Tensor) -> Proposal:
        tokens, valid, score = self._chain(tokens)
        drawn = valid & (self._parent >= 0)
        return Proposal(
            tokens, self._parent, valid, score, sources=(self.source,), law="iid", drawn=drawn, _laws=self.laws,
            _slot=self._slot, _seal=_SEAL,
        )  # fmt: skip

    def _chain(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, validity and score of the nodes [B, W + 1]. What has no chance is not drafted, nor what stands behind it."""
        chance = self.laws.gather(-1, tokens[..., None])[..., 0]
        valid = (self.where & (chance > 0)).cumprod(1).bool()
        score = chance.cumprod(1) * valid
        first = torch.ones_like(self.root)
        return torch.cat([self.root, tokens], 1), torch.cat([first.bool(), valid], 1), torch.cat([first.float(), score], 1)
