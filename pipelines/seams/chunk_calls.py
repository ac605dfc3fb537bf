"""Sampling a causal video student on an unmodified pipeline: chunk after chunk of frames inside the pipeline's own loop.

The pipeline walks through a list of levels that has the student's once for every chunk, and hands the whole clip to its network
each time. The network is asked about the present chunk alone, which reads the kept keys and values of earlier ones; the
scheduler changes that chunk alone. Before a chunk begins, the one before it is evaluated without noise, and what its
attention saw is kept.

Shapes: B rows; x [B, C, F, H, W] the latents, F latent frames; K calls of each chunk.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hasten.caching.frames import FrameStore
from hasten.errors import ModelError, RefusedError
from hasten.pipelines.host import Layout, Output, denoisers
from hasten.pipelines.seams.few_calls import arguments, become, generators
from hasten.pipelines.seams.frames import FrameSeam, Spans, View
from hasten.pipelines.sizes import frame_step
from hasten.samplers.chunk_calls import ChunkCalls, spans
from hasten.session import Attachment

Hold = Callable[[int], None]


class ChunkRun:
    """One clip in the making. evaluations of the network go through `ask`, steps of the scheduler through `go`."""

    def __init__(self, part: ChunkCalls, seam: FrameSeam, frames: int, hold: Hold) -> None:
        self.part, self.seam, self.frames, self.hold = part, seam, frames, hold
        seam.check(frames)
        self.chunks: Spans = spans(frames, part.chunk, part.first)
        self.step, self.asked = 0, -1
        self.store: FrameStore | None = None
        self.noise: list[torch.Generator] = []

    @property
    def steps(self) -> int:
        """K for each chunk."""
        return len(self.chunks) * self.part.calls

    def sigmas(self) -> Tensor:
        """float32 [steps + 1]: noise of the present chunk before each step, and none at the end."""
        return torch.tensor([*(self.part.sigmas or ()) * len(self.chunks), 0.0])

    def ask(self, forward: Any, layout: Layout, arguments: dict[str, Any]) -> Any:
        """The network's answer where the present chunk is, and zeros elsewhere."""
        x, time = arguments[layout.sample], arguments[str(layout.timestep)]
        if x.shape[2] != self.frames:
            raise ModelError(f"The pipeline makes {x.shape[2]} latent frames where {self.frames} were expected.")
        if self.store is None:
            tokens = self.seam.tokens(*x.shape[3:])
            self.store = FrameStore(tokens, self.part.sink, self.part.window)
        number, call = divmod(self.step, self.part.calls)

        def asked(which: int, keep: bool) -> Any:
            begin, end = self.chunks[which]
            told = time if time.ndim == 1 else time[:, : (end - begin) * self.seam.tokens(*x.shape[3:])]
            told = torch.zeros_like(told) if keep else told
            own = arguments | {layout.sample: x[:, :, begin:end], str(layout.timestep): told}
            with self.seam.seeing(View(self.store, keep, begin=begin)):
                return forward(**own)

        if call == 0 and number:
            asked(number - 1, keep=True)
            self.store.slide(self.seam.turn)
            self.hold(self.store.num_bytes())
        answer = Output(asked(number, keep=False))
        begin, end = self.chunks[number]
        whole = answer.tensors[0].new_zeros(*answer.tensors[0].shape[:2], *x.shape[2:])
        whole[:, :, begin:end] = answer.tensors[0]
        self.asked = self.step
        return answer.rebuild([whole, *answer.tensors[1:]])

    def go(self, answer: Tensor, x: Tensor) -> Tensor:
        """The clip with its present chunk at the next level."""
        if self.asked != self.step:
            raise RefusedError("A chunk of frames has to be evaluated at each step; another session left an evaluation out.")
        if self.step == 0:
            self.noise = generators(x)
        number, call = divmod(self.step, self.part.calls)
        begin, end = self.chunks[number]
        levels = (*(self.part.sigmas or ()), 0.0)
        now, after = levels[call], levels[call + 1]
        own, velocity = x[:, :, begin:end].float(), answer[:, :, begin:end].float()
        if self.part.how == "ode" or not after:
            made = own + (after - now) * velocity
        else:
            fresh = torch.stack([torch.randn(own.shape[1:], generator=each) for each in self.noise]).to(own.device)
            made = (1 - after) * (own - now * velocity) + after * fresh
        self.step += 1
        return torch.cat([x[:, :, :begin], made.to(x.dtype), x[:, :, end:]], 2)


