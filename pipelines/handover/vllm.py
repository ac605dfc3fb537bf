"""vLLM's settings for a recipe: `speculative_config`, as its `vllm/config/speculative.py` has it (read at 002e77c1)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hasten.pipelines.handover.lengths import schedule
from hasten.pipelines.handover.served import Asked, Served
from hasten.recipe import Recipe
from hasten.samplers.drafters.look_up import LookUp

SERVER = "vLLM"


def to_vllm(recipe: str | Path | Recipe, model: str = "", lengths: Mapping[int, int] | None = None) -> dict[str, Any]:
    """Arguments for `vllm.LLM(**...)` that do with `model` what `recipe` does.

    model: hub id or folder of the model; left out where empty. lengths: batch size -> drafts that pay there
    (`hasten.pipelines.handover.lengths`); vLLM then drafts by the number of running requests.

    Raises `RefusedError` with the reason where vLLM has no counterpart: trees, eviction, verifiers that change texts.
    """
    return serve_vllm(recipe, model, lengths).config


def serve_vllm(recipe: str | Path | Recipe, model: str = "", lengths: Mapping[int, int] | None = None) -> Served:
    """The same with the command that starts the server, and what is otherwise there."""
    asked = Asked.of(SERVER, recipe, model, dict(lengths or {}))
    config: dict[str, Any] = {"model": model} if model else {}
    argv = ["vllm", "serve", *([model] if model else [])]
    speculative = _speculative(asked)
    if speculative:
        config["speculative_config"] = speculative
        argv += ["--speculative-config", json.dumps(speculative)]
    if dtype := asked.cache_dtype("fp8"):
        config["kv_cache_dtype"] = dtype
        argv += ["--kv-cache-dtype", dtype]
    return Served(SERVER, config, argv, tuple(asked.notes))


def _speculative(asked: Asked) -> dict[str, Any]:
    draft = asked.draft
    if draft is None:
        return {}
    if draft.kind not in DRAFTERS:
        asked.refuse(
            f"it has no drafter like {draft.kind!r} (its `custom_class` hook takes one, which hasten does not have)",
            f"These have a counterpart: {', '.join(sorted(DRAFTERS))}.",
        )
    verifier = asked.check_verifier()
    found = DRAFTERS[draft.kind](asked, draft)
    if verifier == "block":
        found["rejection_sample_method"] = "block"
    if asked.lengths:
        found["num_speculative_tokens_per_batch_size"] = schedule(asked.lengths, found["num_speculative_tokens"])
    return found


def _chain(asked: Asked, width: int, instead: str) -> None:
    if width > 1:
        asked.refuse("it drafts trees, and vLLM verifies chains", instead)


def _look_up(asked: Asked, draft: LookUp) -> dict[str, Any]:
    _chain(asked, draft.width, "Take look-up:width=1.")
    asked.note("vLLM takes another occurrence where a suffix occurs several times, and drafts nothing behind the end of the text.")
    return {
        "method": "ngram", "num_speculative_tokens": asked.tokens(draft.nodes), "prompt_lookup_min": draft.shortest,
        "prompt_lookup_max": draft.longest,
    }  # fmt: skip


DRAFTERS: dict[str, Callable[[Asked, Any], dict[str, Any]]] = {LookUp.kind: _look_up}
"""Kind of a drafter -> its `speculative_config`."""
