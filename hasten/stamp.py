"""Where a tuned recipe was measured: what it fits, and what it kept there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from hasten.part import Part


class Stamp(Part):
    """Written by `hasten tune`, read when the recipe is put onto a host: elsewhere its numbers mean nothing, and it says so.

    model: the name it was opened by. weights: fingerprint of the network's weights. scheduler: class of the host's. steps: of
    the plain run. shape: of one row of the network's input. asked: what the plain run's call asked for, steps and size by the
    names of its arguments, as far as it is known. tokenizer: fingerprint of the one for texts. length: tokens that
    were generated, at most. hardware, versions: as in reports. budget: what was asked for. prompts: held-out prompts it was
    checked on. kept: share of them that kept the budget (for texts: that are those of sequential decoding). speedup, worst,
    median: measured there; the last two of the budget's own measure (for texts, worst is the low end of the share's interval).
    date: UTC, to the day.
    """

    model: str
    weights: str
    scheduler: str = ""
    steps: int | None = Field(None, ge=1)
    shape: tuple[int, ...] = ()
    asked: tuple[tuple[str, int], ...] = ()
    tokenizer: str = ""
    length: int | None = Field(None, ge=1)
    hardware: str = ""
    versions: tuple[str, ...] = ()
    budget: str
    prompts: int = Field(0, ge=0)
    kept: float | None = Field(None, ge=0, le=1)
    speedup: float | None = None
    worst: float | None = None
    median: float | None = None
    date: str = ""

    def differences(self, found: Mapping[str, Any]) -> list[str]:
        """What is otherwise here, a phrase each. found: any of this stamp's fields, as they are here."""
        names = {
            "weights": "weights", "scheduler": "scheduler", "steps": "number of steps", "shape": "size", "tokenizer": "tokenizer",
            "length": "number of tokens", "hardware": "hardware",
        }  # fmt: skip
        return [
            f"{what} ({_short(getattr(self, name))} there, {_short(found[name])} here)"
            for name, what in names.items()
            if name in found and found[name] != getattr(self, name)
        ] + self._versions(found.get("versions"))

    def remark(self, name: str, found: Mapping[str, Any]) -> str:
        """What the reader must know where the recipe `name` is used on something else than it was tuned on; "" on the same."""
        others = "; another ".join(self.differences(found))
        return others and (
            f"Recipe {name!r} was tuned and measured elsewhere: another {others}. Its numbers do not hold here; run hasten tune."
        )

    def _versions(self, here: tuple[str, ...] | None) -> list[str]:
        if here is None or set(here) == set(self.versions):
            return []
        return [f"versions ({', '.join(v for v in self.versions if v not in here)} there)"]


def _short(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
