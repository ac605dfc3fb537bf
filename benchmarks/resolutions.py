"""Lower resolutions, windows in time and drafts on the bundled models, beside fewer steps at equal time; and a restorer.

    python benchmarks/resolutions.py bottleneck [--model tiny-image] [--steps 50] [--prompts 8] [--seeds 2]
    python benchmarks/resolutions.py windows [--times 2 4] [--steps 10] [--prompts 3]
    python benchmarks/resolutions.py drafts [--model tiny-image] [--steps 50] [--prompts 8] [--seeds 2]
    python benchmarks/resolutions.py restore --steps 800 [--data mnist-folder]

Each writes `benchmarks/results/cpu-2core/resolutions-<what>[-<model>].json`. Seconds are medians of single runs right
after plain ones, of the processor: one thread does everything, and the machine may do other work as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from hasten import metrics
from hasten.distill.data.moving_digits import load_digits
from hasten.distill.restoration import Restoring, pictures, train
from hasten.pipelines import tiny_models
from hasten.pipelines.accelerate import accelerate
from hasten.pipelines.bench.candidates import Candidate, fewer_steps, ours
from hasten.pipelines.bench.shots import Column, Sample, Shot, other_seed, row_of, shoot
from hasten.pipelines.host import hardware
from hasten.pipelines.judge import DIGITS, Judge, parse_prompt
from hasten.pipelines.residual_shift import restored
from hasten.recipe import Recipe
from hasten.samplers.bottleneck import Bottleneck, Stage
from hasten.samplers.windows import Windows, starts

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "cpu-2core"
TOLD = ("recipe", "control", "speedup", "nfe", "psnr_median", "psnr_converged", "latent_error", "prompt_accuracy", "frechet", "edges")


def samples(moving: bool, prompts: int, seeds: int) -> list[Sample]:
    """Prompts of every digit in turn, in all directions for clips."""
    ways = ("left", "right", "up", "down")
    words = [f"a {DIGITS[(3 * i + 1) % 10]}" + (f" moving {ways[i % 4]}, slowly" if moving else "") for i in range(prompts)]
    return [Sample(word, 100 + seed) for seed in range(seeds) for word in words]


def compared(
    model: str, candidates: Sequence[Candidate], found: Sequence[Sample], steps: int, converged: int
) -> list[dict[str, Any]]:
    """Rows with the keys of the design: the plain run, another seed, and the candidates."""
    pipe = tiny_models.load(model)
    pipe.set_progress_bar_config(disable=True)
    call = {**tiny_models.call_defaults(pipe), "num_inference_steps": steps}
    shoot(pipe, found[0], {**call, "num_inference_steps": 4})
    plain, columns = Column(ours("plain", "plain")), [Column(each) for each in candidates]
    with accelerate(pipe, "plain") as session:
        shoot(pipe, found[0], {**call, "num_inference_steps": 2})
    plain.nfe = round(session.report().nfe / 2) * steps
    for number, sample in enumerate(found):
        print(f"{model}: {number + 1} of {len(found)}", file=sys.stderr, flush=True)
        plain.shots.append(timed(shoot(pipe, sample, call)))
        plain.plain_seconds.append(plain.shots[-1].seconds)
        for column in columns:
            column.shots.append(timed(shoot(pipe, sample, call, column.candidate)))
            column.plain_seconds.append(plain.shots[-1].seconds)
    exact = [shoot(pipe, sample, {**call, "num_inference_steps": converged}).frames for sample in found[:4]]
    rows = [row_of(model, plain, plain, found, exact)]
    if len({sample.seed for sample in found}) > 1:
        rows.append(other_seed(model, plain, found))
    return rows + [row_of(model, column, plain, found, exact) for column in columns]


def timed(shot: Shot) -> Shot:
    """The same, its time that of the processor."""
    shot.seconds = shot.busy
    return shot


def bottleneck(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Full, low, full resolution at several scales and lengths; and fewer steps in the same time."""
    candidates = []
    for scale in (0.75, 0.5):
        for low, back in ((0.5, 0.1), (0.6, 0.3)):
            for noise in ("fresh", "kept"):
                stages = (
                    Stage(steps=0.2, until=0.2),
                    Stage(steps=low - 0.2, begin=0.2, until=low, scale=scale),
                    Stage(steps=0.2, begin=low - back),
                )
                recipe = Recipe(sampler=Bottleneck(stages=stages, noise=noise))  # type: ignore[arg-type]
                candidates.append(ours(f"scale {scale:g} from 0.2 to {low:g}, back {back:g}, {noise} noise", recipe))
    same = Bottleneck(stages=(Stage(steps=0.2, until=0.2), Stage(steps=0.3, begin=0.2, until=0.5), Stage(steps=0.2, begin=0.4)))
    candidates.append(ours("full size from 0.2 to 0.5, back 0.1, fresh noise", Recipe(sampler=same)))
    candidates.append(ours("from 0 to 1 in 0.4 of the steps", Recipe(sampler=Bottleneck(stages=(Stage(steps=0.4),)))))
    for steps in (20, 12, 8):
        candidates.append(fewer_steps("unipc", round(steps * options.steps / 50)))
    found = samples(options.model == "tiny-video", options.prompts, options.seeds)
    return compared(options.model, candidates, found, options.steps, options.converged)


