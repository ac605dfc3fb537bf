"""From a configuration to a trained student: opens the model, makes the data, casts the roles, runs the trainer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hasten.distill import store
from hasten.distill.host_call import HostCall, learn
from hasten.distill.pretrain_state import claimed
from hasten.distill.roles import Adapter, Roles
from hasten.distill.store import Store
from hasten.distill.teach import make_pairs
from hasten.distill.train_config import DataConfig, TrainConfig
from hasten.distill.trainer import Trainer
from hasten.errors import UsageError
from hasten.pipelines import loading, tiny_models

MAY_CHANGE = ("train.steps", "train.accumulate")
"""What a resumed training may have otherwise."""

Say = Callable[[str], None]


def train(
    config: TrainConfig, out: Path, *, resume: bool = False, stop_after: int | None = None, progress: bool = True,
    say: Say = lambda text: None,
) -> Trainer:  # fmt: skip
    """Train below `out`: `data.safetensors` (made once), `log.jsonl`, `latest/`. Returns the trainer, at its end.

    Raises `UsageError` for what does not fit, before anything is trained; `ResumeError` as `Trainer.fit` does.
    """
    if config.method.data == "tokens":
        from hasten.distill.text_training import train_text

        return train_text(config, out, resume=resume, stop_after=stop_after, progress=progress, say=say)
    pipe = loading.open_pipeline(config.model, lora=config.student.base_lora, quiet=True)
    with claimed(out, config.model_dump(mode="json"), resume, MAY_CHANGE):
        host, rows = prepare(config, pipe, out, say)
        roles = cast(config, pipe, host)
        say(memory(roles))
        trainer = Trainer(config.method, roles, rows, config.train, out, host.shape, progress)
        trainer.fit(resume, stop_after)
        return trainer


def prepare(config: TrainConfig, pipe: Any, out: Path, say: Say) -> tuple[HostCall, Store]:
    """How the pipeline calls its network, and the data: read from `out`, or made and written there."""
    call = tiny_models.call_defaults(pipe) | config.data.call
    prompts = _prompts(config.data, config.model)
    facts: dict[str, object] = {
        "model": config.model, "base_lora": config.student.base_lora, "call": call, "prompts": len(prompts),
        "count": config.data.count, "seed": config.train.seed, "data": config.method.data,
    }  # fmt: skip
    host, conditions = learn(pipe, [*prompts, ""], **call)
    file = out / "data.safetensors"
    if file.is_file() and store.facts(file) == json.loads(json.dumps(facts)):
        return host, replace(Store.load(file), drop=config.data.drop)
    if config.method.data == "prompts":
        made = _of_prompts(prompts, conditions, config.data.count, host.shape)
    else:
        say(f"The teacher makes {config.data.count} samples ({call.get('num_inference_steps', 'its usual')} steps each).")
        made = make_pairs(pipe, prompts, config.data.count, seed=config.train.seed, **call)
    made.save(file, facts)
    return host, replace(made, drop=config.data.drop)


def cast(config: TrainConfig, pipe: Any, host: HostCall) -> Roles:
    """The roles that the method asks for, as adapters on one base or as copies."""
    student = config.student
    if student.full:
        return Roles.of_copies(host, config.method.trains)
    adapter = Adapter(student.rank, float(student.alpha or student.rank), student.layers)
    style = tuple(getattr(host.network, "peft_config", ())) if student.base_lora else ()
    return Roles.on_one_base(host, config.method.trains, adapter, style)


def memory(roles: Roles) -> str:
    """What weights, gradients and optimisers take, in words. Activations come on top."""
    networks = {id(role.host.network): role.host.network for role in roles.values()}
    held = sum(t.numel() * t.element_size() for n in networks.values() for t in n.parameters())
    trained = sum(p.numel() for role in roles.values() if role.trained for p in role.parameters().values())
    return (
        f"Memory: weights {_size(held)} for {len(roles)} roles on {len(networks)} network(s); {trained / 1e6:.2f} M numbers"
        f" are trained, with gradients and AdamW {_size(12 * trained)}; activations come on top."
    )


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count > 2**29 else f"{count / 2**20:.1f} MiB"


def _prompts(data: DataConfig, model: str) -> tuple[str, ...]:
    if isinstance(data.prompts, str):
        lines = (line.strip() for line in Path(data.prompts).read_text(encoding="utf-8-sig").splitlines())
        found = tuple(line for line in lines if line and not line.startswith("#"))
    else:
        found = data.prompts
    if found:
        return found
    known = tiny_models.card(model)["prompts"] if model in tiny_models.names() else ()
    if not known:
        raise UsageError("There are no prompts. Pass --prompts FILE (one a line), or data.prompts in the configuration.")
    warnings.warn(f"hasten: no prompts were given; training on the {len(known)} of the model's card.", stacklevel=3)
    return tuple(known)


def _of_prompts(prompts: tuple[str, ...], conditions: Any, count: int, shape: tuple[int, ...]) -> Store:
    import torch

    kept = conditions.rows(torch.arange(len(prompts)))
    empty = conditions.rows(torch.tensor([len(prompts)]))
    return Store(prompts, kept, empty, torch.arange(max(count, len(prompts))) % len(prompts), None, None, shape)