class _Chunked:
    """What is put onto one pipeline: its call, its scheduler, its network's forward. run: the clip in the making."""

    def __init__(self, pipe: Any, part: ChunkCalls, hold: Hold) -> None:
        networks = denoisers(pipe)
        if len(networks) > 1:
            raise RefusedError(f"{type(pipe).__name__} has several networks ({', '.join(networks)}); chunks are made by one.")
        self.part, self.hold = part, hold
        self.network: nn.Module = next(iter(networks.values()))
        self.seam, self.layout = FrameSeam(self.network), Layout.of(self.network)
        self.run: ChunkRun | None = None

    def call(self, original: Any, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pipeline's own call, with as many steps as the clip has chunks, times calls."""
        bound = inspect.signature(original).bind(pipe, *args, **kwargs)
        bound.apply_defaults()
        self.run = ChunkRun(self.part, self.seam, _frames(pipe, bound.arguments), self.hold)
        bound.arguments |= arguments(type(pipe), self.part) | {"num_inference_steps": self.run.steps}
        try:
            return original(*bound.args, **bound.kwargs)
        finally:
            self.run = None

    def forward(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The network's forward: for the present chunk while a clip is being made, else its own."""
        if self.run is None:
            return forward(*args, **kwargs)
        return self.run.ask(forward, self.layout, dict(zip(self.layout.names, args, strict=False)) | kwargs)

    def scheduler(self, host: Any) -> Any:
        """A scheduler of diffusers whose levels and steps are those of the run."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        made: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=host.config.num_train_timesteps)
        step = made.step

        @functools.wraps(made.set_timesteps)
        def set_timesteps(num_inference_steps: int | None = None, device: Any = None, *args: Any, **kwargs: Any) -> None:
            run = self._running()
            made.sigmas = run.sigmas().to(device)
            made.timesteps = made.sigmas[:-1] * host.config.num_train_timesteps
            made.num_inference_steps = run.steps

        @functools.wraps(step)
        def stepped(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (self._running().go(model_output, sample),)

        made.set_timesteps, made.step = set_timesteps, stepped
        return made

    def _running(self) -> ChunkRun:
        if self.run is None:
            raise RefusedError("Chunks of frames are made by the pipeline's own call; its scheduler cannot be used alone.")
        return self.run


def _frames(pipe: Any, given: dict[str, Any]) -> int:
    """Latent frames of a call, as the pipeline will count them."""
    if given.get("latents") is not None:
        return int(given["latents"].shape[2])
    return (int(given["num_frames"]) - 1) // max(1, frame_step(pipe)) + 1


def sample_in_chunks(attachment: Attachment, pipe: Any, part: ChunkCalls, hold: Hold) -> str:
    """Let `pipe` make its clips chunk by chunk until `attachment` is restored. Returns what was done, in words. hold: is told how
    many bytes are kept, and may refuse them.

    Raises `RefusedError` for a pipeline that is no flow-matching video pipeline of a known network, and while another session
    samples a student from it.
    """
    plain = type(pipe)
    if hasattr(plain, "_hasten_plain"):
        raise RefusedError(f"A student is sampled from this {plain.__name__} already. Close that session first.")
    if "num_frames" not in inspect.signature(plain.__call__).parameters or "FlowMatch" not in type(pipe.scheduler).__name__:
        raise RefusedError(
            f"Chunks of frames need a video pipeline with a flow-matching scheduler; this is a {plain.__name__} with a"
            f" {type(pipe.scheduler).__name__}. Load the model that the student is of."
        )
    chunked, original = _Chunked(pipe, part, hold), plain.__call__
    attachment.replace(pipe, "scheduler", chunked.scheduler(pipe.scheduler))
    inner = chunked.network.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return chunked.forward(inner, args, kwargs)

    attachment.replace(chunked.network, "forward", forward)

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return chunked.call(original, self, args, kwargs) if self is pipe else original(self, *args, **kwargs)

    become(attachment, pipe, call, arguments(plain, part))
    return told(part)


def told(part: ChunkCalls) -> str:
    """The way of sampling in words."""
    head = f"{part.first} first, then " if part.first else ""
    seen = "all frames before it" if part.window is None else f"{part.window} frames before it"
    seen += f" and the first {part.sink}" if part.sink else ""
    own = f"{head}{part.chunk} latent frame{'s' if part.chunk > 1 else ''}"
    return (
        f"chunks of {own} that read {seen}, {part.calls} call{'s' if part.calls > 1 else ''} each and one"
        " without noise for what is kept, no guidance"
    )
