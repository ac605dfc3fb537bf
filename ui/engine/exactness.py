"""Is a drafted text the model's own? What can be said of it, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

ROUNDING = "A forward of several tokens adds in another order than one of a single token, so that logits that are nearly equal may change places."


@dataclass(frozen=True, slots=True)
class Exactness:
    """verifier: its kind, "" where nothing was drafted. lossy: why it may be another text than the model's own, "" where nothing
    is left out. drawn: tokens were sampled, so that two texts cannot be compared one by one. tokens: of the text. same: how many,
    from the first on, are those of plain decoding, which wrote `against`; None where that was not asked. ours, plain: the first
    ones that differ, "" for the end of a text. gap: how far the two best logits were apart there. lead: the same for the closest of all tokens."""

    verifier: str
    lossy: str
    drawn: bool
    tokens: int
    same: int | None = None
    against: int | None = None
    ours: str = ""
    plain: str = ""
    gap: float | None = None
    lead: float | None = None

    def compared(self, ours: Sequence[int], plain: Sequence[int], words: Sequence[str], plain_words: Sequence[str], leads: Sequence[float]) -> Exactness:
        """The same, with what a comparison of the tokens shows. words: how tokens read. leads: by how much ours were ahead."""
        same = next((at for at, (a, b) in enumerate(zip(ours, plain, strict=False)) if a != b), min(len(ours), len(plain)))
        lead = min(leads, default=None)
        if same == len(ours) == len(plain):
            return Exactness(self.verifier, self.lossy, self.drawn, len(ours), same, len(plain), lead=lead)
        return Exactness(
            self.verifier, self.lossy, self.drawn, len(ours), same, len(plain), _at(words, same), _at(plain_words, same),
            leads[same] if same < len(leads) else None, lead,
        )  # fmt: skip

    @property
    def verdict(self) -> str:
        """`plain`, `same`, `differs`, `law` (drawn by the model's own) or `lossy` (drawn by another one)."""
        if not self.verifier:
            return "plain"
        if self.drawn:
            return "lossy" if self.lossy else "law"
        return "same" if self.same == self.tokens == self.against else "differs"

    @property
    def headline(self) -> str:
        """The verdict in a few words."""
        return {
            "plain": "Nothing was drafted", "same": f"Same text, {self.tokens} of {self.tokens} tokens",
            "differs": f"Another text from token {(self.same or 0) + 1} on", "law": "Drawn by the model's own law", "lossy": "Drawn by another law than the model's",
        }[self.verdict]  # fmt: skip

    @property
    def sentence(self) -> str:
        """What it means, and why."""
        lossy = f"It is lossy: {self.lossy}."
        if self.verdict == "plain":
            return "The model wrote all of it alone, one token per forward."
        if self.drawn:
            kept = f"The verifier “{self.verifier}” keeps the model's law: every text is as probable as without drafts."
            return f"{lossy if self.lossy else kept} Tokens were drawn, so this text and a plain one cannot be compared token by token."
        if self.verdict == "same":
            near = f" The closest was {self.lead:.3g} ahead of the next in logits." if self.lead is not None else ""
            found = f"The prompt was decoded plainly, too, and every token is the same.{near}"
            return f"{found} Other prompts may differ. {lossy}" if self.lossy else found
        apart = f" The two best logits were {self.gap:.3g} apart there." if self.gap is not None else ""
        here = f"Here stands {_quoted(self.ours)}, and plain decoding wrote {_quoted(self.plain)}.{apart}"
        return f"{here} {lossy if self.lossy else ROUNDING}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with verdict, headline and sentence."""
        return asdict(self) | {"verdict": self.verdict, "headline": self.headline, "sentence": self.sentence}


def _at(words: Sequence[str], place: int) -> str:
    """The word there; a part of a character has none of its own."""
    return (words[place] or "…") if place < len(words) else ""


def _quoted(word: str) -> str:
    return f"“{word}”" if word else "the end of the text"
