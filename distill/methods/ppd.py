"""Parallel prompt tokens (PPD: Chen et al., arXiv 2405.18628, section 3): trained embeddings behind a text, each of which
says one of the tokens behind the next one.

Prompt token i stands i places behind the last token of the text and says the token i + 1 places on. It is an ensemble: several
embeddings that do not see each other, only the text and those of the same number in prompt tokens before them; their
logits are averaged. The model is frozen and nothing of the text sees them, so that what it says itself, which verifies, stays as
it is. Loss: the sum over i of decay^(i - 1) times the divergence KL(the model in that place of the whole text || prompt token i).

Differs from the paper: several places of each text are asked at once in one evaluation, each with prompt tokens that see the
text up to there; the first embeddings are drawn with mean and spread of the model's own.

Shapes: B texts of at most L tokens, m of them of length N; P prompt tokens of E embeddings of C channels; G places; V logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor, nn

from hasten.atomic import atomic_write
from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Loss, MethodState
from hasten.distill.text.method import TextMethod, TextState
from hasten.distill.text.roles import TextCall, Texts

FILE = "prompt_tokens.safetensors"


class PromptTokens(TextMethod):
    """distances: prompt tokens. ensemble: embeddings of each. places: of each text, asked at once. decay: of the loss by
    distance."""

    kind: ClassVar[str] = "ppd"
    trains: ClassVar[tuple[str, ...]] = ()
    distances: int = Field(3, ge=1)
    ensemble: int = Field(4, ge=1)
    places: int = Field(4, ge=1)
    decay: float = Field(0.8, gt=0, le=1)

    def start(self, facts: Facts) -> MethodState:
        return _PromptState(self, facts)

    def used(self, model: str, student: Path) -> str:
        return f"hasten.accelerate(model, 'ppd:path={student}') drafts with it; python benchmarks/several_tokens.py {student} counts what it saves"


class PromptEmbeddings(nn.Module):
    """weight [P, E, C]. The first ones follow from the model's `embeddings` [V, C]."""

    def __init__(self, distances: int, ensemble: int, embeddings: Tensor) -> None:
        super().__init__()
        width = embeddings.shape[1]
        noise = torch.randn(distances, ensemble, width, generator=torch.Generator().manual_seed(0)).to(embeddings.device)
        own = embeddings.detach().float()
        self.weight = nn.Parameter(own.mean(0) + own.std(0) * noise)


class _PromptState(TextState):
    def __init__(self, method: PromptTokens, facts: Facts) -> None:
        super().__init__(method, facts)
        self.method = method
        network: Any = self.learner.call.network
        self.prompts = PromptEmbeddings(method.distances, method.ensemble, network.get_input_embeddings().weight)

    def heads(self, role: str) -> Iterable[tuple[str, nn.Module]]:
        return [("prompts", self.prompts)]

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        texts, m = Texts.of(batch), self.method
        over = texts.over(self.learner.call.facts.eos_ids)
        room = over - texts.start
        drawn = torch.stack([(draw.uniform(f"place {number}") * room).long() for number in range(m.places)], 1)
        at = texts.start[:, None] - 1 + drawn
        said, own = prompt_logits(self.learner.call, self.prompts.weight, texts, at)
        there = at[..., None] + torch.arange(2, m.distances + 2, device=at.device) < over[:, None, None]
        aim = own.log_softmax(3)
        apart = (aim.exp() * (aim - said.log_softmax(3))).sum(3) * there
        weight = m.decay ** torch.arange(m.distances, device=at.device)
        count = there.sum(1).clamp(min=1)
        right = ((said.argmax(3) == aim.argmax(3)) & there).sum((0, 1)) / there.sum((0, 1)).clamp(min=1)
        told = {f"right_{number}": value for number, value in enumerate(right)}
        return Loss((apart.sum(1) / count * weight).sum(1), told)

    def write(self, folder: Path, base: str, recipe: str, weights: Mapping[str, Tensor] | None) -> None:
        """Write the embeddings, with the model that they are for in the header."""
        found = (weights or {}).get("heads.prompts.weight", self.prompts.weight)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / FILE, save({"weight": found.detach().cpu().contiguous()}, {"model": base}))


