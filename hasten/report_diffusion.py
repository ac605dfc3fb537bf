"""What generations by text diffusion cost: steps, evaluations, and computed tokens against computing everything anew."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hasten.recipe import Recipe
from hasten.report_forms import Forms, fact_lines, installed_versions, readable_bytes, strict


@dataclass(frozen=True, slots=True)
class Generation:
    """One call of `generate`, text by text.

    steps: of the loop. prompt, written: tokens. evaluations: of the model that a text took part in. computed: tokens times
    layers that were computed for it (both branches of guidance, all drafts). anew: what they would have been if every
    evaluation had computed the whole text once. sequential: if each written token had taken such an evaluation of
    its own. seconds: wall time. guide: tokens that a guiding model computed. stopped: before all was written.
    """

    steps: int
    prompt: tuple[int, ...]
    written: tuple[int, ...]
    evaluations: tuple[int, ...]
    computed: tuple[float, ...]
    anew: tuple[float, ...]
    sequential: tuple[float, ...]
    seconds: float = 0.0
    guide: int = 0
    stopped: bool = False

    @property
    def tokens_per_forward(self) -> float:
        """Written tokens for each evaluation of the batch's texts."""
        return sum(self.written) / max(1, sum(self.evaluations))


@dataclass
class TextDiffusionReport(Forms):
    """The account of one generation, or of a session of them. `print` it, `save` it, or read its properties.

    model: class of the model. family: what it was taken for. cache: kind of the recipe's cache. exact: that cache gives
    what computing everything gives. notes: what the user must read (what was refused, what the model is not).
    bytes_held: most bytes of keys, values and hidden states that were held at once.
    """

    generations: list[Generation] = field(default_factory=list)
    recipe: Recipe | None = None
    model: str = ""
    family: str = ""
    cache: str = "recompute"
    exact: bool = True
    bytes_held: int = 0
    notes: list[str] = field(default_factory=list)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=installed_versions)
    extras: Mapping[str, Any] = field(default_factory=dict)

    # --- numbers ----------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Of all generations."""
        return sum(one.steps for one in self.generations)

    @property
    def written(self) -> int:
        """Tokens written, up to and with those that end texts."""
        return sum(sum(one.written) for one in self.generations)

    @property
    def evaluations(self) -> int:
        """Of the model, counted for each text."""
        return sum(sum(one.evaluations) for one in self.generations)

    @property
    def tokens_per_forward(self) -> float:
        """Written tokens for each evaluation; 1 is what an autoregressive model does."""
        return self.written / max(1, self.evaluations)

    @property
    def token_layers(self) -> float:
        """Computed tokens times layers."""
        return math.fsum(value for one in self.generations for value in one.computed)

    @property
    def computed_fraction(self) -> float:
        """Of what the same evaluations cost without a cache; above 1 with drafts. 1.0 where nothing was generated."""
        return self._of("anew")

    @property
    def of_sequential(self) -> float:
        """Of what one token per evaluation costs without a cache: the work that was left, 1.0 is none saved."""
        return self._of("sequential")

    def _of(self, whole: str) -> float:
        total = math.fsum(value for one in self.generations for value in getattr(one, whole))
        return self.token_layers / total if total else 1.0

    @property
    def warnings(self) -> list[str]:
        """What the reader must know before the numbers."""
        found = list(self.notes)
        if not self.generations:
            return [*found, "Nothing was generated, so this recipe did nothing."]
        if self.recipe is not None and self.recipe.axes and self.of_sequential >= 1 and self.written:
            found.append(
                f"{self.name} saved nothing: it computed {self.of_sequential:.0%} of what one token per evaluation without a"
                " cache computes. Lower its threshold, take fewer steps, or take a recipe with a cache."
            )
        if self.cache != "recompute" and self.computed_fraction >= 1 and (self.recipe is None or self.recipe.verify is None):
            found.append(
                f"The cache {self.cache!r} saved nothing: every evaluation computed whole texts. Take smaller blocks, or longer"
                " texts."
            )
        return found

    # --- forms ------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """Readable text: warnings first, then the numbers, then one line for each generation."""
        lines = self.opening(self.model + (f" ({self.family})" if self.family else ""))
        if self.generations:
            lines += [f"  {name:<11} {value}" for name, value in self._sentences().items()]
        lines += fact_lines({"hardware": self.hardware, "versions": self.versions})
        if len(self.generations) > 1:
            lines += [f"  generation {number:<3} {_line(one)}" for number, one in enumerate(self.generations)]
        return "\n".join(lines)

    def _sentences(self) -> dict[str, str]:
        """Heading -> what to know."""
        rate = f"{self.written:,} in {self.evaluations:,} evaluations, {self.tokens_per_forward:.2f} per evaluation"
        kind = f"{self.cache}, exact" if self.exact else f"{self.cache}, an approximation"
        said = {
            "tokens": f"{rate}; {self.steps:,} steps of the loop",
            "computed": f"{self.token_layers:,.0f} tokens times layers: {self.computed_fraction:.1%} of the same evaluations"
            f" without a cache, {self.of_sequential:.1%} of one token per evaluation",
            "cache": kind + (f"; {readable_bytes(self.bytes_held)} held at most" if self.bytes_held else ""),
            "time": f"{math.fsum(one.seconds for one in self.generations):.2f} s",
        }
        if "budget" in self.extras:
            said["budget"] = str(self.extras["budget"])
        guide = sum(one.guide for one in self.generations)
        return said | ({"guide": f"{guide:,} tokens computed by the guiding model, not counted above"} if guide else {})

    def to_dict(self) -> dict[str, Any]:
        """Plain, strict-JSON data: numbers that are not finite become None."""
        data = {
            "recipe": self.recipe.model_dump() if self.recipe else None,
            "model": self.model,
            "family": self.family,
            "cache": self.cache,
            "exact": self.exact,
            "steps": self.steps,
            "written": self.written,
            "nfe": self.evaluations,
            "tokens_per_forward": self.tokens_per_forward,
            "token_layers": self.token_layers,
            "computed_fraction": self.computed_fraction,
            "of_sequential": self.of_sequential,
            "bytes_held": self.bytes_held,
            "warnings": self.warnings,
            "notes": self.notes,
            "hardware": self.hardware,
            "versions": self.versions,
            "extras": self.extras,
            "generations": [asdict(one) for one in self.generations],
        }
        return {key: strict(value) for key, value in data.items()}

    def to_html(self) -> str:
        """One self-contained page; nothing is loaded from anywhere."""
        from hasten.report_page import facts, page, rows, tiles, yaml_of

        shown = [
            (f"{self.tokens_per_forward:.2f}", "tokens per evaluation"),
            (f"{self.of_sequential:.1%}", "of the work of one token per evaluation"),
            (f"{self.computed_fraction:.1%}", "of the same evaluations without a cache"),
            (readable_bytes(self.bytes_held), "held by the cache, at most"),
        ]
        each = [_row(number, text, one) for number, one in enumerate(self.generations) for text in range(len(one.written))]
        paper = f" - {self.recipe.paper}" if self.recipe and self.recipe.paper else ""
        sections = [
            tiles(shown), rows("Text by text", each), facts("Request", self.extras), yaml_of(self.recipe),
            facts("Hardware", self.hardware), facts("Versions", self.versions),
        ]  # fmt: skip
        return page(self.name, f"hasten report, {self.model}{paper}", self.warnings, sections)


