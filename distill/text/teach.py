"""What the teacher writes, as data: prompts with its own answers.

Shapes: N texts of at most L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.canvas import Canvas
from hasten.distill.data.store import Store
from hasten.distill.network.host_call import Condition
from hasten.distill.text.roles import Texts
from hasten.errors import UsageError
from hasten.pipelines.text.job import fitting
from hasten.pipelines.text.loop import TextLoop
from hasten.pipelines.text_models.host import TextHost
from hasten.recipe import Recipe
from hasten.samplers.scores import Draw

Say = Callable[[str], None]


def make_texts(
    host: TextHost, tokenizer: Any, prompts: Sequence[Tensor], new: Sequence[int], recipe: Recipe, *, batch: int = 32,
    say: Say = lambda text: None,
) -> Store:  # fmt: skip
    """A store of N texts: `prompts` (int64 [P_b] each), behind each of which the model wrote new[b] tokens with `recipe`.

    Raises `UsageError` where there are no prompts or their numbers differ, and what the recipe raises.
    """
    if not prompts or len(prompts) != len(new):
        raise UsageError(f"make_texts needs prompts and a length for each, got {len(prompts)} and {len(new)}.")
    way = fitting(recipe, host, tokenizer)
    longest = max(len(prompt) + more for prompt, more in zip(prompts, new, strict=True))
    ids = torch.full((len(prompts), longest), host.facts.pad_id)
    start, end = torch.zeros(2, len(prompts), dtype=torch.int64)
    for first in range(0, len(prompts), batch):
        some = slice(first, first + batch)
        canvas = Canvas.of(prompts[some], new[some], host.facts, host.device)
        seeds = torch.arange(first, first + len(canvas.ids), device=canvas.ids.device)
        canvas = TextLoop(host, way, canvas, Draw(seeds)).run().to(torch.device("cpu"))
        ids[some, : canvas.ids.shape[1]] = canvas.ids
        start[some], end[some] = canvas.start, canvas.end
        say(f"generated {min(first + batch, len(prompts))} of {len(prompts)} texts")
    if bool((end <= start).any()):
        raise UsageError("The recipe cuts texts down to nothing, so that nothing can be learned of them. Take one without ends.")
    return Store((), Texts(ids, start, end).condition, Condition({}), torch.arange(len(prompts)))
