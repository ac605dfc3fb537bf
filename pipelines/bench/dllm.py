"""What ways of decoding and caches are worth on a text diffusion model: the measurements behind `hasten bench dllm`.

Every row is one recipe on the same prompts, weights and batches. It is compared with *sequential* decoding (one token per
evaluation, nothing cached), whose texts say what agreement means; the controls are the published rules of LLaDA and of
Fast-dLLM, and the oracle writes in every evaluation exactly the tokens that equal sequential decoding's final text.

The fair measure of work is the **token-layer**: one token computed in one layer. Evaluations (NFE) do not see that a
call may be of one block or of the whole text; seconds on one machine see everything, that machine included.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hasten.canvas import Canvas, TextFacts
from hasten.errors import HastenError
from hasten.pipelines import list_tasks, python_sources
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.text.job import fitting
from hasten.pipelines.text.loop import TextLoop
from hasten.pipelines.text_models.host import TextHost
from hasten.recipe import Recipe
from hasten.samplers.commit import Unmask
from hasten.samplers.commit_told import Oracle
from hasten.samplers.scores import Draw

SEQUENTIAL = "sequential"
FAST_DLLM = "fast-dllm"
ORACLE = "oracle"
CONTROLS = {"llada:steps=8": "llada", FAST_DLLM: "fast-dllm"}
"""Recipe -> what `control` says of it."""

DECODING = (
    "threshold", "factor", "eb-sampler", "margin", "local-leap", "hierarchy", "credit", "ccd", "klass", "prophet", "saber",
    "wino", "remask", "adablock", "dparallel", "sub-blocks", "dream", "freedave", "freedave-plus",
    "rcr:steps=8", "remdm-conf:steps=8", "learn2pd", "learned-filter",
)  # fmt: skip
CACHES = (
    "prefix-cache", "dual-cache", "vicinity-cache", "dkv-cache", "dllm-cache", "free-cache", "elastic-cache", "echo-cache",
    "d2-cache", "dpad", "value-cache", "exact-cache",
)  # fmt: skip
OURS = ("text-exact", "text-balanced", "text-fast")
SLOTS = 16
"""Tokens generated for a list task: at most nine letters, then ends of text."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts with what is to be generated. kinds: the task of each. right: is this text (before its end) a right answer?
    None where nobody knows (code), which is judged by agreement alone."""

    name: str
    prompts: list[Tensor]
    new: list[int]
    kinds: list[str]
    right: list[Callable[[str], bool]] | None


@dataclass(slots=True)
class Generated:
    """What one recipe wrote. texts: ids of each behind its prompt, up to its end. nfe, tokens, layers: per text.
    seconds: of all batches together, the median of the repeats."""

    texts: list[list[int]]
    nfe: list[int]
    tokens: list[int]
    layers: list[float]
    seconds: float
    bytes: int


@dataclass(slots=True)
class Bench:
    """One model under measurement. batch: texts at once. guide: for recipes that ask one."""

    host: TextHost
    tokenizer: Any
    batch: int = 32
    repeats: int = 1
    guide: Any = None
    notes: list[str] = field(default_factory=list)

    def generate(self, recipe: Recipe, work: Workload, final: list[list[int]] | None = None) -> Generated:
        """Run a recipe over a workload. final: what the oracle is told."""
        runs = [self._once(recipe, work, final) for _ in range(self.repeats)]
        runs[0].seconds = statistics.median(run.seconds for run in runs)
        return runs[0]

    def _once(self, recipe: Recipe, work: Workload, final: list[list[int]] | None) -> Generated:
        done = Generated([], [], [], [], 0.0, 0)
        for begin in range(0, len(work.prompts), self.batch):
            part = slice(begin, begin + self.batch)
            one = recipe if final is None else _told(recipe, final[part])
            canvas = Canvas.of(work.prompts[part], work.new[part], self.host.facts, self.host.device)
            seeds = torch.arange(begin, begin + len(canvas.ids), device=canvas.ids.device)
            loop = TextLoop(self.host, one, canvas, Draw(seeds), self.guide)
            started = time.perf_counter()
            loop.run()
            done.seconds += time.perf_counter() - started
            for row in range(len(canvas.ids)):
                done.texts.append(canvas.ids[row, canvas.start[row] : canvas.end[row]].tolist())
            done.nfe += loop.tally.evaluations.tolist()
            done.tokens += loop.tally.tokens.tolist()
            done.layers += loop.tally.layers.tolist()
            done.bytes = max(done.bytes, loop.store.bytes)
        return done

    def answer(self, text: Sequence[int]) -> str:
        """A text in words, up to its first end."""
        return str(self.tokenizer.decode(self.kept(text)))

    def kept(self, text: Sequence[int]) -> list[int]:
        """The tokens before the first end of the text."""
        ends = set(self.host.facts.eos_ids)
        return list(text[: next((i for i, token in enumerate(text) if token in ends), len(text))])


def _told(recipe: Recipe, final: list[list[int]]) -> Recipe:
    return recipe.model_copy(update={"commit": Unmask(rule=Oracle(final=tuple(tuple(text) for text in final)))})


# --- workloads ------------------------------------------------------------------------------------


def lists(tokenizer: Any, count: int, seed: int = 77) -> Workload:
    """`count` held-out questions of each list task."""
    asked = []
    for task in list_tasks.TASKS:
        rng = random.Random(f"{seed}-{task}")
        asked += [list_tasks.ask(task, rng, held_out=True) for _ in range(count)]
    prompts = [torch.tensor(tokenizer(question.prompt).input_ids) for question in asked]
    kinds = [question.task for question in asked]
    return Workload("lists", prompts, [SLOTS] * len(asked), kinds, [question.right for question in asked])


def code(tokenizer: Any, count: int, given: int = 48, new: int = 64, seed: int = 77) -> Workload:
    """`count` pieces of sources that training never saw, of `given` tokens, to be continued by `new`."""
    rng, prompts = random.Random(seed), []
    files = [tokenizer(text, verbose=False).input_ids for text in python_sources.texts("validation")]
    files = [ids for ids in files if len(ids) >= given + new]
    for _ in range(count):
        ids = rng.choice(files)
        begin = rng.randrange(len(ids) - given - new + 1)
        prompts.append(torch.tensor(ids[begin : begin + given]))
    return Workload("code", prompts, [new] * count, ["code"] * count, None)


# --- rows -----------------------------------------------------------------------------------------


def table(
    bench: Bench, work: Workload, names: Sequence[str], model: str, told: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """One row for sequential decoding, one for the oracle without and with Fast-dLLM's cache, and one for each of `names`.

    A recipe that the model or another part of it refuses gets a row with the reason in `note`, and no numbers.
    """
    told(SEQUENTIAL)
    base = bench.generate(find_recipe(SEQUENTIAL), work)
    rows = [_row(bench, work, SEQUENTIAL, base, base, model, "sequential")]
    for name, recipe in ((ORACLE, find_recipe(SEQUENTIAL)), (f"{ORACLE}+dual-cache", find_recipe("sequential+dual-cache"))):
        told(name)
        rows.append(_row(bench, work, name, bench.generate(recipe, work, base.texts), base, model, "oracle"))
    for name, recipe in [(name, find_recipe(name)) for name in names]:
        told(name)
        try:
            found = bench.generate(fitting(recipe, bench.host, bench.tokenizer), work)
        except HastenError as error:
            rows.append({"model": model, "workload": work.name, "recipe": name, "n": len(work.prompts), "note": str(error)})
            continue
        rows.append(_row(bench, work, name, found, base, model, CONTROLS.get(name, "")))
    return rows


def _row(
    bench: Bench, work: Workload, name: str, found: Generated, base: Generated, model: str, control: str
) -> dict[str, Any]:  # fmt: skip
    kept = [len(bench.kept(text)) for text in found.texts]
    row: dict[str, Any] = {
        "model": model,
        "workload": work.name,
        "recipe": name,
        "n": len(found.texts),
        "nfe": statistics.mean(found.nfe),
        "tokens_per_forward": sum(kept) / sum(found.nfe),
        "token_forwards": statistics.mean(found.tokens),
        "token_layers": statistics.mean(found.layers),
        "of_sequential": sum(found.layers) / sum(base.layers),
        "seconds": found.seconds,
        "speedup": base.seconds / found.seconds,
        "agreement": statistics.mean(_same(bench, a, b) for a, b in zip(found.texts, base.texts, strict=True)),
        "position_agreement": statistics.mean(_share(bench, a, b) for a, b in zip(found.texts, base.texts, strict=True)),
        "bytes_held": found.bytes,
    }
    if control:
        row["control"] = control
    if work.right is not None:
        right = [check(bench.answer(text)) for check, text in zip(work.right, found.texts, strict=True)]
        row["exact_match"] = statistics.mean(right)
        for kind in dict.fromkeys(work.kinds):
            row[f"exact_{kind}"] = statistics.mean(ok for ok, its in zip(right, work.kinds, strict=True) if its == kind)
    else:
        row["distinct_2"] = _distinct(found.texts)
    return row


def _same(bench: Bench, one: list[int], other: list[int]) -> float:
    return float(bench.kept(one) == bench.kept(other))


def _share(bench: Bench, one: list[int], other: list[int]) -> float:
    """Share of places with the same token, up to the longer one's end."""
    a, b = bench.kept(one), bench.kept(other)
    longest = max(len(a), len(b))
    return sum(x == y for x, y in zip(a, b, strict=False)) / longest if longest else 1.0


