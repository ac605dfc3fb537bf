"""`hasten.accelerate`: put a recipe onto an unmodified host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from hasten.agree import group_of
from hasten.budget import Budget
from hasten.caching.decode.kept import KeptCache
from hasten.errors import HastenError, UsageError
from hasten.limits import Limits
from hasten.pipelines.host import denoisers
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.session import Session
from hasten.recipe import Recipe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModularPipeline
    from transformers import PreTrainedModel

    from hasten.pipelines.causal.session import TextSession
    from hasten.pipelines.decode.session import DecodeSession
    from hasten.pipelines.decode_kv.session import KVSession
    from hasten.pipelines.text.llada2 import LLaDA2Session
    from hasten.pipelines.text.pipeline import TextPipeline
    from hasten.pipelines.text.session import TextDiffusionSession


# Where the types of diffusers and transformers are not looked at (they are Any), the later ones cannot be told apart.
@overload
def accelerate(
    host: TextPipeline, recipe: str | Path | Recipe | Budget, *, scheduler: None = None, limits: Limits | None = None
) -> TextDiffusionSession: ...
@overload
def accelerate(
    host: DiffusionPipeline | ModularPipeline, recipe: str | Path | Recipe | Budget, *,
    scheduler: Any = None, limits: Limits | None = None, group: Any = None,
) -> Session: ...  # fmt: skip
@overload
def accelerate(  # type: ignore[overload-cannot-match]
    host: PreTrainedModel, recipe: str | Path | Recipe | Budget, *, scheduler: None = None, limits: Limits | None = None
) -> TextSession | DecodeSession | KVSession: ...
@overload
def accelerate(  # type: ignore[overload-cannot-match]
    host: nn.Module, recipe: str | Path | Recipe | Budget, *,
    scheduler: Any, limits: Limits | None = None, group: Any = None,
) -> Session: ...  # fmt: skip
def accelerate(
    host: Any,
    recipe: str | Path | Recipe | Budget,
    *,
    scheduler: Any = None,
    limits: Limits | None = None,
    group: Any = None,
) -> Session | TextSession | DecodeSession | KVSession | TextDiffusionSession | LLaDA2Session:
    """Make `host` generate faster while the returned session is open.

    host: any diffusers pipeline, unmodified; a bare denoiser (then `scheduler` is required); a `TextDiffusionPipeline` or
    `DiffusionGemmaPipeline`; or a causal language model of transformers. recipe: a recipe's name, a `Recipe`, the path of a
    YAML file, or a `Budget`: a tuned recipe that is kept for this host (`hasten.pipelines.tune.kept`) where one is within it and
    was tuned for what a call asks, else the online controller `auto` (on text diffusion: sequential decoding; on a causal language model, within
    `Budget(lossless=True)`: look-up where it pays); on a causal language model it has `attention`, or drafts (`draft`, `verify`, `pace`), or a cache (`kv` of kind `kept`), on text diffusion those of
    `hasten.pipelines.text.job`.
    limits: `max_cache_bytes` caps what caches may hold. group: a torch.distributed process
    group whose ranks compute parts of one sample (sequence or weight sharding); they decide alike. diffusers' context
    parallelism is found by itself. Only this instance is touched, and closing the session (leaving `with`, an exception,
    `close()`) restores it: the next output is bit-identical to one from before.

    Raises `RecipeError` for an unknown recipe, `ModelError` when there is nothing in the host that hasten knows,
    `UsageError` when an axis of the recipe has no seam on this host, `RefusedError` when a method cannot be right on it.
    """
    if isinstance(recipe, Budget) and recipe.lossless and scheduler is None and _is_of_transformers(host):
        from hasten.pipelines.tune.decode_matching import attach_lossless

        return attach_lossless(getattr(host, "_orig_mod", host), limits)
    if isinstance(recipe, Budget) and (_is_named(host, "TextPipeline") or recipe.exact_match is not None):
        return _of_texts(recipe, host, limits)
    found = find_recipe(recipe)
    if _is_named(host, "TextPipeline"):
        from hasten.pipelines.text.session import TextDiffusionSession

        return TextDiffusionSession(host, found, limits)
    if _is_named(host, "LLaDA2Pipeline"):
        from hasten.pipelines.text.llada2 import LLaDA2Session

        return LLaDA2Session(host, found, limits)
    if scheduler is None and _is_of_transformers(host):
        if found.draft is not None:
            from hasten.pipelines.decode.attach import attach as attach_drafts

            return attach_drafts(getattr(host, "_orig_mod", host), found, limits)
        if isinstance(found.kv, KeptCache):
            from hasten.pipelines.decode_kv.session import attach as attach_kv

            return attach_kv(getattr(host, "_orig_mod", host), found, limits)
        if found.commit is not None or found.kv is not None:
            raise UsageError(
                f"Recipe {found.name!r} is for texts that are written in any order, which takes a loop of its own. Use"
                f" hasten.TextDiffusionPipeline(model, tokenizer, recipe) on a {type(host).__name__} that is a masked"
                " language model."
            )
        if group is not None:
            raise UsageError(
                "group= is for diffusion models, whose ranks have to skip the same work. On a language model each rank reads for"
                " its own heads; leave it out."
            )
        from hasten.pipelines.causal.attention import attach

        return attach(getattr(host, "_orig_mod", host), found, limits)
    if isinstance(recipe, Budget):
        return _within(recipe, host, found, scheduler, limits or Limits(), group)
    return Session(host, found, scheduler, limits or Limits(), group)


def _of_texts(budget: Budget, host: Any, limits: Limits | None) -> TextDiffusionSession:
    """A session with a tuned recipe that is kept for this text model, else with what the budget is measured against."""
    if not _is_named(host, "TextPipeline"):
        raise UsageError(
            f"Budget(exact_match={budget.exact_match:g}) is about a TextDiffusionPipeline, and this is a {type(host).__name__}. Pictures"
            " and clips have psnr=, latent_error= or quality=; a masked language model goes into hasten.TextDiffusionPipeline."
        )
    from hasten.pipelines.tune.text_matching import TextBudgetSession

    return TextBudgetSession(host, budget, limits)


def _within(budget: Budget, host: Any, online: Recipe, scheduler: Any, limits: Limits, group: Any) -> Session:
    """A session with a tuned recipe that is kept for this host and budget, else with the online controller."""
    from hasten.pipelines.tune.kept import Found, fitting
    from hasten.pipelines.tune.matching import Matching

    models = denoisers(host)
    if group is not None or any(group_of(model) is not None for model in models.values()):
        kept = Found((), "several ranks compute one sample, and each may have kept others, so the online controller is at work")
    else:
        kept = fitting(models, getattr(host, "scheduler", None) if scheduler is None else scheduler, budget)
    refused = ""
    try:
        session = Session(host, online if kept.recipe is None else kept.recipe, scheduler, limits, group)
    except HastenError as error:
        if kept.recipe is None:
            raise
        session = Session(host, online, scheduler, limits, group)
        refused = f"The tuned recipe that is kept for this budget cannot be used: {str(error).rstrip('.')}; the online controller is at work."
    session.trace.facts["budget"] = kept.told if not refused else "the online controller is at work"
    for sentence in (refused, kept.skipped):
        if sentence:
            session.note(sentence)
    if kept.ready and not refused:
        Matching(session, kept.ready, online)
    return session


def _is_named(host: Any, name: str) -> bool:
    """Is `host` of the class `name`, or one made from it? Asked by name, so that nothing is imported for it."""
    return any(kind.__name__ == name for kind in type(host).__mro__)


def _is_of_transformers(host: Any) -> bool:
    """Is it a model or pipeline of transformers, compiled or not? Asked by name, so that nothing is imported for it."""
    kinds = type(getattr(host, "_orig_mod", host)).__mro__
    return any(kind.__module__.startswith("transformers.") for kind in kinds)
