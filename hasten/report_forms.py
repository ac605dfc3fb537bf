"""What every report can do: print itself, become JSON or a page, and be saved, whole or not at all."""

from __future__ import annotations

import json
import math
import platform
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.atomic import atomic_write
from hasten.errors import UsageError, nearest

if TYPE_CHECKING:
    from hasten.recipe import Recipe
    from hasten.trace import Trace


class Forms(ABC):
    """The forms of a report. `print` it, `save` it, or read its properties."""

    recipe: Recipe | None

    @property
    def name(self) -> str:
        """Of the recipe, in words where there is none."""
        return (self.recipe.name or "unnamed recipe") if self.recipe else "no recipe"

    @property
    @abstractmethod
    def warnings(self) -> list[str]:
        """What the reader must know before the numbers."""

    def opening(self, about: str) -> list[str]:
        """First lines of the text: the recipe, what the report is about, and the warnings."""
        return [f"hasten report: {self.name}, {about}", *(f"  !! WARNING: {warning}" for warning in self.warnings)]

    @abstractmethod
    def __str__(self) -> str:
        """Readable text: warnings first, then the numbers."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain, strict-JSON data: numbers that are not finite become None."""

    @abstractmethod
    def to_html(self) -> str:
        """One self-contained page; nothing is loaded from anywhere."""

    def to_json(self) -> str:
        """`to_dict` as JSON text without NaN or Infinity."""
        return json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False, indent=1)

    def save(self, path: Path | str) -> Path:
        """Write the form that the suffix names (.txt, .json, .html), whole or not at all.

        Raises `UsageError` for another suffix and `OutputError` when the file cannot be written.
        """
        forms = {".txt": self.__str__, ".json": self.to_json, ".html": self.to_html}
        suffix = Path(path).suffix.lower()
        if suffix not in forms:
            raise UsageError(
                f"Cannot save a report as {str(path)!r}: the suffix is {suffix!r};"
                f" allowed: {', '.join(forms)}.{nearest(suffix, forms)}"
            )
        return atomic_write(path, forms[suffix]().rstrip("\n") + "\n")


class Traced(Forms):
    """A report that is counted from a trace."""

    trace: Trace

    @property
    def bytes_held(self) -> int:
        """Most bytes that were held at once for later: by caches, and by readers beside the model's own cache."""
        return max(self.trace.bytes_peak, self.trace.bytes_held)

    @property
    def notes(self) -> list[str]:
        """What the session said: fallbacks, refusals, methods that did nothing."""
        return list(self.trace.notes)


def fact_lines(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line of text for each group of facts that holds any: `hardware    device cpu, cores 2`."""
    return [
        f"  {title:<11} {', '.join(f'{key} {value}' for key, value in group.items())}"
        for title, group in facts.items()
        if group
    ]


def installed_versions() -> dict[str, str]:
    """Versions of hasten, Python and the libraries that decide the numbers, without importing them."""
    from hasten import __version__

    found = {"hasten": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers"):
        if (version := _version(name)) is not None:
            found[name] = version
    return found


@cache
def _version(name: str) -> str | None:
    """What is installed stays what it is, and to read its description takes milliseconds."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def readable_bytes(num: int) -> str:
    """`12.3 MiB`, in the largest unit that gives at least 1."""
    power = max(0, min((num.bit_length() - 1) // 10, 4))
    return f"{num} B" if power == 0 else f"{num / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def strict(value: Any) -> Any:
    """`value` in types that strict JSON has; anything unknown as text."""
    if isinstance(value, Mapping):
        return {str(key): strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [strict(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
