"""`hasten.accelerate` on diffusers' `LLaDA2Pipeline`: its own loop, with an exact cache and a recipe's decisions in it.

The pipeline evaluates the prompt and every finished block again at each step. Where the model's attention is
block-causal these cannot change, so that their keys and values are kept.

Shapes: B texts, n tokens of the pipeline's window, L slots of the store, V tokens.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn

from hasten.caching.kv import TokenKV
from hasten.caching.store import KVStore, Pass
from hasten.errors import HastenError, RefusedError, UsageError
from hasten.limits import Limits
from hasten.pipelines.host import hardware
from hasten.pipelines.text.scheduler import RecipeScheduler, cuts_alike
from hasten.pipelines.text_models import families
from hasten.pipelines.text_models.host import TextHost
from hasten.recipe import Recipe
from hasten.report_diffusion import Generation, TextDiffusionReport
from hasten.session import Attachment

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative difference of logits up to which they are the same; 2e-2 in half precision."""


class LLaDA2Session:
    """A context manager; `report()` says what was saved.

    The recipe may have the axes commit and revise, which replace the scheduler's, blocks of one size, and kv of an exact
    kind, which keeps what cannot change. Before anything is kept, one evaluation is compared with the model's own; where they differ the
    model is left to itself, and the report says so.
    """

    def __init__(self, pipe: Any, recipe: Recipe, limits: Limits | None = None) -> None:
        self.host, self.recipe, self.limits = pipe, recipe, limits or Limits()
        kv = recipe.kv
        if kv is not None and not (isinstance(kv, TokenKV) and kv.exact):
            raise RefusedError(
                f"Recipe {recipe.name!r} has the cache {kv.kind!r}, which is an approximation that needs to know which slots are"
                " being written. In LLaDA2Pipeline's own loop only exact caches can be used; take"
                " hasten.TextDiffusionPipeline(pipe.model, pipe.tokenizer, recipe)."
            )
        if recipe.verify is not None or not cuts_alike(recipe):
            raise UsageError(
                f"Recipe {recipe.name!r} verifies drafts, or has blocks or ends of its own; LLaDA2Pipeline cuts blocks of one"
                " size (block_length of its call). Take hasten.TextDiffusionPipeline(pipe.model, pipe.tokenizer, recipe)."
            )
        self.notes: list[str] = []
        self.runs: list[_Run] = []
        self.cached = _Cached(self, families.choose(pipe.model, pipe.tokenizer)) if kv is not None else None
        self._attachment, self._closed = Attachment(), False
        try:
            self._attach()
        except BaseException:
            self.close()
            raise

    def _attach(self) -> None:
        recipe, pipe = self.recipe, self.host
        if recipe.commit is not None or recipe.revise is not None:
            decides = Recipe(name=recipe.name, commit=recipe.commit, revise=recipe.revise)
            length = pipe.scheduler.config.block_length
            self._attachment.replace(pipe, "scheduler", RecipeScheduler.of(decides, length))
        scheduler, own = pipe.scheduler, (pipe.scheduler.set_timesteps, pipe.scheduler.step)

        def begins(*args: Any, block_length: int | None = None, **more: Any) -> None:
            own[0](*args, block_length=block_length, **more)
            self.runs.append(_Run(block_length or scheduler.config.block_length))

        def writes(*args: Any, **more: Any) -> Any:
            given = own[1](*args, **more)
            if self.runs:
                self.runs[-1].wrote(given.transfer_index if hasattr(given, "transfer_index") else given[1])
            return given

        self._attachment.replace(scheduler, "set_timesteps", begins)
        self._attachment.replace(scheduler, "step", writes)
        self._attachment.replace(pipe, "model", _Watched(self, pipe.model))

    # --- what users ask ---------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Has the pipeline been restored?"""
        return self._closed

    def report(self) -> TextDiffusionReport:
        """What happened so far, ready to print, to save as JSON or as a page. Waits for the device."""
        model = self.host.model.own if isinstance(self.host.model, _Watched) else self.host.model
        layers = self.cached.host.facts.layers if self.cached is not None else getattr(model.config, "num_hidden_layers", 1)
        held = self.cached.store.bytes if self.cached is not None and self.cached.store is not None else 0
        runs = [run.told(layers) for run in self.runs if run.evaluations]
        used = self.recipe.kv is not None and self.cached is not None and self.cached.works is not False
        family = self.cached.host.family if self.cached is not None else ""
        device = next((str(p.device) for p in model.parameters()), "cpu")
        return TextDiffusionReport(
            runs, self.recipe, type(model).__name__, family, self.recipe.kv.kind if used and self.recipe.kv else "recompute",
            True, held, list(self.notes), hardware(device),
        )  # fmt: skip

    def close(self) -> None:
        """Restore the pipeline. Safe to call twice; the report stays."""
        self._closed = True
        self._attachment.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Run:
    """The account of one call of the pipeline."""

    def __init__(self, block_length: int) -> None:
        self.block_length, self.began = block_length, time.perf_counter()
        self.evaluations, self.texts, self.width = 0, 0, 0
        self.computed, self.whole = 0, 0
        self.seconds = 0.0
        self.written: Tensor | None = None

    def evaluated(self, texts: int, tokens: int, window: int) -> None:
        self.evaluations, self.texts, self.width = self.evaluations + 1, texts, max(self.width, window)
        self.computed, self.whole = self.computed + tokens, self.whole + window
        self.seconds = time.perf_counter() - self.began

    def wrote(self, chosen: Tensor) -> None:
        now = chosen.sum(1)
        self.written = now if self.written is None else self.written + now

    def told(self, layers: int) -> Generation:
        written = self.written.tolist() if self.written is not None else [0] * self.texts
        each = [1] * self.texts
        return Generation(
            steps=self.evaluations, prompt=tuple(max(0, self.width - count) for count in written), written=tuple(written),
            evaluations=tuple(self.evaluations * one for one in each), computed=tuple(float(self.computed * layers) for _ in each),
            anew=tuple(float(self.whole * layers) for _ in each),
            sequential=tuple(float(count * self.width * layers) for count in written), seconds=self.seconds,
        )  # fmt: skip


