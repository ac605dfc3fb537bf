"""Windows of frames on an unmodified video pipeline: its network is asked about each, and the answers are blended.

The pipeline walks the whole clip as ever; only its network's forward is another one, so that solvers, guidance and caches
of whole evaluations see one evaluation of one clip. Within a window the network counts frames from 0.

Shapes: B rows; x [B, C, F, H, W] the latents, F latent frames; W windows of n frames.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import RefusedError, UsageError
from hasten.pipelines.host import Layout, Output, denoisers
from hasten.pipelines.seams.few_calls import generators
from hasten.samplers.windows import Windows, shares, starts
from hasten.session import Attachment

KNOWN = ("WanTransformer3DModel", "HunyuanVideoTransformer3DModel", "MochiTransformer3DModel")
"""Networks whose latents are [B, C, F, H, W] and that find the places of their tokens by themselves."""

FRAMED = ("hidden_states_image", "control_hidden_states", "control_hidden_states_scale")
"""Arguments that hold frames besides the latents, which are not cut here."""

Note = Callable[[str], None]


class WindowedNetwork:
    """Stands in for the forward of one network. step: says which step of the run it is, for windows that move."""

    def __init__(self, network: nn.Module, inner: Any, part: Windows, step: Callable[[], int], note: Note) -> None:
        self.layout, self.inner, self.part, self.step, self.note = Layout.of(network), inner, part, step, note

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        told = dict(zip(self.layout.names, args, strict=False)) | kwargs
        x = told[self.layout.sample]
        begins = starts(self.part, x.shape[2], self.step())
        if len(begins) == 1:
            self.note(f"One window of {self.part.frames} latent frames holds this clip of {x.shape[2]}: it is the plain run.")
            return self.inner(*args, **kwargs)
        if framed := [name for name in FRAMED if told.get(name) is not None]:
            raise RefusedError(f"{', '.join(framed)} of this network hold frames that windows do not cut. Ask for a shorter clip.")
        group = self.part.at_once or len(begins)
        answers: list[Tensor] = []
        last: Output | None = None
        for first in range(0, len(begins), group):
            some = begins[first : first + group]
            last = Output(self.inner(**self._cut(told, x, some)))
            answers += last.tensors[0].chunk(len(some))
        assert last is not None
        return last.rebuild([self._blended(answers, x, begins), *last.tensors[1:]])

    def _cut(self, told: dict[str, Any], x: Tensor, begins: tuple[int, ...]) -> dict[str, Any]:
        """The arguments for these windows, one after the other as rows."""
        rows, n = x.shape[0], self.part.frames
        cut = {name: _repeated(value, rows, len(begins)) for name, value in told.items()}
        cut[self.layout.sample] = torch.cat([x[:, :, begin : begin + n] for begin in begins])
        time = told.get(self.layout.timestep or "")
        if isinstance(time, Tensor) and time.ndim == 2:  # a time for each token, frame after frame
            tokens = time.reshape(len(time), x.shape[2], -1)
            cut[str(self.layout.timestep)] = torch.cat([tokens[:, begin : begin + n].flatten(1) for begin in begins])
        return cut

    def _blended(self, answers: list[Tensor], x: Tensor, begins: tuple[int, ...]) -> Tensor:
        """One answer for the clip, summed in float32."""
        first, n = answers[0], self.part.frames
        whole = torch.zeros(*first.shape[:2], x.shape[2], *first.shape[3:], device=first.device)
        for begin, answer, share in zip(begins, answers, shares(self.part, x.shape[2], begins), strict=True):
            weight = torch.tensor(share, device=first.device)[:, None, None]
            whole[:, :, begin : begin + n] += answer.float() * weight
        return whole.to(first.dtype)


def _repeated(value: Any, rows: int, times: int) -> Any:
    """What has a row for each row of the latents, once for each window."""
    if isinstance(value, Tensor):
        return value.repeat(times, *(1,) * (value.ndim - 1)) if value.ndim and value.shape[0] == rows else value
    if isinstance(value, list | tuple):
        return type(value)(_repeated(inner, rows, times) for inner in value)
    return value


def shuffled(x: Tensor, n: int) -> Tensor:
    """Noise whose frames behind the first n are those n again, in another order each time."""
    generator = generators(x)[0]
    order = [torch.arange(n)]
    while sum(map(len, order)) < x.shape[2]:
        order.append(torch.randperm(n, generator=generator))
    return x[:, :, torch.cat(order)[: x.shape[2]].to(x.device)]


def sample_in_windows(
    attachment: Attachment, pipe: Any, part: Windows, step: Callable[[], int], note: Note
) -> str:
    """Let the networks of `pipe` see windows of frames until `attachment` is restored. Returns what was done, in words.

    Raises `RefusedError` for networks that are not known to find the places of their tokens by themselves.
    """
    networks = denoisers(pipe)
    for network in networks.values():
        if not any(kind.__name__ in KNOWN for kind in type(getattr(network, "_orig_mod", network)).__mro__):
            raise RefusedError(f"{type(network).__name__} cannot be asked about windows of frames: known are {', '.join(KNOWN)}.")
    for network in networks.values():
        place = "_compiled_call_impl" if getattr(network, "_compiled_call_impl", None) is not None else "forward"
        attachment.replace(network, place, WindowedNetwork(network, getattr(network, place), part, step, note))
    if part.noise == "shuffled":
        _shuffle(attachment, pipe, part.frames)
    return (
        f"windows of {part.frames} latent frames, {part.overlap} shared, blended {part.blend}"
        + (", moving" if part.moving else "")
        + (f", {part.at_once} at once" if part.at_once else "")
        + (", noise shuffled" if part.noise == "shuffled" else "")
    )


def _shuffle(attachment: Attachment, pipe: Any, n: int) -> None:
    """Let noise that the pipeline draws repeat itself; latents that its caller gives stay as they are."""
    inner = getattr(pipe, "prepare_latents", None)
    if inner is None or "latents" not in inspect.signature(inner).parameters:
        raise UsageError(f"sampler.noise=shuffled needs a pipeline with prepare_latents(latents=); {type(pipe).__name__} has none.")

    @functools.wraps(inner)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        found = inner(*args, **kwargs)
        given = inspect.signature(inner).bind(*args, **kwargs).arguments.get("latents")
        return found if given is not None or found.shape[2] <= n else shuffled(found, n)

    attachment.replace(pipe, "prepare_latents", prepared)
