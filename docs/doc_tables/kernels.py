"""What compiled kernels need."""

from __future__ import annotations

from doc_tables.results import Row, document, table

PRODUCTS = ("wgmma", "tcgen05", "mma")


def kernels() -> str:
    """What each kernel needs on each architecture: registers, spills, shared memory, matrix instructions."""
    compiled = document("aot/kernels.json") or {"rows": []}
    found = {(row["kernel"], row["arch"]): row for row in compiled["rows"]}
    archs = list(dict.fromkeys(arch for _, arch in found))
    rows = [
        [name, *(_needs(found[name, arch]) if (name, arch) in found else "" for arch in archs)]
        for name in dict.fromkeys(name for name, _ in found)
    ]
    return table(["kernel", *archs], rows, left=1 + len(archs))


def _needs(row: Row) -> str:
    products = [f"{row['counts'][kind]} {kind}" for kind in PRODUCTS if row["counts"][kind]]
    room = [f"{row['registers']} registers", f"{row['spills']} spills", f"{row['shared'] // 1024} KiB"]
    return ", ".join(room + products)
