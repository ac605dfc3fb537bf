"""A causal model becomes one that writes blocks in any order (Fast-dLLM v2, arXiv 2509.26328, section 3).

Tokens of a block are masked at a rate of the row's own, and again the other way round, so that each is asked for once. The
model reads [masked; clean] in one pass: a masked block sees itself and the clean blocks before it (BD3-LM, arXiv
2503.09573, section 3.1). The prediction of a token is read one place before it, as the causal model does it; at the
beginning of a block that place is in the clean text, as it is when a text is written.

Differs from the paper: rows are not packed, so that no block reaches over two texts, and only generated tokens are masked.

Shapes: B texts of at most L tokens; N tokens of one length; n tokens that are asked for, V logits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hasten.atomic import atomic_write
from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Loss, MethodState
from hasten.distill.pretrain.text_objective import seen_doubled
from hasten.distill.text.method import TextMethod, TextState
from hasten.distill.text.roles import TextRole, Texts

KIND = "hasten_diffusion.json"


class BlockDiffusion(TextMethod):
    """block: slots of a block, counted from the first token of a text. least: the smallest share that is masked."""

    kind: ClassVar[str] = "block"
    recipe: ClassVar[str] = "fast-dllm-v2"
    block: int = Field(8, ge=2)
    least: float = Field(0.1, gt=0, le=1)

    def start(self, facts: Facts) -> MethodState:
        return _BlockState(self, facts)

    def used(self, model: str, student: Path) -> str:
        return f"{super().used(model, student)}, and put what {KIND} says into its config as hasten_diffusion"


class _BlockState(TextState):
    def __init__(self, method: BlockDiffusion, facts: Facts) -> None:
        super().__init__(method, facts)
        self.method, self.mask = method, self.mask_token(method.kind)

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        texts = Texts.of(batch)
        inside = (texts.place >= texts.start[:, None]) & (texts.place < texts.end[:, None])
        noise = torch.special.ndtr(draw.normal("slots", torch.zeros(texts.ids.shape, device=texts.ids.device)))
        share = self.method.least + (1 - self.method.least) * draw.uniform("share")
        first = inside & (noise < share[:, None])
        asked = torch.cat([first, inside & ~first])
        both = Texts(texts.ids.repeat(2, 1), texts.start.repeat(2), texts.end.repeat(2))
        logits = doubled_logits(self.learner, both, asked, self.mask, self.method.block)
        cross = F.cross_entropy(logits, both.ids[asked], reduction="none")
        row, zeros = asked.nonzero()[:, 0] % len(texts.ids), cross.new_zeros(len(texts.ids))
        rows = zeros.index_add(0, row, cross) / zeros.index_add(0, row, torch.ones_like(cross)).clamp(min=1)
        return Loss(rows, {"right": (logits.argmax(1) == both.ids[asked]).float().mean()})

    def write(self, folder: Path, base: str, recipe: str, weights: Mapping[str, Tensor] | None) -> None:
        """Write the adapter, and beside it what the model's config has to say about it now (`hasten_diffusion`)."""
        super().write(folder, base, recipe, weights)
        said = {"kind": "block", "block": self.method.block, "shifted": True}
        atomic_write(folder / KIND, json.dumps(said) + "\n")


def doubled_logits(role: TextRole, texts: Texts, asked: Tensor, mask: int, block: int) -> Tensor:
    """float32 [n, V] of the tokens at `asked` (bool [B, L]), row after row, in texts that are masked there."""
    call, number = role.call, torch.arange(texts.ids.numel(), device=texts.ids.device).view_as(texts.ids)
    network: Any = call.network
    found, order = [], []
    for length in sorted(set(texts.end.tolist())):  # one look at the device, as in `TextCall.logits`
        mine, n = texts.end == length, int(length)
        clean, wanted = texts.ids[mine, :n], asked[mine, :n]
        ids = torch.cat([clean.masked_fill(wanted, mask), clean], 1)
        sight = seen_doubled(block, n).to(ids.device)[None, None].expand(len(ids), -1, -1, -1)
        position = torch.arange(n, device=ids.device).repeat(2)[None]
        with role.playing():
            whole = network(input_ids=ids, attention_mask=sight, position_ids=position, use_cache=False).logits
        row, at = wanted.nonzero(as_tuple=True)
        found.append(whole[row, torch.where(at % block == 0, n, 0) + at - 1])
        order.append(number[mine, :n][wanted])
    return call.allowed(torch.cat(found)[torch.cat(order).argsort()])
