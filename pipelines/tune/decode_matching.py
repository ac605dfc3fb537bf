"""`Budget(lossless=True)` on a causal language model: the kept recipe that was tuned on it here, else look-up where it pays."""

from __future__ import annotations

from typing import Any

from hasten.errors import HastenError
from hasten.limits import Limits
from hasten.pipelines.decode.attach import attach
from hasten.pipelines.decode.session import DecodeSession
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.tune.decode_result import LOSSLESS
from hasten.pipelines.tune.fingerprint import OF_TEXTS, known_by
from hasten.pipelines.tune.kept import Found, files_kept, read_kept, told_of

ONLINE = "look-up"
"""What needs no tuning: drafts from the text itself, as many as pay."""

NONE = f"so {ONLINE} drafts where it pays (hasten tune --budget {LOSSLESS} finds the fastest)"


def fitting_drafts(model: Any) -> Found:
    """The kept lossless recipes that were tuned on these weights, here, fastest first. Reads the weights only where anything
    is kept."""
    files = files_kept()
    if not files:
        return Found((), f"no tuned recipe is kept here, {NONE}")
    here = known_by({"model": model}, OF_TEXTS)
    reading = read_kept(files, here["weights"])
    ready = [
        recipe
        for recipe in reading.recipes
        if (stamp := recipe.tuned) is not None and stamp.budget == LOSSLESS and stamp.weights == here["weights"]
        and stamp.hardware == here["hardware"] and stamp.speedup is not None and recipe.draft is not None
    ]  # fmt: skip
    if not ready:
        return Found((), f"none of the tuned recipes kept here is lossless and for this model, {NONE}", reading.skipped)
    ready.sort(key=lambda recipe: (recipe.tuned.speedup or 0.0) if recipe.tuned else 0.0, reverse=True)
    return Found(tuple(ready), told_of(ready[0]), reading.skipped)


def attach_lossless(model: Any, limits: Limits | None = None) -> DecodeSession:
    """A session with the fastest kept recipe that runs on the model, else with `ONLINE`; its report says which.

    Raises what `attach` raises where no draft can be verified on the model.
    """
    found = fitting_drafts(model)
    refused: list[str] = []
    for recipe in found.ready:
        try:
            session = attach(model, recipe, limits)
        except HastenError as error:
            refused.append(f"The tuned recipe that is kept for this budget cannot be used: {str(error).rstrip('.')}.")
            continue
        told = told_of(recipe)
        break
    else:
        session = attach(model, find_recipe(ONLINE), limits)
        told = found.told if not refused else f"no kept recipe can be used, {NONE}"
    for sentence in (f"Budget: {told}.", *refused, found.skipped):
        if sentence:
            session.note(sentence, warn=False)
    return session
