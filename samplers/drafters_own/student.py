"""Files that a training left beside a model, for the drafters that read them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file
from torch import Tensor

from hasten.errors import ModelError
from hasten.recipe import FromFile
from hasten.samplers.decode.protocols import Drafter


class Student(Drafter, FromFile):
    """A drafter that was trained on one model. path: the `student/` folder of its training. file, training: what it reads there,
    and which `hasten train` writes it."""

    file: ClassVar[str] = ""
    training: ClassVar[str] = ""

    def read(self, name: str = "") -> dict[str, Tensor]:
        """The tensors of a file of the folder. Raises `ModelError` where there is none."""
        return loaded(self.place / (name or self.file), self.training)

    def fits(self, width: int, model: Any) -> None:
        """Raise `ModelError` where the file is for states of another width than the model's."""
        own = int(model.config.get_text_config(decoder=True).hidden_size)
        if width != own:
            raise ModelError(
                f"{self.kind}: '{self.place}' was trained for states of {width} numbers, and this {type(model).__name__} has {own}."
                " A student fits the very model that it was trained on."
            )


def loaded(file: Path, training: str) -> dict[str, Tensor]:
    """The tensors of `file`, not to be written into. Raises `ModelError` where there is none; training: what writes it."""
    if not file.is_file():
        raise ModelError(
            f"'{file.parent}' has no {file.name}. Name the student/ folder that `hasten train {training}` wrote."
        )
    return _read(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _read(file: Path, stamp: int) -> dict[str, Tensor]:
    """A file is read once, and again when it has changed."""
    return load_file(file)
