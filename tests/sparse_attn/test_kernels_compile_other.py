"""The kernels around attention compile for GPUs that are not here: matrix instructions, and no register spilled."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")

from benchmarks.compile_kernels_other import variants
from hasten.sparse_attn.kernels import aot

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter"),
    pytest.mark.skipif(not aot.available(), reason="this Triton brings no ptxas and no disassembler"),
]

VARIANTS = dict(variants())
ARCHS = (80, 90, 100)
WITHOUT_PRODUCTS = ("means", "permute", "pack", "linear sums")

QUICK = [
    ("backward 64 bf16 causal", 90), ("backward 128 bf16 order 1", 80), ("backward 64 bf16", 100),
    ("assign 128 bf16", 90), ("means 64 bf16", 90), ("permute 128 bf16", 90), ("pack 1000 blocks masked", 90),
    ("linear states 64 bf16", 90), ("linear outputs 128 bf16 causal", 90),
    ("tangent 64 bf16", 90),
    ("backward 66 bf16", 90), ("linear states 128 bf16 causal", 100),  # the last two that spilled
]  # fmt: skip
"""One of each kind; `pytest -m slow` compiles all of them for all architectures (some minutes)."""


SPILL = {(f"tangent 128 bf16{kind}", arch) for kind in ("", " causal") for arch in (80, 90)}
"""Known to spill: two sums of outputs that are 128 wide (docs/kernels.md has the numbers)."""


def check(name: str, arch: int) -> None:
    found = aot.compile(VARIANTS[name](arch), arch)
    assert found.spills == 0 and found.stack == 0, f"{name} on sm_{arch}: {found}"
    assert found.registers * found.warps * 32 <= 65536, "one program has more registers than a multiprocessor"
    if not name.startswith(WITHOUT_PRODUCTS):
        products = sum(found.counts[kind] for kind in ("mma", "wgmma", "tcgen05"))
        assert products > 0, f"{name} on sm_{arch} has no matrix instructions: {found}"


@pytest.mark.parametrize(("name", "arch"), QUICK)
def test_one_of_each_kind(name: str, arch: int) -> None:
    check(name, arch)


def test_gradients_of_16_bits_use_the_instructions_of_hopper() -> None:
    assert aot.compile(VARIANTS["backward 64 bf16"](90), 90).counts["wgmma"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", VARIANTS)
def test_all(name: str, arch: int) -> None:
    if (name, arch) in SPILL:
        pytest.xfail("two sums of outputs that are 128 wide do not fit into registers there")
    check(name, arch)
