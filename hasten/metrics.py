"""How far an accelerated result is from the un-accelerated one, on raw frames and latents.

These numbers say "similar to the baseline", not "good". Never compute them on decoded video: H.264 at
CRF 17 alone limits PSNR to about 33 dB.

Frames come as numpy arrays, torch tensors, PIL images or lists of either, channel-last: (H, W, C),
(F, H, W, C), or lists of (H, W) and (H, W, C). Values are uint8 in 0..255 or floating point in [0, 1].
Everything is computed in float64: uint8 arithmetic wraps, which makes black against white look like 48 dB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.errors import UsageError

Frames = Any
"""Anything `as_frames` accepts."""

_CHANNELS = (1, 3, 4)
_ROUNDING = 1e-3
"""How far outside [0, 1] a float image may lie: half precision and VAE clamping round by less."""


class Summary(TypedDict):
    """Strict-JSON summary of one metric; see `summary`."""

    median: float | None
    worst: float | None
    n: int
    identical: int


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of all frames together; symmetric.

    10 log10(1 / mean((a - b)^2)) for data in [0, 1]; `math.inf` when a and b are identical, 0 for black
    against white. Raises `UsageError` for different shapes or kinds of data, or values out of range.
    """
    return _decibel(_squared_error(*_pair(a, b)).mean())


def psnr_by_frame(a: Frames, b: Frames) -> list[float]:
    """`psnr` of each frame, in dB. (Their mean is not `psnr`, which averages the squared error first.)"""
    return [_decibel(error) for error in _squared_error(*_pair(a, b))]


def ssim(a: Frames, b: Frames) -> float:
    """Mean of `ssim_by_frame`: 1 for identical frames, at least -1; symmetric."""
    return float(np.mean(ssim_by_frame(a, b)))


def ssim_by_frame(a: Frames, b: Frames) -> list[float]:
    """Structural similarity of each frame (Wang, Bovik, Sheikh & Simoncelli, 2004), mean over channels.

    11 x 11 Gaussian window with sigma 1.5, K1 = 0.01, K2 = 0.03, population covariance, borders without a
    full window left out: what scikit-image computes with `gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1`. Raises `UsageError` as `psnr` does, and below 11 x 11 pixels.
    """
    first, second = _pair(a, b)
    if min(first.shape[1:3]) < _WINDOW:
        raise UsageError(
            f"SSIM needs frames of at least {_WINDOW} x {_WINDOW} pixels, got {first.shape[1]} x {first.shape[2]}."
            " Use psnr for smaller ones."
        )
    # Frame by frame: a long video in float64 with five filtered copies would not fit in memory.
    return [_ssim_of_frame(_unit(x), _unit(y)) for x, y in zip(first, second, strict=True)]


def latent_error(a: Any, b: Any) -> float:
    """Relative error ||a - b|| / ||b|| of latents (any equal shape, any real dtype); b is the reference.

    0 for identical latents; `math.inf` when only the reference is all zeros. Raises `UsageError` for
    different shapes and for NaN or infinity.
    """
    first, second = _numbers(a, "a"), _numbers(b, "b")
    if first.shape != second.shape:
        raise UsageError(f"Latents must have equal shapes, got {first.shape} and {second.shape}.")
    distance, size = float(np.linalg.norm(first - second)), float(np.linalg.norm(second))
    if distance == 0.0:
        return 0.0
    return distance / size if size > 0.0 else math.inf


def temporal_flicker(video: Frames, reference: Frames | None = None) -> float:
    """Mean |x[t-1] - 2 x[t] + x[t+1]| over pixels and inner frames, for values in [0, 1]; units 0 to 2.

    The second difference is 0 for a still or evenly fading video and large where frames jump back and
    forth. With a reference: the flicker of `video` minus that of `reference`, so that motion which both
    share cancels; above 0 means that `video` flickers more. Raises `UsageError` below 3 frames.
    """
    if reference is None:
        return _flicker(as_frames(video, "video"))
    first, second = _pair(video, reference, ("video", "reference"))
    return _flicker(first) - _flicker(second)


def summary(values: Iterable[float], *, higher_is_better: bool = True) -> Summary:
    """Median and worst of one metric over n results, safe for strict JSON.

    PSNR is infinite for identical results. They count as better than every number, so they take part in the
    median by rank; a median or worst that is itself infinite is given as None, which together with
    `identical` > 0 reads "identical". Between a number and infinity the median is the number (the lower
    one), never an average. With `higher_is_better=False` (errors), worst is the largest, identical counts
    zeros, and infinity is refused. Raises `UsageError` for no values and for NaN.
    """
    ordered = sorted(float(value) for value in values)
    if not ordered:
        raise UsageError("There is nothing to summarise: no value was given. Measure at least one result.")
    best = math.inf if higher_is_better else 0.0
    for value in ordered:
        if not math.isfinite(value) and value != best:
            raise UsageError(f"Cannot summarise {value}: values must be finite (a PSNR may be +inf).")
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    median = (low + high) / 2 if math.isfinite(high) else low
    worst = ordered[0] if higher_is_better else ordered[-1]
    return {
        "median": median if math.isfinite(median) else None,
        "worst": worst if math.isfinite(worst) else None,
        "n": len(ordered),
        "identical": sum(value == best for value in ordered),
    }


