"""What happened: one event per decision. Report, UI, tuner and tests read it, policies never do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hasten.rounds import Round

Action = Literal["compute", "reuse", "forecast", "skip"]
"""compute: the work was done. reuse: the last result stood in. forecast: an extrapolation stood in.
skip: the call was answered from another branch (guidance)."""


@dataclass(frozen=True, slots=True)
class Event:
    """One decision about one piece of work.

    run, step, branch: where (see `Step`). site: dotted name of what was (not) run, for example
    `transformer` or `transformer.blocks`. blocks: half-open range of blocks that the decision covers,
    None for the whole network. signal, threshold: what the rule compared, where it compared anything.
    seconds: host wall time of the call (launch time only on asynchronous devices). why: one phrase.
    share: share of the batch that the action covers; the rest of it was skipped (guidance on pipelines
    that evaluate both branches in one batch).
    """

    run: int
    step: int
    branch: int
    site: str
    action: Action
    blocks: tuple[int, int] | None = None
    signal: float | None = None
    threshold: float | None = None
    seconds: float | None = None
    why: str = ""
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Attended:
    """One attention call whose policy was asked.

    site, layer: dotted name of the module, and its number among those that may be sparse. action: "sparse" or "dense".
    tokens: queries. density: share of the pairs of query and key that were read. recall: estimated share of the softmax
    mass that was read exactly; None where nothing stood in for the rest, so that it is not known. reused: with the
    selection of an earlier step.
    """

    run: int
    step: int
    branch: int
    site: str
    layer: int
    action: str
    tokens: int
    density: float
    recall: float | None = None
    reused: bool = False

    @property
    def sparse(self) -> bool:
        return self.action == "sparse"

    @property
    def reads_all(self) -> bool:
        """Did it read every pair, to the rounding of a float32 share?"""
        return self.density > 1 - 1e-6


@dataclass(frozen=True, slots=True)
class Reading:
    """What attention of one layer of a language model read in one phase, over a whole session: sums, because there are
    as many calls as tokens.

    site, layer: dotted name of the module, and its layer number. phase: "prompt" (many queries at once) or "cache" (new
    tokens, a draft). sparse, dense: calls. read, all: over the sparse calls, the pairs of a query and a key that were
    computed (with those that a mask forbids within a block), and those that the model's own attention computes. rest: the
    latter over the dense calls. recall, lowest: estimated or measured share of the softmax mass that sparse calls read,
    mean and smallest; None where nobody knows.
    """

    site: str
    layer: int
    phase: str
    sparse: int = 0
    dense: int = 0
    read: float = 0.0
    all: float = 0.0
    rest: float = 0.0
    recall: float | None = None
    lowest: float | None = None

    @property
    def calls(self) -> int:
        return self.sparse + self.dense

    @property
    def of_sparse(self) -> float | None:
        """Share of the model's pairs that its sparse calls computed; None where there were none."""
        return min(1.0, self.read / self.all) if self.all else None

    @property
    def density(self) -> float:
        """The same over all calls."""
        pairs = self.all + self.rest
        return min(1.0, (self.read + self.rest) / pairs) if pairs else 1.0

    @property
    def saves_nothing(self) -> bool:
        """Did its sparse calls compute as many pairs as the model would have?"""
        return self.of_sparse is not None and self.of_sparse > 1 - 1e-6


@dataclass(slots=True)
class Run:
    """One pass of the host's loop. `steps` is the planned number of evaluations per branch.

    estimated_error: relative error of the final latents that skipping is estimated to have caused, where a budget
    kept an account. error_by_level: the same by level (reuse, guidance, attention), where several share one.
    """

    index: int
    steps: int
    times: list[float] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False
    estimated_error: float | None = None
    error_by_level: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Trace:
    """Everything that one `accelerate` saw, in order.

    attention: what attention calls did, where a recipe makes them sparse; written when a run is over.
    readings: the same of language models, where there are no runs; brought up to date by `report()`.
    rounds: of decode loops, in order.
    structure: site name -> number of blocks, for drawing the timeline.
    notes: sentences the user must read (fallbacks, refusals, methods that did nothing); each once.
    bytes_peak: most bytes that caches held at once.
    facts: what was put onto the host beside the loop's decisions (label -> words), a student's adapter for example.
    """

    runs: list[Run] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    attention: list[Attended] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    structure: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    bytes_held: int = 0
    bytes_peak: int = 0
    facts: dict[str, str] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        self.events.append(event)

    def note(self, sentence: str) -> bool:
        """Keep `sentence` once; True when it is new."""
        if sentence in self.notes:
            return False
        self.notes.append(sentence)
        return True

    def hold(self, num_bytes: int) -> None:
        """Record how many bytes all caches hold now."""
        self.bytes_held = num_bytes
        self.bytes_peak = max(self.bytes_peak, num_bytes)

    def of_run(self, index: int) -> Iterator[Event]:
        return (event for event in self.events if event.run == index)

    def attended(self, index: int) -> Iterator[Attended]:
        return (call for call in self.attention if call.run == index)

    def to_dict(self) -> dict[str, Any]:
        return {
            "runs": [asdict(run) for run in self.runs],
            "events": [asdict(event) for event in self.events],
            "attention": [asdict(call) for call in self.attention],
            "readings": [asdict(row) for row in self.readings],
            "structure": dict(self.structure),
            "notes": list(self.notes),
            "bytes_peak": self.bytes_peak,
            "facts": dict(self.facts),
        }
