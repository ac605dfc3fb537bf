"""A finished student as a folder: adapter or network, sampler, recipe, card, and the names of other programs.

Shapes: as in `pipelines/lora.py`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hasten.atomic import atomic_write
from hasten.distill.export.card import Card, Rows
from hasten.distill.export.lora import lora_of, save_network, styles_of
from hasten.distill.export.names import PREFIX, Names, Style, write
from hasten.distill.export.quantised import QuantisedStudent, quantised_student_of
from hasten.distill.export.sampler import describe, few_calls, told_guidance
from hasten.distill.method import Beside
from hasten.distill.network.few_steps import FewSteps, OwnWay
from hasten.distill.network.quantised import Quantised
from hasten.distill.network.roles import Role
from hasten.distill.network.timed_lora import gates_of
from hasten.errors import RefusedError, UsageError
from hasten.pipelines import timed_lora, tiny_models
from hasten.pipelines.lora import FILE, Lora
from hasten.pipelines.timed_lora import TimedGates, plain
from hasten.recipe import Adapter, Recipe
from hasten.samplers.few_calls import FewCalls


@dataclass(frozen=True)
class Student:
    """What is written. role: the student; weights: what stands for its parameters (the average), None for its own; steps:
    how it is sampled, None for "as its teacher". base: the teacher as one opens it; call: the pipeline's arguments it was
    trained for.

    also: other programs to write an adapter for. merge: whether a style that teacher and student keep is put into the file.
    beside: what the student needs beside its weights.
    """

    role: Role
    pipe: Any
    base: str
    steps: FewSteps | None
    weights: Mapping[str, Tensor] | None = None
    name: str = ""
    call: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    table: Rows = ()
    training: Mapping[str, object] = field(default_factory=dict)
    also: tuple[Style, ...] = ()
    merge: bool = False
    beside: Beside | None = None

    def save(self, folder: Path) -> Path:
        """Write adapter or network, other programs' files, sampler.json, recipe.yaml and README.md below `folder`.

        Raises, before anything is written, `RefusedError` where no scheduler samples it so, and `UsageError` for a program
        that is unknown or whose names of this model are.
        """
        part = None if self.steps is None else self._sampler(self.steps)
        told = None if part is None else describe(part, self.pipe)
        self._check()
        folder.mkdir(parents=True, exist_ok=True)
        if self.role.stage is None:
            files = [*save_network(self.role, folder / self.role.host.site, self.weights).glob("*.safetensors")]
            facts: dict[str, object] = {}
        else:
            lora = self._lora(told)
            files = [self._adapter(lora, folder), *self._others(lora, folder)]
            ranks, alphas = ({getattr(low, key) for low in lora.layers.values()} for key in ("rank", "alpha"))
            facts = {"rank": _one(ranks), "alpha": _one(alphas), "layers": len(lora.layers)}
        if self.beside is not None:
            files.append(atomic_write(folder / self.beside.file, self.beside.content))
        if told is not None:
            atomic_write(folder / "sampler.json", json.dumps(told, indent=1) + "\n")
        atomic_write(folder / "recipe.yaml", self._recipe(part).to_yaml())
        sums = {str(file.relative_to(folder)): _sha256(file) for file in files}
        atomic_write(folder / "README.md", self._card(told, facts | dict(self.training), sums).text())
        return folder

    def _check(self) -> None:
        if self.role.stage is None and (self.also or self.merge):
            raise UsageError("A student that is a whole network has no adapter to write for other programs or to merge.")
        if (gates := self._gates) is not None and (self.also or self.merge):
            plain(lora_of(self.role, self.weights), gates)  # says why it cannot be, where it cannot
        for style in self.also:
            if style not in PREFIX:
                raise UsageError(f"Adapters are written for {', '.join(PREFIX)} beside diffusers, not for {style!r}.")
            Names(self.role.host.network).check(style)

    @property
    def _gates(self) -> TimedGates | None:
        """Those of an adapter whose strength changes with the time."""
        return gates_of(self.role, self.weights)

    def _adapter(self, lora: Lora, folder: Path) -> Path:
        gates = self._gates
        if gates is None or gates.table.constant:
            return lora.save(folder / FILE)
        return timed_lora.write(lora, gates, folder / timed_lora.FILE)

    def _sampler(self, steps: FewSteps) -> FewCalls:
        return few_calls(steps, self.role.host.path, told_guidance(self.pipe, self.call))

    def _lora(self, sampler: Mapping[str, Any] | None) -> Lora:
        lora, gates = lora_of(self.role, self.weights), self._gates
        if gates is not None and gates.table.constant:
            lora = plain(lora, gates)
        for style in styles_of(self.role) if self.merge else ():
            lora = lora.merged(style)
        return replace(lora, facts=lora.facts | ({"sampler": sampler} if sampler else {}) | {"base": self.base})

    def _others(self, lora: Lora, folder: Path) -> list[Path]:
        for style in self.also:
            (folder / style).mkdir(exist_ok=True)  # load_lora_weights(folder) wants one file beside the card
        network = self.role.host.network
        return [write(lora, network, folder / style / f"{self._name}.safetensors", style) for style in self.also]

    def _recipe(self, sampler: FewCalls | None) -> Recipe:
        timed = self._gates is not None and not self._gates.table.constant
        adapter = None if self.role.stage is None else Adapter(path=timed_lora.FILE if timed else FILE)
        reuse = None if self.beside is None else self.beside.reuse
        attention = None if self.role.attention is None else self.role.attention.policy
        return Recipe(name=self._name, models=(self.base,), sampler=sampler, adapter=adapter, attention=attention, reuse=reuse)

    def _card(self, sampler: Mapping[str, Any] | None, training: Mapping[str, object], files: Mapping[str, str]) -> Card:
        plain = type(self.pipe)
        takes = tuple(inspect.signature(plain.__call__).parameters)
        bundled = self.base in tiny_models.names()
        return Card(
            self._name, self.base, plain.__name__, type(self.role.host.network).__name__, self.role.host.site, self._loads(), takes,
            sampler, self.licence, self.table, training, files, bundled,
        )  # fmt: skip

    def _loads(self) -> str:
        if self.role.stage is None:
            return "network_folder"
        if self._gates is not None and not self._gates.table.constant:
            return "timed"
        if hasattr(self.pipe, "load_lora_weights"):
            return "pipeline"
        return "network" if hasattr(self.role.host.network, "load_lora_adapter") else "peft"

    @property
    def _name(self) -> str:
        count = len(self.steps.angles) if self.steps is not None else 0
        calls = f"-{count}-call{'s' if count > 1 else ''}" if count else ""
        return self.name or f"{Path(self.base).name}{calls}"


def student_of(trainer: Any, pipe: Any, base: str, **more: Any) -> Student | QuantisedStudent:
    """The student of a finished training, its average where there is one. more: further fields of `Student`.

    Raises `RefusedError` for a student that is more than its network: one that is told numbers by modules beside it.
    """
    who = trainer.state.student()
    if isinstance(who, Quantised):
        return quantised_student_of(trainer, who, pipe, base, more)
    if not isinstance(who, Role | OwnWay):
        raise RefusedError(
            f"This student's network is told numbers by modules beside it ({type(who).__name__}), which no file that diffusers"
            " reads can hold. Train with told = false, or sample it with hasten.distill."
        )
    player = trainer.players["student"]
    # Heads that are only trained with (a learned weighting) are no part of the student.
    every = player.average or player.parameters
    weights = {n: w for n, w in every.items() if not n.startswith("heads.")}
    facts = {"method": trainer.method.kind, "steps": trainer.settings.steps, "batch": trainer.settings.batch,
             "learning rate": trainer.settings.lr, "seed": trainer.settings.seed}  # fmt: skip
    facts |= {"averaged": trainer.settings.average} if player.average else {}
    facts |= {"composed with": ", ".join(trainer.roles.styles.values())} if trainer.roles.styles else {}
    if (attention := trainer.roles["student"].attention) is not None:
        facts |= {"attention": " | ".join(type(p.score).__name__ for p in attention.policy.patterns) + ", sparse in every call"}
    given = {"training": facts, "beside": trainer.state.beside(every)} | more
    return Student(trainer.roles["student"], pipe, base, trainer.state.sampler(), weights, **given)


def _one(values: set[Any]) -> object:
    return next(iter(values)) if len(values) == 1 else f"{min(values):g} to {max(values):g}"


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
