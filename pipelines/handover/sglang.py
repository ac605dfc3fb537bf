"""SGLang's settings for a recipe: its `--speculative-*` options, as `arg_groups/speculative_hook.py` has them (read at
004c82e0)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hasten.pipelines.decode.drafters_candidates import Candidates
from hasten.pipelines.decode.drafters_small import SmallModel
from hasten.pipelines.handover.served import Asked, Served, place
from hasten.recipe import Recipe
from hasten.samplers.drafters.look_up import LookUp
from hasten.samplers.drafters.trie import Trie

SERVER = "SGLang"


def to_sglang(recipe: str | Path | Recipe, model: str = "", lengths: Mapping[int, int] | None = None) -> list[str]:
    """The arguments of `python -m sglang.launch_server` that do with `model` what `recipe` does.

    model, lengths: as for `to_vllm`; SGLang has one number of drafts for all batch sizes, so the largest is taken.

    Raises `RefusedError` with the reason where SGLang has no counterpart: eviction, Medusa heads, verifiers that change texts.
    """
    return serve_sglang(recipe, model, lengths).argv[3:]


def serve_sglang(recipe: str | Path | Recipe, model: str = "", lengths: Mapping[int, int] | None = None) -> Served:
    """The same with the command that starts the server, and what is otherwise there."""
    asked = Asked.of(SERVER, recipe, model, dict(lengths or {}))
    config: dict[str, Any] = {"model_path": model} if model else {}
    config |= _speculative(asked)
    if dtype := asked.cache_dtype("fp8_e4m3"):
        config["kv_cache_dtype"] = dtype
    argv = ["python", "-m", "sglang.launch_server"]
    for name, value in config.items():
        argv += ["--" + name.replace("_", "-"), str(value)]
    return Served(SERVER, config, argv, tuple(asked.notes))


def _speculative(asked: Asked) -> dict[str, Any]:
    draft = asked.draft
    if draft is None:
        return {}
    if draft.kind not in DRAFTERS:
        medusa = "Hand the heads over to vLLM. " if draft.kind == "medusa" else ""
        asked.refuse(f"it has no drafter like {draft.kind!r}", f"{medusa}These have a counterpart: {', '.join(sorted(DRAFTERS))}.")
    if (verifier := asked.check_verifier()) == "block":
        asked.note("SGLang has no block verification; its own keeps the model's law, too, and accepts somewhat fewer drafts.")
    elif verifier != "lossless":
        asked.note(f"SGLang chooses its verifier itself; it keeps the model's law, as {verifier!r} does.")
    if len(set(asked.lengths.values())) > 1:
        asked.note("SGLang adapts its drafts to the batch for EAGLE only, so the largest measured length is taken for all sizes.")
    return DRAFTERS[draft.kind](asked, draft)


def _look_up(asked: Asked, draft: LookUp) -> dict[str, Any]:
    return _ngram(asked, draft.nodes, draft.width, draft.longest, "BFS")


def _trie(asked: Asked, draft: Trie) -> dict[str, Any]:
    """By frequency, as ours is pruned."""
    return _ngram(asked, draft.nodes, 10, draft.longest, "PROB", draft.branch)


def _ngram(asked: Asked, nodes: int, width: int, longest: int, match: str, behind: int | None = None) -> dict[str, Any]:
    """Its n-gram drafter, whose trie holds what is looked for and what stands `behind` it. Sizes count the last written token,
    too, which hasten does not."""
    tokens = asked.tokens(nodes)
    asked.note(
        "SGLang's NGRAM looks in one trie of all requests' texts, so what one user wrote can be drafted for another (never written:"
        " the model decides)."
    )
    return {
        "speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": tokens + 1, "speculative_ngram_min_bfs_breadth": 1,
        "speculative_ngram_max_bfs_breadth": width, "speculative_ngram_match_type": match,
        "speculative_ngram_max_trie_depth": longest + (tokens if behind is None else behind),
    }  # fmt: skip


def _small(asked: Asked, draft: SmallModel) -> dict[str, Any]:
    return _standalone(asked, draft.model, draft.nodes, draft.width, draft.depth)


def _standalone(asked: Asked, model: str, nodes: int, width: int, depth: int) -> dict[str, Any]:
    tokens = asked.tokens(nodes)
    return {"speculative_algorithm": "STANDALONE", "speculative_draft_model_path": place(model)} | _sizes(tokens, width, depth)


def _sizes(tokens: int, width: int, depth: int) -> dict[str, Any]:
    steps = tokens if width == 1 else min(depth, tokens)
    return {"speculative_num_steps": steps, "speculative_eagle_topk": width, "speculative_num_draft_tokens": tokens + 1}


def _candidates(asked: Asked, draft: Candidates) -> dict[str, Any]:
    if draft.which == "prompt-lookup":
        return _ngram(asked, draft.nodes, 1, draft.longest, "BFS")
    if draft.which == "assisted":
        return _standalone(asked, draft.model, draft.nodes, 1, draft.nodes)
    if draft.which != "mtp":
        asked.refuse("its candidates come from an object of this process")
    return {"speculative_algorithm": "NEXTN"} | _sizes(asked.tokens(draft.nodes), 1, draft.nodes)


DRAFTERS: dict[str, Callable[[Asked, Any], dict[str, Any]]] = {
    LookUp.kind: _look_up, Trie.kind: _trie, SmallModel.kind: _small, Candidates.kind: _candidates,
}  # fmt: skip
"""Kind of a drafter -> options by name."""
