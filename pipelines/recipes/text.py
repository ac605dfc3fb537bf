"""Recipes of text diffusion: which slots are written when, where, and what is taken back.

They say nothing of what is computed again; join them with a cache of `text_caches.py`: "eb-sampler+dual-cache". Recipes
that are papers about both stand there, too.
"""

from __future__ import annotations

from hasten.recipe import Recipe
from hasten.samplers.commit import CommitRule, Either, Falling, Quota, Threshold
from hasten.samplers.commit import Unmask as _Unmask
from hasten.samplers.commit_history import Settled, Steady
from hasten.samplers.commit_sure import AboveMean, AllAtOnce, EntropyBound, Factor, Lead, Nearby, Runs
from hasten.samplers.commit_told import Agreed
from hasten.samplers.commit_wide import WideIn
from hasten.samplers.filter import Learned, LearnedBlock
from hasten.samplers.revise_edit import Edit
from hasten.samplers.revise_erase import Backtrack, NarrowOut, Remask
from hasten.samplers.scores import Certainty, Confidence, Margin, Score, Softened
from hasten.samplers.scores_history import Averaged, Credit
from hasten.samplers.text_blocks import AtDelimiter, BlockRule, Fixed, InBlocks, SubBlocks, Whole
from hasten.samplers.text_ends import AtEndToken, AtPredictedEnd, AtSurestEnd, EndRule
from hasten.samplers.verify import FreeDave


def _decode(
    rule: CommitRule, paper: str, *, score: Score | None = None, blocks: BlockRule | int = 32, end: EndRule | None = None
) -> Recipe:  # fmt: skip
    where = Fixed(size=blocks) if isinstance(blocks, int) else blocks
    return Recipe(
        commit=_Unmask(rule=rule, score=score or Confidence()),
        blocks=InBlocks(rule=where, end=end or AtEndToken()),
        paper=paper,
    )


def sequential(size: int = 32) -> Recipe:
    """One slot per evaluation, the surest first, block by block: what the others are compared with."""
    return _decode(Quota(), "LLaDA, arXiv 2502.09992", blocks=size)


def llada(steps: int = 128, size: int = 32) -> Recipe:
    """LLaDA: as many slots per evaluation as make `steps` evaluations, the surest first, block by block."""
    return _decode(Quota(steps=steps), "LLaDA, arXiv 2502.09992", blocks=size)


def dream(steps: int = 512, alg: str = "entropy", alg_temp: float = 0.0) -> Recipe:
    """Dream: as many as a noise level unveils that falls evenly; no blocks. alg: entropy, maskgit_plus or topk_margin."""
    scores: dict[str, Score] = {"entropy": Certainty(), "maskgit_plus": Confidence(), "topk_margin": Margin()}
    if alg not in scores:
        raise ValueError(f"alg must be one of {', '.join(scores)}, got {alg!r}")
    score = Softened(score=scores[alg], temperature=alg_temp) if alg_temp > 0 else scores[alg]
    return _decode(Falling(steps=steps), "Dream, arXiv 2508.15487", score=score, blocks=Whole())


def threshold(above: float = 0.9, size: int = 32) -> Recipe:
    """Fast-dLLM's parallel decoding: all slots of the block that are sure enough, without a cache."""
    return _decode(Threshold(above=above), "Fast-dLLM, arXiv 2505.22618", blocks=size)


def factor(factor: float = 1.0, size: int = 32) -> Recipe:
    """Fast-dLLM's factor rule: the n surest slots while (n + 1)(1 - confidence) < factor."""
    return _decode(Factor(factor=factor), "Fast-dLLM, arXiv 2505.22618", blocks=size)


def eb_sampler(bound: float = 0.1, size: int = 32) -> Recipe:
    """EB-Sampler: the slots of least entropy while what they may share stays below a bound."""
    return _decode(EntropyBound(bound=bound), "EB-Sampler, arXiv 2505.24857", score=Certainty(), blocks=size)


def margin(by: float = 0.8, size: int = 32) -> Recipe:
    """All slots whose best token is ahead of the next by `by`."""
    return _decode(Lead(by=by), "Dream, arXiv 2508.15487", score=Margin(), blocks=size)


def local_leap(above: float = 0.9, near: float = 0.75, reach: int = 4, size: int = 32) -> Recipe:
    """LocalLeap: near a slot that is sure, less certainty is enough."""
    return _decode(Nearby(above=above, near=near, reach=reach), "LocalLeap, arXiv 2510.07081", blocks=size)


def hierarchy(above: float = 0.9, low: float = 0.4, size: int = 32) -> Recipe:
    """dInfer's hierarchical decoding: of each run of open slots the surest one, too."""
    return _decode(Runs(above=above, low=low), "dInfer, arXiv 2510.08666", blocks=size)


def credit(above: float = 0.9, alpha: float = 0.7, beta: float = 0.8, gamma: float = 0.2, size: int = 32) -> Recipe:
    """CreditDecoding: tokens that keep coming up are written earlier."""
    score = Credit(alpha=alpha, beta=beta, gamma=gamma)
    return _decode(Threshold(above=above), "CreditDecoding, arXiv 2510.06133", score=score, blocks=size)