def windows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Clips of two and four times the length, asked for directly and in windows; read in stretches of 17 frames."""
    pipe = tiny_models.load("tiny-video")
    pipe.set_progress_bar_config(disable=True)
    defaults = tiny_models.call_defaults(pipe) | {"num_inference_steps": options.steps}
    own = defaults["num_frames"]
    asked = [("plain", 1, None), *(("direct", times, None) for times in options.times)]
    parts = {
        "overlap 4": Windows(overlap=4), "overlap 4, shuffled noise": Windows(overlap=4, noise="shuffled"),
        "overlap 7": Windows(overlap=7), "overlap 4, flat": Windows(overlap=4, blend="flat"),
        "overlap 4, moving": Windows(overlap=4, moving=True), "overlap 0": Windows(overlap=0),
    }  # fmt: skip
    for times in options.times:
        few = 2 if times > 2 else len(parts)  # longer clips take long: the first two alone
        asked += [(name, times, part) for name, part in list(parts.items())[:few]]
    rows = []
    for name, times, part in asked:
        clips, seconds = [], []
        for sample in samples(True, options.prompts, 1):
            call = defaults | {"num_frames": (own - 1) * times + 1}
            shot = shoot(pipe, sample, call, ours(name, Recipe(sampler=part)) if part else None)
            clips.append((sample.prompt, shot.frames))
            seconds.append(shot.seconds)
        row = {"model": "tiny-video", "recipe": name, "times": times, "n": len(clips), "seconds": statistics.median(seconds)}
        rows.append(row | work(part, (own - 1) // 2 * times + 1) | read_long(clips, own))
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True)
    return rows


def work(part: Windows | None, length: int) -> dict[str, float]:
    """Of one evaluation of a clip of `length` latent frames: frames that the network sees, and pairs of them in attention."""
    if part is None:
        return {"frames": length, "pairs": length**2}
    both = [starts(part, length, step) for step in (0, 1)]
    seen = statistics.fmean(len(begins) for begins in both)
    return {"frames": seen * part.frames, "pairs": seen * part.frames**2}


def read_long(clips: Sequence[tuple[str, Any]], length: int) -> dict[str, Any]:
    """What the judge reads in stretches of `length` frames, and how much neighbouring frames differ.

    accuracy: of digit, and of direction, over stretches that follow each other. same_digit: share of clips whose stretches
    show one digit. whole: the clip read as one, resampled in time. jump: the largest step between neighbouring frames over
    the median one, which is 1 for a motion without seams.
    """
    judge = Judge.load()
    digits, directions, same, whole, jumps, features = [], [], [], [], [], []
    for prompt, frames in clips:
        told = parse_prompt(prompt)
        stretches = [frames[begin : begin + length] for begin in range(0, len(frames) - length + 1, length - 1)]
        read = judge.read_all(stretches)
        features += [reading.features for reading in read]
        digits += [reading.digit == told["digit"] for reading in read]
        directions += [reading.direction == told["direction"] for reading in read]
        same.append(len({reading.digit for reading in read}) == 1)
        once = judge.read(frames)
        whole.append(once.digit == told["digit"] and once.direction == told["direction"])
        steps = [float(abs(b - a).mean()) for a, b in pairwise(frames)]
        jumps.append(max(steps) / statistics.median(steps))
    return {
        "digit": statistics.fmean(digits), "direction": statistics.fmean(directions), "same_digit": statistics.fmean(same),
        "whole": statistics.fmean(whole), "jump": statistics.median(jumps),
        "frechet": judge.frechet_to_real(torch.stack(features), "video") if len(features) > 1 else None,
    }  # fmt: skip


def drafts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Drafts by a few steps, by a student and by the plain run itself, walked on from; and fewer steps in the same time."""
    named = ["draft:recipe=plain,share=0.2", "draft:recipe=plain,share=0.5"]
    named += [f"draft:recipe=fewer-steps,steps={steps},share={share}" for steps in (20, 40) for share in (0.1, 0.2, 0.4)]
    if options.model != "tiny-flux":
        named += [f"draft:recipe=fastest,share={share}" for share in (0.1, 0.2, 0.4)]
    if options.model == "tiny-image":
        named += [f"draft:recipe=fast,share={share}" for share in (0.1, 0.2, 0.4)]
    candidates = [ours(name, name) for name in named]
    for steps in (25, 15, 10, 7):
        candidates.append(fewer_steps("unipc", round(steps * options.steps / 50)))
    found = samples(options.model == "tiny-video", options.prompts, options.seeds)
    rows = compared(options.model, candidates, found, options.steps, options.converged)
    branches = 1 if options.model == "tiny-image" else 2
    for row in rows:
        if row["recipe"].startswith("draft:"):
            row["nfe"] += branches * of_draft(row["recipe"], options.steps)
    return rows