def as_frames(frames: Frames, name: str = "frames") -> NDArray[Any]:
    """Check frames and give them as one (F, H, W, C) array, uint8 or floating point in [0, 1], unconverted.

    A single image becomes one frame; C is 1, 3 or 4. Raises `UsageError` that names `name`, what was got and
    how to convert it.
    """
    if isinstance(frames, list | tuple):
        if not frames:
            raise UsageError(f"{name} is empty. Give at least one frame.")
        if getattr(frames[0], "ndim", 0) != 4:
            return _stack([_image(frame, f"{name}[{i}]") for i, frame in enumerate(frames)], name)
        raise UsageError(f"{name} is a list of videos. Give one video of shape (F, H, W, C).")
    array = _image(frames, name)
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[-1] not in _CHANNELS or 0 in array.shape:
        raise UsageError(
            f"{name} must have shape (F, H, W, C) or (H, W, C) with C of 1, 3 or 4;{_advice(array)}"
        )
    return _check_values(array, name)


def _image(frame: Any, name: str) -> NDArray[Any]:
    """One image or video as an array; a PIL image in grey, or an element (H, W) of a list, gains C = 1."""
    if hasattr(frame, "getbands") and frame.mode not in ("L", "RGB", "RGBA"):
        raise UsageError(f"{name} is a PIL image in mode {frame.mode!r}. Convert it with .convert('RGB').")
    array = _array(frame, name)
    grey = array.ndim == 2 and (hasattr(frame, "getbands") or "[" in name)
    return array[..., None] if grey else array


def _stack(images: Sequence[NDArray[Any]], name: str) -> NDArray[Any]:
    kinds = sorted({f"{image.shape} {image.dtype}" for image in images})
    if len(kinds) > 1:
        raise UsageError(
            f"The frames of {name} differ: {'; '.join(kinds)}. Give frames of one size and type."
        )
    return as_frames(np.stack(images), name)


def _array(data: Any, name: str) -> NDArray[Any]:
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu()
        # numpy has no bfloat16; half-precision floats fit in float32 exactly.
        data = data.float() if data.dtype in (torch.bfloat16, torch.float16) else data
        return np.asarray(data.numpy())
    if isinstance(data, np.ndarray) or hasattr(data, "__array_interface__"):
        return np.asarray(data)
    raise UsageError(
        f"{name} must be a numpy array, a torch tensor or PIL images, got {type(data).__name__}."
    )


def _advice(array: NDArray[Any]) -> str:
    got = f" got {array.shape}."
    if array.ndim == 5:
        return got + " Take one video of the batch, for example x[0]."
    if array.ndim in (3, 4) and array.shape[-3] in _CHANNELS:
        return got + " It looks channel-first: move the channels last with np.moveaxis(x, -3, -1)."
    if array.ndim == 2:
        return got + " Add the channel axis, for example x[..., None]."
    return got


def _check_values(array: NDArray[Any], name: str) -> NDArray[Any]:
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise UsageError(
            f"{name} must be uint8 (0..255) or floating point (0..1), got {array.dtype}."
            " Convert it, for example with .astype(np.uint8)."
        )
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UsageError(
            f"{name} holds NaN or infinity, so the result is broken. Look at the run that made it."
        )
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        hint = "Divide by 255." if low >= 0 and high > 2 else "For a range of -1 to 1 use x / 2 + 0.5."
        raise UsageError(f"{name} must lie in [0, 1], got {low:.4g} to {high:.4g}. {hint}")
    return array


def _pair(a: Frames, b: Frames, names: tuple[str, str] = ("a", "b")) -> tuple[NDArray[Any], NDArray[Any]]:
    first, second = as_frames(a, names[0]), as_frames(b, names[1])
    if first.shape != second.shape:
        raise UsageError(
            f"{names[0]} and {names[1]} must have equal shapes (F, H, W, C), got {first.shape} and"
            f" {second.shape}. Compare results of the same size; nothing is resized here."
        )
    if (first.dtype == np.uint8) != (second.dtype == np.uint8):
        raise UsageError(
            f"{names[0]} is {first.dtype} and {names[1]} is {second.dtype}: rounding to uint8 on one side alone"
            " would count as an error. Convert both the same way."
        )
    return first, second


def _unit(array: NDArray[Any]) -> NDArray[np.float64]:
    """The same values as float64 in [0, 1]."""
    return array.astype(np.float64) / 255.0 if array.dtype == np.uint8 else array.astype(np.float64)


def _squared_error(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Mean squared error of each frame, shape (F,), in float64."""
    return np.array([np.mean((_unit(x) - _unit(y)) ** 2) for x, y in zip(a, b, strict=True)])


def _decibel(squared_error: float) -> float:
    return math.inf if squared_error == 0.0 else -10.0 * math.log10(squared_error)


def _flicker(video: NDArray[Any]) -> float:
    if len(video) < 3:
        raise UsageError(f"temporal_flicker needs at least 3 frames, got {len(video)}. Use psnr for images.")
    second = (
        _unit(x) - 2.0 * _unit(y) + _unit(z) for x, y, z in zip(video, video[1:], video[2:], strict=False)
    )
    return float(np.mean([np.abs(difference).mean() for difference in second]))


def _numbers(data: Any, name: str) -> NDArray[np.float64]:
    array = _array(data, name)
    if np.iscomplexobj(array):
        raise UsageError(f"{name} is complex ({array.dtype}). Give real latents.")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise UsageError(
            f"{name} holds NaN or infinity, so the result is broken. Look at the run that made it."
        )
    return array


_WINDOW = 11
_SIGMA = 1.5


def _ssim_of_frame(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """SSIM of two (H, W, C) float64 frames in [0, 1]."""
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    kernel = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    kernel = kernel / kernel.sum()
    a, b = (torch.from_numpy(frame).movedim(-1, 0)[:, None] for frame in (x, y))  # (C, 1, H, W)

    def blur(image: torch.Tensor) -> torch.Tensor:
        rows = torch.nn.functional.conv2d(image, kernel.view(1, 1, -1, 1))
        return torch.nn.functional.conv2d(rows, kernel.view(1, 1, 1, -1))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    above = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    below = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return float((above / below).mean())
