"""Where work is done: what a job has at hand, in the thread or process that does it. Models stay warm by their ids."""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from hasten.errors import UsageError
from hasten.ui.engine.cancel import stoppable
from hasten.ui.engine.models import Models
from hasten.ui.engine.outputs import Outputs
from hasten.ui.engine.place import Place
from hasten.ui.engine.recipes import recipe_of
from hasten.ui.engine.report import Report, Tell
from hasten.ui.engine.request import Request

if TYPE_CHECKING:
    from hasten.recipe import Recipe

WARM = 2
"""Bundled models that are kept; of others one."""


class Writer(NamedTuple):
    """A causal language model of transformers, and its tokenizer."""

    model: Any
    tokenizer: Any


class Desk:
    """One for each worker."""

    def __init__(self, place: Place) -> None:
        self.place, self.limits = place, place.limits
        self.models, self.outputs = Models(place), Outputs(place)
        self._warm: OrderedDict[tuple[str, str | None], Any] = OrderedDict()

    def perform(self, job: str, request: Request, tell: Tell, stopped: Callable[[], bool]) -> dict[str, Any]:
        """Do it, and give the result that its kind has. Raises `Cancelled` when told to stop."""
        from hasten.ui.engine.work import WORK

        report = Report(job, tell, stopped)
        report.phase("Starting")
        try:
            return WORK[request.kind](request, self, report)
        finally:
            if on_accelerator():
                tidy()  # a broken run's traceback may hold what the next one needs the room of

    # --- what work asks for -----------------------------------------------------------------------

    def recipe(self, text: str) -> Recipe:
        """The recipe that a request names. Raises `RecipeError`."""
        return recipe_of(text, self.outputs.trained(), self.models.drafting())

    @contextmanager
    def pipeline(self, model: str, lora: str | None, report: Report, on_call: Callable[[], None] = lambda: None) -> Iterator[Any]:
        """The pipeline, warm or opened now, which stops within one block when the job is told to. It stays warm."""
        pipe = self._opened(model, lora, report)
        try:
            with stoppable(pipe, report.check, on_call):
                yield pipe
        finally:
            if hasattr(pipe, "maybe_free_model_hooks"):
                pipe.maybe_free_model_hooks()  # where a run with offload broke off, its part may still be on the device

    def text_pipeline(self, model: str, report: Report) -> Any:
        """The same for masked language models; the caller makes it stoppable."""
        return self._opened(model, None, report)

    def language_model(self, model: str, report: Report) -> Writer:
        """The same for causal language models. Raises `UsageError` for others."""
        if self.models.card(model).kind != "language":
            raise UsageError(f"{model} does not write from left to right. Choose a causal language model, such as tiny-lm.")
        writer: Writer = self._opened(model, None, report)
        return writer

    @property
    def warm(self) -> list[str]:
        """Ids of the models in memory."""
        return [model for model, _ in self._warm]

    def unload(self) -> None:
        """Forget all models."""
        if self._warm:
            self._warm.clear()
            tidy()

    # --- the rest ---------------------------------------------------------------------------------

    def _opened(self, model: str, lora: str | None, report: Report) -> Any:
        key = (model, lora)
        if key in self._warm:
            self._warm.move_to_end(key)
            return self._warm[key]
        report.phase(f"Loading {model}")
        self._make_room(model)
        self._warm[key] = self._open(model, lora)
        return self._warm[key]

    def _make_room(self, model: str) -> None:
        """Before another model is loaded, not after: both may not fit."""
        apart = self.models.apart(model)
        while len(self._warm) >= (1 if apart else WARM) or (self._warm and any(self.models.apart(name) for name, _ in self._warm)):
            self._warm.popitem(last=False)
            tidy()

    def _open(self, model: str, lora: str | None) -> Any:
        card, source = self.models.card(model), self.models.source(model)
        place = self.place
        if card.kind in ("text", "language"):
            from hasten.pipelines.loading import silence
            from hasten.pipelines.text.diffusion import TextDiffusionPipeline
            from hasten.pipelines.text_models.loading import open_text

            silence()
            if card.kind == "language":
                return Writer(*open_text(source, device=place.device, dtype=place.dtype))
            known: dict[str, Any] = {"probe": False} if card.where == "bundled" else {}  # tests ask the bundled ones
            return TextDiffusionPipeline.from_pretrained(source, device=place.device, dtype=place.dtype, **known)
        from hasten.pipelines.loading import open_pipeline

        file = str(self.models.lora(lora)) if lora is not None else None
        return open_pipeline(source, device=place.device, dtype=place.dtype, lora=file, quiet=True)


def tidy() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if on_accelerator():
        sys.modules["torch"].cuda.empty_cache()


def on_accelerator() -> bool:
    """Has this process used a GPU? Asked without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_available() and torch.cuda.is_initialized())
