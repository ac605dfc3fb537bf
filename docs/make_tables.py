"""Writes the tables of the README and the docs from the recipe registry and the measured results.

    python docs/make_tables.py            rewrite them
    python docs/make_tables.py --check    exit 1 when one differs from what it should be

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; the names are the keys of `TABLES`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from doc_tables import (
    attention,
    caches,
    compose,
    decode,
    decode_kv,
    distill,
    dllm,
    kernels,
    masked_images,
    recipes,
    resolutions,
    runs,
    samplers,
    text_tuning,
    token_images,
)
from doc_tables.results import ROOT

MARK = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

TABLES: dict[str, Callable[[], str]] = {
    "recipes": recipes.recipes,
    "results": runs.results,
    "models": runs.models,
    "text-models": runs.text_models,
    "conformance": runs.conformance,
    "bars": caches.bars,
    "cache": caches.cache,
    "budget": caches.budget,
    "attention-speed": attention.speed,
    "attention-bars": attention.bars,
    "attention-quality": attention.quality,
    "attention-sharpness": attention.sharpness,
    "attention-end-to-end": attention.end_to_end,
    "kernels": kernels.kernels,
    "compose-bars": compose.bars,
    "compose": compose.compose,
    "decode-bars": decode.bars,
    "decode": decode.decode,
    "distill-bars": distill.bars,
    "distill": distill.distill,
    "distill-texts": distill.texts,
    "dllm-bars": dllm.bars,
    "dllm": dllm.dllm,
    "kv-quality": decode_kv.quality,
    "kv-shared": decode_kv.shared,
    "masked-images": masked_images.masked_images,
    "resolutions-bottleneck": resolutions.bottleneck,
    "resolutions-windows": resolutions.windows,
    "resolutions-drafts": resolutions.drafts,
    "resolutions-restore": resolutions.restore,
    "token-images": token_images.token_images,
    "tune-text": text_tuning.text_tuning,
    "samplers-orders": samplers.orders,
    "samplers-solvers": samplers.solvers,
    "samplers-sequences": samplers.sequences,
    "samplers-travel": samplers.travel,
    "samplers-noises": samplers.noises,
}


def filled(text: str) -> str:
    """`text` with every marked table made anew."""

    def make(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise SystemExit(f"there is no table {name!r}; known: {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[name]()}{match[3]}"

    return MARK.sub(make, text)


def stale(files: Iterable[Path] | None = None) -> list[Path]:
    """Files whose tables differ from what they should be."""
    return [file for file in files or pages() if filled(text := file.read_text(encoding="utf-8")) != text]


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of the README and the docs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a table is not up to date")
    check = parser.parse_args().check
    old = stale()
    for file in old:
        name = file.relative_to(ROOT)
        if check:
            print(f"{name}: its tables are not up to date; run python docs/make_tables.py")
        else:
            file.write_text(filled(file.read_text(encoding="utf-8")), encoding="utf-8")
            print(f"{name}: written")
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())
