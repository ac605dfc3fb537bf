"""Other libraries' log messages and progress bars, left out for a while."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Errors only from these loggers and those below them; their levels come back, also after an exception."""
    known = [name for name in logging.root.manager.loggerDict if name.startswith(names)]
    levels = {logger: logger.level for logger in map(logging.getLogger, {*known, *names})}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """No progress bars of transformers and diffusers, as far as they are imported; afterwards as before, also after an
    exception.

    Their `disable_progress_bar` turns off the hub's downloads, too, and forgets which of them somebody had turned off; so
    the two switches are set themselves.
    """
    libraries = [sys.modules.get(f"{name}.utils.logging") for name in ("transformers", "diffusers")]
    switches = {library: library.__dict__["_tqdm_active"] for library in libraries if hasattr(library, "_tqdm_active")}
    for library in switches:
        library.__dict__["_tqdm_active"] = False
    try:
        yield
    finally:
        for library, active in switches.items():
            library.__dict__["_tqdm_active"] = active
