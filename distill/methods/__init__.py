"""The ways of training, a file each: losses on roles, without loop or optimiser."""

from __future__ import annotations

import importlib
import pkgutil


def load_all() -> None:
    """Import every method, so that configurations can name it."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
