"""The teacher's samples as they are made: a training that is killed on the way goes on with those it has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hasten.atomic import atomic_write


@dataclass(frozen=True)
class Parts:
    """One file per batch in `folder`. facts: how they are made, prompts and all; a part that was made otherwise is made anew."""

    folder: Path
    facts: Mapping[str, object]

    def load(self, number: int) -> dict[str, Tensor] | None:
        """The tensors of a batch; None where it is not made yet, was made otherwise, or is no file of ours."""
        try:
            with safe_open(self._file(number), framework="pt") as opened:
                if json.loads((opened.metadata() or {}).get("facts", "null")) != self._told():
                    return None
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
        except (OSError, ValueError, SafetensorError):
            return None

    def save(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a finished batch, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        head = {"facts": json.dumps(self._told())}
        atomic_write(self._file(number), save({name: tensor.contiguous() for name, tensor in tensors.items()}, head))

    def drop(self) -> None:
        """Everything is in one file now."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _told(self) -> object:
        return json.loads(json.dumps(self.facts))
