"""What may be spent: one number, and how long the search may take."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from hasten.budget import DECODER_DB, Budget
from hasten.errors import UsageError

Measure = Literal["psnr", "latent_error", "ssim"]

_WRITTEN = re.compile(r"\s*(psnr|latent_error|ssim|exact_match)\s*(>=|<=|=)\s*(\d+\.?\d*|\.\d+)\s*(%|dB)?\s*", re.IGNORECASE)
_LONG = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


@dataclass(frozen=True, slots=True)
class Goal:
    """A run is good enough when its `measure`, against the plain run with the same noise, is at least (psnr in dB, ssim) or
    at most (latent_error) `limit`."""

    measure: Measure
    limit: float

    def met(self, value: float | None) -> bool:
        """Whether a run's value keeps it; None is what cannot be measured."""
        return value is not None and self.better(value) >= self.better(self.limit) - 1e-12

    def better(self, value: float) -> float:
        """The value so that more is better."""
        return -value if self.measure == "latent_error" else value

    @property
    def tolerance(self) -> float:
        """About the latent error that keeps it: where a search begins."""
        if self.measure == "latent_error":
            return self.limit
        if self.measure == "psnr":
            return min(1.0, 10 ** ((DECODER_DB - self.limit) / 20))
        return max(1e-3, min(0.5, math.sqrt(max(0.0, 1 - self.limit))))

    def told(self, value: float) -> str:
        """A value in words: 34.2 dB, 0.031, or identical."""
        if math.isinf(value):
            return "identical" if self.better(value) > 0 else "not to be measured"
        return f"{value:.1f} dB" if self.measure == "psnr" else f"{value:.4g}"

    def __str__(self) -> str:
        sign = "<=" if self.measure == "latent_error" else ">="
        return f"{self.measure} {sign} {self.limit:g}{' dB' if self.measure == 'psnr' else ''}"

    @classmethod
    def read(cls, given: str | Budget) -> Goal:
        """From `"psnr>=30"` (dB may follow), `"latent_error<=0.05"` (or 5%), `"ssim>=0.98"` (or 98%), or a `Budget`.

        Raises `UsageError` for anything else.
        """
        if isinstance(given, Budget):  # of texts: `tolerance` raises
            return cls("psnr", given.psnr) if given.psnr is not None else cls("latent_error", given.tolerance)
        found = _WRITTEN.fullmatch(given)
        if found is None:
            raise UsageError(f"The budget {given!r} is none. Write psnr>=30, latent_error<=0.05, or ssim>=0.98.")
        name, sign, unit = found[1].lower(), found[2], (found[4] or "").lower()
        number = float(found[3]) / (100 if unit == "%" else 1)
        if name == "exact_match":
            raise UsageError("exact_match is for text diffusion, and this model makes pictures or clips. Use psnr>=30.")
        wanted = "<=" if name == "latent_error" else ">="
        if sign not in (wanted, "="):
            raise UsageError(f"The budget {given!r} asks for bad results. Write {name}{wanted}{number:g}.")
        if unit and (unit == "db") != (name == "psnr"):
            raise UsageError(f"The budget {given!r} has the unit {found[4]}, which is none of {name}'s. Leave it out.")
        low, high = {"psnr": (12, 90), "latent_error": (0, 1), "ssim": (0, 1)}[name]
        if not low < number <= high:
            raise UsageError(f"A budget of {name} lies in ({low}, {high}], got {number:g}.")
        return cls(name, number)  # type: ignore[arg-type]  # one of the three


def seconds_of(text: str) -> float:
    """Seconds of "10m", "90s", "1h30m" or "600". Raises `UsageError` for anything else, and for nothing."""
    found = _LONG.fullmatch(text.strip().lower())
    total = sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0.0
    if total <= 0:
        raise UsageError(f"The time {text!r} is none. Write 10m, 90s or 1h30m.")
    return total
