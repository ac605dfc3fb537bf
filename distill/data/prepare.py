"""The data of a training: read from its folder or from another training's, or made and written there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hasten.distill.data import store
from hasten.distill.data.encode import encode, size_of
from hasten.distill.data.own_files import OwnFiles, find
from hasten.distill.data.parts import Parts
from hasten.distill.data.store import Store
from hasten.distill.data.teach import make_pairs
from hasten.distill.network.host_call import HostCall, learn
from hasten.distill.train_config import DataConfig, TrainConfig
from hasten.errors import ResumeError, UsageError
from hasten.pipelines import tiny_models

NO_PROMPTS = "There are no prompts. Pass --prompts FILE (one a line), or data.prompts in the configuration."

Say = Callable[[str], None]


def prepare(
    config: TrainConfig, pipe: Any, out: Path, say: Say, resume: bool = False, progress: bool = False
) -> tuple[HostCall, Store]:
    """How the pipeline calls its network, and the data: read from `out`, or made and written there. The teacher's samples are
    kept as they are made, so that a training which is killed among them goes on from there.

    Raises `UsageError` for data that the method cannot use, `ResumeError` where a resumed training would get others.
    """
    call = tiny_models.call_defaults(pipe) | config.data.call
    if config.data.file is not None:
        return _stored(config, Path(config.data.file).expanduser(), pipe, call)
    own = _own(config)
    prompts = _prompts(config.data, config.model) if own is None else tuple(dict.fromkeys(own.captions.values()))
    facts: dict[str, object] = {
        "model": config.model, "base_lora": config.student.base_lora, "call": call, "prompts": len(prompts),
        "count": config.data.count, "seed": config.train.seed, "data": config.method.data,
    }  # fmt: skip
    if config.method.way_points:
        facts["points"] = config.method.way_points
    if own is not None:
        facts |= {"own": own.digest(), "resize": config.data.resize}
    host, conditions = learn(pipe, [*prompts, ""], **call)
    file = out / "data.safetensors"
    same = file.is_file() and store.facts(file) == json.loads(json.dumps(facts)) and store.prompts(file) == tuple(prompts)
    if same:  # the file holds the prompts themselves: another text of equal length is seen, too
        return host, replace(Store.load(file), drop=config.data.drop)
    if file.is_file() and resume:
        raise ResumeError(f"The data have changed since '{file}' was made. Restore them, or start in an empty folder.")
    if own is not None:
        say(f"Encoding {len(own.captions)} files of '{config.data.folder}'.")
        made = encode(pipe, host, own, size_of(pipe, call, config.data.resize), prompts, conditions)
        say(own.told())
    elif config.method.data == "prompts":
        made = _of_prompts(prompts, conditions, config.data.count, host.shape)
    else:
        say(f"The teacher makes {config.data.count} samples ({call.get('num_inference_steps', 'its usual')} steps each).")
        parts = Parts(out / "data.parts", facts | {"asked": prompts})
        with _bar(config.data.count, progress) as told:
            made = make_pairs(
                pipe, prompts, config.data.count, seed=config.train.seed, points=config.method.way_points, parts=parts, told=told, **call
            )
    made.save(file, facts)
    Parts(out / "data.parts", {}).drop()
    return host, replace(made, drop=config.data.drop)


@contextmanager
def _bar(count: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar of the teacher's samples; takes the number that is there."""
    with tqdm(total=count, desc="teacher", disable=not shown, mininterval=2) as bar:
        yield lambda done: bar.update(done - bar.n) and None


def _stored(config: TrainConfig, file: Path, pipe: Any, call: dict[str, Any]) -> tuple[HostCall, Store]:
    """The data of another training, of the same teacher called in the same way. Raises `UsageError` where it was not."""
    if config.data.prompts or config.data.folder is not None:
        raise UsageError("data.file has prompts of its own. Leave data.prompts and data.folder out.")
    if not file.is_file():
        raise UsageError(f"There is no data file '{file}'. It is the data.safetensors of another training's folder.")
    found = store.facts(file)
    wanted = {"model": config.model, "base_lora": config.student.base_lora, "call": json.loads(json.dumps(call))}
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UsageError(
                f"'{file}' was made with {name} = {found.get(name)!r}, and this training has {value!r}. Say the same, or"
                " leave data.file out, so that new data are made."
            )
    made = Store.load(file, config.data.drop)
    kind = config.method.data
    lacks = (kind in ("latents", "pairs") and made.x0 is None) or (kind == "pairs" and made.z is None)
    if lacks or (kind == "own" and "own" not in found):
        raise UsageError(f"'{file}' has {found.get('data')}, and {config.method.kind} needs {kind}. Leave data.file out.")
    if (points := config.method.way_points) and found.get("points") != points:
        raise UsageError(
            f"'{file}' has the teacher's points of {found.get('points', 'no')} calls, and this training needs those of {points}."
            " Leave data.file out, so that new data are made."
        )
    host, _ = learn(pipe, [made.prompts[0]], **call)
    return host, made


def _own(config: TrainConfig) -> OwnFiles | None:
    """The files of `data.folder`. None without one."""
    data, kind = config.data, config.method.kind
    if data.folder is None:
        if config.method.data == "own":
            raise UsageError(f"{kind} learns from data of your own. Say --train_data_dir FOLDER, with pictures and captions.")
        return None
    if config.method.data not in ("own", "latents"):
        raise UsageError(f"{kind} lets the teacher make its data, and reads no folder. Leave data.folder out.")
    if data.prompts:
        raise UsageError("data.prompts and data.folder contradict each other: a folder has captions of its own.")
    return find(Path(data.folder).expanduser(), data.uncaptioned)


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
        raise UsageError(NO_PROMPTS)
    warnings.warn(f"hasten: no prompts were given; training on the {len(known)} of the model's card.", stacklevel=3)
    return tuple(known)


def _of_prompts(prompts: tuple[str, ...], conditions: Any, count: int, shape: tuple[int, ...]) -> Store:
    kept = conditions.rows(torch.arange(len(prompts)))
    empty = conditions.rows(torch.tensor([len(prompts)]))
    return Store(prompts, kept, empty, torch.arange(max(count, len(prompts))) % len(prompts), None, None, shape)
