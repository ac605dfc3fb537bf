"""tiny-image on latents with half as many positions a side (DC-Gen): is it worth it to align the embeddings first?

    python benchmarks/deeper_latents.py --digits DIGITS --steps 80 --align 0.3
    python benchmarks/deeper_latents.py --digits DIGITS --steps 80 --align 0
    python benchmarks/deeper_latents.py --digits DIGITS --steps 0

The deeper autoencoder is tiny-video's, of a single frame: 8 x 8 x 8 numbers instead of 16 x 16 x 4, and a quarter of the tokens.
DIGITS: a folder with MNIST, or sklearn; the training is on pictures of it. Prints a line of JSON: operations of an evaluation,
the loss on pictures that were kept, and by the bundled judge the share of right digits and the Frechet distance to unseen
pictures. --steps 0: of the base, and of pictures that the autoencoder has encoded and decoded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.distill.data import moving_digits
from hasten.distill.data.encode import latents
from hasten.distill.data.store import Store
from hasten.distill.loop.draw import Draw
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.methods.dcgen import DCGen
from hasten.distill.network.host_call import learn
from hasten.distill.network.new_latents import BothSpaces, cast_new, moved
from hasten.distill.network.roles import Adapter
from hasten.pipelines import loading, tiny_models
from hasten.pipelines.judge import Judge
from hasten.pipelines.work import watch

KEPT = 64


class Deeper:
    """tiny-video's autoencoder, with latents of unit variance. Pictures [n, 3, 1, 32, 32] in [-1, 1], latents [n, 8, 8, 8]."""

    def __init__(self) -> None:
        from diffusers import AutoencoderKLWan

        self.vae: Any = AutoencoderKLWan.from_pretrained(tiny_models.path("tiny-video") / "vae", torch_dtype=torch.float32)
        config = self.vae.config
        self.mean, self.std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))

    @torch.no_grad()
    def encode(self, seen: Tensor) -> Tensor:
        made = [self.vae.encode(part).latent_dist.mode() for part in seen.split(64)]
        return ((torch.cat(made) - self.mean) / self.std)[:, :, 0]

    @torch.no_grad()
    def decode(self, made: Tensor) -> Tensor:
        """[n, 32, 32, 3] in [0, 1]."""
        seen = [self.vae.decode(part[:, :, None] * self.std + self.mean).sample[:, :, 0] for part in made.split(64)]
        return (torch.cat(seen) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def stand_in() -> Any:
    """An autoencoder of the kind that the pipeline knows, for the shape of its latents alone."""
    from diffusers import AutoencoderKL

    made: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 8),
        latent_channels=8, norm_num_groups=4, mid_block_add_attention=False, scaling_factor=1.0,
    )  # fmt: skip
    return made


def sampled(pipe: Any, prompts: list[str], steps: int, output: str) -> Tensor:
    """What the pipeline makes, 32 at a time."""
    call, made = tiny_models.call_defaults("tiny-image"), []
    for start in range(0, len(prompts), 32):
        generator = torch.Generator().manual_seed(start)
        options = call | {"num_inference_steps": steps, "output_type": output, "generator": generator}
        made.append(pipe(prompts[start : start + 32], **options).images)
    return torch.cat(made)


def judged(seen: Tensor, prompts: list[str]) -> dict[str, float]:
    """[n, 32, 32, 3] in [0, 1]."""
    judge, each = Judge.load(), list(seen)
    return {"digit": round(judge.prompt_accuracy(each, prompts)["digit"], 3),
            "frechet": round(judge.frechet_to_real(judge.features(each), "image"), 2)}  # fmt: skip


def operations(pipe: Any, output: str) -> dict[str, float]:
    """Millions of floating-point operations of one evaluation of one picture with guidance."""
    with watch(pipe) as work:
        sampled(pipe, ["a seven"], 2, output)
    return {"megaflops": round(work.flops / work.calls / 1e6, 1)}


@torch.no_grad()
def loss_on(trainer: Trainer, rows: BothSpaces, index: Tensor) -> float:
    """Of the averaged student on these rows, at the same noise for every training."""
    player = trainer.players["student"]
    for name, value in player.average.items():
        player.parameters[name].copy_(value)
    draw = Draw(1, 0, range(len(index)))
    return round(float(trainer.state.loss("student", rows.batch(index, draw), draw, trainer.settings.steps, {}).rows.mean()), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", required=True)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--align", type=float, default=0.3)
    parser.add_argument("--head", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--count", type=int, default=384)
    parser.add_argument("--judged", type=int, default=64)
    parser.add_argument("--sampled", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    drawn = moving_digits.sample_images(moving_digits.load_digits(given.digits), given.count + KEPT, 5, paraphrase=False)
    seen, told = drawn.rgb(), [" ".join(prompt.split()[:3]) for prompt in drawn.prompts]  # "a thick seven": 20 prompts in all
    prompts, deeper = sorted(set(told)), Deeper()
    base, asked = loading.open_pipeline("tiny-image", device="cpu", quiet=True), (prompts * given.judged)[: given.judged]
    if not given.steps:
        found = {**operations(base, "pt"), **judged(sampled(base, asked, given.sampled, "pt").permute(0, 2, 3, 1), asked)}
        print(json.dumps({"who": "base", **found}), flush=True)
        again = deeper.decode(deeper.encode(seen[: given.judged]))
        print(json.dumps({"who": "autoencoder", **judged(again, told[: given.judged])}), flush=True)
        return
    call = tiny_models.call_defaults(base)
    host, _ = learn(base, ["a seven"], **call)
    pipe = moved(base, host, stand_in(), call, given.seed)
    new, conditions = learn(pipe, [*prompts, ""], **call)
    kept, empty = conditions.rows(torch.arange(len(prompts))), conditions.rows(torch.tensor([len(prompts)]))
    number = torch.tensor([prompts.index(prompt) for prompt in told])
    old = torch.cat([latents(base, host, part) for part in seen.split(64)])
    store = Store(tuple(prompts), kept, empty, number, deeper.encode(seen), old, new.shape, drop=0.1)
    train = Store(store.prompts, kept, empty, number[KEPT:], store.x0[KEPT:], old[KEPT:], new.shape, drop=0.1)  # type: ignore[index]
    roles = cast_new(host, new, Adapter(given.rank, float(given.rank)), given.seed)
    settings = TrainSettings(steps=given.steps, batch=given.batch, lr=given.lr, seed=given.seed, average=0.95)
    method = DCGen(autoencoder="tiny-video", align=given.align, head=given.head if given.align else 0.0)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(method, roles, BothSpaces(train), settings, Path(folder), new.shape, progress=False)
        trainer.fit()
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    row = {"who": "moved", "align": given.align, "steps": given.steps, "apart": [r["apart"] for r in log if "apart" in r][-1:],
           "loss": loss_on(trainer, BothSpaces(store), torch.arange(KEPT)), "cpu_seconds": round(time.process_time() - started)}  # fmt: skip
    print(json.dumps(row), flush=True)
    with roles["student"].playing():
        found = {**operations(pipe, "latent"), **judged(deeper.decode(sampled(pipe, asked, given.sampled, "latent")), asked)}
    print(json.dumps({"who": "moved", "align": given.align, **found}), flush=True)


if __name__ == "__main__":
    main()
