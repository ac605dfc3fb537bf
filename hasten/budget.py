"""`Budget`: how much quality may be spent, instead of thresholds."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hasten.errors import UsageError

DECODER_DB = 12.0
"""PSNR = DECODER_DB - 20 log10(latent error). A decoder that turns unit-variance latents into pixels in [0, 1] of
standard deviation 0.25, without damping or enlarging errors, has 12 dB (20 log10 4); measured between 11.6 and 16.5
on the bundled models, so this is the cautious end."""

FINEST, COARSEST = 0.01, 0.2
"""Latent errors at quality 1 and 0."""


class Budget(BaseModel):
    """A tolerance, given in exactly one of five ways.

    psnr: similarity in dB of the decoded result to the plain run's, at least. latent_error: |latents - plain latents| /
    |plain latents| (rms), at most. quality: a slider from 0 (draft, latent error 0.2) to 1 (hardly to be told from the
    plain run, 0.01), geometric in between. The measured relation between the three is documented in docs/caching.md.
    exact_match: of texts that are written in any order, the share that must be those of sequential decoding, token by token.
    lossless: True for causal language models: nothing may be lost, only drafted (greedy texts stay, drawn ones follow the law).

    Raises `ValueError` when none or several are given, or one is out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    psnr: float | None = Field(None, gt=12, le=90)
    latent_error: float | None = Field(None, gt=0, le=1)
    quality: float | None = Field(None, ge=0, le=1)
    exact_match: float | None = Field(None, gt=0, le=1)
    lossless: Literal[True] | None = None

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [name for name in ("psnr", "latent_error", "quality", "exact_match", "lossless") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a Budget is one of psnr=, latent_error=, quality=, exact_match= or lossless=, got {', '.join(given) or 'none'};"
                " for example Budget(psnr=35)"
            )
        return self

    @property
    def tolerance(self) -> float:
        """The latent error that may be reached. Raises `UsageError` for a budget of texts, which have none."""
        if self.lossless:
            raise UsageError(
                "Budget(lossless=True) is about causal language models of transformers. Pictures and clips have psnr=, latent_error="
                " or quality=, texts that are written in any order exact_match=."
            )
        if self.exact_match is not None:
            raise UsageError(
                f"Budget(exact_match={self.exact_match:g}) is about texts that are written in any order. Pictures and clips have"
                " psnr=, latent_error= or quality=."
            )
        if self.latent_error is not None:
            return self.latent_error
        if self.psnr is not None:
            return float(10 ** ((DECODER_DB - self.psnr) / 20))
        assert self.quality is not None
        return float(COARSEST * (FINEST / COARSEST) ** self.quality)
