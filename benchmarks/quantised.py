"""What few bits cost a picture, and what a short training brings back.

    python benchmarks/quantised.py [--model tiny-image] [--ways plain,rtn,qalora,quest] [--bits 4x8,4x4] [--steps 30]

Every way starts from the same calibration; `rtn` is that and no training (round to nearest). Prints a line of JSON for each
way and each bits of weights x inputs: the mean squared distance of finished latents from the full-precision teacher's on the
same held-out noise, prompt accuracy, bytes of the rounded layers' weights with their tables, processor seconds of training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.distill.bench.contest import prompts
from hasten.distill.data.encode import decode
from hasten.distill.data.store import Store
from hasten.distill.export.quantised import packed_of
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.methods.qalora import QALoRA, Rounding, RoundingState
from hasten.distill.methods.quest import QuEST
from hasten.distill.network.host_call import learn
from hasten.distill.network.roles import Adapter, Roles
from hasten.pipelines import loading, tiny_models
from hasten.pipelines.judge import Judge

SEED = 77_000
"""Of the held-out noise."""


class Bench:
    """One model, its prompts, held-out noise, and what the teacher makes of it in so many steps."""

    def __init__(self, model: str, rows: int, sampling: int) -> None:
        self.pipe = loading.open_pipeline(model, quiet=True)
        self.call = tiny_models.call_defaults(self.pipe) | {"num_inference_steps": sampling}
        self.prompts = prompts("image", rows)
        self.host, conditions = learn(self.pipe, [*dict.fromkeys(self.prompts), ""], **self.call)
        count = len(conditions) - 1
        kept, empty = conditions.rows(torch.arange(count)), conditions.rows(torch.tensor([count]))
        self.data = Store(tuple(dict.fromkeys(self.prompts)), kept, empty, torch.arange(512) % count, None, None, self.host.shape)
        self.z = torch.randn(rows, *self.host.shape, generator=torch.Generator().manual_seed(SEED))
        self.aim = self.sampled(nullcontext())

    def sampled(self, playing: AbstractContextManager[Any]) -> Tensor:
        """Finished latents of whoever plays."""
        given = dict(self.call)
        if given.get("negative_prompt") is not None:
            given["negative_prompt"] = [given["negative_prompt"]] * len(self.z)
        with playing, torch.no_grad():
            return torch.as_tensor(self.pipe(**given, prompt=self.prompts, latents=self.z, output_type="latent")[0])

    def judged(self, x0: Tensor) -> dict[str, float]:
        """Distance from the teacher, and prompt accuracy."""
        pictures = decode(self.pipe, x0, self.call)
        right = Judge.load().prompt_accuracy(list(pictures), self.prompts)["all"]
        return {"distance": float((x0 - self.aim).square().mean()), "prompt_accuracy": right}

    def trained(self, method: Rounding, settings: TrainSettings, steps: int, out: Path) -> tuple[Trainer, float]:
        """A training of so many steps, and its processor seconds; none for 0."""
        roles = Roles.on_one_base(self.host, method.trains, Adapter())
        trainer = Trainer(method, roles, self.data, settings, out, self.host.shape, progress=False)
        began = time.process_time()
        if steps:
            trainer.fit()
        return trainer, time.process_time() - began

    def row(self, trainer: Trainer) -> dict[str, float]:
        """Of a student with its averaged weights."""
        state, player = trainer.state, trainer.players["student"]
        assert isinstance(state, RoundingState)
        for name, value in player.average.items():
            player.parameters[name].data.copy_(value)
        found = packed_of(state.student())
        numbers = sum(layer.q.numel() for layer in found.layers.values())
        return self.judged(self.sampled(state.student().playing())) | {"bytes": found.num_bytes(), "bytes_plain": 4 * numbers}


def methods(way: str, bits: str, model: str, matched: str) -> Rounding:
    """The method of a way."""
    weights, inputs = map(int, bits.split("x"))
    call = tiny_models.call_defaults(model)
    scale = call.get("true_cfg_scale", call.get("guidance_scale"))
    given: dict[str, Any] = {"weights": weights, "inputs": inputs, "scale": scale, "matched": matched}
    return QuEST(**given) if way == "quest" else QALoRA(**given)


def rows(given: argparse.Namespace) -> Iterator[dict[str, object]]:
    """What is printed."""
    bench = Bench(given.model, given.rows, given.sampling)
    for way in given.ways.split(","):
        if way == "plain":
            yield {"way": way, **bench.judged(bench.aim)}
            continue
        for bits in given.bits.split(","):
            steps = 0 if way == "rtn" else given.steps
            settings = TrainSettings(steps=max(1, steps), batch=given.batch, lr=given.lr, warmup=3, average=0.9, seed=given.seed)
            with tempfile.TemporaryDirectory() as out:
                trainer, seconds = bench.trained(methods(way, bits, given.model, given.matched), settings, steps, Path(out))
                found = bench.row(trainer)
            yield {"way": way, "bits": bits, "matched": given.matched, "steps": steps, "batch": given.batch, **found, "train_cpu_seconds": round(seconds, 1)}


def main() -> None:
    """Print a line for each row."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    asked.add_argument("--model", default="tiny-image")
    asked.add_argument("--ways", default="plain,rtn,qalora,quest")
    asked.add_argument("--bits", default="4x8,4x4")
    asked.add_argument("--steps", type=int, default=30)
    asked.add_argument("--batch", type=int, default=2)
    asked.add_argument("--lr", type=float, default=1e-2)
    asked.add_argument("--rows", type=int, default=64)
    asked.add_argument("--sampling", type=int, default=8)
    asked.add_argument("--matched", default="answer")
    asked.add_argument("--seed", type=int, default=0)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for row in rows(asked.parse_args()):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
