"""diffusers' own LLaDA2Pipeline and hasten's ways of running the same block diffusion, on tiny-dllm-block.

    python benchmarks/llada2_peer.py [--seed 5] [--count 16] [--threshold 0.9] [--repeats 3]

LLaDA2Pipeline hands the model a 2-D mask and leaves it to the model to read in blocks. tiny-dllm-block is a plain
LlamaForCausalLM, which reads a 2-D mask causally, so that it cannot be opened there as it is: the row `as it is` shows
what comes out. `InBlocks` below is what the class of a released block model does, and nothing else.

Rows: the pipeline by itself; with an exact cache and its own rule (`hasten.accelerate`); with a recipe's rule as well,
which does not evaluate a full block once more; and `TextDiffusionPipeline`, without and with the cache. The same rule in
all of them: confidence 0.9, or the surest slot; blocks of 8; a text is over at its end token. Batches are of one task's
questions, which are equally long, because LLaDA2Pipeline would put padding in front of shorter ones, and its blocks
would lie elsewhere in each text. Seconds are of the processor, one thread, so that they mean something on a machine that
does other things as well. Writes `benchmarks/results/cpu-2core/llada2_peer.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from torch import Tensor
from transformers import LlamaForCausalLM

import hasten
from hasten.pipelines import tiny_models
from hasten.pipelines.bench import dllm
from hasten.pipelines.host import hardware

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2core" / "llada2_peer.json"
MODEL, SLOTS = "tiny-dllm-block", dllm.SLOTS


class InBlocks(LlamaForCausalLM):
    """tiny-dllm-block's weights in a class that turns a 2-D mask into that of blocks, as released block models do."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **more: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 2:
            block = torch.arange(input_ids.shape[1]) // self.config.hasten_diffusion["block"]
            itself = torch.eye(input_ids.shape[1], dtype=torch.bool)  # padding reads itself: no softmax is empty
            attention_mask = (block[:, None] >= block) & attention_mask.bool()[:, None, None] | itself
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **(more | {"use_cache": False}))


class Meter:
    """Evaluations of a model, and tokens computed in them, of all texts."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.evaluations, self.tokens = 0, 0
        model.model.layers[0].register_forward_pre_hook(self._passed)

    def _passed(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self.evaluations += 1
        self.tokens += args[0].shape[:-1].numel()


Batch = Callable[[Tensor], Tensor]
"""Writes `SLOTS` tokens behind prompts int64 [B, P]: int64 [B, SLOTS]."""


def theirs(model: Any, tokenizer: Any, threshold: float) -> tuple[LLaDA2Pipeline, Batch]:
    """LLaDA2Pipeline with its own scheduler, and how it is called."""
    block = model.config.hasten_diffusion["block"]
    pipe = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler(block_length=block), tokenizer=tokenizer)
    pipe.set_progress_bar_config(disable=True)

    def write(prompts: Tensor) -> Tensor:
        written: Tensor = pipe(
            input_ids=prompts, gen_length=SLOTS, block_length=block, num_inference_steps=block, threshold=threshold,
            editing_threshold=None, temperature=0.0, eos_token_id=tokenizer.eos_token_id,
            mask_token_id=model.config.mask_token_id, output_type="seq",
        ).sequences  # fmt: skip
        return written[:, -SLOTS:]

    return pipe, write


def ours(model: Any, tokenizer: Any, recipe: str, threshold: float) -> Batch:
    """TextDiffusionPipeline with a recipe."""
    pipe = hasten.TextDiffusionPipeline(model, tokenizer, recipe, probe=False)

    def write(prompts: Tensor) -> Tensor:
        given = pipe.generate(prompts, max_new_tokens=SLOTS, threshold=threshold, output_type="seq")
        return given.sequences[:, prompts.shape[1] :]

    return write


def arms(tokenizer: Any, threshold: float) -> dict[str, tuple[Meter, Any, Batch]]:
    """Name of a row -> its meter, what to enter around a run, how to write. Each has a model of its own."""

    def model(cls: Any) -> Any:
        return cls.from_pretrained(tiny_models.path(MODEL), dtype=torch.float32, local_files_only=True).eval()

    found: dict[str, tuple[Meter, Any, Batch]] = {}
    rule = hasten.recipe("threshold").model_copy(update={"blocks": None})
    cache = hasten.recipe("sequential+exact-cache").model_copy(update={"commit": None, "blocks": None})
    for name, cls, recipe in (
        ("LLaDA2Pipeline, the model as it is", LlamaForCausalLM, None),
        ("LLaDA2Pipeline", InBlocks, None),
        ("LLaDA2Pipeline, exact-cache", InBlocks, cache),
        ("LLaDA2Pipeline, threshold+exact-cache", InBlocks, cache | rule),
    ):
        network = model(cls)
        pipe, write = theirs(network, tokenizer, threshold)
        around = nullcontext() if recipe is None else hasten.accelerate(pipe, recipe)
        found[name] = (Meter(network), around, write)
    for recipe in ("threshold", "threshold+exact-cache"):
        network = model(LlamaForCausalLM)
        found[f"TextDiffusionPipeline, {recipe}"] = (Meter(network), nullcontext(), ours(network, tokenizer, recipe, threshold))
    return found


def kept(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--count", type=int, default=16, help="questions per task: the batch")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = tiny_models.text(MODEL)[1]
    work = dllm.lists(tokenizer, options.count, seed=options.seed)
    assert work.right is not None
    batches = [torch.stack(work.prompts[i : i + options.count]) for i in range(0, len(work.prompts), options.count)]
    rows: list[dict[str, Any]] = []
    for name, (meter, around, write) in arms(tokenizer, options.threshold).items():
        with around:
            write(batches[0])  # proves the cache; loads what is loaded once
            meter.evaluations, meter.tokens, seconds, texts = 0, 0, [], []
            for _ in range(options.repeats):
                began = time.process_time()
                texts = [kept(row, tokenizer.eos_token_id) for batch in batches for row in write(batch).tolist()]
                seconds.append(time.process_time() - began)
        right = [check(tokenizer.decode(text)) for check, text in zip(work.right, texts, strict=True)]
        rows.append({
            "model": MODEL, "run": name, "n": len(texts), "batches": len(batches),
            "evaluations": meter.evaluations / options.repeats / len(batches),
            "tokens": meter.tokens / options.repeats / len(texts),
            "seconds": statistics.median(seconds), "exact_match": statistics.mean(right), "texts": texts,
        })  # fmt: skip
    peer = next(row for row in rows if row["run"] == "LLaDA2Pipeline")
    for row in rows:
        row["agreement"] = statistics.mean(a == b for a, b in zip(row["texts"], peer["texts"], strict=True))
        row["speedup"] = peer["seconds"] / row["seconds"]
    for row in rows:
        del row["texts"]
        print(json.dumps(row), flush=True)
    document = {
        "command": "llada2_peer",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "hardware": hardware("cpu"),
        "seed": options.seed,
        "threshold": options.threshold,
        "rows": rows,
    }
    options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