def of_draft(name: str, steps: int) -> float:
    """Steps of the draft itself, which a session's report does not count among its own."""
    told = dict(part.split("=") for part in name.partition(":")[2].split(","))
    asked = int(told.get("steps", steps))
    return {"plain": asked, "fewer-steps": round(asked * 0.25), "fast": 4, "fastest": 1}[told["recipe"]]


def restore(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A restorer trained on blurred and shrunk digits, in 1 to 15 steps, beside what it was given (cubic interpolation)."""
    digits = load_digits(options.data)
    began, losses = time.process_time(), []
    settings = Restoring(steps=options.steps, batch=options.batch)
    with tempfile.TemporaryDirectory() as folder:
        network, scheduler = train(Path(folder), options.data, settings, told=lambda step, loss: losses.append(loss))
    seconds = time.process_time() - began  # of one core: the machine may do other work as well
    print(f"{settings.steps} steps in {seconds:.0f} s of one core, loss {statistics.fmean(losses[-20:]):.4f}", file=sys.stderr)
    clean, prompts = pictures(digits, options.pictures, seed=10**6, split="test")
    y = settings.damage(clean, torch.Generator().manual_seed(1))
    results = {"cubic interpolation": y, "the clean pictures": clean}
    for steps in (1, 2, 4, 8, 15):
        results[f"{steps} step{'s' if steps > 1 else ''}"] = restored(
            network, scheduler, y, steps, torch.Generator().manual_seed(2)
        )
    judge, rows = Judge.load(), []
    for name, found in results.items():
        seen = (found.clamp(-1, 1) + 1) / 2
        images, right = [
            [picture.expand(3, -1, -1).permute(1, 2, 0).numpy() for picture in batch] for batch in (seen, (clean + 1) / 2)
        ]
        errors = [metrics.psnr(a, b) for a, b in zip(right, images, strict=True)]
        features = judge.features(images)
        rows.append({
            "model": "restorer", "recipe": name, "n": len(clean), "training_seconds": seconds,
            "psnr_median": None if found is clean else statistics.median(errors),
            "prompt_accuracy": judge.prompt_accuracy(images, prompts)["digit"],
            "frechet": judge.frechet_to_real(features, "image"),
            "edges": float((seen[..., 1:] - seen[..., :-1]).abs().mean()),
        })  # fmt: skip
    return rows


METHODS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "bottleneck": bottleneck, "windows": windows, "drafts": drafts, "restore": restore,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--model", default="tiny-image")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--converged", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--times", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--data", default="sklearn", help="a folder of MNIST, or sklearn")
    parser.add_argument("--batch", type=int, default=32, help="pictures in a step of the restorer's training")
    parser.add_argument("--pictures", type=int, default=256, help="unseen pictures that are restored")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows = METHODS[options.method](options)
    for row in rows:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items() if key in TOLD})
    tail = "" if options.method in ("windows", "restore") else f"-{options.model}"
    document = {
        "command": f"resolutions {options.method}", "versions": {"torch": torch.__version__}, "hardware": hardware("cpu"),
        "steps": options.steps, "minutes": (time.perf_counter() - began) / 60, "rows": rows,
    }  # fmt: skip
    file = options.json or RESULTS / f"resolutions-{options.method}{tail}.json"
    file.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
