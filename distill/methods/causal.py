"""A video student that reads no later frames, made from a teacher who reads all: regression on the teacher's pairs.

The first stage of CausVid (Yin et al., arXiv 2412.07772, section 4.3, "ODE initialization") and of Self-Forcing (arXiv
2506.08009, section 4): attention is block-causal over chunks of latent frames, every chunk has a noise level of its own from
those at which the student will be asked, and its x0 shall be what the teacher made of the same noise.

What differs from the papers: a noisy chunk lies on the straight way (on the circle) between the teacher's noise and result,
not on its solver's trajectory, which is not stored. In CausVid a chunk goes on from earlier chunks as noisy as it finds them
(`context = noisy`: diffusion forcing, arXiv 2407.01392); sampling goes on from finished ones, and by default so does
training (`clean`: teacher forcing).

Shapes: B rows; x0, z [B, C, F, H, W], F latent frames; tau float64 [B, F] radians.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Data, Facts, Loss, Method, MethodState
from hasten.distill.methods.pairs import pseudo_huber
from hasten.distill.network.chunks import Chunks, ChunkSteps, over


class Causal(Method):
    """A video student in chunks of frames, regressed on stored pairs.

    chunk: its latent frames; first: those of the first one, 0 for as many. calls, how, shift: how each chunk is sampled, as
    in `dmd` and `FewSteps.even`. context: what a chunk goes on from. huber: c of the pseudo-Huber loss, 0 for squares.
    """

    kind: ClassVar[str] = "causal"
    data: ClassVar[Data] = "pairs"
    chunk: int = Field(3, ge=1)
    first: int = Field(0, ge=0)
    calls: int = Field(4, ge=1)
    how: Literal["consistency", "ode"] = "consistency"
    shift: float = Field(1.0, gt=0)
    context: Literal["clean", "noisy"] = "clean"
    huber: float = Field(0.0, ge=0)

    def start(self, facts: Facts) -> MethodState:
        """Raises as `Chunks`."""
        return _CausalState(self, facts)


class _CausalState(MethodState):
    def __init__(self, method: Causal, facts: Facts) -> None:
        super().__init__(facts)
        self.method = method
        student = facts.roles["student"]
        steps = ChunkSteps.even(method.calls, student.host.path, method.how, shift=method.shift)
        self.steps = replace(steps, chunk=method.chunk, first=method.first)
        self.chunks = Chunks(student, self.steps)
        # A noisy context has to know finished frames, too: they are what is sampled from.
        levels = [*self.steps.angles, *([0.0] if method.context == "noisy" else [])]
        self.levels = torch.tensor(levels, dtype=torch.float64)

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        assert batch.x0 is not None and batch.z is not None
        tau = self._angles(batch.x0, draw)
        x = over(tau.cos(), batch.x0) * batch.x0 + over(tau.sin(), batch.x0) * batch.z
        before = batch.x0 if self.method.context == "clean" else None
        made = self.chunks.data(x, tau, batch.condition, before)
        return Loss(pseudo_huber(made - batch.x0, self.method.huber))

    def _angles(self, like: Tensor, draw: Draw) -> Tensor:
        """float64 [B, F]: a level for each chunk, drawn by itself."""
        chunks = self.chunks.spans(like.shape[2])
        drawn = [draw.below(f"call.{number}", len(self.levels)) for number in range(len(chunks))]
        wide = [each[:, None].expand(-1, end - begin) for each, (begin, end) in zip(drawn, chunks, strict=True)]
        return self.levels.to(like.device)[torch.cat(wide, 1)]

    def student(self) -> Chunks:
        return self.chunks

    def sampler(self) -> ChunkSteps:
        return self.steps
