"""What every launch needs: is this a real device, may these tensors go to a kernel, which powers of two hold them?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.plan import Plan

LOG2E = 1.4426950408889634
"""Kernels work with powers of 2: the device has an instruction for 2^x and none for e^x."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch, as data: what runs here is also what `aot.compile` compiles for GPUs that are not here.

    arguments: by name, constants included. warps, stages: per program, and chunks in flight.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int

    def run(self, beside: Tensor) -> None:
        """Launch on the device of `beside`, which becomes the current one for this long: Triton knows no other."""
        if not beside.is_cuda:
            self._run()
            return
        with torch.cuda.device(beside.device):
            self._run()

    def _run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told. Multiply-adds may be fused, which Triton wants to be told from 3.10 on."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def power(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and at least `least` (matrix instructions want 16)."""
    return max(least, 1 << (n - 1).bit_length()) if n > 0 else least


def interpreted(kernel: Any) -> bool:
    """Whether `kernel` was defined under TRITON_INTERPRET=1: it runs as NumPy on the CPU, for tests."""
    return not isinstance(kernel, triton.JITFunction)


def check(kernel: Any, **tensors: Tensor | None) -> None:
    """Refuse what a kernel cannot read. Raises `UsageError` naming the tensor, what it has and what is allowed."""
    present = {name: x for name, x in tensors.items() if x is not None}
    first, leader = next(iter(present.items()))
    wanted = "cpu" if interpreted(kernel) else "cuda"
    for name, x in present.items():
        if x.device.type != wanted:
            raise UsageError(
                f"Triton kernels need {name} on {wanted}, got {x.device}."
                ' Use backend="torch" there, or move the tensors to a CUDA device.'
            )
        if x.device != leader.device:
            raise UsageError(f"{name} is on {x.device} and {first} on {leader.device}; put them on one device.")
        if x.is_floating_point() and x.dtype not in DTYPES:
            raise UsageError(f"{name} is {x.dtype}; kernels take float16, bfloat16 and float32.")


def rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, which kernels need; a copy only where it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def same_dtype(**tensors: Tensor) -> torch.dtype:
    """The one dtype of all `tensors`. Raises `UsageError` where they differ."""
    (first, leader), *others = tensors.items()
    for name, x in others:
        if x.dtype != leader.dtype:
            raise UsageError(f"{name} is {x.dtype} and {first} {leader.dtype}; cast them to one dtype.")
    return leader.dtype


def precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: as three TF32 ones (about 1e-6 relative error), or as one where PyTorch's
    own matrix products may do so (`torch.backends.cuda.matmul.allow_tf32`). Has no meaning for 16-bit inputs."""
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def arch(x: Tensor) -> int:
    """Compute capability of x's device as one number (90 for Hopper); 0 in the interpreter."""
    if not x.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def plan_arguments(plan: Plan) -> dict[str, Any]:
    """The plan's tensors, by the names that kernels give them."""
    names: tuple[str, ...] = ("q_perm", "k_perm", "tile_start", "tile_length", "tile_plane", "tile_row")
    names += ("row_start", "row_full", "row_end", "chunk_start", "chunk_length")
    tensors = {name: getattr(plan, name) for name in names}
    return tensors | {
        "q_perm_plane": _plane_stride(plan.q_perm), "k_perm_plane": _plane_stride(plan.k_perm), "keys": plan.keys
    }


def mask_arguments(mask: Mask | None) -> dict[str, Any]:
    """A mask, by the names that kernels give its parts; the tree as bytes."""
    found = Mask(None, None) if mask is None else mask
    tree = None if found.tree is None else found.tree.contiguous().view(torch.uint8)
    return {
        "left": found.left or 0, "right": found.right or 0, "offset": found.offset,
        "tree": tree, "tree_keys": 0 if tree is None else tree.shape[1],
        "MASKED": mask is not None, "LEFT": found.left is not None, "RIGHT": found.right is not None,
        "TREE": tree is not None,
    }  # fmt: skip


def strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of [B, H, S, D] tensors but for the last, as x_b, x_h, x_s."""
    return {f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bhs")}


def _plane_stride(perm: Tensor | None) -> int:
    """Elements from one plane's permutation to the next; 0 where all planes share one."""
    return perm.stride(0) if perm is not None and perm.shape[0] > 1 else 0
