"""A student that makes a video chunk after chunk, in training as afterwards: its own frames are what it goes on from.

The roll-out of Self-Forcing, arXiv 2506.08009, section 3.2 and algorithm 1: each chunk is made from noise by a few calls that
read the keys and values of the chunks before it; then it is evaluated once more, without noise, and what its attention sees
there is kept. Gradients pass the last call of each chunk alone, never what is kept.

Shapes: B rows; a clip x, z, x0 [B, C, F, H, W] on the circle, F latent frames; tau float64 [B, F] or [B] radians.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.caching.frames import FrameStore
from hasten.distill.network.few_steps import FewSteps, Noise, OwnWay
from hasten.distill.network.host_call import Condition
from hasten.distill.network.paths import spread, turned
from hasten.distill.network.roles import Role
from hasten.errors import ModelError, UsageError
from hasten.pipelines.seams.frames import FrameSeam, Spans, View, causal_mask, forced_mask
from hasten.samplers.chunk_calls import spans

Fresh = Callable[[int], Tensor]
"""Number of a call -> noise for the way to the next one, of the whole clip."""


@dataclass(frozen=True, slots=True)
class ChunkSteps(FewSteps):
    """The calls of each chunk. chunk: its frames; first: those of the first one, 0 for as many."""

    chunk: int = 3
    first: int = 0


class Chunks(OwnWay):
    """A role whose frames read no later chunk than their own.

    Raises `RefusedError` for a network that cannot be made so, `ModelError` where it makes no clips, `UsageError` with
    gradient checkpointing, whose second evaluation would see all frames.
    """

    def __init__(self, role: Role, steps: ChunkSteps) -> None:
        self.role, self.steps = role, steps
        if len(role.host.shape) != 4:
            raise ModelError(f"Chunks of frames need a video model; this one's input is {role.host.shape} for each row.")
        if getattr(role.host.network, "gradient_checkpointing", False):
            raise UsageError("A student in chunks cannot be trained with train.checkpointing. Leave it out, or halve the batch.")
        self.seam = FrameSeam(role.host.network)
        self.tokens = self.seam.tokens(*role.host.shape[2:])
        self.spans(role.host.shape[1])

    def spans(self, frames: int) -> Spans:
        """The chunks of a clip. Raises `UsageError` where it is but one."""
        found = spans(frames, self.steps.chunk, self.steps.first)
        if len(found) < 2:
            raise UsageError(f"A clip of {frames} latent frames is a single chunk of {self.steps.chunk}. Make chunks smaller.")
        return found

    def playing(self) -> AbstractContextManager[None]:
        """As `Role.playing`."""
        return self.role.playing()

    # --- a whole clip at once, in training --------------------------------------------------------------

    def data(self, x: Tensor, tau: Tensor, condition: Condition, before: Tensor | None = None) -> Tensor:
        """x0 of a clip whose frames have angles tau [B, F] of their own, all chunks in one evaluation.

        before: the clip whose finished chunks each chunk goes on from, as in the roll-out (teacher forcing; one more
        evaluation, without gradient); None: from this one's own noisy ones (diffusion forcing).
        """
        chunks = self.spans(x.shape[2])
        if before is None:
            return self._whole(x, tau, condition, View(mask=causal_mask(chunks, self.tokens)))
        store = FrameStore(self.tokens)
        with torch.no_grad():
            view = View(store, keep=True, mask=causal_mask(chunks, self.tokens))
            self._whole(before, torch.zeros_like(tau), condition, view)
        return self._whole(x, tau, condition, View(store, mask=forced_mask(chunks, self.tokens)))

    def _whole(self, x: Tensor, tau: Tensor, condition: Condition, view: View) -> Tensor:
        host = self.role.host
        time = host.path.time(tau).repeat_interleave(self.tokens, 1)
        with self.seam.seeing(view), self.playing():
            answer = host(over(host.path.scale(tau), x) * x, time, condition)
        p, q = (over(factor, x) for factor in host.path.factors(tau))
        return over(tau.cos(), x) * x - over(tau.sin(), x) * (p * x + q * answer)

    # --- chunk after chunk ------------------------------------------------------------------------------

    def made(
        self, z: Tensor, condition: Condition, exit: int, again: Fresh, graph: bool = False, given: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """The clip x0 that comes of noise z, where each chunk is made by the calls up to `exit`.

        again: noise between calls, for `consistency`. graph: whether each chunk's last call can be differentiated. given:
        frames that are there already, whole chunks [B, C, f, H, W].
        """
        store, parts = FrameStore(self.tokens), []
        ready = 0 if given is None else given.shape[2]
        for begin, end in self.spans(z.shape[2]):
            if given is not None and end <= ready:
                parts.append(given[:, :, begin:end])
            else:
                parts.append(self._chunk(z[:, :, begin:end], condition, exit, again, graph, store, begin))
            if end < z.shape[2]:
                self._remember(parts[-1].detach(), condition, store, begin)
        return torch.cat(parts, 2)

    def _chunk(
        self, x: Tensor, condition: Condition, exit: int, again: Fresh, graph: bool, store: FrameStore, begin: int
    ) -> Tensor:  # fmt: skip
        """x0 of one chunk, from its noise x."""
        angles, view = self.steps.angles, View(store, begin=begin)
        for number in range(exit):
            tau, after = (torch.full((len(x),), angles[k], dtype=torch.float64, device=x.device) for k in (number, number + 1))
            with torch.no_grad(), self.seam.seeing(view):
                velocity = self.role.velocity(x, tau, condition)
            if self.steps.how == "ode":
                x = turned(x, velocity, tau - after)
            else:
                noise = again(number)[:, :, begin : begin + x.shape[2]]
                x = spread(after.cos(), x) * turned(x, velocity, tau) + spread(after.sin(), x) * noise
        tau = torch.full((len(x),), angles[exit], dtype=torch.float64, device=x.device)
        with nullcontext() if graph else torch.no_grad(), self.seam.seeing(view):
            return self.role.data(x, tau, condition)

    @torch.no_grad()
    def _remember(self, x0: Tensor, condition: Condition, store: FrameStore, begin: int) -> None:
        """Keep what a finished chunk looks like to those after it."""
        with self.seam.seeing(View(store, keep=True, begin=begin)):
            self.role.answer(x0, torch.zeros(len(x0), dtype=torch.float64, device=x0.device), condition)

    def sampled(self, x: Tensor, condition: Condition, steps: FewSteps, noise: Noise | None) -> Tensor:
        """x0 [B, ...] from pure noise x, as `few_steps.sample`; `steps` are its own."""
        if steps != self.steps:
            raise UsageError("A student in chunks is sampled by the calls that it was trained for.")
        if noise is None and steps.how == "consistency" and len(steps.angles) > 1:
            raise UsageError("Sampling by consistency with several calls needs fresh noise: pass noise=.")
        with torch.no_grad():
            return self.made(x, condition, len(steps.angles) - 1, lambda number: noise(number, x) if noise else x)


def over(values: Tensor, like: Tensor) -> Tensor:
    """[B, F] -> [B, 1, F, 1, 1], for a clip `like`."""
    return values.to(like.device, like.dtype)[:, None, :, None, None]
