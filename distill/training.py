"""From a configuration to a trained student: opens the model, makes the data, casts the roles, runs the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hasten.distill.data.prepare import NO_PROMPTS, prepare
from hasten.distill.loop import cost, memory_plan, processes
from hasten.distill.loop.ending import Ended, check_finished, ending, never
from hasten.distill.loop.log import check_tracker
from hasten.distill.loop.optimizers import check_optimizer
from hasten.distill.loop.samples import Samples
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.state import claimed
from hasten.distill.loop.trainer import Trainer
from hasten.distill.network import styles
from hasten.distill.network.host_call import Condition, HostCall
from hasten.distill.network.role_attention import read_less
from hasten.distill.network.roles import Adapter, Roles, follow
from hasten.distill.train_config import DataConfig, StudentConfig, TrainConfig
from hasten.errors import RefusedError, UsageError
from hasten.pipelines import loading, tiny_models

MAY_CHANGE = (
    "train.steps", "train.accumulate", "train.shard", "train.report_to", "train.samples", "train.recall", "train.checkpoint_every",
)  # fmt: skip
"""What a resumed training may have otherwise."""

Say = Callable[[str], None]


def train(
    config: TrainConfig, out: Path, *, resume: bool = False, stop_after: int | None = None, progress: bool = True,
    say: Say = lambda text: None, ended: Ended = never,
) -> Trainer:  # fmt: skip
    """Train below `out`: `data.safetensors` (made once), `log.jsonl`, `latest/`, and `student/` at the end. Returns the
    trainer. ended: asked after each step whether to write a checkpoint and stop there.

    Raises `UsageError` for what does not fit, before anything is loaded or trained; `ResumeError` as `Trainer.fit` does;
    `StoppedError` when it was asked to end (SIGTERM, `ended`), with a checkpoint written.
    """
    check_packages(config)
    if config.method.data == "tokens":
        from hasten.distill.text.training import train_text

        return train_text(config, out, resume=resume, stop_after=stop_after, progress=progress, say=say, ended=ended)
    check_asked(config)
    if config.method.kind == "dcgen":
        from hasten.distill.network.new_latents import train_new_latents

        return train_new_latents(config, out, resume=resume, stop_after=stop_after, progress=progress, say=say, ended=ended)
    with processes.joined():
        say = say if processes.rank() == 0 else _silent
        wanted = config.model_dump(mode="json") | styles.digests(config.student.styles)
        mine = claimed(out, wanted, resume, MAY_CHANGE, usual(config)) if processes.rank() == 0 else nullcontext()
        with mine:
            if (found := memory_plan.plan(config)) is not None:
                memory_plan.check_fits(found)
                memory_plan.check_room(found.disk, out)
                say(found.told())
            pipe = loading.open_pipeline(config.model, lora=config.student.base_lora, quiet=True, dtype=dtype_of(config))
            with processes.first_alone(), cost.metered(out, "data"):
                host, rows = prepare(config, pipe, out, say, resume, progress)
            with _seeded(config.train.seed):
                roles = cast(config, pipe, host, rows.conditions)
                if config.student.start is not None:
                    begin_with(Path(config.student.start).expanduser(), roles)
                    for name in config.method.averages:
                        follow(roles[name], roles["student"], 0.0)
                trainer = Trainer(config.method, roles, rows, config.train, out, host.shape, progress)
            say(memory_plan.memory(roles))
            memory_plan.check_disk(trainer)
            if config.train.samples_every:
                call = tiny_models.call_defaults(pipe) | config.data.call
                trainer.watch = Samples(pipe, call, rows.prompts)
            with cost.metered(out, "training"), ending(ended) as trainer.ended:
                done = trainer.fit(resume and begun(out, say), stop_after)
            check_finished(done, config.train.steps, stop_after)
            if done == config.train.steps and processes.rank() == 0 and not config.train.shard:
                export(config, trainer, pipe, out, say)
    if done == config.train.steps and processes.first() and config.train.shard:
        export(config, _whole(config, out), pipe, out, say)
    return trainer


def usual(config: TrainConfig) -> dict[str, Any]:
    """What a configuration was in what an older version did not write."""
    plain = config.model_copy(update={"student": StudentConfig(), "data": DataConfig(), "train": TrainSettings()})
    return plain.model_dump(mode="json")


def check_packages(config: TrainConfig) -> None:
    """Raises `UsageError` where a package is missing that this training needs."""
    check_optimizer(config.train)
    check_tracker(config.train.report_to)


def check_asked(config: TrainConfig) -> None:
    """Raises `UsageError` where nobody says what the model is asked, which is known before it is loaded."""
    data = config.data
    asked = data.prompts or data.folder is not None or data.file is not None or config.model in tiny_models.names()
    a_model = "/" in config.model or Path(config.model).exists()  # another word is no model, which is said when it is opened
    if not asked and a_model and config.method.data != "own":
        raise UsageError(NO_PROMPTS)


def _whole(config: TrainConfig, out: Path) -> Trainer:
    """The finished training once more in a single process that has whole weights, from its last checkpoint."""
    single = config.model_copy(update={"train": config.train.model_copy(update={"shard": False})})
    pipe = loading.open_pipeline(config.model, lora=config.student.base_lora, quiet=True, dtype=dtype_of(config))
    host, rows = prepare(single, pipe, out, _silent)
    made = Trainer(config.method, cast(single, pipe, host, rows.conditions), rows, single.train, out, host.shape, False)
    made.restore(to_train=False)
    return made


def export(config: TrainConfig, trainer: Trainer, pipe: Any, out: Path, say: Say) -> None:
    """Write `student/`: adapter or network, sampler, recipe, card. Where that cannot be, the reason is said and the
    weights stay in `latest/`."""
    from hasten.distill.export.student import student_of

    call = tiny_models.call_defaults(pipe) | config.data.call
    try:
        student_of(trainer, pipe, config.model, call=call, merge=config.student.merge).save(out / "student")
    except RefusedError as error:
        say(f"The student was not written as a folder of its own: {error}")


def dtype_of(config: TrainConfig) -> str | None:
    """What the model is opened in. All weights of a copy are trained, and bfloat16 would round small steps away;
    train.precision is for speed."""
    return "float32" if config.student.full else None


def begun(out: Path, say: Say) -> bool:
    """Whether there is a checkpoint to go on from. A training that was killed before its first has none, and starts anew."""
    if (out / "latest").exists() or (out / "latest.old").exists():
        return True
    say("It was stopped before its first checkpoint: it starts from the first step.")
    return False


def begin_with(folder: Path, roles: Roles) -> None:
    """Give the student the weights of a finished training's student: the average, where there is one.

    Raises `UsageError` where there is none, or one of another kind.
    """
    place = folder / "latest" / "student"
    file = next((file for file in (place / "average.safetensors", place / "weights.safetensors") if file.is_file()), None)
    if file is None:
        raise UsageError(f"There is no student in '{folder}/latest'. student.start is the folder of a finished training.")
    found = {name: value for name, value in load_file(file).items() if not name.startswith("heads.")}
    own = roles["student"].parameters()
    odd = [name for name in found.keys() | own.keys() if name not in own or name not in found or own[name].shape != found[name].shape]
    if odd:
        raise UsageError(
            f"The student of '{folder}' differs from this one in {len(odd)} weights (the first: {min(odd)}). Say the same"
            " rank, layers and full as there."
        )
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)


def cast(config: TrainConfig, pipe: Any, host: HostCall, conditions: Condition) -> Roles:
    """The roles that the method asks for, as adapters on one base or as copies. conditions: rows of the data, or one."""
    student, method = config.student, config.method
    if student.full:
        roles = Roles.of_copies(host, method.trains)
    else:
        adapter = Adapter(student.rank, float(student.alpha or student.rank), student.layers, student.experts)
        style = tuple(getattr(host.network, "peft_config", ())) if student.base_lora else ()
        known = styles.put_on(pipe, host.network, student.styles)
        roles = Roles.on_one_base(host, method.trains, adapter, style)
        roles.styles = known
    if student.attention is not None:
        read_less(roles, ["student", *method.averages], student.attention, conditions)
    return roles


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """New weights follow from the seed, and nobody else's random numbers change."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _silent(text: str) -> None:
    """Says nothing: for all processes but the first."""
