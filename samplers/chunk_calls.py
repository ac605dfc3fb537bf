"""A causal video student's way of sampling: chunk after chunk of frames, each in a few calls.

Shapes: F latent frames.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from hasten.errors import RecipeError
from hasten.samplers.few_calls import FewCalls


def spans(frames: int, chunk: int, first: int = 0) -> tuple[tuple[int, int], ...]:
    """Begin and end of each chunk of `frames` latent frames, in order. first: size of the first one, 0 for `chunk`. The
    last may be shorter."""
    starts = [0, *range(first or chunk, frames, chunk)]
    return tuple(zip(starts, [*starts[1:], frames], strict=True))


class ChunkCalls(FewCalls):
    """Make `chunk` latent frames at a time, in the calls that `FewCalls` names; each chunk reads those before it.

    Keys and values of a finished chunk are kept, as the network sees it at no noise, and are not computed again (CausVid,
    arXiv 2412.07772, section 4; Self-Forcing, arXiv 2506.08009, section 3). first: frames of the first chunk, 0 for `chunk`;
    with 1, a picture is made first and a clip of it then. window: how many of the frames before a chunk it reads, None for
    all; sink: how many of the very first ones it reads besides. With a window, clips may be longer than those of training.
    """

    kind: ClassVar[str] = "chunk-calls"
    chunk: int = Field(3, ge=1)
    first: int = Field(0, ge=0)
    window: int | None = Field(None, ge=1)
    sink: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _a_flow_and_a_window(self) -> ChunkCalls:
        if self.sigmas is None:
            raise RecipeError("sampler needs sigmas: chunks are made by flow-matching models alone")
        if self.sink and self.window is None:
            raise RecipeError("sampler.sink needs sampler.window; without a window all frames are read")
        return self