class _Watched(nn.Module):
    """What the pipeline calls in place of its model. The model is no submodule, so that moving this moves nothing."""

    session: LLaDA2Session
    own: Any

    def __init__(self, session: LLaDA2Session, own: Any) -> None:
        super().__init__()
        self.__dict__["session"], self.__dict__["own"] = session, own

    @property
    def device(self) -> torch.device:
        first: Tensor = next(self.own.parameters())
        return first.device

    @property
    def dtype(self) -> torch.dtype:
        first: Tensor = next(self.own.parameters())
        return first.dtype

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **more: Any) -> Any:
        session, cached = self.session, self.session.cached
        if cached is None or cached.works is False or not session.runs or attention_mask is None or more:
            given = self.own(ids, attention_mask=attention_mask, position_ids=position_ids, **more)
            tokens = ids.shape[1]
        else:
            length = session.runs[-1].block_length
            given, tokens = cached.answer(ids, attention_mask.bool(), position_ids, length, self.own)
        if session.runs:
            session.runs[-1].evaluated(ids.shape[0], tokens, ids.shape[1])
        return given


class _Cached:
    """Keys and values of a window whose beginning is as it was. works: None until it has been compared with the model."""

    def __init__(self, session: LLaDA2Session, host: TextHost) -> None:
        if not host.caches:
            raise RefusedError(f"The keys and values of {type(host.model).__name__} change with every step; nothing can be kept.")
        self.session, self.host = session, host
        self.grains = dict.fromkeys([host.facts.block or 1, 1])
        self.grain = 1
        self.works: bool | None = None
        self.store: KVStore | None = None
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None

    def answer(self, ids: Tensor, mask: Tensor, positions: Tensor | None, length: int, own: Any) -> tuple[Any, int]:
        """Logits of the window's last tokens, at least `length` of them, and how many tokens were computed."""
        if self.works is None:
            if ids.shape[1] < length + max(self.grains):  # nothing before the block that could be kept
                return own(ids, attention_mask=mask.long(), position_ids=positions), ids.shape[1]
            given = own(ids, attention_mask=mask.long(), position_ids=positions)
            self._prove(ids, mask, length, given.logits)
            return given, ids.shape[1]
        low = min(self._changed(ids, mask), ids.shape[1] - length) // self.grain * self.grain
        return SimpleNamespace(logits=self._evaluate(ids, mask, low)), ids.shape[1] - low

    def _changed(self, ids: Tensor, mask: Tensor) -> int:
        """The first slot that is not what it was when the store was filled. The pipeline waits for the device at every step
        anyway."""
        known = self.ids
        if self.store is None or known is None or self.mask is None or len(known) != len(ids) or ids.shape[1] > self.store.slots:
            return 0
        both = min(known.shape[1], ids.shape[1])
        other = (known[:, :both] != ids[:, :both]) | (self.mask[:, :both] != mask[:, :both])
        return int(torch.where(other.any(0), torch.arange(both, device=ids.device), both).min()) if both else 0

    def _prove(self, ids: Tensor, mask: Tensor, length: int, right: Tensor) -> None:
        """Compare with the model's own evaluation, under either kind of mask that leaves the beginning as it was."""
        real = mask[:, -length:]
        bound = TOLERANCE.get(right.dtype, 2e-2)
        wrong = float("nan")
        for grain in self.grains:
            self.grain, self.store = grain, None
            low = (ids.shape[1] - length) // grain * grain
            try:
                self._evaluate(ids[:, :low], mask[:, :low], 0)
                got = self._evaluate(ids, mask, low)[:, -length:].float()
            except HastenError as error:
                self._refuse(str(error))
                return
            want = right[:, -length:].float()
            finite = torch.isfinite(want)
            gap = ((got - want) * real[..., None]).masked_fill(~finite, 0.0).norm()
            wrong = float(gap / (want * real[..., None]).masked_fill(~finite, 0.0).norm().clamp(min=1e-12))
            if wrong <= bound:
                self.works = True
                return
        self._refuse(
            f"its attention is not block-causal when LLaDA2Pipeline calls it (logits differ by {wrong:.1%}), so that what was"
            " computed for the prompt changes with every step"
        )

    def _refuse(self, why: str) -> None:
        self.works, self.store = False, None
        name = type(self.host.model).__name__
        self.session.notes.append(f"Nothing of {name} is kept from step to step: {why}. Every evaluation is its own.")

    def _evaluate(self, ids: Tensor, mask: Tensor, low: int) -> Tensor:
        """Logits [B, n - low, V] of the tokens from `low` on; the store has those before, and these from now on."""
        texts, end = ids.shape
        if self.store is None or self.store.slots < end or len(self.store.present) != texts:
            self.store, low = KVStore(texts, max(2 * end, 256), ids.device), 0
        if end == low:
            return ids.new_zeros(texts, 0, self.host.facts.vocab, dtype=torch.float32)
        slots = torch.arange(low, end, device=ids.device).expand(texts, -1)
        place = torch.arange(self.store.slots + 1, device=ids.device)
        held = torch.nn.functional.pad(mask, (0, self.store.slots + 1 - end))[:, None]
        sees = (slots[0] // self.grain)[:, None] >= place // self.grain
        visible = held & sees | (slots[..., None] == place)  # padding reads itself, so that no softmax is empty
        number = torch.arange(end - low, device=ids.device).expand(texts, -1)
        now = Pass(torch.arange(texts, device=ids.device), slots, ids[:, low:], "store", visible, number, slots, run=slice(0, texts))
        with self.host.attached():
            logits = self.host.run(now, self.store)
        self.ids, self.mask = ids.clone(), mask.clone()
        return logits
