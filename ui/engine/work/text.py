"""A text of a masked language model, and how its canvas was filled."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hasten.errors import UsageError
from hasten.ui.engine.cancel import stoppable
from hasten.ui.engine.desk import Desk
from hasten.ui.engine.report import Report
from hasten.ui.engine.request import Text

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.pipelines.text.output import TextOutput

SHOWN = 0.4
"""Seconds between two looks at the canvas, at least: each copies it from the device."""


def text(ask: Text, desk: Desk, report: Report) -> dict[str, Any]:
    """Result: {"output", "text", "tokens": [{"text", "step", "given"}], "row", "trace", "warnings", "seconds"}; step: the
    evaluation that revealed a token, from 0; None for those of the prompt."""
    import torch

    from hasten.pipelines.accelerate import accelerate
    from hasten.pipelines.text.job import acts_on_texts

    recipe = desk.recipe(ask.recipe)
    if recipe.axes:
        acts_on_texts(recipe)
    pipe = desk.text_pipeline(ask.model, report)
    if not hasattr(pipe, "generate"):
        raise UsageError(f"{ask.model} is no masked language model. Choose one for texts, such as tiny-dllm.")
    length = ask.length or desk.models.card(ask.model).call.get("max_new_tokens")
    canvas = _Canvas(pipe, report)
    report.phase("Writing", int(length or 0))
    with stoppable(pipe, report.check), accelerate(pipe, recipe, limits=desk.limits):
        more = {"max_new_tokens": length} if length is not None else {}
        made = pipe.generate(
            prompts=ask.prompt, generator=torch.Generator().manual_seed(ask.seed), callback_on_step_end=canvas,
            callback_on_step_end_tensor_inputs=["ids", "status"], **more,
        )  # fmt: skip
    return _kept(ask, desk, made, pipe, recipe.name or "custom")


class _Canvas:
    """What has been written so far, read from the loop after its steps. It only looks."""

    def __init__(self, pipe: Any, report: Report) -> None:
        self.report, self.pipe = report, pipe
        self._revealed: Tensor | None = None
        self._looked = 0.0

    def __call__(self, pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        import torch

        from hasten.canvas import DONE, MASK

        self.report.check()
        ids, status = tensors["ids"][0], tensors["status"][0]
        known = self._revealed if self._revealed is not None else torch.full_like(ids, -1)
        # Slots that a reviser has made masks again are revealed anew.
        known = torch.where(status == DONE, known, -1)
        self._revealed = torch.where((status == DONE) & (known < 0), step, known)
        now = time.monotonic()
        if now - self._looked >= SHOWN:
            self._looked = now
            rows = torch.stack([ids, status.long(), self._revealed]).tolist()
            done = sum(each == DONE for each in rows[1])
            self.report.data(tokens=self._tokens(rows))
            self.report.step(done, done + sum(each == MASK for each in rows[1]))
        return {}

    def _tokens(self, rows: list[list[int]]) -> list[dict[str, Any]]:
        from hasten.canvas import MASK, PAD, PROMPT

        words = self.pipe.tokenizer
        return [
            {"text": "" if status == MASK else words.decode([token]), "step": None if status in (MASK, PROMPT) else step, "given": status == PROMPT}
            for token, status, step in zip(*rows, strict=True) if status != PAD
        ]  # fmt: skip


def _kept(ask: Text, desk: Desk, made: TextOutput, pipe: Any, recipe: str) -> dict[str, Any]:
    """The result, on the disk and as it is told."""
    cost, found = made.report, made.texts[0] if made.texts else ""
    prompt = made.sequences.shape[1] - made.commit_step.shape[1]
    ids, steps = made.sequences[0].tolist(), made.commit_step[0].tolist()
    decode, end = pipe.tokenizer.decode, prompt + int(made.lengths[0])
    tokens = [{"text": decode([token]), "step": None, "given": True} for token in ids[:prompt]]
    tokens += [{"text": decode([token]), "step": step, "given": False} for token, step in zip(ids[prompt:end], steps, strict=False)]
    row = {
        "model": ask.model, "recipe": recipe, "seconds": cost.generations[0].seconds, "nfe": int(made.nfe[0]),
        "tokens": int(made.lengths[0]), "tokens_per_forward": float(made.tokens_per_forward[0]), "computed_fraction": cost.computed_fraction,
        "of_sequential": cost.of_sequential, "bytes_held": cost.bytes_held, "seed": ask.seed,
    }  # fmt: skip
    with desk.outputs.making(ask) as out:
        trace = out.json("trace.json", cost.to_dict())
        out.text("text.txt", found + "\n")
        out.facts = {"text": found, "tokens": tokens, "row": row, "trace": trace, "warnings": cost.warnings}
    return {"output": out.id, **out.facts, "seconds": row["seconds"]}
