"""What was denoised, kept until its picture is whole: whatever fails behind the loop costs the decoding, not the run.

Where a pipeline gives its latents to the autoencoder, they are written beside the job, with the run's report. They are decoded
again by what pipelines do themselves behind `vae.decode`: their own processor makes the pictures.

Shapes: latents as the pipeline gives them to `vae.decode`, [B, C, h, w] or [B, C, f, h, w], in its own dtype.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hasten.errors import UsageError
from hasten.session import Attachment
from hasten.ui.engine.place import Place

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

JOB = re.compile(r"[0-9a-f]{16}")
MOST = 8
"""Runs whose latents are kept; of more, the oldest are forgotten."""


@dataclass(frozen=True)
class Kept:
    """Latents of one run that has failed behind its loop. tensors: `latents`, and further arguments of `vae.decode` that are
    tensors. arguments: those that are plain values. facts: what else the result needs."""

    tensors: dict[str, Tensor]
    arguments: dict[str, Any]
    facts: dict[str, Any]

    @classmethod
    def read(cls, place: Place, job: str) -> Kept:
        """Those of a job. Raises `UsageError` where there are none any more."""
        from safetensors.torch import load_file

        if not has(place, job):
            raise UsageError(f"The latents of job {job[:32]} are not kept any more. Run it again from the beginning.")
        told = json.loads((place.latents / job / "run.json").read_text(encoding="utf-8"))
        return cls(load_file(place.latents / job / "latents.safetensors"), told["arguments"], told["facts"])

    def decoded(self, pipe: Any) -> NDArray[np.float32]:
        """Frames (F, H, W, C) in [0, 1], as the pipeline itself would have made them."""
        import torch

        from hasten.pipelines.generate import frames_of

        vae = pipe.vae
        given = {key: value.to(_device(pipe)) for key, value in self.tensors.items()}
        own, wanted = vae.dtype, given["latents"].dtype
        if own != wanted:
            vae.to(dtype=wanted)  # some pipelines decode in another dtype than they denoise in
        try:
            with torch.no_grad():
                more = {key: value for key, value in given.items() if key != "latents"}
                made = vae.decode(given["latents"], **self.arguments, **more, return_dict=False)[0]
            return frames_of(_output(pipe, made))
        finally:
            if own != wanted:
                vae.to(dtype=own)


@contextmanager
def keeping(pipe: Any, place: Place, job: str, facts: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """While open, what `pipe` gives its autoencoder is written first. facts: asked then. Does nothing for a pipeline that does
    more behind its decoder than is known here, and never costs the run: where it cannot be written, it is not kept."""
    hold = Attachment()
    if _is_known(pipe):
        decode, calls = pipe.vae.decode, [0]

        def watched(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == 1:
                with suppress(OSError, _Unknown):
                    _write(place, job, z, _named(decode, args) | kwargs, facts())
            else:
                remove(place, job)  # several pieces, and one would not be all of it
            return decode(z, *args, **kwargs)

        hold.replace(pipe.vae, "decode", functools.update_wrapper(watched, decode))
    try:
        yield
    finally:
        hold.restore()


@contextmanager
def tiled(pipe: Any, wanted: bool) -> Iterator[None]:
    """While open, the autoencoder decodes in tiles, one sample at a time. Raises `UsageError` for one that cannot."""
    vae = getattr(pipe, "vae", None)
    if not wanted:
        yield
        return
    if not hasattr(vae, "enable_tiling"):
        raise UsageError(f"The decoder of {type(pipe).__name__} ({type(vae).__name__}) has no tiles. Ask for a smaller size or fewer frames.")
    switches = [name for name in ("tiling", "slicing") if hasattr(vae, f"enable_{name}") and not getattr(vae, f"use_{name}", False)]
    for name in switches:
        getattr(vae, f"enable_{name}")()
    try:
        yield
    finally:
        for name in switches:
            getattr(vae, f"disable_{name}")()


def has(place: Place, job: str) -> bool:
    """Are latents of that job kept?"""
    return JOB.fullmatch(job) is not None and (place.latents / job / "run.json").is_file()


def remedies(place: Place, job: str, asked: dict[str, Any], full: bool) -> list[dict[str, Any]]:
    """What to try of a job whose latents, or those that it was to decode, are kept: [{"label", "request"}]. full: memory has
    run out, or may have."""
    source = str(asked.get("latents") or job)
    if asked.get("kind") != "generate" or not has(place, source):
        return []
    tiles = [{"label": "Decode it again, in tiles", "request": {**asked, "latents": source, "decoding": "tiles"}}]
    again = [{"label": "Decode it again", "request": {**asked, "latents": source}}]
    return [*(tiles if full and asked.get("decoding") != "tiles" else []), *again]


def remove(place: Place, job: str) -> None:
    """Forget them. Safe where there are none."""
    if JOB.fullmatch(job) is not None:
        shutil.rmtree(place.latents / job, ignore_errors=True)


def sweep(place: Place) -> None:
    """Remove what killed processes have left half written. Only while nobody else works."""
    for aside in place.latents.glob(".*.part"):
        shutil.rmtree(aside, ignore_errors=True)


class _Unknown(Exception):
    """An argument of the decoder that no file holds."""


def _is_known(pipe: Any) -> bool:
    """Is all that it does behind its decoder one processor's work? A safety checker or a watermark is not to be gone round."""
    processors = (getattr(pipe, name, None) for name in ("video_processor", "image_processor"))
    others = (getattr(pipe, name, None) for name in ("safety_checker", "watermark"))
    return hasattr(getattr(pipe, "vae", None), "decode") and any(each is not None for each in processors) and not any(others)


def _output(pipe: Any, made: Tensor) -> SimpleNamespace:
    """What the pipeline would have returned."""
    if (processor := getattr(pipe, "video_processor", None)) is not None:
        return SimpleNamespace(frames=processor.postprocess_video(made, output_type="np"))
    picture = made[:, :, 0] if made.ndim == 5 else made  # image models on a video's autoencoder
    return SimpleNamespace(images=pipe.image_processor.postprocess(picture, output_type="np"))


def _device(pipe: Any) -> Any:
    return getattr(pipe, "_execution_device", None) or pipe.vae.device


def _named(decode: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """Arguments behind the latents, by their names."""
    import inspect

    return dict(zip(list(inspect.signature(decode).parameters)[1:], args, strict=False))


def _write(place: Place, job: str, z: Tensor, given: dict[str, Any], facts: dict[str, Any]) -> None:
    """Put them in place whole. They are to outlive this process, not the machine, so nothing is flushed to the disk."""
    import torch
    from safetensors.torch import save_file

    given = {key: value for key, value in given.items() if key not in ("return_dict", "generator") and value is not None}
    tensors = {"latents": z, **{key: value for key, value in given.items() if isinstance(value, torch.Tensor)}}
    plain = {key: value for key, value in given.items() if key not in tensors}
    if not all(isinstance(value, bool | int | float | str) for value in plain.values()):
        raise _Unknown
    aside = place.latents / f".{job}.part"
    shutil.rmtree(aside, ignore_errors=True)
    remove(place, job)
    try:
        aside.mkdir(mode=0o700, parents=True)
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, aside / "latents.safetensors")
        (aside / "run.json").write_text(json.dumps({"arguments": plain, "facts": facts}), encoding="utf-8")
        os.replace(aside, place.latents / job)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    folders = sorted((each for each in place.latents.iterdir() if JOB.fullmatch(each.name)), key=lambda each: each.stat().st_mtime)
    for old in folders[:-MOST]:
        remove(place, old.name)
