"""What a request from a page may ask for at most. One object, enforced where a request is read, not in the page."""

from __future__ import annotations

from dataclasses import dataclass

from hasten import limits
from hasten.errors import LimitError

SHOWN = 60
"""Characters of a wrong value that a message repeats."""


class RequestError(LimitError):
    """A request that is not allowed. what: the field. got: what it was, shortened. allowed: in words. next_step: in words."""

    def __init__(self, what: str, got: object, allowed: str, next_step: str = "Change it and try again.") -> None:
        self.what, self.got, self.allowed, self.next_step = what, short(got), allowed, next_step
        super().__init__(f"{what}: got {self.got}; allowed: {allowed}. {next_step}")


@dataclass(frozen=True, slots=True)
class Limits(limits.Limits):
    """Bounds of `hasten.Limits`, tighter, and those of a page. Shared by every view, so that none can ask for more.

    max_text: characters of a prompt that a language model goes on with. least_side: pixels. max_frames: of a clip. max_recipes: compared at once, plain aside. max_repeats: of each run's time.
    max_prompts: of a tuning or training.
    max_seconds: of a tuning. max_minutes: of a training. max_upload: bytes of a file whose settings are restored.
    max_request: bytes of a request as JSON. max_queue: jobs that wait. max_pixels_read: of a picture that is read.
    """

    max_side: int = 4_096
    max_steps: int = 200
    max_tokens: int = 8_192
    max_text: int = 100_000
    least_side: int = 8
    max_frames: int = 1_025
    max_recipes: int = 8
    max_repeats: int = 25
    max_prompts: int = 256
    max_seconds: float = 7 * 86_400.0
    max_minutes: float = 7 * 1_440.0
    max_upload: int = 64 * 2**20
    max_request: int = 512 * 2**10
    max_queue: int = 256
    max_pixels_read: int = 2 * 4_096 * 4_096


def short(value: object) -> str:
    """`value` as a message shows it: on one line, and never long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer with too many digits to be written out
        text = f"a very long {type(value).__name__}"
    text = text.encode("ascii", "backslashreplace").decode() if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text) else text
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
