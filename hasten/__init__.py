"""hasten makes unmodified diffusers pipelines generate faster and says exactly what it skipped.

    import hasten
    with hasten.accelerate(pipe, "balanced") as run:
        video = pipe(prompt).frames[0]
    print(run.report())

Names are imported when they are first used, so `import hasten` loads neither torch nor diffusers.
The root folders of the repository are this package's subpackages: `hasten.caching` is `caching/`, and so on.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.budget import Budget
    from hasten.errors import (
        HastenError,
        LimitError,
        ModelError,
        OutputError,
        RecipeError,
        RefusedError,
        ResumeError,
        UsageError,
    )
    from hasten.limits import Limits
    from hasten.pipelines.accelerate import accelerate
    from hasten.pipelines.compare import compare
    from hasten.pipelines.handover.sglang import to_sglang
    from hasten.pipelines.handover.vllm import to_vllm
    from hasten.pipelines.noise_search import search_noise
    from hasten.pipelines.recipes import recipe
    from hasten.pipelines.session import Session
    from hasten.pipelines.text.diffusion import TextDiffusionPipeline
    from hasten.pipelines.text.gemma_pipeline import DiffusionGemmaPipeline
    from hasten.pipelines.tiny_models import load
    from hasten.pipelines.tune.run import tune
    from hasten.recipe import Recipe
    from hasten.report import Report
    from hasten.step import Step
    from hasten.trace import Event, Trace

__version__ = "0.1.0"

_HOME = {
    "Budget": "hasten.budget",
    "DiffusionGemmaPipeline": "hasten.pipelines.text.gemma_pipeline",
    "Event": "hasten.trace",
    "HastenError": "hasten.errors",
    "LimitError": "hasten.errors",
    "Limits": "hasten.limits",
    "ModelError": "hasten.errors",
    "OutputError": "hasten.errors",
    "Recipe": "hasten.recipe",
    "RecipeError": "hasten.errors",
    "RefusedError": "hasten.errors",
    "Report": "hasten.report",
    "ResumeError": "hasten.errors",
    "Session": "hasten.pipelines.session",
    "Step": "hasten.step",
    "TextDiffusionPipeline": "hasten.pipelines.text.diffusion",
    "Trace": "hasten.trace",
    "UsageError": "hasten.errors",
    "accelerate": "hasten.pipelines.accelerate",
    "compare": "hasten.pipelines.compare",
    "load": "hasten.pipelines.tiny_models",
    "recipe": "hasten.pipelines.recipes",
    "search_noise": "hasten.pipelines.noise_search",
    "to_sglang": "hasten.pipelines.handover.sglang",
    "to_vllm": "hasten.pipelines.handover.vllm",
    "tune": "hasten.pipelines.tune.run",
}
"""Public name -> the module that defines it."""

__all__ = [
    "Budget",
    "DiffusionGemmaPipeline",
    "Event",
    "HastenError",
    "LimitError",
    "Limits",
    "ModelError",
    "OutputError",
    "Recipe",
    "RecipeError",
    "RefusedError",
    "Report",
    "ResumeError",
    "Session",
    "Step",
    "TextDiffusionPipeline",
    "Trace",
    "UsageError",
    "__version__",
    "accelerate",
    "compare",
    "load",
    "recipe",
    "search_noise",
    "to_sglang",
    "to_vllm",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `hasten.recipe` the function: importing the module `hasten.recipe` must not take its name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
