"""A causal video student that is trained on clips which it has made itself, chunk after chunk.

`self-forcing`: Huang et al., Self Forcing, arXiv 2506.08009, algorithm 1, with the loss of DMD (`dmd.py`) on the whole clip: what
the student has got wrong in an early chunk stands before it in the next ones, in training as afterwards. All chunks of a
batch have the same exit; only its call has gradients; kept keys and values are those of finished frames, at no noise.
Data-free. It starts best from a student of `causal` (`student.start`).

`magic141`: Magic 1-For-1, arXiv 2502.07701, section 3: text to video in two tasks, text to a picture and the picture to a
clip. The clip's first latent frame is a chunk of its own, all others are the second one. In a share `given` of the steps the
frame is the data's and only the rest is made (image to video); else the student makes both.

What differs from Magic 1-For-1: one student has both tasks, where the paper takes another model for pictures; the loss is
DMD's for the whole clip. Its teacher needs no way of being given a frame: where first frames come from the data, KL(q(clip) ||
p(clip)) is the mean over them of KL(q(rest | frame) || p(rest | frame)), so the teacher's score of whole clips trains the
conditional student. (The paper's teacher is an image-to-video model.) The critic is told which of the two tasks it sees.

Shapes: B rows; clips [B, C, F, H, W], F latent frames; an exit is the number of each chunk's last call, from 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Data, Facts, MethodState
from hasten.distill.methods.dmd import DMD, DMDState, Rollout
from hasten.distill.network.chunks import Chunks, ChunkSteps
from hasten.distill.network.hint import Hint


class SelfForcing(DMD):
    """Distribution matching of clips that a causal student rolls out. chunk: its latent frames; first: those of the first one,
    0 for as many. shift: of its noise levels, as in `FewSteps.even`. The rest is that of `dmd`."""

    kind: ClassVar[str] = "self-forcing"
    calls: int = Field(4, ge=1)
    chunk: int = Field(3, ge=1)
    first: int = Field(0, ge=0)
    shift: float = Field(1.0, gt=0)

    def start(self, facts: Facts) -> MethodState:
        """Raises as `Chunks`."""
        return _SelfForcingState(self, facts, self.shift, self.chunk, self.first)


class Magic141(DMD):
    """A first frame from a text, and a clip from the frame. given: share of the steps whose first frame is the data's. shift: of
    its noise levels. The rest is that of `dmd`."""

    kind: ClassVar[str] = "magic141"
    data: ClassVar[Data] = "latents"
    calls: int = Field(4, ge=1)
    shift: float = Field(1.0, gt=0)
    given: float = Field(0.5, ge=0, le=1)

    def start(self, facts: Facts) -> MethodState:
        """Raises as `Chunks`."""
        return _MagicState(self, facts)


class _ChunkRollout(Rollout):
    """A clip of the student's own, chunk after chunk. Exits from `calls` on have a given first chunk."""

    def __init__(self, chunks: Chunks, shape: tuple[int, ...]) -> None:
        super().__init__(chunks.role, chunks.steps, shape)
        self.chunks = chunks

    def made(self, batch: Batch, draw: Draw, purpose: str, exit: int, graph: bool) -> Tensor:
        host, calls = self.student.host, len(self.steps.angles)
        like = torch.empty(len(batch), *self.shape, dtype=torch.promote_types(host.dtype, torch.float32), device=draw.device)
        given = None
        if exit >= calls:
            assert batch.x0 is not None
            given = batch.x0[:, :, : self.chunks.spans(self.shape[1])[0][1]].to(like)
        return self.chunks.made(
            draw.normal(f"{purpose}.start", like), batch.condition, exit % calls,
            lambda number: draw.normal(f"{purpose}.again.{number}", like), graph, given,
        )  # fmt: skip


class _SelfForcingState(DMDState):
    def __init__(self, method: DMD, facts: Facts, shift: float, chunk: int, first: int) -> None:
        super().__init__(method, facts)
        student = facts.roles["student"]
        steps = ChunkSteps.even(method.calls, student.host.path, method.how, shift=shift)
        self.steps = replace(steps, chunk=chunk, first=first)
        self.chunks = Chunks(student, self.steps)
        self.rollout = _ChunkRollout(self.chunks, facts.shape)

    def student(self) -> Chunks:
        return self.chunks


class _MagicState(_SelfForcingState):
    def __init__(self, method: Magic141, facts: Facts) -> None:
        super().__init__(method, facts, method.shift, max(1, facts.shape[1] - 1), first=1)
        self.given = method.given
        if method.told and 0 < method.given < 1 and self.hint is None:
            self.hint = Hint(facts.roles.of("critic").host.network)

    def exit(self, draw: Draw, purpose: str) -> int:
        exit = super().exit(draw, purpose)
        coin = draw.one_below(f"{purpose}.given", 2**20) / 2**20
        return exit + self.method.calls if coin < self.given else exit
