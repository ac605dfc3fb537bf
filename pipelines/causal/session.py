"""One recipe on one causal language model: what `hasten.accelerate` returns for it."""

from __future__ import annotations

import warnings
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel

from hasten.limits import Limits
from hasten.pipelines.causal.configs import redirect
from hasten.pipelines.causal.mask import Rule, read
from hasten.pipelines.causal.rows import Done, Row
from hasten.pipelines.causal.site import Site
from hasten.pipelines.host import hardware
from hasten.recipe import Recipe
from hasten.session import Attachment
from hasten.sparse_attn.text.causal import CausalAttention
from hasten.trace import Trace

if TYPE_CHECKING:
    from hasten.report_text import TextReport

NAME = "hasten"
"""Of our function in transformers' registry of attention functions, and of SDPA's masks in that of masks."""


class TextSession:
    """A context manager; `report()` says what was really left out.

    policy: what the recipe's attention comes to on a language model. rows: what happened, by layer and phase, as it is
    counted. reasons: why calls were left to the model. sites: the attached modules.
    """

    def __init__(
        self, model: PreTrainedModel, modules: dict[str, nn.Module], recipe: Recipe, policy: CausalAttention, limits: Limits
    ) -> None:
        self.host, self.recipe, self.policy, self.limits = model, recipe, policy, limits
        self.trace = Trace()
        self.rows: dict[tuple[int, str], Row] = {}
        self.reasons: list[str] = []
        self.sites: list[Site] = []
        self.off: set[str] = set()
        self.declined: weakref.WeakSet[Any] = weakref.WeakSet()
        self._rules: list[tuple[weakref.ref[Tensor], int | None, Rule | None]] = []
        self._attachment = Attachment()
        self._closed = False
        try:
            self._attach(modules)
        except BaseException:
            self._attachment.restore()
            raise

    def _attach(self, modules: dict[str, nn.Module]) -> None:
        layers = 1 + max(int(module.layer_idx) for module in modules.values())  # type: ignore[arg-type]
        for name, module in modules.items():
            site = Site(self, name, module, layers, module.config._attn_implementation)  # type: ignore[union-attr, arg-type]
            self._attachment.replace(module, "forward", site.forward(module.forward))
            self.sites.append(site)
        redirect(self._attachment, self.host, modules.values(), NAME)

    # --- what users ask ---------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Has the model been restored?"""
        return self._closed

    @property
    def skipped(self) -> float:
        """Share of attention's pairs of query and key that were left out so far, 0 to 1. Waits for the device."""
        return 1.0 - self.report().computed_fraction

    @property
    def acts(self) -> tuple[str, ...]:
        """The phases that the recipe should make sparse."""
        parts = {"prompt": self.policy.prompt, "cache": self.policy.cache}
        return tuple(phase for phase, part in parts.items() if part is not None)

    def report(self) -> TextReport:
        """What happened so far, ready to print, to save as JSON or as a page. Waits for the device."""
        from hasten.report_text import TextReport

        self.trace.readings = [self.rows[place].reading() for place in sorted(self.rows)]
        device = next((str(p.device) for p in self.host.parameters()), "cpu")
        return TextReport(
            self.trace, self.recipe, type(self.host).__name__, self.acts, self._idle(), hardware=hardware(device)
        )

    def _idle(self) -> dict[str, str]:
        """Phase -> why its calls were dense, in words."""
        return {phase: self._why_idle(phase) for phase in self.acts}

    def _why_idle(self, phase: str) -> str:
        if not any(self.policy.acts_on(site.layer, site.layers) for site in self.sites):
            return "the recipe keeps all layers dense"
        longest = max((row.keys for row in self.rows.values() if row.phase == phase), default=0)
        least = self.least(phase)
        if longest < least:
            return f"the longest had {longest:,} tokens, and fewer than min_tokens = {least:,} are read densely"
        if self.trace.notes:
            return "the notes say why"
        if phase == "cache":
            return "all layers' caches forget (sliding windows), or hold padding behind the prompt"
        return "the recipe keeps all layers dense"

    def least(self, phase: str) -> int:
        """Shorter inputs than this are read densely in this phase, tokens."""
        own = self.policy.prompt.min_tokens if phase == "prompt" and self.policy.prompt is not None else None
        return self.policy.min_tokens if own is None else own

    def close(self) -> None:
        """Restore the model. Warns where a part of the recipe did nothing. Safe to call twice; the report stays."""
        if self._closed:
            return
        self._closed = True
        self._attachment.restore()
        for site in self.sites:
            site.readers.clear()
        if self.rows:
            for sentence in self.report().inert:
                self._warn(f"{self.recipe.name or 'this recipe'} on {type(self.host).__name__}: {sentence}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- what sites ask ---------------------------------------------------------------------------

    def rule(self, mask: Tensor | None, query: Tensor, keys: int, window: int | None) -> Rule | None:
        """`read` of this mask, done once for all layers that share it."""
        if mask is None:
            return read(None, query.shape[0], query.shape[2], keys, window)
        for known, its_window, rule in self._rules:
            if known() is mask and its_window == window:
                return rule
        rule = read(mask, query.shape[0], query.shape[2], keys, window)
        self._rules = [entry for entry in self._rules if entry[0]() is not None][-3:]
        self._rules.append((weakref.ref(mask), window, rule))
        return rule

    def count(self, site: Site, phase: str, done: Done | None, pairs: float, keys: int) -> None:
        """One call at a site; None: it was dense."""
        self.rows.setdefault((site.layer, phase), Row(site.name, site.layer, phase)).add(done, pairs, keys)

    def because(self, reason: str) -> None:
        """A call is the model's own; each reason is said once."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            self.note(warn=bool(self.acts), sentence=f"Attention of {type(self.host).__name__} is the model's own where {reason}.")

    def refuse(self, phase: str, reason: str) -> None:
        """A phase is the model's own for the rest of the session, because its method failed."""
        if phase not in self.off:
            self.off.add(phase)
            self.reasons.append(reason)
            words = {"prompt": "Prompts are", "cache": "Caches are"}[phase]
            self.note(f"{words} read by the model's own attention from here on: {reason}.")

    def account(self, cache: Any) -> None:
        """Count the bytes that readers hold; above the cap, drop those of `cache` and say so."""
        held = sum(state.num_bytes() for site in self.sites for state in site.readers.values())
        self.trace.hold(held)
        cap = self.limits.max_cache_bytes
        if cap is not None and held > cap:
            self.declined.add(cache)
            for site in self.sites:
                site.readers.pop(cache, None)
            self.trace.hold(sum(state.num_bytes() for site in self.sites for state in site.readers.values()))
            self.note(f"Readers reached {held:,} bytes, above the cap of {cap:,}; this cache is read in full.")

    def note(self, sentence: str, *, warn: bool = True) -> None:
        """A sentence the user must read: once in the report, once as a warning."""
        if self.trace.note(sentence) and warn:
            self._warn(sentence)

    def _warn(self, sentence: str) -> None:
        warnings.warn(f"hasten: {sentence}", stacklevel=2)
