"""vLLM's settings for a recipe: `speculative_config`, as its `vllm/config/speculative.py` has it (read at 002e77c1)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hasten.pipelines.decode.drafters_candidates import Candidates
from hasten.pipelines.decode.drafters_small import SmallModel
from hasten.pipelines.handover.lengths import schedule
from hasten.pipelines.handover.served import Asked, Served, place
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
            f"it has no drafter like {draft.kind!r}",
            NEAREST.get(draft.kind, f"These have a counterpart: {', '.join(sorted(DRAFTERS))}."),
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
    return _ngram(asked, draft.nodes, draft.shortest, draft.longest)


def _ngram(asked: Asked, nodes: int, shortest: int, longest: int) -> dict[str, Any]:
    tokens = asked.tokens(nodes)
    return {"method": "ngram", "num_speculative_tokens": tokens, "prompt_lookup_min": max(1, shortest), "prompt_lookup_max": longest}


def _small(asked: Asked, draft: SmallModel) -> dict[str, Any]:
    _chain(asked, draft.width, "Take speculative, which drafts a chain.")
    return _draft_model(asked, draft.model, min(draft.nodes, draft.depth), "probabilistic")


def _draft_model(asked: Asked, model: str, nodes: int, how: str) -> dict[str, Any]:
    """how: "probabilistic" for drafts that are drawn, "greedy" for the most probable, which are verified as such."""
    tokens = asked.tokens(nodes)
    return {"method": "draft_model", "model": place(model), "num_speculative_tokens": tokens, "draft_sample_method": how}


def _candidates(asked: Asked, draft: Candidates) -> dict[str, Any]:
    if draft.which == "prompt-lookup":
        return _ngram(asked, draft.nodes, 1, draft.longest)
    if draft.which == "assisted":
        return _draft_model(asked, draft.model, draft.nodes, "greedy")
    if draft.which != "mtp":
        asked.refuse("its candidates come from an object of this process")
    return {"method": "mtp", "num_speculative_tokens": asked.tokens(draft.nodes)}


DRAFTERS: dict[str, Callable[[Asked, Any], dict[str, Any]]] = {
    LookUp.kind: _look_up, SmallModel.kind: _small, Candidates.kind: _candidates,
}  # fmt: skip
"""Kind of a drafter -> its `speculative_config`."""

NEAREST = {
    "medusa": "Hand the heads over by themselves: hasten export serve --heads STUDENT --heads-to FOLDER.",
    "trie": 'Its nearest is a chain of the most frequent path: --speculative-config \'{"method": "suffix"}\', which needs arctic-inference.',
}
"""Kind of a drafter without a counterpart -> what is near it."""
