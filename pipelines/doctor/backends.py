"""Which backends work on this machine: each is run on small numbers and compared with float64."""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten.errors import RefusedError

Status = Literal["ok", "failed", "absent", "refused", "inapplicable"]

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest allowed error relative to the largest true value: a few roundings of each format."""

_ATTENTION = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. ok: it works and is right. failed: it is there and wrong. absent: it is not there.
    refused: hasten knows that it cannot be right here and does not do it. inapplicable: it does not arise here."""

    name: str
    status: Status
    detail: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        row = asdict(self)
        return {"check": row.pop("name")} | row


class Absent(Exception):
    """What is to be checked is not on this machine; the message says why."""


class Inapplicable(Exception):
    """What is to be checked does not arise on this model; the message says why."""


def check(name: str, body: Callable[[], str]) -> Check:
    """Run `body`: what it returns is the detail. `AssertionError` means wrong, `Absent` not there, `RefusedError`
    not done for a reason, `Inapplicable` nothing to check."""
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch explains at length why a kernel is not available
            detail, status = body(), "ok"
    except Absent as error:
        detail, status = str(error), "absent"
    except Inapplicable as error:
        detail, status = str(error), "inapplicable"
    except RefusedError as error:
        detail, status = str(error), "refused"
    except AssertionError as error:
        detail, status = str(error), "failed"
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is the finding
        detail, status = f"{type(error).__name__}: {_one_line(error)}", "failed"
    return Check(name, status, detail, time.perf_counter() - started)  # type: ignore[arg-type]


def backends(device: torch.device, *, quick: bool = False) -> Iterator[Check]:
    """All checks of the machine. quick: without compilation."""
    for dtype in TOLERANCE:
        yield check(f"{_name(dtype)} matmul", lambda dtype=dtype: _matmul(device, dtype))  # type: ignore[misc]
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, backend in _ATTENTION.items():
        yield check(f"{name} attention", lambda backend=backend: _sdpa(device, half, backend))  # type: ignore[misc]
    yield check("xformers attention", lambda: _xformers(device, half))
    yield check("triton", lambda: _triton(device))
    if not quick:
        yield check("torch.compile", lambda: _compiled(device))
    for suffix in (".mp4", ".gif", ".png"):
        yield check(f"{suffix[1:]} files", lambda suffix=suffix: _media(suffix))  # type: ignore[misc]


def compare(got: Tensor, truth: Tensor, dtype: torch.dtype) -> str:
    """The error of `got` in words; raises `AssertionError` when it is larger than `dtype` explains."""
    error = float((got.double() - truth).abs().max() / truth.abs().max())
    assert error <= TOLERANCE[dtype], (
        f"error {error:.1e} against float64, at most {TOLERANCE[dtype]:.0e} expected"
    )
    return f"error {error:.1e}"


def _draw(*shape: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A random tensor as `dtype` on the device, and the same numbers as float64 on the CPU."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return values.to(device), values.double()


def _matmul(device: torch.device, dtype: torch.dtype) -> str:
    a, a64 = _draw(96, 128, device=device, dtype=dtype)
    b, b64 = _draw(128, 64, device=device, dtype=dtype)
    return compare((a @ b).cpu(), a64 @ b64, dtype)


def _qkv(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Query, key and value (1, heads 4, tokens 192, 64) and what attention over them is."""
    draws = [_draw(1, 4, 192, 64, device=device, dtype=dtype) for _ in range(3)]
    values = [(x.roll(i, -1), x64.roll(i, -1)) for i, (x, x64) in enumerate(draws)]
    q, k, v = (x64 for _, x64 in values)
    truth = ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1) @ v
    return (values[0][0], values[1][0], values[2][0]), truth


def _sdpa(device: torch.device, dtype: torch.dtype, backend: SDPBackend) -> str:
    (q, k, v), truth = _qkv(device, dtype)
    try:
        with sdpa_kernel([backend]):
            got = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    except RuntimeError as error:
        if "No available kernel" in str(error) or "no viable backend" in str(error).lower():
            raise Absent(f"not for {_name(dtype)} on {device.type}") from None
        raise
    return f"{_name(dtype)}, {compare(got.cpu(), truth, dtype)}"


def _xformers(device: torch.device, dtype: torch.dtype) -> str:
    version = _installed("xformers")
    if device.type != "cuda":
        raise Absent(f"{version} is installed, but needs a CUDA device")
    import xformers.ops

    tensors, truth = _qkv(device, dtype)
    got = xformers.ops.memory_efficient_attention(*(x.transpose(1, 2).contiguous() for x in tensors))
    return f"{version}, {compare(got.transpose(1, 2).cpu(), truth, dtype)}"


def _triton(device: torch.device) -> str:
    """Presence only: on a GPU torch.compile runs through it, which is the test."""
    version = _installed("triton")
    if device.type != "cuda":
        raise Absent(f"{version} is installed, but needs a CUDA device")
    return f"{version}, tested by torch.compile"


def _compiled(device: torch.device) -> str:
    a, a64 = _draw(64, 64, device=device, dtype=torch.float32)

    def body(x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x @ x.T).softmax(-1) + x.sin()

    try:
        got = torch.compile(body, fullgraph=True)(a)
    except Exception as error:
        text = str(error).lower()
        if "compiler" in text or "triton" in text or "python.h" in text:
            raise Absent(f"cannot build kernels here: {_one_line(error)}") from None
        raise
    return compare(got.cpu(), body(a64), torch.float32)


def _media(suffix: str) -> str:
    """Write a moving gradient with metadata and read both back."""
    import imageio.v3
    import numpy

    from hasten.metrics import psnr
    from hasten.pipelines.media import read_metadata, save

    ramp = numpy.linspace(0.1, 0.9, 64, dtype=numpy.float32)
    video = numpy.stack([numpy.tile(numpy.roll(ramp, shift)[:, None], (1, 64)) for shift in range(0, 40, 8)])
    video = numpy.repeat(video[..., None], 3, axis=-1)
    video = video[:1] if suffix == ".png" else video
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"probe{suffix}"
        save(video, path, fps=10, metadata={"seed": 7})
        assert read_metadata(path).get("seed") == 7, "the metadata did not come back"
        plugin = "pyav" if suffix == ".mp4" else "pillow"
        back = numpy.stack(list(imageio.v3.imiter(path, plugin=plugin)))
    assert back.shape == video.shape, f"wrote {video.shape}, read {back.shape}"
    quality = psnr(back, numpy.rint(video * 255).astype(numpy.uint8))
    assert quality > 28, f"read back at only {quality:.1f} dB"
    return "exact" if quality == float("inf") else f"read back at {quality:.0f} dB"


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Absent("not installed; pip install 'hasten[gpu]'") from None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:160].rsplit(" ", 1)[0] + " ..."
