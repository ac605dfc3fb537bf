"""A text diffusion model drafts for a causal one: a whole block in one evaluation, put in order by what follows what (DiffuSpec)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from hasten.samplers.decode.protocols import Drafter, DrafterState, Facts


class DiffusionDraft(Drafter):
    """DiffuSpec (arXiv 2510.02358): masks behind the text, one evaluation, and a search through what it says of each.

    model: a masked language model with the tokenizer of the model that verifies: a bundled name or a folder. masks: places of
    the block; width: guesses for each; beam: paths that are kept, of which the best `paths` make the tree; weight: of the
    proxy, an n-gram model of the row's own text. reads: last tokens of the text that it is shown.

    Differs: the paper's proxy is an n-gram model of a corpus, and its draft one path. Its adaptive length is the pace `average`.
    """

    kind: ClassVar[str] = "diffusion-draft"
    nodes: int = Field(8, ge=1)
    model: str = "tiny-dllm"
    masks: int = Field(6, ge=1)
    width: int = Field(4, ge=1)
    beam: int = Field(4, ge=1)
    paths: int = Field(2, ge=1)
    weight: float = Field(0.5, ge=0)
    reads: int = Field(128, ge=1)

    def start(self, facts: Facts) -> DrafterState:
        from hasten.pipelines.decode_own.diffusion_state import (
            DiffusionState,  # transformers is asked for when it drafts
        )

        return DiffusionState(self, facts)