def _distinct(texts: list[list[int]]) -> float:
    """Different pairs of neighbouring tokens as a share of all: falls when texts repeat themselves."""
    pairs = [pair for text in texts for pair in itertools.pairwise(text)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


# --- what is measured -----------------------------------------------------------------------------


def every(facts: TextFacts) -> list[str]:
    """Every way of decoding alone and with each cache that the model can have, the papers, the controls and ours.

    Drafts are verified with the caches that can hold them; what cannot be combined gets a row that says so.
    """
    caches = [name for name in CACHES if name != "exact-cache" or facts.block is not None]
    joined = [way if cache is None else f"{way}+{cache}" for way in ("sequential", *DECODING) for cache in (None, *caches)]
    return [*CONTROLS, *OURS, "fast-dllm-v2", "elastic", *joined[1:]]


def few() -> list[str]:
    """A sample of them, for a first look and for tests."""
    return [*CONTROLS, *OURS, "threshold", "eb-sampler+dual-cache", "freedave", "sequential+dkv-cache"]


def lossless(names: Sequence[str], facts: TextFacts) -> list[str]:
    """Those of `names` whose texts must be those of sequential decoding: drafts and exact caches of its own order."""
    exact = {"exact-cache", "free-cache", "prefix-cache"} if facts.block is not None else set()
    return [
        name
        for name in names
        if name == "text-exact" or name.split("+")[0] in ("sequential", "freedave") and set(name.split("+")[1:]) <= exact
    ]
