"""Stored data of trainings: latents, noise and conditions in safetensors, so that nothing is encoded twice.

Shapes: N rows, P prompts; x0, z [N, ...] in the file's dtype, way [N, K - 1, ...]; prompt int64 [N] into the conditions'
rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from hasten.atomic import atomic_write
from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch
from hasten.distill.network.host_call import Condition
from hasten.errors import UsageError


@dataclass(frozen=True)
class Store:
    """Rows for training. x0: clean latents in the network's scale; z: the noise that the teacher made x0 of. Either may
    be None: prompts alone have neither. way: where the teacher was between them, on the circle, at the angles of K even calls
    but the first. conditions: a row per prompt; empty: the row of the empty prompt alone."""

    prompts: tuple[str, ...]
    conditions: Condition
    empty: Condition
    prompt: Tensor
    x0: Tensor | None = None
    z: Tensor | None = None
    shape: tuple[int, ...] = ()
    drop: float = 0.0
    """Share of rows whose prompt is left out."""
    way: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt)

    def batch(self, index: Tensor, draw: Draw) -> Batch:
        """The rows of these numbers, float32, on the device of `draw`."""
        condition = self.conditions.rows(self.prompt[index]).to(draw.device)
        empty = self.empty.to(draw.device)
        if self.drop:
            none = empty.rows(torch.zeros(len(index), dtype=torch.int64))
            condition = condition.where(draw.uniform("drop") < self.drop, none)
        x0, z, way = (None if t is None else t[index].to(draw.device).float() for t in (self.x0, self.z, self.way))
        return Batch(condition, empty, x0, z, self.shape, way)

    def save(self, file: Path, facts: dict[str, object]) -> None:
        """Write everything into one safetensors file; `facts` (how it was made) into its header."""
        tensors = {"prompt": self.prompt}
        tensors |= {name: t for name, t in (("x0", self.x0), ("z", self.z), ("way", self.way)) if t is not None}
        tensors |= {f"condition.{name}": t for name, t in self.conditions.tensors.items()}
        tensors |= {f"empty.{name}": t for name, t in self.empty.tensors.items()}
        head = {"prompts": json.dumps(self.prompts), "shape": json.dumps(self.shape), "facts": json.dumps(facts)}
        atomic_write(file, save({name: t.contiguous() for name, t in tensors.items()}, head))

    @classmethod
    def load(cls, file: Path, drop: float = 0.0) -> Store:
        """Read what `save` wrote. Raises `UsageError` for another kind of file."""
        try:
            with safe_open(file, framework="pt") as opened:
                head = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
            prompts, shape = json.loads(head["prompts"]), json.loads(head["shape"])
        except (OSError, KeyError, ValueError) as error:
            raise UsageError(f"'{file}' holds no training data of hasten ({error}). Make it again.") from error
        return cls(
            tuple(prompts), _conditions(tensors, "condition."), _conditions(tensors, "empty."), tensors["prompt"],
            tensors.get("x0"), tensors.get("z"), tuple(shape), drop, tensors.get("way"),
        )  # fmt: skip


def facts(file: Path) -> dict[str, object]:
    """How a file of stored data was made."""
    with safe_open(file, framework="pt") as opened:
        found: dict[str, object] = json.loads((opened.metadata() or {})["facts"])
    return found


def prompts(file: Path) -> tuple[str, ...]:
    """The prompts of a file of stored data, in order."""
    with safe_open(file, framework="pt") as opened:
        return tuple(json.loads((opened.metadata() or {})["prompts"]))


def _conditions(tensors: dict[str, Tensor], prefix: str) -> Condition:
    return Condition({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
