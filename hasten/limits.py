"""What a request may ask for at most. One object, enforced where work starts, not in a user interface."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hasten.errors import LimitError


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds of one generation request; `check` raises `LimitError` with the first one broken.

    max_prompt: characters. max_side: pixels. max_volume: height x width x frames. max_steps: solver steps.
    max_batch: prompts in one call. max_tokens: of one text, its prompt and what is generated. max_cache_bytes: bytes that
    caches may hold, None for no cap.
    """

    max_prompt: int = 4_000
    max_side: int = 8_192
    max_volume: int = 3_840 * 2_160 * 129
    max_steps: int = 1_000
    max_batch: int = 1_024
    max_tokens: int = 131_072
    max_cache_bytes: int | None = None

    def check(
        self,
        *,
        prompts: list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        """Raise `LimitError` unless every given value is inside the limits. None means not given."""
        if prompts is not None:
            self._check_prompts(prompts)
        self._check_range("height", height, 1, self.max_side, "pixels")
        self._check_range("width", width, 1, self.max_side, "pixels")
        self._check_range("num_frames", num_frames, 1, self.max_volume, "frames")
        self._check_range("num_inference_steps", num_inference_steps, 1, self.max_steps, "steps")
        if height is not None and width is not None:
            volume = height * width * (num_frames or 1)
            if volume > self.max_volume:
                raise LimitError(
                    f"{height} x {width} x {num_frames or 1} frames is {volume:,} pixels; at most"
                    f" {self.max_volume:,} are allowed. Ask for a smaller size or fewer frames."
                )
        if guidance_scale is not None and not math.isfinite(guidance_scale):
            raise LimitError(f"guidance_scale must be a finite number, got {guidance_scale}. Try 3.0.")

    def check_tokens(self, prompts: Sequence[int], new: Sequence[int]) -> None:
        """Raise `LimitError` unless there is a text, not too many of them, and none is too long. Numbers of tokens, of
        each prompt and of what is to be generated behind it."""
        if not prompts:
            raise LimitError("No prompt was given. Pass at least one.")
        if len(prompts) > self.max_batch:
            raise LimitError(f"{len(prompts)} prompts in one call; at most {self.max_batch} are allowed.")
        for number, (prompt, more) in enumerate(zip(prompts, new, strict=True), 1):
            if prompt + more > self.max_tokens:
                raise LimitError(
                    f"Text {number} would have {prompt:,} + {more:,} tokens; at most {self.max_tokens:,} are allowed."
                    " Shorten the prompt, or generate less."
                )

    def _check_prompts(self, prompts: list[str]) -> None:
        if not prompts:
            raise LimitError("No prompt was given. Pass at least one, for example 'a seven moving left'.")
        if len(prompts) > self.max_batch:
            raise LimitError(f"{len(prompts)} prompts in one call; at most {self.max_batch} are allowed.")
        for number, prompt in enumerate(prompts, 1):
            if not prompt.strip():
                raise LimitError(f"Prompt {number} is empty. Write what to generate, or remove the line.")
            if len(prompt) > self.max_prompt:
                raise LimitError(
                    f"Prompt {number} has {len(prompt)} characters; at most {self.max_prompt} are allowed."
                    " Shorten it: text encoders cut prompts long before that."
                )

    @staticmethod
    def _check_range(name: str, value: int | None, low: int, high: int, unit: str) -> None:
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise LimitError(f"{name} must be a whole number of {unit}, got {value!r}.")
        if not low <= value <= high:
            raise LimitError(f"{name} must lie between {low} and {high:,} {unit}, got {value:,}.")
