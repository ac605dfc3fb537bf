"""Every kernel compiles for GPUs that are not here: matrix instructions are there, and no register is spilled."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from benchmarks.compile_kernels import variants
from hasten.sparse_attn.kernels import aot, config

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter"),
    pytest.mark.skipif(not aot.available(), reason="this Triton brings no ptxas and no disassembler"),
]

VARIANTS = dict(variants())
PRODUCTS = {80: "mma", 90: "wgmma", 100: "tcgen05"}
"""The matrix instructions of each architecture."""

QUICK = [
    ("forward 128 bf16 order 0", 90),
    ("forward 128 bf16 order 2", 80),
    ("forward 64 bf16 causal order 2", 90),
    ("forward 64 bf16 order 1", 100),
    ("decode 128 bf16", 90),
    ("merge pieces 128 bf16", 90),
    ("merge 128 bf16", 90),
    ("columns 128 bf16", 90),
]
"""One of each kind; `pytest -m slow` compiles all of them for all architectures (some minutes)."""


def check(name: str, arch: int) -> None:
    launch = VARIANTS[name](arch)
    found = aot.compile(launch, arch)
    assert found.spills == 0 and found.stack == 0, f"{name} on sm_{arch}: {found}"
    assert found.registers * found.warps * 32 <= 65536, "one program has more registers than a multiprocessor"
    assert found.shared <= config.SHARED[arch] * 1024, f"{name} on sm_{arch}: more shared memory than there is"
    if name.startswith("merge"):
        return
    # Products of float32, and of fewer than 64 rows, are those of sm_80 everywhere.
    small = "fp32" in name or name.startswith("decode")
    products = found.counts[PRODUCTS[arch]] + (found.counts["mma"] if small else 0)
    assert products > 0, f"{name} on sm_{arch} has no matrix instructions: {found}"


@pytest.mark.parametrize(("name", "arch"), QUICK)
def test_one_of_each_kind(name: str, arch: int) -> None:
    check(name, arch)


def test_the_copy_engine_is_one_line_of_the_table_away(monkeypatch: pytest.MonkeyPatch) -> None:
    table = config.forward_config
    monkeypatch.setattr(config, "forward_config", lambda *args, **more: replace(table(*args, **more), tma=True))
    found = aot.compile(VARIANTS["forward 64 bf16 order 0"](90), 90)
    assert found.counts["tma"] > 0 and found.counts["wgmma"] > 0 and found.spills == 0


def test_shared_memory_fits_smaller_gpus_too() -> None:
    found = aot.compile(VARIANTS["forward 128 bf16 order 0"](89), 89)
    assert found.spills == 0 and found.shared <= config.SHARED[89] * 1024


@pytest.mark.slow
@pytest.mark.parametrize("arch", PRODUCTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_all(name: str, arch: int) -> None:
    check(name, arch)