def together(reports: Sequence[TextDiffusionReport]) -> TextDiffusionReport:
    """Reports of generations with one recipe on one model as one."""
    first = reports[0]
    notes = list(dict.fromkeys(note for report in reports for note in report.notes))
    return TextDiffusionReport(
        [one for report in reports for one in report.generations], first.recipe, first.model, first.family, first.cache,
        first.exact, max(report.bytes_held for report in reports), notes, first.hardware, first.versions, first.extras,
    )  # fmt: skip


def _line(one: Generation) -> str:
    stopped = ", stopped" if one.stopped else ""
    return (
        f"{len(one.written)} texts, {sum(one.written):,} tokens in {sum(one.evaluations):,} evaluations"
        f" ({one.tokens_per_forward:.2f} each), {one.seconds:.2f} s{stopped}"
    )


def _row(number: int, text: int, one: Generation) -> dict[str, str]:
    computed, anew, sequential = one.computed[text], one.anew[text], one.sequential[text]
    return {
        "generation": str(number), "text": str(text), "prompt": f"{one.prompt[text]:,}", "written": f"{one.written[text]:,}",
        "evaluations": f"{one.evaluations[text]:,}", "tokens x layers": f"{computed:,.0f}",
        "of no cache": f"{computed / anew:.1%}" if anew else "-",
        "of one by one": f"{computed / sequential:.1%}" if sequential else "-",
    }  # fmt: skip
