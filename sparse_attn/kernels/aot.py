"""Compiling kernels for GPUs that are not here, and reading what came out: registers, spills, instructions.

Needs no GPU and no driver: Triton brings its own compiler, `ptxas`, `cuobjdump` and `nvdisasm`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from hasten.errors import RefusedError
from hasten.sparse_attn.kernels.launch import Launch

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"

INSTRUCTIONS = {
    "wgmma": "HGMMA",
    "mma": r"HMMA",
    "tcgen05": r"UTC\w*MMA",
    "async_copies": "LDGSTS",
    "tma": r"UTMALDG",
    "spill_stores": "STL",
    "spill_loads": "LDL",
}
"""What to count -> its name in machine code: matrix products of sm_90, sm_80 and sm_100, copies into shared memory,
and stores to and loads from the stack, which is where registers that do not fit go."""

POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8", torch.int8: "*i8", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one kernel needs. registers: per thread. stack, shared: bytes, per thread and per program."""

    registers: int
    stack: int
    shared: int
    warps: int
    stages: int
    counts: dict[str, int]

    @property
    def spills(self) -> int:
        """Instructions that move registers to or from the stack."""
        return self.counts["spill_stores"] + self.counts["spill_loads"]


def available() -> bool:
    """Whether this installation of Triton can compile and disassemble."""
    return all((TOOLS / tool).is_file() for tool in ("ptxas", "cuobjdump", "nvdisasm"))


def compile(launch: Launch, arch: int) -> Compiled:
    """Compile what `launch` would run on a GPU of compute capability `arch` (80, 90, 100).

    Its tensors may be on the meta device. Raises `RefusedError` under TRITON_INTERPRET=1, where nothing is compiled.
    """
    kernel = launch.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise RefusedError("Kernels cannot be compiled under TRITON_INTERPRET=1. Unset it and start again.")
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        kind, aligned = _type(value, constant=parameter.is_constexpr, plain=parameter.do_not_specialize)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(place,)] = value
        elif aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    return _read(found, launch)


def _type(value: Any, *, constant: bool, plain: bool) -> tuple[str, bool]:
    """The type that a launch gives an argument, and whether it may be taken for a multiple of 16."""
    if constant or value is None or (isinstance(value, int) and value == 1 and not plain):
        return "constexpr", False
    if isinstance(value, Tensor):
        return POINTERS[value.dtype], True
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>", False
    if isinstance(value, float):
        return "fp32", False
    return "i32" if abs(value) < 2**31 else "i64", value % 16 == 0 and not plain


def _read(found: Any, launch: Launch) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(found.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", str(file))
        code = _run("nvdisasm", "-c", str(file))
    registers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert registers is not None, usage
    counts = {name: len(re.findall(rf"\b{pattern}\b", code)) for name, pattern in INSTRUCTIONS.items()}
    return Compiled(
        int(registers[1]), int(registers[2]), int(found.metadata.shared), launch.warps, launch.stages, counts
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
