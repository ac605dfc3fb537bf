"""What is done to logits between the model and everything that decides on them: guidance, and end tokens held back.

Shapes: m texts with N computed tokens each, R of them whose logits are wanted, V tokens, K keys; B texts, L slots in all.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hasten.caching.store import KVStore, Pass
from hasten.canvas import Canvas
from hasten.pipelines.text.loop import Evaluate


class Guided:
    """Classifier-free guidance: l = l_u + (w + 1) (l_c - l_u), where the second branch does not see the prompt.

    LLaDA (arXiv 2502.09992, `generate.py`): the prompt's tokens are masks in the branch u; w = `scale`, 0 is none. Both
    branches of a text are two rows of one call and have keys and values of their own, so that caches work with it (but for
    those that decide layer by layer, whose decisions are about one row).
    """

    def __init__(self, evaluate: Evaluate, canvas: Canvas, mask_id: int, scale: float) -> None:
        self.evaluate, self.mask_id, self.scale = evaluate, mask_id, scale
        self.start, self.texts = canvas.start, len(canvas.ids)
        self.store = KVStore(2 * self.texts, canvas.slots, canvas.ids.device)

    def __call__(self, now: Pass, store: KVStore) -> Tensor:
        hidden = now.slots < self.start[now.members][:, None]
        both = replace(
            now,
            members=torch.cat([now.members, now.members + self.texts]),
            slots=now.slots.repeat(2, 1),
            ids=torch.cat([now.ids, torch.where(hidden, self.mask_id, now.ids)]),
            visible=now.visible if now.visible is None else now.visible.expand(len(now.slots), -1, -1).repeat(2, 1, 1),
            read=now.read.repeat(2, 1),
            target=now.target.repeat(2, 1),
            run=None,
        )
        seen, blind = self.evaluate(both, self.store).float().chunk(2)
        store.note(now)
        return blind + (self.scale + 1) * (seen - blind)


class HoldEnd:
    """Makes end tokens less likely, and impossible before `least` tokens are written.

    penalty: taken off their logits, in nats; against texts that end at once because models were trained with answers
    that are filled up with end tokens.
    """

    def __init__(self, evaluate: Evaluate, canvas: Canvas, eos_ids: tuple[int, ...], penalty: float, least: int) -> None:
        self.evaluate, self.start, self.penalty, self.least = evaluate, canvas.start, penalty, least
        self.eos = torch.tensor(eos_ids, dtype=torch.int64, device=canvas.ids.device)

    def __call__(self, now: Pass, store: KVStore) -> Tensor:
        values = self.evaluate(now, store)
        early = now.target - self.start[now.members][:, None] < self.least
        ends = (values[..., self.eos] - self.penalty).masked_fill(early[..., None], -float("inf"))
        return values.index_copy(-1, self.eos, ends)
