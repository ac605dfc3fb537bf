"""From a configuration to a trained language model: opens it, lets it write its own data, casts the roles, trains.

The same trainer, checkpoints, resume and settings as for pictures (`training.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hasten.distill.data import store
from hasten.distill.data.store import Store
from hasten.distill.loop import processes
from hasten.distill.loop.ending import Ended, check_finished, ending, never
from hasten.distill.loop.memory_plan import memory
from hasten.distill.loop.state import claimed
from hasten.distill.loop.trainer import Trainer
from hasten.distill.network.roles import Adapter
from hasten.distill.text import filter_prompts as text_filter_prompts
from hasten.distill.text.filter_prompts import Asked
from hasten.distill.text.method import TextMethod, TextState
from hasten.distill.text.roles import TextCall, TextRoles
from hasten.distill.train_config import TrainConfig
from hasten.distill.training import MAY_CHANGE, begun, check_packages, usual
from hasten.errors import ResumeError, UsageError
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.text_models.families import choose
from hasten.pipelines.text_models.host import TextHost
from hasten.pipelines.text_models.loading import open_text

NEW = 128
"""Tokens behind a prompt of one's own."""

CALL = ("recipe", "max_new_tokens")
"""What `data.call` may say for a language model: how the teacher writes, and how much behind each prompt."""

Say = Callable[[str], None]


def train_text(
    config: TrainConfig, out: Path, *, resume: bool = False, stop_after: int | None = None, progress: bool = True,
    say: Say = lambda text: None, ended: Ended = never,
) -> Trainer:  # fmt: skip
    """Train below `out`: `data.safetensors` (made once), `log.jsonl`, `latest/`, and `student/` at the end (`TextState.write`).
    Returns the trainer.

    Raises `UsageError` for what does not fit, before anything is trained; `ResumeError` as `Trainer.fit` does.
    """
    method = _check(config)
    check_packages(config)
    network, tokenizer = open_text(config.model, None, None, None)
    host = choose(network, tokenizer)
    method.fits(host.facts)
    with claimed(out, config.model_dump(mode="json"), resume, MAY_CHANGE, usual(config)):
        rows = prepare_texts(config, host, tokenizer, out, say, resume)
        roles = cast_texts(config, host)
        say(memory(roles))
        found = rows.conditions.tensors
        shape = tuple(found["ids"].shape[1:]) if "ids" in found else ()
        trainer = Trainer(method, roles, rows, config.train, out, shape, progress)
        assert isinstance(trainer.state, TextState)
        trainer.state.rows = rows
        with ending(ended) as trainer.ended:
            done = trainer.fit(resume and begun(out, say), stop_after)
        check_finished(done, config.train.steps, stop_after)
        if done == config.train.steps:
            trainer.state.write(out / "student", config.model, method.recipe, trainer.players["student"].average or None)
        return trainer


def prepare_texts(
    config: TrainConfig, host: TextHost, tokenizer: Any, out: Path, say: Say = lambda text: None, resume: bool = False
) -> Store:
    """The teacher's texts: read from `out`, or written there. `ResumeError` where a resumed training would get others."""
    method = _check(config)
    call: dict[str, Any] = {"recipe": method.writes, "max_new_tokens": NEW} | config.data.call
    prompts = config.data.prompts
    facts: dict[str, object] = {
        "model": config.model, "call": call, "count": config.data.count, "prompts": prompts, "seed": config.train.seed,
        **method.depends(),
    }  # fmt: skip
    if isinstance(prompts, str) and prompts:  # the file's text, which may change under the same name
        facts["lines"] = hashlib.sha256("\n".join(_lines(Path(prompts))).encode()).hexdigest()
    file = out / "data.safetensors"
    if file.is_file() and store.facts(file) == json.loads(json.dumps(facts)):
        return Store.load(file)
    if file.is_file() and resume:
        raise ResumeError(f"The data have changed since '{file}' was made. Restore them, or start in an empty folder.")
    asked = _asked(config, host, tokenizer, int(call["max_new_tokens"]))
    say(f"{config.model} writes behind {asked.about} with the recipe {call['recipe']}.")
    made = method.make(host, tokenizer, asked, find_recipe(str(call["recipe"])), config.train.seed, say)
    made.save(file, facts)
    return made


def cast_texts(config: TrainConfig, host: TextHost) -> TextRoles:
    """The roles that the method asks for. An adapter's first weights follow from the seed, and no others are drawn."""
    call, student = TextCall.of(host), config.student
    if student.full:
        return TextRoles.of_model_copies(call, config.method.trains)
    with torch.random.fork_rng():
        torch.manual_seed(config.train.seed)
        return TextRoles.of_model(
            call, config.method.trains, Adapter(student.rank, float(student.alpha or student.rank), student.layers)
        )


def _asked(config: TrainConfig, host: TextHost, tokenizer: Any, new: int) -> Asked:
    data = config.data
    if data.prompts:
        lines = data.prompts if not isinstance(data.prompts, str) else _lines(Path(data.prompts))
        return text_filter_prompts.given(lines, tokenizer, new, host.facts)
    card = Path(getattr(host.model.config, "_name_or_path", "") or ".") / "hasten.json"
    if not card.is_file():
        raise UsageError(
            f"Nobody knows what {config.model} is used for: it has no card. Pass --prompts FILE with prompts like yours, one a"
            " line."
        )
    return text_filter_prompts.own(json.loads(card.read_text())["data"], tokenizer, data.count, host.facts, config.train.seed)


def _lines(file: Path) -> tuple[str, ...]:
    return tuple(line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip())


def _check(config: TrainConfig) -> TextMethod:
    """What can be said before anything is loaded; the method."""
    assert isinstance(config.method, TextMethod)
    unknown = sorted(set(config.data.call) - set(CALL))
    if unknown:
        raise UsageError(f"data.call of a language model has {', '.join(unknown)}; allowed: {', '.join(CALL)}.")
    data, settings = config.data, config.train
    student = config.student
    unfit = {"data.folder": data.folder, "data.file": data.file, "data.drop": data.drop, "student.start": student.start,
             "student.base_lora": student.base_lora, "student.experts": student.experts if student.experts > 1 else None,
             "train.shard": settings.shard, "train.samples_every": settings.samples_every}  # fmt: skip
    for name, value in unfit.items():
        if value:
            raise UsageError(f"{name} = {value} has no meaning for a language model. Leave it out.")
    if processes.launched() > 1:
        raise UsageError("Language models are trained in one process, and several were launched. Start without torchrun.")
    return config.method
