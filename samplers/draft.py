"""Starting from a draft: a cheap first result is given noise again, and only the rest of the run is walked in full."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from hasten.recipe import Sampler


class Draft(Sampler):
    """Make a draft by another recipe, put noise on it, and walk the last `share` of the steps by the full model.

    recipe: of the draft, by name or file: a student's calls (`fast`, `fastest`), a fast solver (`fewer-steps`), a cache; ""
    where the caller passes the draft as `latents=`, clean and as the network reads them: pictures of one's own. steps: how
    many the draft is asked for; None for as many as the caller asks for. The noise is the one that the draft started from,
    so that the result stays near to the plain run of that seed; that of the caller's generator where there is no such run.
    x = alpha draft + sigma noise at the level where the rest begins, as SDEdit does (arXiv 2108.01073); a learnt coarse
    result as the start of a diffusion is CAT-DM's (arXiv 2311.18405, section 3.3), whose draft is a GAN's.
    """

    kind: ClassVar[str] = "draft"
    recipe: str = "fast"
    steps: int | None = Field(None, ge=1)
    share: float = Field(0.5, gt=0, lt=1)

    def begin(self, steps: int) -> int:
        """The first step that is walked, of `steps`."""
        return steps - max(1, round(self.share * steps))
