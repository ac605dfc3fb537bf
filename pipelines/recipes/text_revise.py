"""Recipes of text diffusion that take written slots back by what was known when they were written, and other orders and ends.

Like those of `text.py` they say nothing of what is computed again; join them with a cache of `text_caches.py`.
"""

from __future__ import annotations

from hasten.recipe import Recipe
from hasten.samplers.commit import Quota, Threshold
from hasten.samplers.commit import Unmask as _Unmask
from hasten.samplers.revise_unsure import Lapse, Outbid
from hasten.samplers.scores import Arbitrary, Confidence, Score, Softened
from hasten.samplers.text_blocks import Fixed, InBlocks, Whole
from hasten.samplers.text_ends import AtEmptyBlock


def _paced(steps: int, score: Score, size: int | None) -> Recipe:
    where = Whole() if size is None else Fixed(size=size)
    return Recipe(commit=_Unmask(rule=Quota(steps=steps), score=score), blocks=InBlocks(rule=where))


def rcr(steps: int = 128, size: int = 32) -> Recipe:
    """RCR: of what is written and what could be, the surest stay; a slot that was written unsurely is predicted again."""
    found = _paced(steps, Confidence(), size)
    return found | Recipe(revise=Outbid(), paper="MDPO, arXiv 2508.13148")


def remdm(steps: int = 128, eta: float = 0.02, schedule: str = "cap", late: float = 1.0) -> Recipe:
    """ReMDM: slots in random order, each of which may be taken back by chance. schedule: cap or rescale."""
    lapse = Lapse.model_validate({"eta": eta, "schedule": schedule, "late": late})
    return _paced(steps, Arbitrary(), None) | Recipe(revise=lapse, paper="ReMDM, arXiv 2503.00307")


def remdm_conf(steps: int = 128, size: int = 32) -> Recipe:
    """ReMDM-conf: the surest slots first, and those that were written unsurely are taken back sooner."""
    lapse = Lapse(schedule="rescale", eta=1.0, unsure=True)
    return _paced(steps, Confidence(), size) | Recipe(revise=lapse, paper="ReMDM, arXiv 2503.00307")


def random_order(steps: int = 128, size: int | None = None) -> Recipe:
    """LLaDA's random remasking, MDLM's ancestral order: which slots are written next is drawn beforehand."""
    return _paced(steps, Arbitrary(), size) | Recipe(paper="LLaDA, arXiv 2502.09992")


def soft_order(steps: int = 128, temperature: float = 0.1, size: int | None = None) -> Recipe:
    """Dream's alg_temp: the next slots are drawn, surer ones more often."""
    score = Softened(temperature=temperature)
    return _paced(steps, score, size) | Recipe(paper="Dream, arXiv 2508.15487")


def early_exit(above: float = 0.9, size: int = 32) -> Recipe:
    """FreeDave's early exit: sure slots together, and the text is over with a block that holds nothing but ends."""
    return Recipe(
        commit=_Unmask(rule=Threshold(above=above)),
        blocks=InBlocks(rule=Fixed(size=size), end=AtEmptyBlock()),
        paper="FreeDave, arXiv 2510.00294",
    )
