"""What ways of training a language model have in common.

Shapes: none of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from hasten.distill.method import Data, Facts, Method, MethodState
from hasten.distill.text_roles import TextRole, TextRoles
from hasten.distill.text_student import save_student
from hasten.errors import UsageError
from hasten.pipelines.recipes import recipe as find_recipe


class TextMethod(Method):
    """A way of training that reads tokens. recipe: the one that its students are decoded with."""

    data: ClassVar[Data] = "tokens"
    recipe: ClassVar[str] = "sequential"


class TextState(MethodState):
    """Losses of one training of a language model. learner: the student."""

    learner: TextRole

    def __init__(self, facts: Facts, kind: str) -> None:
        """Raises `UsageError` where the roles are no language models. Where there is no student, only heads are trained, and the
        learner is the teacher."""
        super().__init__(facts)
        if not isinstance(facts.roles, TextRoles):
            raise UsageError(f"{kind} is for language models. Take one with --model, such as tiny-dllm.")
        self.learner = facts.roles.text("student" if "student" in facts.roles else "teacher")

    def write(self, folder: Path, base: str, recipe: str, weights: Mapping[str, Tensor] | None) -> None:
        """Write the student. base: the model's name; recipe: how it is decoded; weights: name of a parameter -> its average,
        None for none."""
        save_student(self.learner, folder, base, find_recipe(recipe), weights)

    def causal(self, kind: str) -> None:
        """Raise `UsageError` for a model that does not write from left to right."""
        facts = self.learner.call.facts
        if facts.block != 1 or not facts.shifted:
            raise UsageError(f"{kind} is for models that write from left to right. Take one with --model, such as tiny-lm.")

    def mask_token(self, kind: str) -> int:
        """The token for "not written yet". Raises `UsageError` for a model without one."""
        mask = self.learner.call.facts.mask_id
        if mask is None:
            raise UsageError(f"{kind} masks tokens, and this model starts from noise. Take a masked language model.")
        return mask
