"""The registry of recipes."""

from __future__ import annotations

import re
from typing import Any

from doc_tables.results import NOT_YET, documents, table

ARXIV = re.compile(r"(?:arXiv )?(\d{4}\.\d{5})")


def part_text(part: Any) -> str:
    """`network(rule spread(share 0.24), forecast polynomial, correct)`: nested parts, and what is not the default."""
    inner = []
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if name == "signal" and not part.rule.needs_signal:
            continue  # a schedule asks no signal
        if hasattr(value, "kind"):
            inner.append(f"{name} {part_text(value)}")
        elif value != field.get_default(call_default_factory=True):
            inner.append(name if value is True else f"{name} {_value(value)}")
    return part.kind + (f"({', '.join(inner)})" if inner else "")


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + " ".join(part_text(item) if hasattr(item, "kind") else str(item) for item in value) + "]"
    return str(value)


def measured_where() -> dict[str, list[str]]:
    """Recipe name -> hardware folders whose results have a row of it, alone or together with others."""
    found: dict[str, list[str]] = {}
    for command in ("recipes", "cache", "attention-end-to-end", "dllm", "masked-images", "token-images", "decode"):
        for file, document in documents(command):
            for row in document["rows"]:
                control = str(row.get("control"))
                if control.startswith(("oracle", "fewer", "peer")) or not row.get("n"):
                    continue
                for part in row["recipe"].partition(" @ ")[0].split("+"):
                    places = found.setdefault(re.split("[:,]", part.strip())[0], [])
                    if file.parent.name not in places:
                        places.append(file.parent.name)
    return found


def recipes() -> str:
    """One row per recipe of the registry."""
    from hasten.pipelines.recipes import catalogue

    where = measured_where()
    rows = []
    for entry in catalogue():
        parts = "; ".join(f"{axis}: {part_text(part)}" for axis, part in entry.recipe.axes.items())
        paper = ARXIV.sub(r"[\g<0>](https://arxiv.org/abs/\g<1>)", entry.paper) or "ours"
        rows.append([f"`{entry.name}`", paper, parts or "none", ", ".join(where.get(entry.name, [NOT_YET]))])
    return table(["recipe", "paper", "parts", "measured on"], rows, left=4)
