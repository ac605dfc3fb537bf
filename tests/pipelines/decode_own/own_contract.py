"""What every drafter that is made of the model itself must do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import StaticCache

import hasten
from hasten.recipe import Drafting, Recipe
from hasten.samplers.decode.pace import Steady
from hasten.testing import assert_lossless

WIDTH = 32
"""Of the states of `causal_models.build`."""


def prompts(rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Texts that repeat themselves, of different lengths, padded on the left."""
    torch.manual_seed(seed)
    texts = [torch.randint(2, 97, (length,)).repeat(3) for length in (6, 4, 9, 3)[:rows]]
    longest = max(map(len, texts))
    ids = torch.stack([torch.nn.functional.pad(text, (longest - len(text), 0)) for text in texts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(text), (longest - len(text), 0)) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def drafted(model: Any, draft: Drafting, inputs: dict[str, Any], nodes: int | None = None, **call: Any) -> tuple[Tensor, Any]:
    """The text, and the report."""
    with hasten.accelerate(model, Recipe(name="own", draft=draft, pace=Steady(nodes=nodes))) as run:
        return model.generate(**inputs, **call), run.report()


def greedy_is_the_same(model: Any, draft: Drafting) -> Any:
    """Rows of different lengths, few and many nodes, end tokens, a static cache; the report of the first."""
    call: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    reports = []
    for rows in (1, 3):
        inputs = prompts(rows)
        plain = model.generate(**inputs, **call)
        for nodes in (None, 1, 2, 5):
            text, report = drafted(model, draft, inputs, nodes, **call)
            assert torch.equal(plain, text), (rows, nodes)
            reports.append(report)
        end = int(plain[0, -5])
        ends = call | {"eos_token_id": end, "pad_token_id": 0}
        assert torch.equal(model.generate(**inputs, **ends), drafted(model, draft, inputs, **ends)[0])
        config = model.config
        cache = StaticCache(config, max_cache_len=inputs["input_ids"].shape[1] + 24 + 40)
        assert torch.equal(plain, drafted(model, draft, inputs, past_key_values=cache, **call)[0])
    return reports[0]


def restores(model: Any, draft: Drafting) -> None:
    """Not a hook, gate or attribute is left, and the model says what it said."""
    ids = prompts(2)["input_ids"]
    model(ids, output_hidden_states=True)  # transformers puts hooks of its own on, and leaves them
    before, names, hooks = model(ids).logits, {name: set(vars(each)) for name, each in model.named_modules()}, _hooks(model)
    drafted(model, draft, prompts(2), max_new_tokens=6, do_sample=False)
    assert torch.equal(before, model(ids).logits)
    assert names == {name: set(vars(each)) for name, each in model.named_modules()} and hooks == _hooks(model)


def _hooks(model: Any) -> list[tuple[int, int]]:
    return [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in model.modules()]


def sampled_is_lossless(model: Any, draft: Drafting, tokens: int = 3, runs: int = 4000) -> float:
    """Share of accepted drafts."""
    found = assert_lossless(draft, None, model, tokens=tokens, runs=runs, greedy=False, top_k=3)
    return max(each.accepted for each in found)


def heads(folder: Path, count: int = 3, spread: float = 0.05) -> Path:
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for head in range(count):
        tensors[f"blocks.{head}.weight"] = spread * torch.randn(WIDTH, WIDTH, generator=g)
        tensors[f"blocks.{head}.bias"] = torch.zeros(WIDTH)
    save_file(tensors, folder / "medusa_heads.safetensors", {"model": "tiny", "heads": str(count)})
    return folder


def prompt_tokens(folder: Path, distances: int = 3, members: int = 2) -> Path:
    weight = torch.randn(distances, members, WIDTH, generator=torch.Generator().manual_seed(0))
    save_file({"weight": weight}, folder / "prompt_tokens.safetensors", {"model": "tiny"})
    return folder
