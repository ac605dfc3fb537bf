"""Starting from a draft on an unmodified pipeline: its own call runs twice, the second time from the middle.

For as long as the session is open the pipeline is of a class of its own. Its call first makes the draft, as the plain
pipeline under another recipe, and keeps the noise that it started from. In the second call the scheduler answers
`set_timesteps` with the rest of its list, and what `prepare_latents` hands to the loop is overwritten by the draft with the
noise of the first of these levels.

Shapes: x [B, ...] the latents, as the pipeline's loop has them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hasten.errors import RefusedError, UsageError
from hasten.pipelines.seams.few_calls import become
from hasten.samplers.data_steps import renoised
from hasten.samplers.draft import Draft
from hasten.scheduler import is_flow, solver_levels, solver_times
from hasten.session import Attachment

Open = Callable[[], AbstractContextManager[Any]]
"""Opens a session with the draft's recipe on the pipeline."""


class Drafted:
    """What is put onto one pipeline. drafting: is the draft being made?

    follow: called when the pipeline has its own scheduler again. tell: told what the draft was made of, in words.
    """

    def __init__(
        self, pipe: Any, part: Draft, opened: Open | None, follow: Callable[[], None], tell: Callable[[str], None]
    ) -> None:
        _refuse_unknown(pipe)
        self.part, self.opened, self.follow, self.tell = part, opened, follow, tell
        self.plain = type(pipe)
        self.scheduler = self._from_the_middle(pipe.scheduler)
        self.drafting = False
        self._data: Tensor | None = None
        self._noise: Tensor | None = None
        self._level: Any = None
        self._loop: Tensor | None = None

    def put_on(self, attachment: Attachment, pipe: Any) -> str:
        """Until `attachment` is restored. Returns what was done, in words."""
        original = self.plain.__call__

        @functools.wraps(original)
        def call(own: Any, *args: Any, **kwargs: Any) -> Any:
            return self.call(original, own, args, kwargs) if own is pipe else original(own, *args, **kwargs)

        attachment.replace(pipe, "scheduler", self.scheduler)
        become(attachment, pipe, call, {})
        by = f"a draft by {self.part.recipe!r}" if self.part.recipe else "the draft that is passed as latents"
        return f"{by}, and the last {self.part.share:g} of the steps from there"

    def call(self, original: Any, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pipeline's own call, from a draft."""
        bound = inspect.signature(original).bind(pipe, *args, **kwargs)
        given = bound.arguments
        try:
            if self.opened is not None:
                self._make(original, pipe, dict(given))
            else:
                self._take(given)
            given["latents"] = self._noise
            with _watched(pipe, self._prepared):
                result = original(*bound.args, **bound.kwargs)
            if self._data is not None:
                raise RefusedError(f"{type(pipe).__name__} made its latents in a way that a draft cannot be put into.")
            return result
        finally:
            self._data = self._noise = self._level = self._loop = None

    def _make(self, original: Any, pipe: Any, given: dict[str, Any]) -> None:
        """The draft, by the plain pipeline under its own recipe, and the noise it started from."""
        assert self.opened is not None
        known = inspect.signature(original).parameters
        changed = {"output_type": "latent", "return_dict": False, "num_inference_steps": self.part.steps}
        given |= {name: value for name, value in changed.items() if name in known and value is not None}
        for name in ("self", "callback_on_step_end", "callback", *(("sigmas", "timesteps") if self.part.steps else ())):
            given.pop(name, None)
        own, self.drafting = type(pipe), True
        try:
            object.__setattr__(pipe, "__class__", self.plain)
            with self.opened() as session, _watched(pipe, self._started):
                found = pipe(**given)[0]
            self.tell(f"{session.report().nfe:g} evaluations by {self.part.recipe!r}")
        finally:
            object.__setattr__(pipe, "__class__", own)
            self.drafting = False
            self.follow()
        if self._noise is None or not isinstance(found, Tensor) or found.shape != self._noise.shape:
            raise RefusedError(f"The latents that {type(pipe).__name__} returns are not those of its loop; a draft needs them.")
        self._data = found

    def _take(self, given: dict[str, Any]) -> None:
        """The caller's own draft, and noise of the caller's generator."""
        from diffusers.utils.torch_utils import randn_tensor

        data = given.get("latents")
        if not isinstance(data, Tensor):
            raise UsageError("sampler.recipe is empty, so the draft is yours: pass it as latents=, clean, as the network reads it.")
        self._data = data
        self._noise = randn_tensor(tuple(data.shape), generator=given.get("generator"), device=data.device, dtype=data.dtype)

    def _started(self, x: Tensor) -> None:
        self._noise = x.clone()

    def _prepared(self, x: Tensor) -> None:
        self._loop = x
        self._fill()

    def _fill(self) -> None:
        """Overwrite the loop's latents, once both they and the first level are known; pipelines differ in their order."""
        if self._loop is None or self._level is None or self._data is None or self._noise is None:
            return
        data, noise = (value.to(self._loop.device, torch.float32) for value in (self._data, self._noise))
        with torch.no_grad():
            self._loop.copy_(renoised(data, noise, self._level))
        self._data = None

    def _from_the_middle(self, host: Any) -> Any:
        """A copy of the host's scheduler whose list begins where the full model takes over."""
        made = type(host).from_config(host.config)
        inner = made.set_timesteps

        @functools.wraps(inner)
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            inner(*args, **kwargs)
            if self._noise is None or self.drafting:
                return
            begin = self.part.begin(len(made.timesteps))
            made.timesteps = made.timesteps[begin:]
            if isinstance(getattr(made, "sigmas", None), Tensor):
                made.sigmas = made.sigmas[begin:]
            self._level = solver_levels(made, solver_times(made)[:1], flow=is_flow(made))[0]
            if self._level is None:
                raise RefusedError(f"{type(made).__name__} does not say how noisy its steps are, so no draft can be put in.")
            self._fill()

        made.set_timesteps = set_timesteps
        return made


class _watched:
    """While open, `seen` is told the latents that the pipeline prepares."""

    def __init__(self, pipe: Any, seen: Callable[[Tensor], None]) -> None:
        self.pipe, self.seen, self.attachment = pipe, seen, Attachment()

    def __enter__(self) -> None:
        inner = self.pipe.prepare_latents

        @functools.wraps(inner)
        def prepared(*args: Any, **kwargs: Any) -> Any:
            found = inner(*args, **kwargs)
            self.seen(found if isinstance(found, Tensor) else found[0])
            return found

        self.attachment.replace(self.pipe, "prepare_latents", prepared)

    def __exit__(self, *_: object) -> None:
        self.attachment.restore()


def _refuse_unknown(pipe: Any) -> None:
    """Raises `RefusedError` where a run cannot begin in the middle, by name."""
    kind, scheduler = type(pipe).__name__, getattr(pipe, "scheduler", None)
    if hasattr(type(pipe), "_hasten_plain"):
        raise RefusedError(f"This {kind} is sampled in another way already. Close that session first.")
    known = inspect.signature(type(pipe).__call__).parameters
    if "strength" in known:
        raise RefusedError(f"{kind} starts from a picture already (strength); a draft is for pipelines that start from noise.")
    if not hasattr(pipe, "prepare_latents") or "latents" not in known or "output_type" not in known:
        raise RefusedError(f"{kind} does not take latents and hand them out, which a draft needs.")
    name = type(scheduler).__name__
    if getattr(scheduler, "order", 1) != 1 or name == "PNDMScheduler":
        raise RefusedError(f"{name} cannot begin in the middle of its list. Take euler, ddim, dpm++ or unipc.")
    sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
    if sigma != 1:
        raise RefusedError(
            f"{name} scales its latents (init_noise_sigma {sigma:g}), so that a draft would need"
            " another scale. Take a flow-matching scheduler, ddim, dpm++ or unipc."
        )
