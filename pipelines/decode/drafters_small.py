"""A small model that drafts for a large one: chains, and trees that grow where they most probably stand."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr

from hasten.samplers.decode.protocols import Drafter, DrafterState, Facts


class SmallModel(Drafter):
    """Drafts of a smaller model with the same tokenizer (speculative decoding; trees as DySpec, arXiv 2410.11744, grows them).

    model: name of a bundled model, or a folder that `save_pretrained` wrote; `SmallModel.of(model)` takes one that is loaded.
    width: children of a node at most; 1 is a chain. depth: forwards of the small model for one proposal, and so the depth of the
    tree. above: drafts whose chance to stand is smaller, by the small model's own estimate, are not made.

    A tree grows by the draft that most probably stands: the product of the small model's probabilities on its path, and for the
    next child of a node what its elder ones left. Where tokens are sampled, drafts are drawn (a chain independently, children
    without replacement) through the call's own processors, and verified with the law they were drawn from; where they are not,
    the most probable ones are taken.

    Differs: DySpec reads one node at a time, here the `width` best of a row are read in one forward, and at most `depth` of them.
    """

    kind: ClassVar[str] = "small-model"
    model: str = Field("tiny-draft", min_length=1)
    nodes: int = Field(8, ge=1)
    width: int = Field(3, ge=1)
    depth: int = Field(5, ge=1)
    above: float = Field(0.01, ge=0, lt=1)
    _given: Any = PrivateAttr(default=None)

    @classmethod
    def of(cls, model: Any, **settings: Any) -> Self:
        """The drafter made of a loaded causal language model of transformers."""
        found = cls(model=model.config.name_or_path or type(model).__name__, **settings)
        found._given = model
        return found

    @property
    def shape(self) -> Literal["tree", "chain"]:
        return "chain" if self.width == 1 else "tree"

    def start(self, facts: Facts) -> DrafterState:
        from hasten.pipelines.decode.small_drafts import SmallState, check, opened

        key = f"{self.kind}:{self.model}"
        small = self._given if self._given is not None else facts.kept.get(key)
        if small is None:
            small = facts.kept[key] = opened(self.model, facts)
        check(small, facts)
        return SmallState(self, small, facts)
