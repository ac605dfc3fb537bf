"""What ways of training a language model have in common.

Shapes: none of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from hasten.canvas import TextFacts
from hasten.distill.data.store import Store
from hasten.distill.method import Data, Facts, Method, MethodState
from hasten.distill.text.filter_prompts import Asked
from hasten.distill.text.roles import TextRole, TextRoles
from hasten.distill.text.student import save_student
from hasten.distill.text.teach import Say, make_texts
from hasten.errors import UsageError
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.text_models.host import TextHost
from hasten.recipe import Recipe


class TextMethod(Method):
    """A way of training that reads tokens. recipe: the one that its students are decoded with."""

    data: ClassVar[Data] = "tokens"
    recipe: ClassVar[str] = "sequential"
    writes: ClassVar[str] = "sequential"
    """The recipe that the teacher writes its texts with, unless `data.call.recipe` says another."""
    causal: ClassVar[bool] = True
    """For models that write from left to right; otherwise for those that write in any order."""

    def fits(self, facts: TextFacts) -> None:
        """Raises `UsageError` for a model of the other kind, before anything is made for it."""
        left_to_right = facts.block == 1 and facts.shifted
        if self.causal and not left_to_right:
            raise UsageError(f"{self.kind} is for models that write from left to right. Take one with --model, such as tiny-lm.")
        if not self.causal and left_to_right:
            raise UsageError(f"{self.kind} is for models that write in any order. Take one with --model, such as tiny-dllm.")

    def make(self, host: TextHost, tokenizer: Any, asked: Asked, recipe: Recipe, seed: int, say: Say) -> Store:
        """The data: texts that the teacher writes behind what it is asked."""
        return make_texts(host, tokenizer, asked.prompts, asked.new, recipe, say=say)

    def used(self, model: str, student: Path) -> str:
        """How a student in this folder is used, in words."""
        return f"put it onto the model and merge it: PeftModel.from_pretrained(model, '{student}').merge_and_unload()"

    def depends(self) -> dict[str, object]:
        """What of the method the data depend on."""
        return {}


class TextState(MethodState):
    """Losses of one training of a language model. learner: the student. rows: all data, for what is chosen on them in the end;
    `train_text` gives them."""

    learner: TextRole
    rows: Store | None = None

    def __init__(self, method: TextMethod, facts: Facts) -> None:
        """Raises `UsageError` where the roles are no language models. Where there is no student, only heads are trained, and the
        learner is the teacher."""
        super().__init__(facts)
        if not isinstance(facts.roles, TextRoles):
            raise UsageError(f"{method.kind} is for language models. Take one with --model, such as tiny-dllm.")
        self.learner = facts.roles.text("student" if "student" in facts.roles else "teacher")
        method.fits(self.learner.call.facts)

    def write(self, folder: Path, base: str, recipe: str, weights: Mapping[str, Tensor] | None) -> None:
        """Write the student. base: the model's name; recipe: how it is decoded; weights: name of a parameter -> its average,
        None for none."""
        save_student(self.learner, folder, base, find_recipe(recipe), weights)

    def mask_token(self, kind: str) -> int:
        """The token for "not written yet". Raises `UsageError` for a model without one."""
        mask = self.learner.call.facts.mask_id
        if mask is None:
            raise UsageError(f"{kind} masks tokens, and this model starts from noise. Take a masked language model.")
        return mask
