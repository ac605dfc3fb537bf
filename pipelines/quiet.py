"""Other libraries' log messages, left out for a while."""

from __future__ import annotations

import contextlib
import logging
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
