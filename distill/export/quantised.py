"""A student in few bits as a folder: its weights packed, a recipe that puts them on, and a card.

Shapes: as in `pipelines/quantised.py`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hasten.atomic import atomic_write
from hasten.distill.export.card import Card, Rows
from hasten.distill.network.quantised import Quantised
from hasten.pipelines import tiny_models
from hasten.pipelines.lora import marks
from hasten.pipelines.quantised import FILE
from hasten.pipelines.quantised import Quantised as Packed
from hasten.recipe import Adapter, Recipe


def packed_of(student: Quantised, weights: Mapping[str, Tensor] | None = None) -> Packed:
    """The student as a file has it. weights: name of a trained number (`heads.LAYER.NAME`) -> value that stands for it, such
    as a training's average; its own by default."""
    network = student.host.network
    with _instead(student, weights or {}):
        layers = {name: layer.finished(_weight(network, name)) for name, layer in student.layers.items()}
    facts = {"network": type(network).__name__, "weights": marks(network, layers)}
    return Packed(student.host.site, layers, student.bins, student.end, facts)


@dataclass(frozen=True)
class QuantisedStudent:
    """What is written. weights: as in `packed_of`. base: the teacher as one opens it. table, training: rows and facts of the
    card; licence: of the base."""

    student: Quantised
    pipe: Any
    base: str
    weights: Mapping[str, Tensor] | None = None
    name: str = ""
    licence: str | None = None
    table: Rows = ()
    training: Mapping[str, object] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Write quantised.safetensors, recipe.yaml and README.md below `folder`."""
        made = packed_of(self.student, self.weights)
        name = self.name or f"{Path(self.base).name}-{min(layer.bits for layer in made.layers.values())}-bit"
        folder.mkdir(parents=True, exist_ok=True)
        file = made.save(folder / FILE)
        atomic_write(folder / "recipe.yaml", Recipe(name=name, models=(self.base,), adapter=Adapter(path=FILE)).to_yaml())
        sums = {FILE: hashlib.sha256(file.read_bytes()).hexdigest()}
        atomic_write(folder / "README.md", self._card(name, made, sums).text())
        return folder

    def _card(self, name: str, made: Packed, sums: Mapping[str, str]) -> _Card:
        network = self.student.host.network
        plain = sum(_weight(network, layer).numel() * _weight(network, layer).element_size() for layer in made.layers)
        facts = {"bytes of these layers": made.num_bytes(), "bytes as they were": plain, **self.training}
        return _Card(
            name, self.base, type(self.pipe).__name__, type(network).__name__, made.site, "quantised",
            tuple(inspect.signature(type(self.pipe).__call__).parameters), None, self.licence, self.table, facts, sums,
            self.base in tiny_models.names(), made.told(),
        )  # fmt: skip


def quantised_student_of(trainer: Any, student: Quantised, pipe: Any, base: str, more: Mapping[str, Any]) -> QuantisedStudent:
    """The student of a finished training, its average where there is one. more: fields of `QuantisedStudent`; others of
    `Student`, about its sampling and adapters, have no meaning here."""
    player = trainer.players["student"]
    facts = {"method": trainer.method.kind, "steps": trainer.settings.steps, "batch": trainer.settings.batch,
             "learning rate": trainer.settings.lr, "seed": trainer.settings.seed}  # fmt: skip
    given = {"training": facts} | {key: more[key] for key in ("name", "licence", "table", "training") if key in more}
    return QuantisedStudent(student, pipe, base, player.average or player.parameters, **given)


@dataclass(frozen=True, slots=True)
class _Card(Card):
    """told: the weights in words."""

    told: str = ""

    def _head(self) -> str:
        base = f"base_model: {self.base}\nbase_model_relation: quantized\nlibrary_name: diffusers\n"
        licence = f"license: {self.licence}\n" if self.licence else ""
        return f"---\n{base}{licence}tags:\n- quantization\n- hasten\n---\n"

    def _summary(self) -> str:
        licence = "" if self.licence else " The licence of the base model was not given; it applies to this student, too."
        return f"{self.base} (`{self.pipeline}`) in few bits: {self.told}. It is sampled as its teacher is.{licence}\n"

    def _plain(self) -> str:
        return (
            "Weights and inputs are rounded as kernels of whole numbers would have them, and computed in full precision: the file\n"
            "is small, memory and time while it runs are not. Plain diffusers has no reader for it.\n"
        )


def _weight(network: Any, name: str) -> Tensor:
    weight: Tensor = network.get_submodule(name).weight
    return weight


@contextmanager
def _instead(student: Quantised, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, what is trained has these values."""
    own = {f"heads.{name}.{key}": p for name, layer in student.layers.items() for key, p in layer.named_parameters()}
    kept = {name: own[name].data for name in own.keys() & weights.keys()}
    try:
        for name, value in kept.items():
            own[name].data = weights[name].detach().to(value)
        yield
    finally:
        for name, value in kept.items():
            own[name].data = value
