"""What a way of training is: which roles it needs, what data, and a loss for each of its phases.

A `Method` is a part like those of recipes: frozen, printable, made from YAML. `start` gives the state that holds the
roles and returns losses; it has no optimiser and knows no loop. Losses come row by row, so that a batch's loss does not
depend on how the batch is cut, and every random number comes from the step's `Draw`.

Shapes: B rows; x0, z [B, ...] on the circle's scale (as the network sees clean data); losses float32 [B].
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from hasten.distill.loop.draw import Draw
from hasten.distill.network.few_steps import FewSteps, OwnWay
from hasten.distill.network.hint import FlowMap, Hinted
from hasten.distill.network.host_call import Condition
from hasten.distill.network.quantised import Quantised
from hasten.distill.network.roles import Role, Roles
from hasten.errors import UsageError
from hasten.part import Part
from hasten.recipe import ReusePolicy

Data = Literal["latents", "own", "prompts", "pairs", "tokens"]
"""What a method reads: clean latents with prompts; the same, but never the teacher's; prompts alone; noise and the
teacher's result; tokens."""


@dataclass(slots=True)
class Batch:
    """Rows of data. x0, z and way are None where the method's data has none. empty: one row, the empty prompt. way: [B,
    K - 1, ...] where the teacher was at the angles of K even calls, but the first."""

    condition: Condition
    empty: Condition
    x0: Tensor | None = None
    z: Tensor | None = None
    shape: tuple[int, ...] = ()
    way: Tensor | None = None

    def __len__(self) -> int:
        return len(self.condition)


@dataclass(slots=True)
class Loss:
    """rows: float32 [B]. metrics: numbers for the log, each a tensor without gradient; a sketch [64] of a direction
    (`loop/direction.py`) is logged as its cosine with those before it. keep: what later phases of the same step may use (a
    generator's sample for its critic)."""

    rows: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    keep: Mapping[str, Any] = field(default_factory=dict)


class Method(Part):
    """Base of all ways of training. A concrete one names its roles and its data."""

    trains: ClassVar[tuple[str, ...]] = ("student",)
    """Roles with weights of their own, beside the teacher: trained ones and, of those, `averages`."""

    averages: ClassVar[tuple[str, ...]] = ()
    """Roles that follow the student as an exponential average, and get no gradient."""

    data: ClassVar[Data] = "latents"

    composable: ClassVar[bool] = False
    """Whether all that is learnt comes from the teacher as it is in that step, so that a style may be on both."""

    @property
    def way_points(self) -> int:
        """Of how many even calls the points of the teacher's way are needed beside noise and result; 0 for none."""
        return 0

    @abstractmethod
    def start(self, facts: Facts) -> MethodState:
        """State for one training."""


@dataclass(frozen=True, slots=True)
class Beside:
    """What a student needs beside its weights: a file (its name, its bytes), and the part of a recipe that reads it."""

    file: str
    content: bytes
    reuse: ReusePolicy


def _no_row(count: int = 1) -> Batch:
    raise UsageError("This method looks at a row of the data before it starts, and was given none. Pass Facts(row=...).")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a method is told once. steps: how long it is trained. shape: of one row of the network's input. row: gives
    the first row of the data (or the first `count`), for methods that have to see the network run before anything is
    trained."""

    roles: Roles
    steps: int
    shape: tuple[int, ...]
    row: Callable[..., Batch] = _no_row


class MethodState:
    """Losses of one training."""

    def __init__(self, facts: Facts) -> None:
        self.roles, self.facts = facts.roles, facts

    def phases(self, step: int) -> Sequence[str]:
        """Names of this step's phases in order, each the name of the role whose weights it changes."""
        return ("student",)

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        """The loss of a phase. kept: what earlier phases of this step kept."""
        raise NotImplementedError

    def heads(self, role: str) -> Iterable[tuple[str, nn.Module]]:
        """Trained modules beside the role's network, by name: discriminator heads, a learned weighting."""
        return ()

    def decay(self, role: str) -> float:
        """How slowly an average follows the student, in [0, 1)."""
        raise NotImplementedError

    def student(self) -> Role | Hinted | FlowMap | OwnWay | Quantised:
        """Who is sampled: the student, told what it was trained to be told."""
        return self.roles["student"]

    def beside(self, weights: Mapping[str, Tensor]) -> Beside | None:
        """What the student needs beside its network. weights: of the student and its heads, as they are to be written."""
        return None

    def sampler(self) -> FewSteps | None:
        """How the student is to be sampled; None where it is sampled like the teacher."""
        return None
