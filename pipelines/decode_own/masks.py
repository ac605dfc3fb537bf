"""Multi-token prediction by a gated adapter, as a drafter: mask tokens behind likely ends of the accepted path say later tokens.

The adapter acts on masks alone, so that one forward verifies, as the model, and drafts, as the student.

Shapes: B rows, N nodes, P masks, C channels, V tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hasten.errors import ModelError
from hasten.samplers.decode.proposal import Proposal, nothing
from hasten.samplers.decode.protocols import Context, DrafterState, Facts, Outcome
from hasten.samplers.drafters_own.asked import Asked, split, with_questions
from hasten.samplers.drafters_own.student import Student, loaded
from hasten.samplers.drafters_own.trees import ranked

STATE = "hidden:-1"
ADAPTER = "adapter_model.safetensors"


class Masks(Student):
    """The adapter and sampler head of `hasten train mtp` (Samragh et al., arXiv 2507.11851): a mask in place t says token t + 1,
    and the head makes it fit the token before.

    masks: behind one end. drafts: verified nodes of a round at most; the other `nodes` ask. width: guesses for each place.
    """

    kind: ClassVar[str] = "masks"
    file: ClassVar[str] = "sampler.safetensors"
    training: ClassVar[str] = "mtp"
    needs: ClassVar[frozenset[str]] = frozenset({STATE})
    nodes: int = Field(24, ge=1)
    masks: int = Field(3, ge=1)
    drafts: int = Field(6, ge=1)
    width: int = Field(3, ge=1)

    def start(self, facts: Facts) -> DrafterState:
        return _MasksState(self, facts)


class _MasksState(DrafterState):
    def __init__(self, part: Masks, facts: Facts) -> None:
        self.part, model = part, facts.host
        self.embed, self.last = model.get_input_embeddings(), model.get_output_embeddings()
        like = self.embed.weight
        self.head = SamplerWeights({name: each.to(like) for name, each in part.read().items()})
        part.fits(self.head.width, model)
        mask = getattr(model.config, "mask_token_id", None)
        if mask is None:
            raise ModelError(f"masks: the config of this {type(model).__name__} names no mask_token_id, which the adapter was trained on.")
        self.vectors = self.embed(torch.tensor([mask], device=like.device)).expand(part.masks, -1)[:, None]
        self.adapter = adapter(part, model)
        self.asked: Asked | None = None
        self.states: Tensor | None = None  # [B, P, C] of the masks behind the last accepted node
        self.known: Tensor | None = None  # bool [B]: in which rows

    def propose(self, context: Context, nodes: int) -> Proposal:
        if context.reach < 1:
            return nothing(context.last)
        drafts, anchors, distances, _ = split(nodes, self.part.masks, 1, self.part.drafts)
        made = self._drafts(context, drafts) if drafts else nothing(context.last)
        made, self.asked = with_questions(made, self.vectors[:distances], anchors)
        return made

    @contextmanager
    def reading(self, proposal: Proposal) -> Iterator[None]:
        if proposal.prompt is None:
            yield
            return
        gate = proposal.prompt[..., None].to(self.vectors.dtype)
        with ExitStack() as stack:
            for module, down, up in self.adapter:
                stack.callback(module.register_forward_hook(_branch(down, up, gate)).remove)
            yield

    def observe(self, outcome: Outcome, context: Context) -> None:
        self.states = self.known = None
        if self.asked is not None and outcome.proposal.prompt is not None:
            index, self.known = self.asked.behind(outcome)
            rows = torch.arange(len(index), device=index.device)[:, None]
            self.states = outcome.hidden[STATE][rows, index[..., 0]]
        self.asked = None

    def _drafts(self, context: Context, nodes: int) -> Proposal:
        if self.states is None or self.known is None:
            return nothing(context.last)
        states, known = self.states, self.known

        def guess(step: int, before: Tensor) -> tuple[Tensor, Tensor]:
            state = states[:, step - 1, None].expand(-1, before.shape[1], -1)
            logits = self.last(self.head(state, self.embed(before))).float()
            chances, tokens = logits.softmax(-1).topk(self.part.width, -1)
            return tokens, chances * known[:, None, None]

        return ranked(context, guess, states.shape[1], nodes, self.part.kind)


class SamplerWeights:
    """The sampler head of the training: state of a mask and embedding of the token before, [..., C] each, to a state."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.width = tensors["last.weight"].shape[0]

    def __call__(self, state: Tensor, before: Tensor) -> Tensor:
        own = self.tensors
        mixed = F.silu(F.linear(torch.cat([state, before], -1), own["both.weight"], own["both.bias"]))
        normed = F.layer_norm(mixed, mixed.shape[-1:], own["norm.weight"], own["norm.bias"])
        return state + F.linear(normed, own["last.weight"], own["last.bias"])


def adapter(part: Student, model: Any) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """(layer, its A [r, in], its B [out, r] with the scale) of a LoRA as peft writes it. Raises `ModelError` where the model has no
    such layers."""
    tensors = loaded(part.place / ADAPTER, part.training)
    says = json.loads((part.place / "adapter_config.json").read_text())
    rank = float(says["r"])
    scale = float(says["lora_alpha"]) / (rank**0.5 if says.get("use_rslora") else rank)
    found = []
    for name in sorted(name for name in tensors if name.endswith("lora_A.weight")):
        place = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        try:
            module = model.get_submodule(place)
        except AttributeError as error:
            raise ModelError(f"{part.kind}: this {type(model).__name__} has no layer {place!r}, which '{part.place}' adapts.") from error
        like = module.weight
        found.append((module, tensors[name].to(like), scale * tensors[name.replace("lora_A", "lora_B")].to(like)))
    return found


def _branch(down: Tensor, up: Tensor, gate: Tensor) -> Any:
    """A hook that adds the adapter's branch where `gate` [B, N, 1] is 1; x + 0 is x elsewhere."""

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + F.linear(F.linear(args[0], down), up) * gate

    return add
