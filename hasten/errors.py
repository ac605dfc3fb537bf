"""The errors hasten raises on purpose; anything else that escapes is a bug.

HastenError (ValueError)          exit code
├── UsageError                    2   a wrong argument, an unknown name, a value out of range
│   ├── RecipeError               2   an unknown key, two parts on one axis, an unsafe file
│   ├── LimitError                2   too large, too long, not finite
│   └── ModelError                2   no such model, a refused checkpoint format, a host without a denoiser
├── RefusedError                  1   a method cannot be right on this model, and there is nothing to fall back to
├── OutputError                   1   an unwritable folder, a full disk
├── StoppedError                  143 a training that was told to end (SIGTERM), and can be resumed
└── ResumeError                   1   a checkpoint that lacks something needed to continue exactly

Every message says what was wrong, what was got, what is allowed and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HastenError(ValueError):
    """Base of all errors raised on purpose. `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(HastenError):
    """The caller asked for something that does not exist or is not allowed."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be read, joined or applied."""


class LimitError(UsageError):
    """A request larger than `Limits` allows, or a number that is not finite."""


class ModelError(UsageError):
    """A model that is unknown, unsafe to load, or has no denoiser that hasten can find."""


class RefusedError(HastenError):
    """A method that cannot be right on this model."""


class OutputError(HastenError):
    """A result that could not be written. Nothing half-written is left behind."""


class ResumeError(HastenError):
    """A checkpoint that does not hold all that an exact continuation needs."""


class StoppedError(HastenError):
    """A training that was told to end before it was finished. Its checkpoint is written."""

    exit_code = 143


def nearest(word: str, words: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or an empty string when nothing is close. Meant to end an error message."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""
