"""What a recipe changes on the host itself, before its loop is followed: weights, and the way of sampling.

Everything is put on through the session's attachment, which takes it off again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from hasten.caching.network import NetworkReuse
from hasten.errors import ModelError, UsageError
from hasten.pipelines.lora import Lora, find
from hasten.pipelines.quantised import Quantised, is_quantised
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.seams.adapter import put_on
from hasten.pipelines.seams.bottleneck import sample_in_stages
from hasten.pipelines.seams.chunk_calls import sample_in_chunks
from hasten.pipelines.seams.draft import Drafted
from hasten.pipelines.seams.few_calls import sample_in_few_calls
from hasten.pipelines.seams.quantised import put_on as put_weights_on
from hasten.pipelines.seams.windows import sample_in_windows
from hasten.pipelines.solver import swap_scheduler
from hasten.pipelines.timed_lora import TimedLora, read_adapter
from hasten.samplers.bottleneck import Bottleneck
from hasten.samplers.chunk_calls import ChunkCalls
from hasten.samplers.draft import Draft
from hasten.samplers.few_calls import FewCalls
from hasten.samplers.solver import Solver
from hasten.samplers.travel import TimeTravel
from hasten.samplers.windows import Windows

if TYPE_CHECKING:
    from hasten.pipelines.session import Session


def change_adapter(session: Session, models: dict[str, nn.Module]) -> None:
    """Put the recipe's adapter onto its network. Raises `ModelError` where the host has no such network."""
    adapter, host = session.recipe.adapter, session.host
    if adapter is None:
        return
    place = find(adapter)
    made = Quantised.load(place) if is_quantised(place) else read_adapter(place)
    network = host if isinstance(host, nn.Module) else models.get(made.site)
    if network is None:
        raise ModelError(
            f"The adapter {adapter.path!r} is for a pipeline's {made.site}, and {type(host).__name__} has"
            f" {', '.join(models)}. Load the model that it was trained for."
        )
    session.trace.facts["adapter"] = _changed(session, network, made, adapter.scale)
    if remark := made.remark(network):
        session.note(remark)


def _changed(session: Session, network: nn.Module, made: Lora | Quantised, scale: float) -> str:
    """Put an adapter or quantised weights onto `network`; what was done, in words."""
    if isinstance(made, Lora):
        name = put_on(session.attachment, network, made, scale)
        timed = made.put_on(session.attachment, network, name) if isinstance(made, TimedLora) else ""
        return f"{len(made.layers)} layers changed, scale {scale:g}{timed}"
    if scale != 1:
        raise UsageError(f"adapter.scale is for what a LoRA adds, got {scale:g}; quantised weights are whole. Leave it out.")
    put_weights_on(session.attachment, network, made)
    return made.told()


def change_sampling(session: Session) -> Drafted | None:
    """Put the recipe's sampler onto the pipeline; what makes drafts, where it starts from one.

    Raises `UsageError` where the recipe sets an axis beside it that cannot know what it does.
    """
    sampler, hold, host, facts = session.recipe.sampler, session.attachment, session.host, session.trace.facts
    if isinstance(sampler, TimeTravel) and session.recipe.reuse is not None:
        raise UsageError(
            f"Recipe {session.recipe.name!r} sets reuse beside a sampler that goes back to more noise: what was computed on one"
            " walk says nothing of the next. Take one of the two."
        )
    if isinstance(sampler, Solver):
        swap_scheduler(hold, host, sampler)
    elif isinstance(sampler, ChunkCalls):
        _refuse_beside(session, "makes chunks of frames", "guidance", "reuse", "attention")
        facts["student"] = sample_in_chunks(hold, host, sampler, session.hold)
    elif isinstance(sampler, Bottleneck):
        _refuse_beside(session, "changes its resolution on the way", "reuse", "attention", "guidance")
        facts["stages"] = sample_in_stages(hold, host, sampler, session.note)
    elif isinstance(sampler, Windows):
        inner = () if isinstance(session.recipe.reuse, NetworkReuse | None) else ("reuse",)
        _refuse_beside(session, "cuts clips into windows", *inner, "attention")
        facts["windows"] = sample_in_windows(hold, host, sampler, lambda: session.step.index if session.step else 0, session.note)
    elif isinstance(sampler, Draft):
        drafted = _drafts(session, sampler)
        facts["draft"] = drafted.put_on(hold, host)
        return drafted
    elif isinstance(sampler, FewCalls):
        facts["student"] = sample_in_few_calls(hold, host, sampler)
    return None


def _drafts(session: Session, part: Draft) -> Drafted:
    """What makes drafts here, by a session of their own. Raises `UsageError` where their recipe is none for this host."""
    draft = find_recipe(part.recipe) if part.recipe else None
    if draft is not None and isinstance(draft.sampler, Draft):
        raise UsageError(f"The recipe of a draft, {part.recipe!r}, starts from a draft itself. Name one that starts from noise.")
    if draft is not None:
        session.another(draft).close()  # what is refused is refused now
    opened = None if draft is None else lambda: session.another(draft)
    return Drafted(session.host, part, opened, session.follow_scheduler, lambda told: session.trace.facts.update(drafted=told))


def _refuse_beside(session: Session, does: str, *axes: str) -> None:
    """Raises `UsageError` where the recipe sets one of `axes` beside a sampler that `does` something they do not know of."""
    others = [axis for axis in axes if getattr(session.recipe, axis) is not None]
    if others:
        raise UsageError(
            f"Recipe {session.recipe.name!r} sets {' and '.join(others)} beside a sampler that {does}: what they would leave out"
            " is said of whole runs at one size. Take one of the two."
        )
