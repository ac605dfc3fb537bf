"""Pictures of latents while they are denoised, by a linear map: one matrix product for each, at most two a second.

The map (`linear_map`) is fitted to a few random latents that the pipeline decodes at first, and to real ones as jobs finish.
What is shown is what the network takes the clean data to be at that step, where its solver says so, else the noisy latents.

Shapes: latents as the pipeline's loop has them, [B, C, h, w], [B, C, f, h, w] or folded into tokens [B, n, c].
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from hasten.atomic import atomic_write
from hasten.errors import HastenError
from hasten.session import Attachment
from hasten.ui.engine.linear_map import LinearMap
from hasten.ui.engine.place import Place
from hasten.ui.engine.report import Report
from hasten.ui.engine.request import Picture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from hasten.pipelines.session import Session

EVERY = 0.5
"""Seconds between two pictures, at least."""

PATCH = 8
"""Pixels of a patch's side, at most."""

SMALL = 256
"""Pixels of the side of what is decoded for a first map."""

NAME = re.compile(r"([0-9a-f]{16})\.\d+")


class Previews:
    """The pictures of one run: make it before the session is opened, for a first map takes runs of its own, which no session
    should see; and open `watching` within. Does nothing where pictures are not wanted, or the latents' layout is not known."""

    def __init__(self, pipe: Any, ask: Picture, place: Place, report: Report) -> None:
        self.pipe, self.ask, self.place, self.report = pipe, ask, place, report
        self.session: Session | None = None
        self.map: LinearMap | None = None
        self.last: Tensor | None = None
        self.made = 0
        self.seconds = 0.0
        self._shown = 0.0
        self._layout: Layout | None = None
        if ask.preview:
            self._begin()

    @contextmanager
    def watching(self, session: Session) -> Iterator[Previews]:
        """While open, pictures of the run's latents are written and told."""
        self.session, hold = session, Attachment()
        if self.map is not None:
            step = self.pipe.scheduler.step

            def watched(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
                self.look(model_output, sample)
                made = step(model_output, timestep, sample, *args, **kwargs)
                self.after(made)
                return made

            hold.replace(self.pipe.scheduler, "step", functools.update_wrapper(watched, step))
        try:
            yield self
        finally:
            hold.restore()

    def _begin(self) -> None:
        """Find the map of this autoencoder, or fit a first one."""
        name = autoencoder_name(self.pipe)
        self._layout = Layout.of(self.pipe)
        if name is None or self._layout is None:
            return
        self.map = LinearMap.load(self.place, name)
        if self.map is None:
            self.report.phase("Fitting previews")
            with suppress(HastenError, TypeError, ValueError, RuntimeError):  # no pictures then: a preview never costs the result
                self.map = first_map(self.pipe, self._layout, name, self.ask)
        self._shown = time.monotonic()

    def look(self, model_output: Tensor, sample: Tensor) -> None:
        """A solver step is about to be made; show what it knows, if it is time."""
        now = time.monotonic()
        if self.map is None or now - self._shown < EVERY:
            return
        self._shown = now
        began = time.perf_counter()
        self.made += 1
        z = self._frame(self._clean(model_output, sample))
        if z is not None:
            atomic_write(self.place.previews / f"{self.report.now.job}.png", as_png(self.map.picture(z)))
            self.report.preview(f"{self.report.now.job}.{self.made}")
        self.seconds += time.perf_counter() - began

    def after(self, made: Any) -> None:
        """The latents behind a step: the last ones are learnt from."""
        self.last = made[0] if isinstance(made, tuple) else getattr(made, "prev_sample", None)

    def learn(self, frames: NDArray[Any]) -> None:
        """The run is over: what its latents have become makes the map better. Raises nothing."""
        name = autoencoder_name(self.pipe)
        if self.map is None or self.last is None or self._layout is None or name is None:
            return
        with suppress(HastenError, TypeError, ValueError, RuntimeError, OSError):
            self.map.learn(self._layout.frames(self.last, self.ask_size(frames)), frames)
            self.map.save(self.place)

    @staticmethod
    def ask_size(frames: NDArray[Any]) -> tuple[int, int]:
        """(height, width)."""
        return int(frames.shape[1]), int(frames.shape[2])

    def _clean(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """What the network takes the data to be; the noisy latents where that is not known."""
        step = self.session.step if self.session is not None else None
        level = step.level if step is not None else None
        if level is None or level.data is None or model_output.shape != sample.shape:
            return sample
        a, b = level.data
        scaled = float(getattr(self.pipe.scheduler, "init_noise_sigma", 1.0)) > 1.5  # its samples are data + sigma noise
        return a * (sample * level.alpha if scaled else sample) + b * model_output

    def _frame(self, latents: Tensor) -> Tensor | None:
        """The middle frame."""
        assert self._layout is not None
        call = self.ask
        size = (call.height or self._usual("height"), call.width or self._usual("width"))
        found = self._layout.frames(latents, size)
        return found[len(found) // 2] if found is not None else None

    def _usual(self, name: str) -> int:
        from hasten.pipelines import tiny_models

        return int(tiny_models.call_defaults(self.pipe).get(name) or 0)


class Layout:
    """How a pipeline's latents stand: [B, C, h, w], [B, C, f, h, w], or folded into tokens as FLUX does."""

    def __init__(self, unfold: Any, factor: int) -> None:
        self._unfold, self._factor = unfold, factor

    @classmethod
    def of(cls, pipe: Any) -> Layout | None:
        """None where there is no autoencoder."""
        if getattr(pipe, "vae", None) is None:
            return None
        return cls(getattr(type(pipe), "_unpack_latents", None), int(getattr(pipe, "vae_scale_factor", 8) or 8))

    def frames(self, latents: Tensor, size: tuple[int, int]) -> Any:
        """[f, C, h, w] float32 of the first sample; None where it cannot be told. size: (height, width) of the picture."""
        one = latents[:1].detach().float()
        if one.ndim == 3 and self._unfold is not None and all(size):
            one = self._unfold(one, *size, self._factor)
        if one.ndim == 5:
            return one[0].movedim(1, 0)
        return one if one.ndim == 4 else None


def first_map(pipe: Any, layout: Layout, name: str, ask: Picture, samples: int = 3) -> LinearMap | None:
    """A map from random latents that the pipeline decodes: two steps of a small run, whose result is replaced by them."""
    import torch

    from hasten.pipelines import tiny_models
    from hasten.pipelines.generate import Prompt, Request, frames_of, makes_video, plan
    from hasten.pipelines.sizes import frame_step

    made: LinearMap | None = None
    usual = tiny_models.call_defaults(pipe)
    size = {"height": min(SMALL, usual.get("height") or SMALL), "width": min(SMALL, usual.get("width") or SMALL)}
    if makes_video(pipe):
        size["num_frames"] = 1 + frame_step(pipe)
    for seed in range(samples):
        draw = torch.Generator().manual_seed(seed)
        given: list[Tensor] = []
        step, hold = pipe.scheduler.step, Attachment()

        def replaced(model_output: Any, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            from types import SimpleNamespace

            given[:] = [torch.randn(sample.shape, generator=draw).to(sample.device, sample.dtype)]  # noqa: B023
            return SimpleNamespace(prev_sample=given[0]) if kwargs.get("return_dict", True) else (given[0],)  # noqa: B023

        call = plan(pipe, Request((Prompt(ask.prompt),), steps=2, extra=size))
        hold.replace(pipe.scheduler, "step", functools.update_wrapper(replaced, step))
        try:
            frames = frames_of(pipe(prompt=ask.prompt, **call))
        finally:
            hold.restore()
        latents = layout.frames(given[0], (frames.shape[1], frames.shape[2]))
        if latents is None:
            return None
        made = made or LinearMap(name, latents.shape[1], min(PATCH, max(1, frames.shape[1] // latents.shape[2])))
        made.learn(latents, frames)
    return made


def autoencoder_name(pipe: Any) -> str | None:
    """What an autoencoder is known by: its class, and some of its weights. None where there is none."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return None
    digest = hashlib.sha256(type(vae).__name__.encode())
    for name, value in sorted(vae.named_parameters())[:4]:
        digest.update(name.encode() + value.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def as_png(picture: NDArray[np.uint8]) -> bytes:
    """A file of it."""
    from PIL import Image

    kept = io.BytesIO()
    Image.fromarray(picture).save(kept, format="PNG", compress_level=1)
    return kept.getvalue()


def read(place: Place, name: str) -> bytes | None:
    """The newest picture of the job that a preview's id names; None where there is none."""
    found = NAME.fullmatch(name)
    if found is None:
        return None
    try:
        return (place.previews / f"{found[1]}.png").read_bytes()
    except OSError:
        return None


def remove(place: Place, job: str) -> None:
    """The job is over."""
    with suppress(OSError):
        (place.previews / f"{job}.png").unlink()
