"""`benchmarks/masked_images.py`: MaskGIT and ReCAP on tiny-mask."""

from __future__ import annotations

from doc_tables.results import (
    Columns,
    below_each_other,
    documents,
    hardware_and_versions,
    known,
    percent,
    table,
    tenths_of_percent,
)

COLUMNS: Columns = {
    "n": ("images", str),
    "prompt_accuracy": ("digit right", tenths_of_percent),
    "frechet": ("Frechet", lambda value: f"{value:.1f}"),
    "recall": ("recall", percent),
    "agreement": ("same codes", percent),
    "token_layers": ("token-layers", lambda value: f"{value:.0f}"),
    "computed_fraction": ("of `maskgit`", percent),
}

NAMES = {"fewer_steps": "control: fewer steps", "other_seed": "control: other seeds", "real": "reference"}


def masked_images() -> str:
    """All rows, by numbers of steps."""
    parts = []
    for file, document in documents("masked-images"):
        body = table(
            ["recipe", "", "steps", *(heading for heading, _ in COLUMNS.values())],
            [
                [
                    row["recipe"] if row.get("control") == "real" else f"`{row['recipe']}`",
                    NAMES.get(row.get("control", ""), ""), str(row.get("steps", "")),
                    *(known(row, key, COLUMNS) for key in COLUMNS),
                ]
                for row in sorted(document["rows"], key=lambda row: row.get("steps", 0))
            ],
            left=2,
        )  # fmt: skip
        where = hardware_and_versions(document, file)
        how = f"guidance {document['guidance']}, temperature {document['temperature']}, batches of {document['batch']}"
        parts.append(f"{how}; {where}\n\n{body}")
    return below_each_other(parts)
