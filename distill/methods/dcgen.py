"""A model moved to the latents of a deeper autoencoder: fewer tokens in every evaluation, most of its weights kept.

DC-Gen, arXiv 2509.25180: between the two kinds of latents there is a gap, and fine-tuning across it at once loses what the
model knows. So the new patch embedder learns first to give the tokens that the old one gives (`align`), then the new head
what the frozen blocks need to say (`head`), and then adapters on the blocks together with both (the rest). Of a picture x in
old and y in new latents,

    align: |E_new(y) - mean over the old tokens at that place of E_old(x)|^2;      head, rest: the network's own loss at y

(deep autoencoders: DC-AE, arXiv 2410.10733). What differs from the paper: its training code is not public, so that the
length of each part, and that the head begins at zero, are ours; positions are spread so that the new tokens stand in the
middle of what they replace, up to half an old token.

Shapes: B rows; x [B, C, H, W] old and y [B, C', H', W'] new latents in their networks' scales; embeddings [B, D, h, w].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Loss, Method, MethodState
from hasten.distill.methods.flow import Lora, aim, angles
from hasten.distill.network.paths import spread
from hasten.distill.network.roles import Role
from hasten.errors import ModelError

EMBEDDERS = ("pos_embed.proj", "patch_embed.proj")
HEADS = ("proj_out", "proj_out_2")
"""What diffusers' networks of pictures call the convolution that makes tokens of latents, and the layer that ends them."""


class DCGen(Method):
    """The model on a deeper autoencoder's latents, by its own loss.

    autoencoder: folder of an AutoencoderKL. align, head: shares of the steps for the embedder alone and the head alone.
    """

    kind: ClassVar[str] = "dcgen"
    autoencoder: str = ""
    align: float = Field(0.3, ge=0, lt=1)
    head: float = Field(0.1, ge=0, lt=1)

    def start(self, facts: Facts) -> MethodState:
        return _DCGenState(self, facts)


@dataclass(slots=True)
class TwoSpaces(Batch):
    """Pictures in both spaces. x0: new latents; old: [B, C, H, W]."""

    old: Tensor | None = None


class _DCGenState(MethodState):
    def __init__(self, method: DCGen, facts: Facts) -> None:
        super().__init__(facts)
        student = facts.roles.of("student")
        self.plain = Role("plain", student.host, student.stage, (), False)
        self.old = embedder(facts.roles["teacher"].host.network)
        self.embedder, self.head = embedder(student.host.network), head(student.host.network)
        self.times = Lora()
        self.bounds = round(method.align * facts.steps), round((method.align + method.head) * facts.steps)

    def part(self, step: int) -> Literal["align", "head", "all"]:
        """What is trained in this step."""
        return "align" if step < self.bounds[0] else "head" if step < self.bounds[1] else "all"

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        part = self.part(step)
        self.embedder.requires_grad_(part != "head")
        self.head.requires_grad_(part != "align")
        if part == "align":
            return self._aligned(batch)
        return self._own(self.plain if part == "head" else self.roles["student"], batch, draw)

    def _aligned(self, batch: Batch) -> Loss:
        assert isinstance(batch, TwoSpaces) and batch.old is not None and batch.x0 is not None
        made = _embedded(self.embedder, batch.x0)
        with torch.no_grad():
            wanted = functional.adaptive_avg_pool2d(_embedded(self.old, batch.old), (made.shape[-2], made.shape[-1]))
        rows = (made - wanted).square().flatten(1).mean(1)
        return Loss(rows, {"apart": (rows.mean() / wanted.var()).detach()})

    def _own(self, role: Role, batch: Batch, draw: Draw) -> Loss:
        assert batch.x0 is not None
        x0, z, path = batch.x0, draw.normal("z", batch.x0), role.host.path
        tau = angles(self.times, path, draw)
        x = spread(tau.cos(), x0) * x0 + spread(tau.sin(), x0) * z
        told = role.answer(x, tau, batch.condition)
        return Loss((told - aim(path, x0, z, tau)).square().flatten(1).mean(1))

    def heads(self, role: str) -> Iterable[tuple[str, nn.Module]]:
        return [("embedder", self.embedder), ("head", self.head)] if role == "student" else []


def embedder(network: nn.Module) -> nn.Module:
    """What makes tokens of latents. Raises `ModelError` where that is no convolution known by name."""
    return network.get_submodule(named(network, EMBEDDERS, nn.Conv2d))


def head(network: nn.Module) -> nn.Module:
    """What makes latents of tokens."""
    return network.get_submodule(named(network, HEADS, nn.Linear))


def named(network: nn.Module, names: Iterable[str], kind: type[nn.Module]) -> str:
    """The name of these that is a module of this kind."""
    modules = dict(network.named_modules())
    for name in names:
        if isinstance(modules.get(name), kind):
            return name
    raise ModelError(
        f"{type(network).__name__} has no {' or '.join(names)} that is a {kind.__name__}, so that it cannot be moved to other"
        " latents. Known are PixArt, Sana, SD3 and DiT."
    )


def _embedded(module: nn.Module, latents: Tensor) -> Tensor:
    """[B, D, h, w] in float32. Data without noise are put into the network as they are."""
    weight = next(module.parameters())
    made: Tensor = module(latents.to(weight.dtype))
    return made.float()
