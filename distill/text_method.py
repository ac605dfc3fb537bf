"""What ways of training a language model have in common.

Shapes: none of its own.
"""

from __future__ import annotations

from typing import ClassVar

from hasten.distill.method import Data, Facts, Method, MethodState
from hasten.distill.text_roles import TextRole, TextRoles
from hasten.errors import UsageError


class TextMethod(Method):
    """A way of training that reads tokens. recipe: the one that its students are decoded with."""

    data: ClassVar[Data] = "tokens"
    recipe: ClassVar[str] = "sequential"


class TextState(MethodState):
    """Losses of one training of a language model. learner: the student."""

    learner: TextRole

    def __init__(self, facts: Facts, kind: str) -> None:
        """Raises `UsageError` where the roles are no language models."""
        super().__init__(facts)
        if not isinstance(facts.roles, TextRoles):
            raise UsageError(f"{kind} is for language models. Take one with --model, such as tiny-dllm.")
        self.learner = facts.roles.text("student")

    def mask_token(self, kind: str) -> int:
        """The token for "not written yet". Raises `UsageError` for a model without one."""
        mask = self.learner.call.facts.mask_id
        if mask is None:
            raise UsageError(f"{kind} masks tokens, and this model starts from noise. Take a masked language model.")
        return mask
