"""What a cache policy did: bytes, tokens kept and evicted, layer by layer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hasten.report_forms import readable_bytes

if TYPE_CHECKING:
    from hasten.pipelines.decode_kv.cache import KVCache
    from hasten.pipelines.decode_kv.session import KVSession


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer of the last cache. tokens: of the texts, over all rows; held: those that are still there (mean over heads);
    share: the smallest part of the attention so far that stayed at an eviction, None where the score is not attention. far_bytes:
    of values in the CPU's memory, beside `bytes`. read: share of prompts that the layer computed when they came, revived: tokens
    that it computed later, where deeper layers leave tokens out."""

    layer: int
    tokens: int
    held: float
    evicted: float
    evictions: int
    share: float | None
    packed: int
    bytes: int
    full_bytes: int
    far_bytes: int = 0
    read: float | None = None
    revived: int = 0


@dataclass(frozen=True)
class KVReport:
    """The account of the last cache; `print` it, or `to_dict` it. far_bytes: in the slower of two memories, beside `bytes`;
    left_bytes: of hidden states that deeper layers left out, a part of `bytes`. inert: what was enabled and did nothing, in
    words."""

    model: str
    policy: str
    layers: list[LayerReport] = field(default_factory=list)
    bytes: int = 0
    full_bytes: int = 0
    far_bytes: int = 0
    left_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    inert: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Bytes held over those of the model's own cache; 1 before anything was held."""
        return self.bytes / self.full_bytes if self.full_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"share": self.share}

    def to_json(self) -> str:
        """One line."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        lines = [f"{self.policy} on {self.model}"]
        if not self.layers:
            lines.append("nothing was generated")
        else:
            lines.append(
                f"cache: {readable_bytes(self.bytes)} held, {readable_bytes(self.full_bytes)} for all tokens ({100 * self.share:.0f} %)"
                + (f", {readable_bytes(self.far_bytes)} beside that in the CPU's memory" if self.far_bytes else "")
                + (f", of it {readable_bytes(self.left_bytes)} hidden states of tokens that were left out" if self.left_bytes else "")
            )
        for row in self.layers:
            share = "" if row.share is None else f", at least {100 * row.share:.1f} % of the attention stayed"
            packed = f", packed {row.packed} times" if row.packed else ""
            lines.append(
                f"  layer {row.layer}: {row.held:,.0f} of {row.tokens:,} tokens held, {row.evicted:,.0f} evicted{share}{packed}{_lazily(row)},"
                f" {readable_bytes(row.bytes)}"
            )
        return "\n".join([*lines, *(f"note: {note}" for note in dict.fromkeys([*self.notes, *self.inert]))])


def _lazily(row: LayerReport) -> str:
    if row.read is None:
        return ""
    return f", read {100 * row.read:.0f} % of the prompt" + (f", {row.revived:,} computed later" if row.revived else "")


def report_of(session: KVSession) -> KVReport:
    """The report of a session's last cache."""
    cache, name = session.last, session.recipe.name or session.part.score.kind
    if cache is None or not cache.lengths:
        return KVReport(type(session.host).__name__, name, notes=list(session.notes))
    rows = []
    for layer, facts in zip(cache.layers, cache.state.facts, strict=True):
        slots = layer.slots
        each = _each(slots)
        tokens = sum(cache.lengths) + sum(cache.unread)
        rows.append(LayerReport(
            layer.number, tokens, sum(slots.tokens), facts.evicted, facts.evictions, facts.share, facts.packed, slots.bytes,
            tokens * each, slots.far_bytes, *_lazy_facts(cache, layer.number),
        ))  # fmt: skip
    return KVReport(
        type(session.host).__name__, name, rows, cache.bytes, sum(row.full_bytes for row in rows), cache.far_bytes,
        cache.state.lazy.bytes if cache.state.lazy else 0, [*session.notes, *cache.state.refused], _inert(session, rows),
    )  # fmt: skip


def _lazy_facts(cache: KVCache, number: int) -> tuple[float | None, int]:
    """(share of prompts that a layer computed as they came, tokens that it computed later)."""
    facts = cache.state.lazy.facts[number] if cache.state.lazy else None
    return (None, 0) if facts is None or not facts.tokens else (facts.read / facts.tokens, facts.revived)


def _each(slots: Any) -> int:
    """Bytes that one token takes in a layer of the model's own cache."""
    return sum(x.shape[1] * x.shape[3] * x.element_size() for x in (slots.k, slots.v) if x.dim() == 4)


def _inert(session: KVSession, rows: list[LayerReport]) -> list[str]:
    found = []
    if session.part.amount is not None and not any(row.evictions for row in rows):
        found.append("Nothing was evicted: no text was longer than the amount.")
    if session.part.codec is not None and not any(row.packed for row in rows):
        found.append("Nothing was packed: no text was longer than the codec's residual.")
    if session.part.lazy is not None and rows and all((row.read or 1.0) == 1.0 for row in rows):
        found.append("Every layer computed every token of the prompt.")
    return found
