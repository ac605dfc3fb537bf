"""Multi-token prediction with a gated adapter ("Your LLM Knows the Future", Samragh et al., arXiv 2507.11851, section 3).

Mask tokens stand behind a beginning of a text; the one in place t says the token of place t + 1, as every place of a causal
model does. The adapter acts on masks alone (`gate.py`), so that the model's ordinary predictions stay what they were,
and verify what the masks say. A small sampler head looks at a mask's state and at the token before, so that tokens said
at once fit each other. Loss: cross-entropy of both, and the distance of a mask's state from that of the model itself in
the same place of the whole text (latent consistency).

Differs from the paper: all masks are one token (their positions tell them apart), the model's own mask token, whose
embedding stays as it is; and each row has one beginning per step, drawn evenly, in place of all at once.

Shapes: B texts of at most L tokens; n masks; C channels; V logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import save
from torch import Tensor, nn

from hasten.atomic import atomic_write
from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Loss, MethodState
from hasten.distill.text.gate import gated
from hasten.distill.text.method import TextMethod, TextState
from hasten.distill.text.roles import TextRole, Texts

FILE = "sampler.safetensors"


class MultiToken(TextMethod):
    """masks: tokens said at once beside the next one. consistency: weight of the latent distance."""

    kind: ClassVar[str] = "mtp"
    masks: int = Field(4, ge=1)
    consistency: float = Field(1.0, ge=0)

    def start(self, facts: Facts) -> MethodState:
        return _MultiTokenState(self, facts)

    def used(self, model: str, student: Path) -> str:
        return f"hasten.accelerate(model, 'gated-mtp:path={student}') drafts with it; python benchmarks/several_tokens.py {student} counts what it saves"


class SamplerHead(nn.Module):
    """State of a mask [n, C] and embedding of the token before [n, C] -> state [n, C]. Its last layer starts at zero: at first
    it is the mask's own state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both = nn.Linear(2 * width, width, device="meta").to_empty(device="cpu")
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, width, device="meta").to_empty(device="cpu")
        nn.init.normal_(self.both.weight, std=(2 * width) ** -0.5, generator=torch.Generator().manual_seed(0))
        for zero in (self.both.bias, self.last.weight, self.last.bias):
            nn.init.zeros_(zero)

    def forward(self, state: Tensor, before: Tensor) -> Tensor:
        mixed = self.both(torch.cat([state, before], 1))
        made: Tensor = state + self.last(self.norm(F.silu(mixed)))
        return made


class _MultiTokenState(TextState):
    def __init__(self, method: MultiToken, facts: Facts) -> None:
        super().__init__(method, facts)
        self.method, self.mask = method, self.mask_token(method.kind)
        first = next(self.learner.call.head.parameters())
        self.sampler_head = SamplerHead(int(first.shape[1])).to(first.device)

    def heads(self, role: str) -> Iterable[tuple[str, nn.Module]]:
        return [("sampler", self.sampler_head)]

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        texts, call = Texts.of(batch), self.learner.call
        room = (texts.end - texts.start - 1).clamp(min=1)
        cut = texts.start + (draw.uniform("cut") * room).long()
        asked = masks_behind(texts, cut, self.method.masks)
        with torch.no_grad():
            aim = self.roles.of("teacher").states(texts.ids, texts.end, asked)  # type: ignore[attr-defined]  # checked above
        state = masked_states(self.learner, texts, asked, self.mask)
        target, row = texts.ids[asked.roll(1, 1)], asked.nonzero()[:, 0]
        said = call.read(state)
        chosen = call.read(self.sampler_head(state, embedded(self.learner, texts.ids[asked])))
        cross = F.cross_entropy(said, target, reduction="none") + F.cross_entropy(chosen, target, reduction="none")
        each = cross + self.method.consistency * (state.float() - aim.float()).square().mean(1)
        zeros = each.new_zeros(len(texts.ids))
        rows = zeros.index_add(0, row, each) / zeros.index_add(0, row, torch.ones_like(each)).clamp(min=1)
        right = (chosen.argmax(1) == target).float().mean()
        return Loss(rows, {"right": right, "right_alone": (said.argmax(1) == target).float().mean()})

    def write(self, folder: Path, base: str, recipe: str, weights: Mapping[str, Tensor] | None) -> None:
        """Write the adapter for peft, and the sampler head beside it."""
        super().write(folder, base, recipe, weights)
        averaged = {name.removeprefix("heads.sampler."): value for name, value in (weights or {}).items() if "heads." in name}
        tensors = {**self.sampler_head.state_dict(), **averaged}
        atomic_write(folder / FILE, save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}))


def masks_behind(texts: Texts, cut: Tensor, count: int) -> Tensor:
    """bool [B, L]: places of at most `count` masks from `cut` (int64 [B]) on, each with a token behind it in the text."""
    last = torch.minimum(cut + count, texts.end - 1)
    return (texts.place >= cut[:, None]) & (texts.place < last[:, None])


def masked_states(role: TextRole, texts: Texts, asked: Tensor, mask: int) -> Tensor:
    """States [n, C] of masks at `asked`, with what is before them in the text and nothing behind, under the gate."""
    end = torch.where(asked, texts.place + 1, 0).amax(1)
    end = torch.where(end > 0, end, texts.start)  # a row without masks: any length will do
    network, adapter = role.call.network, role.adapters[-1]
    with gated(network, adapter, mask):
        return role.states(texts.ids.masked_fill(asked, mask), end, asked)


def embedded(role: TextRole, tokens: Tensor) -> Tensor:
    """The model's embeddings [n, C] of tokens int64 [n]."""
    network: Any = role.call.network
    found: Tensor = network.get_input_embeddings()(tokens)
    return found


@torch.no_grad()
def accepted(role: TextRole, head: SamplerHead, texts: Texts, cut: Tensor, count: int, mask: int) -> Tensor:
    """How many masks in a row behind `cut` (int64 [B]) say, through the sampler head, what the model itself wrote, int64 [B].

    What a mask is told as the token before it is the accepted one, so that the first mismatch ends the row as in decoding.
    """
    asked = masks_behind(texts, cut, count)
    chosen = role.call.read(head(masked_states(role, texts, asked, mask), embedded(role, texts.ids[asked]))).argmax(1)
    right = torch.zeros_like(asked)
    right[asked] = chosen == texts.ids[asked.roll(1, 1)]
    behind = right.long() + (texts.place < cut[:, None]).long()  # ones before the cut, then the masks
    return (behind.cumprod(1).sum(1) - cut).clamp(min=0)
