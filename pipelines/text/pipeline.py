"""What every pipeline of text diffusion is: a model, a tokenizer and a recipe, which a session may replace for a while."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from hasten.limits import Limits
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.text.output import TextOutput
from hasten.recipe import Recipe
from hasten.report_diffusion import TextDiffusionReport

if TYPE_CHECKING:
    from hasten.pipelines.text.session import TextDiffusionSession


class TextPipeline(ABC):
    """Base of the pipelines. recipe: its own; sessions: those that are open, the innermost last."""

    model: Any
    tokenizer: Any
    recipe: Recipe
    limits: Limits
    sessions: list[TextDiffusionSession]

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, recipe: str | Path | Recipe | None = None, *, revision: str | None = None,
        device: str | None = None, dtype: str | None = None, trust_remote_code: bool = False, **more: Any,
    ) -> TextPipeline:  # fmt: skip
        """The pipeline of a bundled text model, of a folder that `save_pretrained` wrote, or of a hub id (which alone is
        fetched), with its tokenizer. safetensors only.

        A `TextDiffusionPipeline`, or a `DiffusionGemmaPipeline` where the config says so.

        trust_remote_code: LLaDA, Dream, SDAR and others bring their own classes; they run only if you say so here, in
        Python. Read them first, and pin a `revision`. device: None takes the first accelerator, else the CPU. dtype:
        float32, bfloat16 or float16; None is bfloat16 on CUDA and float32 elsewhere. more: as for the constructor.
        Raises `ModelError` for a model that is unknown or unsafe to load.
        """
        from hasten.pipelines.text_models.loading import open_text

        model, tokenizer = open_text(name_or_path, revision, device, dtype, trust_remote_code)
        return cls.of(model, tokenizer, recipe, **more)

    @classmethod
    def of(cls, model: Any, tokenizer: Any, recipe: str | Path | Recipe | None = None, **more: Any) -> TextPipeline:
        """The pipeline for a model that is loaded."""
        return cls(model, tokenizer, recipe, **more)  # type: ignore[call-arg]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = self.model.device
        return found

    def to(self, device: str | torch.device) -> Self:
        """Move the model."""
        self.model.to(device)
        return self

    @abstractmethod
    def generate(self, input_ids: Any = None, attention_mask: Any = None, **arguments: Any) -> TextOutput:
        """Generate a text behind each prompt."""

    def __call__(self, *prompts: Any, **arguments: Any) -> TextOutput:
        """`generate`."""
        return self.generate(*prompts, **arguments)

    # --- what a session asks ------------------------------------------------------------------------

    @abstractmethod
    def fitted(self, recipe: Recipe) -> Recipe:
        """The recipe as this model takes it. Raises `UsageError` or `RefusedError` where it does not."""

    @abstractmethod
    def nothing(self, recipe: Recipe) -> TextDiffusionReport:
        """The report of a session in which nothing was generated."""

    # --- what a call asks ---------------------------------------------------------------------------

    def chosen(self, named: Any, length: int | None = None) -> Recipe:
        """The recipe of the call, else that of the innermost session, else the pipeline's own. length: new tokens of the longest text."""
        if named is not None:
            return self.fitted(find_recipe(named))
        return self.sessions[-1].asked(length) if self.sessions else self.recipe

    @property
    def allowed(self) -> Limits:
        """What a call may ask for now."""
        return self.sessions[-1].limits if self.sessions else self.limits

    def noted(self, report: TextDiffusionReport, named: Any) -> None:
        """Tell the innermost session what a generation cost, unless the call had a recipe of its own."""
        if self.sessions and named is None:
            self.sessions[-1].reports.append(report)
