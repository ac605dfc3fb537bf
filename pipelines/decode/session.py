"""One recipe with drafts on one causal language model: what `hasten.accelerate` returns for it."""

from __future__ import annotations

import functools
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from hasten.limits import Limits
from hasten.pipelines.decode import compat, places
from hasten.pipelines.decode.call import Call
from hasten.pipelines.decode.laws import Processors
from hasten.pipelines.decode.loop import Loop
from hasten.pipelines.decode_kv.cache import KVCache
from hasten.pipelines.host import hardware
from hasten.recipe import Recipe
from hasten.samplers.decode.protocols import Drafter, Facts, Pace, PaceState, Verifier
from hasten.session import Attachment
from hasten.trace import Trace

if TYPE_CHECKING:
    from hasten.pipelines.decode_kv.session import KVSession
    from hasten.report_decode import DecodeReport


class DecodeSession:
    """A context manager; `report()` says what was drafted, accepted, and whether the texts are the model's own.

    drafter, verifier, pace: the recipe's parts. kept: what the drafter remembers from call to call.
    leads: for each greedy call in order, for each of its rows, by how much every written token was ahead of the next best, in
    logits: where this is near 0, another order of adding may choose the other.
    """

    def __init__(
        self, model: Any, recipe: Recipe, drafter: Drafter, verifier: Verifier, pace: Pace, limits: Limits,
        cache: KVSession | None = None,
    ) -> None:  # fmt: skip
        self.host, self.recipe, self.limits = model, recipe, limits
        self.drafter, self.verifier, self.pace, self.cache = drafter, verifier, pace, cache
        self.trace = Trace()
        self.calls: dict[str, int] = {}
        self.kept: dict[str, Any] = {}
        self._paces: dict[tuple[int, bool], PaceState] = {}
        self._leads: list[list[tuple[Tensor, list[int]]]] = []
        self._attachment = Attachment()
        self._closed = False
        self._attachment.replace(model, "generate", self._wrapped(model.generate))

    # --- what users ask ---------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Has the model been restored?"""
        return self._closed

    @property
    def leads(self) -> list[list[list[float]]]:
        """Waits for the device."""
        found = []
        for call in self._leads:
            rows: list[list[float]] = [[] for _ in call[0][1]] if call else []
            for values, lengths in call:
                for row, (each, length) in enumerate(zip(values.tolist(), lengths, strict=True)):
                    rows[row] += each[:length]
            found.append(rows)
        return found

    def report(self) -> DecodeReport:
        """What happened so far, ready to print, to save as JSON or as a page."""
        from hasten.report_decode import DecodeReport

        device = next((str(p.device) for p in self.host.parameters()), "cpu")
        leads = [lead for call in self.leads for row in call for lead in row]
        return DecodeReport(
            self.trace, self.recipe, type(self.host).__name__, dict(self.calls), self.verifier.kind, self.verifier.lossless,
            min(leads, default=None), "" if self.cache is None else self.cache.forgets, hardware=hardware(device),
        )  # fmt: skip

    def close(self) -> None:
        """Restore the model. Warns where the drafts did nothing. Safe to call twice; the report stays."""
        if self._closed:
            return
        self._closed = True
        self._attachment.restore()
        if self.cache is not None:
            self.cache.close()
        if self.trace.rounds:
            for sentence in self.report().inert:
                self._warn(f"{self.recipe.name or 'this recipe'} on {type(self.host).__name__}: {sentence}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- what the loop asks -----------------------------------------------------------------------

    def pace_of(self, facts: Facts) -> PaceState:
        """The pace goes on from call to call: what it has measured of this machine stays true."""
        key = (facts.rows, facts.sampled)
        if key not in self._paces:
            self._paces[key] = self.pace.start(facts)
        return self._paces[key]

    def lead(self, scores: Tensor, lengths: list[int]) -> None:
        """Keep how far the best of `scores` [B, D, V] are ahead, for tokens that were written: `lengths` of each row."""
        best = scores.topk(min(2, scores.shape[-1]), -1).values
        self._leads[-1].append((best[..., 0] - best[..., -1], lengths))

    def note(self, sentence: str, *, warn: bool = True) -> None:
        """A sentence the user must read: once in the report, once as a warning."""
        if self.trace.note(sentence) and warn:
            self._warn(sentence)

    def _warn(self, sentence: str) -> None:
        warnings.warn(f"hasten: {sentence}", stacklevel=2)

    # --- `generate` -------------------------------------------------------------------------------

    def _wrapped(self, plain: Any) -> Any:
        """The instance's `generate`: transformers prepares everything, and our loop writes."""

        @functools.wraps(plain)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if self._closed:
                return plain(*args, **kwargs)
            bound = compat.parameters().bind(self.host, *args, **kwargs)
            named = dict(bound.arguments)
            named.pop("self")
            named |= named.pop("kwargs", {})
            reason = compat.given_away(named)
            if not reason:
                try:
                    return self._drafted(plain, named)
                except _LeftAlone as left:
                    reason = str(left)
            self.leave(reason)
            return plain(*args, **kwargs)

        return generate

    def _drafted(self, plain: Any, named: dict[str, Any]) -> Any:
        named = compat.stop_strings(named)
        streamer = named.pop("streamer", None)

        def write(
            model: Any, input_ids: Tensor, logits_processor: Any = None, stopping_criteria: Any = None,
            generation_config: Any = None, **model_kwargs: Any,
        ) -> Any:  # fmt: skip
            call = Call(input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs)
            reason = compat.why_left(generation_config) or places.why_call(
                self.host, input_ids, model_kwargs, compat.fixed_ends(stopping_criteria)[0]
            )
            if reason or (reason := self._why_cache(model_kwargs, input_ids) or self._why_asked(call)):
                raise _LeftAlone(reason)
            self._count("drafted")
            self._leads.append([])
            return Loop(self, call).run()

        return plain(**named, custom_generate=write)

    def _why_cache(self, arguments: dict[str, Any], ids: Tensor) -> str:
        cache = arguments.get("past_key_values")
        if self.cache is None or (reason := compat.why_others(arguments)):
            return compat.why_cache(arguments, ids) if self.cache is None else reason
        if not isinstance(cache, KVCache):
            return f"its cache is a {type(cache).__name__}, and not the recipe's"
        return "it continues a cache that has forgotten some of its text" if cache.lengths else ""

    def _why_asked(self, call: Call) -> str:
        """The same from what is asked about every token. Processors that nobody knows need one row; then they are asked in order,
        which the report says. Criteria that nobody knows may look at all rows."""
        criteria = compat.unknown(call.criteria)
        if criteria and len(call.ids) > 1:
            return f"{', '.join(criteria)} may look at all rows at once, and with drafts rows are not equally long"
        unknown = Processors(call.processors, False).unknown
        if unknown and len(call.ids) > 1:
            return f"hasten does not know what {', '.join(unknown)} remembers from row to row"
        if unknown:
            self.note(
                f"hasten does not know what {', '.join(unknown)} remembers, so drafts are a chain here, and it is asked about one"
                " token at a time, as generate does.",
                warn=False,
            )
        return ""

    def leave(self, reason: str) -> None:
        """A call is transformers' own; each reason is said once."""
        self._count("plain")
        self.note(f"A call of generate was left to transformers, without drafts: {reason}.")

    def _count(self, how: str) -> None:
        self.calls[how] = self.calls.get(how, 0) + 1


class _LeftAlone(Exception):
    """A call that turns out, when it is prepared, to be none of ours."""