def ccd(over: int = 2, top: int = 4) -> Recipe:
    """Coherent Contextual Decoding: slots that stay among the surest with one token, scored over several evaluations."""
    rule = Steady(top=top, lasting=over)
    return _decode(rule, "CCD, arXiv 2512.02044", score=Averaged(over=over), blocks=Whole())


def klass(above: float = 0.6, drift: float = 0.01, lasting: int = 2, size: int = 32) -> Recipe:
    """KLASS: sure slots whose distribution has settled."""
    return _decode(Settled(above=above, drift=drift, lasting=lasting), "KLASS, arXiv 2511.05664", blocks=size)


def prophet(size: int = 32) -> Recipe:
    """Prophet: everything at once as soon as the mean lead is large."""
    return _decode(AllAtOnce(), "Prophet, arXiv 2508.19982", blocks=size)


def saber(slack: float = 0.02, share: int = 8, least: float = 0.05) -> Recipe:
    """Saber: a threshold that follows the text, and what has lost most confidence is taken back."""
    found = _decode(AboveMean(slack=slack), "Saber, arXiv 2510.18165", blocks=Whole())
    return found | Recipe(revise=Backtrack(share=share, least=least))


def wino(above: float = 0.6, below: float = 0.9, size: int = 32) -> Recipe:
    """WINO: many are written, and those that the rest of the block would not write again are taken back."""
    found = _decode(WideIn(above=above), "WINO, arXiv 2507.18578", blocks=size)
    return found | Recipe(revise=NarrowOut(below=below))


def remask(above: float = 0.9, below: float = 0.4, size: int = 32) -> Recipe:
    """dInfer's remasking: what has become improbable is taken back."""
    return _decode(Threshold(above=above), "dInfer, arXiv 2510.08666", blocks=size) | Recipe(revise=Remask(below=below))


def adablock(above: float = 0.9, delimiter: float = 0.3, size: int = 32) -> Recipe:
    """AdaBlock: blocks end where a line does."""
    return _decode(
        Threshold(above=above), "AdaBlock, arXiv 2509.26432", blocks=AtDelimiter(above=delimiter, size=size)
    )


def learn2pd(weights: str | None = None, above: float | None = 0.9, size: int = 32) -> Recipe:
    """Learn2PD: a trained filter says which slots are final; the text is cut at its surest predicted end.

    weights: a file of `hasten train filter --form block`; None: the one in the model's folder. above None: as calibrated.
    """
    rule = Either(rules=(LearnedBlock(weights=weights, above=above), Quota()))
    return _decode(rule, "Learn2PD, arXiv 2509.25188", blocks=size, end=AtSurestEnd())


def learned_filter(weights: str | None = None, above: float | None = None, size: int = 32) -> Recipe:
    """Ours: a trained filter for blocks of any size, calibrated for a share of wrong tokens; ends are cut only when they are sure.

    weights: a file of `hasten train filter`; None: the one in the model's folder. above None: as calibrated.
    """
    rule = Learned(weights=weights, above=above)
    return _decode(rule, "Learn2PD, arXiv 2509.25188", blocks=size, end=AtPredictedEnd())


def dparallel(above: float = 0.5, size: int = 32) -> Recipe:
    """dParallel: a low threshold, for models trained to be sure early."""
    return _decode(Threshold(above=above), "dParallel, arXiv 2509.26488", blocks=size)


def guided(size: int = 32) -> Recipe:
    """Guided Diffusion: what a small causal model would write, too. Pass it as guide=."""
    return _decode(Agreed(), "FlashDLM, arXiv 2505.21467", blocks=size)


def llada2(above: float = 0.7, edit: float = 0.5, size: int = 32) -> Recipe:
    """LLaDA2.1: sure slots are written, and written ones edited while their block is open."""
    rule = Threshold(above=above)
    found = _decode(rule, "LLaDA2.1, arXiv 2602.08676", blocks=Fixed(size=size, aligned=True))
    return found | Recipe(revise=Edit(above=edit))


def sub_blocks(above: float = 0.9, size: int = 32, inner: int = 8) -> Recipe:
    """Fast-dLLM v2's order: parts of a block from left to right."""
    return _decode(Threshold(above=above), "Fast-dLLM v2, arXiv 2509.26328", blocks=SubBlocks(size=size, inner=inner))


def freedave(most: int = 4, size: int = 32) -> Recipe:
    """FreeDave: several drafts per evaluation, and exactly the text of sequential decoding."""
    return _decode(Quota(), "FreeDave, arXiv 2510.00294", blocks=size) | Recipe(verify=FreeDave(most=most))


def freedave_plus(most: int = 4, above: float = 0.95, size: int = 32) -> Recipe:
    """FreeDave++: drafts of sets of sure slots, and exactly the text of decoding with that threshold."""
    found = _decode(Threshold(above=above), "FreeDave, arXiv 2510.00294", blocks=size)
    return found | Recipe(verify=FreeDave(most=most))