def prompt_logits(call: TextCall, prompts: Tensor, texts: Texts, at: Tensor) -> tuple[Tensor, Tensor]:
    """Behind the places `at` (int64 [B, G]): what prompt tokens [P, E, C] say, and what the model itself says in their places of
    the text (that of its last token behind its end), without gradient; float32 [B, G, P, V] each."""
    said, own, order = [], [], []
    for length in sorted(set(texts.end.tolist())):  # one look at the device, as in `each_length`
        mine = (texts.end == length).nonzero()[:, 0]
        of_prompts, of_text = _of_rows(call, prompts, texts.ids[mine, : int(length)], at[mine])
        said.append(of_prompts)
        own.append(of_text)
        order.append(mine)
    back = torch.cat(order).argsort()
    return torch.cat(said)[back], torch.cat(own)[back].detach()


def _of_rows(call: TextCall, prompts: Tensor, rows: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The same of rows int64 [m, N] without padding."""
    network: Any = call.network
    (count, ensemble, _), (m, n), places = prompts.shape, rows.shape, at.shape[1]
    embedded = network.get_input_embeddings()(rows)
    more = prompts.to(embedded.dtype).flatten(0, 1).repeat(places, 1).expand(m, -1, -1)
    distance = torch.arange(1, count + 1, device=rows.device)
    place = at[..., None] + distance
    position = (at[..., None] + distance.repeat_interleave(ensemble)).flatten(1)
    found = network(
        inputs_embeds=torch.cat([embedded, more], 1), attention_mask=sight(at, n, count, ensemble),
        position_ids=torch.cat([torch.arange(n, device=rows.device).expand(m, -1), position], 1), use_cache=False,
    ).logits  # fmt: skip
    said = call.allowed(found[:, n:].flatten(0, 1)).view(m, places, count, ensemble, -1).mean(3)
    own = found[torch.arange(m, device=rows.device)[:, None], place.clamp(max=n - 1).flatten(1)]
    return said, call.allowed(own.flatten(0, 1)).view(said.shape)


def sight(at: Tensor, n: int, count: int, ensemble: int) -> Tensor:
    """Which tokens (last) a token sees, bool [m, 1, N + G P E, N + G P E]: of text those before it, and itself; a prompt token,
    the text up to its place (`at` int64 [m, G]) and of prompt tokens of this place those of its number in the ensemble."""
    m, places = at.shape
    number = torch.arange(places * count * ensemble, device=at.device)
    group, distance, member = number // (count * ensemble), number // ensemble % count, number % ensemble
    same = (group[:, None] == group) & (member[:, None] == member) & (distance[:, None] >= distance)
    place = torch.arange(n, device=at.device)
    size = n + len(number)
    seen = torch.zeros(m, 1, size, size, dtype=torch.bool, device=at.device)
    seen[:, 0, :n, :n] = place[:, None] >= place
    seen[:, 0, n:, :n] = place <= at[:, group][..., None]
    seen[:, 0, n:, n:] = same
    return seen


@torch.no_grad()
def accepted(call: TextCall, prompts: Tensor, texts: Texts, at: Tensor) -> Tensor:
    """How many prompt tokens in a row behind `at` (int64 [B, G]) say what the model itself wrote there, int64 [B, G].

    The token that the model itself says behind a place is not counted, and behind the end of a text nothing is.
    """
    said, _ = prompt_logits(call, prompts, texts, at)
    place = at[..., None] + 2 + torch.arange(prompts.shape[0], device=at.device)
    target = texts.ids.gather(1, place.clamp(max=texts.ids.shape[1] - 1).flatten(1)).view(place.shape)
    right = (said.argmax(3) == target) & (place < texts.end[:, None, None])
    return right.long().cumprod(2).sum(2)
