"""Moving a pipeline to a deeper autoencoder: the pipeline as it will be, the data in both spaces, the training (DC-Gen).

Shapes: as in `methods/dcgen.py`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.distill.data.encode import decode, latents
from hasten.distill.data.prepare import prepare
from hasten.distill.data.store import Store
from hasten.distill.export.lora import lora_of
from hasten.distill.loop import cost, memory_plan, processes
from hasten.distill.loop.draw import Draw
from hasten.distill.loop.ending import Ended, ending, never
from hasten.distill.loop.state import claimed, replace_folder
from hasten.distill.loop.trainer import Trainer
from hasten.distill.methods.dcgen import EMBEDDERS, HEADS, DCGen, TwoSpaces, embedder, head, named
from hasten.distill.network.host_call import HostCall, learn
from hasten.distill.network.roles import TARGETS, Adapter, Role, Roles, Stage
from hasten.distill.pretrain.bundle import forget_paths
from hasten.distill.train_config import TrainConfig
from hasten.distill.training import MAY_CHANGE, begun
from hasten.errors import ModelError, StoppedError, UsageError
from hasten.pipelines import loading, tiny_models

Say = Callable[[str], None]

BATCH = 32
"""Pictures that are decoded at a time."""


@dataclass(frozen=True)
class BothSpaces:
    """Rows in both spaces. store: x0 are the new latents, and z stands for the old ones."""

    store: Store

    def __len__(self) -> int:
        return len(self.store)

    def batch(self, index: Tensor, draw: Draw) -> TwoSpaces:
        """The rows of these numbers."""
        found = self.store.batch(index, draw)
        return TwoSpaces(found.condition, found.empty, found.x0, None, found.shape, old=found.z)


def train_new_latents(
    config: TrainConfig, out: Path, *, resume: bool = False, stop_after: int | None = None, progress: bool = True,
    say: Say = lambda text: None, ended: Ended = never,
) -> Trainer:  # fmt: skip
    """Train below `out`: `data.safetensors` (old latents), `log.jsonl`, `latest/`, and at the end `student/`, a pipeline that
    plain diffusers opens. Raises as `training.train` does."""
    method = config.method
    assert isinstance(method, DCGen)
    _check(config, method)
    with processes.joined():
        # Two layers are trained whole, and bfloat16 would round small steps away; train.precision is for speed.
        base = loading.open_pipeline(config.model, quiet=True, dtype="float32")
        call = tiny_models.call_defaults(base) | config.data.call
        mine = claimed(out, config.model_dump(mode="json"), resume, MAY_CHANGE)
        with mine:
            vae_folder = Path(method.autoencoder).expanduser().absolute()
            vae = open_autoencoder(vae_folder)
            with cost.metered(out, "data"):
                host, old = prepare(config, base, out, say, resume, progress)
                pipe = moved(base, host, vae, call, config.train.seed)
                new, rows = in_both(base, host, pipe, old, call)
            say(f"{_tokens(host)} tokens become {_tokens(new)} in every evaluation.")
            adapter = Adapter(config.student.rank, float(config.student.alpha or config.student.rank))
            roles = cast_new(host, new, adapter, config.train.seed)
            trainer = Trainer(method, roles, rows, config.train, out, new.shape, progress)
            say(memory_plan.memory(roles))
            memory_plan.check_disk(trainer)
            with cost.metered(out, "training"), ending(ended) as trainer.ended:
                done = trainer.fit(resume and begun(out, say), stop_after)
            if done < min(config.train.steps, stop_after or config.train.steps):
                raise StoppedError(f"Stopped after step {done} of {config.train.steps}, with a checkpoint. Go on with --resume.")
            if done == config.train.steps and processes.first():
                told = call if config.data.folder is not None else call | _unguided(base)
                told_of = {"base": config.model, "autoencoder": vae_folder.name}
                write(trainer, pipe, out / "student", told, told_of)
                say(f"It is a pipeline of its own: hasten generate {out / 'student'} --prompt TEXT")
            return trainer


def open_autoencoder(folder: Path) -> Any:
    """The AutoencoderKL in `folder`, from safetensors. Raises `UsageError` where there is none."""
    from diffusers import AutoencoderKL

    file = folder / "config.json"
    kind = json.loads(file.read_text()).get("_class_name") if file.is_file() else None
    if kind != "AutoencoderKL":
        found = f"it holds a {kind}" if kind else "there is no config.json"
        raise UsageError(f"'{folder}' is no folder of an AutoencoderKL ({found}). Write one with vae.save_pretrained(folder).")
    loaded: Any = AutoencoderKL.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    return loaded.eval().requires_grad_(False)


def moved(pipe: Any, host: HostCall, vae: Any, call: Mapping[str, Any], seed: int = 0) -> Any:
    """A pipeline like `pipe` with this autoencoder and a network for its latents: same weights but for a new embedder and
    head, the latter zero. Raises `ModelError` where the network cannot be moved, or the latents are no smaller."""
    old: Any = host.network
    outer, inner = named(old, EMBEDDERS, nn.Conv2d), named(old, HEADS, nn.Linear)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    side = {int(call[name]) // factor for name in ("height", "width")}
    if len(host.shape) != 3 or len(side) != 1 or host.shape[1] <= min(side):
        raise ModelError(
            f"The autoencoder makes latents of {sorted(side)} a side of pictures {call['height']} x {call['width']}, the model's"
            f" own are {host.shape[1:]}. They must be square and smaller; give a deeper autoencoder."
        )
    config = dict(old.config)
    channels, ratio = int(vae.config.latent_channels), min(side) / host.shape[1]
    outs = config.get("out_channels")
    changes: dict[str, Any] = {"in_channels": channels, "sample_size": min(side)}
    changes |= {} if outs is None else {"out_channels": outs * channels // config["in_channels"]}
    changes |= {"interpolation_scale": config["interpolation_scale"] * ratio} if config.get("interpolation_scale") else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        new: Any = type(old).from_config(config | changes)
    kept = {name: value for name, value in old.state_dict().items() if not name.startswith((f"{outer}.", f"{inner}."))}
    kept = {name: value for name, value in kept.items() if name in new.state_dict()}
    new.load_state_dict(kept, strict=False)
    for parameter in head(new).parameters():
        nn.init.zeros_(parameter)
    new.to(next(old.parameters()).device).eval()
    found = type(pipe)(**(pipe.components | {"vae": vae.to(new.device), host.site: new}))
    found.set_progress_bar_config(disable=True)
    return found


@torch.no_grad()
def in_both(
    base: Any, host: HostCall, pipe: Any, old: Store, call: Mapping[str, Any]
) -> tuple[HostCall, BothSpaces]:
    """How the moved pipeline calls its network, and the rows of `old` in both spaces: decoded by the old autoencoder and
    encoded by the new one."""
    new, conditions = learn(pipe, [*old.prompts, ""], **call)
    assert old.x0 is not None
    made = []
    for start in range(0, len(old), BATCH):
        seen = decode(base, old.x0[start : start + BATCH].float(), call, "pt")
        made.append(latents(pipe, new, 2 * seen[:, :, None] - 1))
    kept = conditions.rows(torch.arange(len(old.prompts)))
    empty = conditions.rows(torch.tensor([len(old.prompts)]))
    store = replace(old, conditions=kept, empty=empty, x0=torch.cat(made), z=old.x0, shape=new.shape)
    return new, BothSpaces(store)


def cast_new(host: HostCall, new: HostCall, adapter: Adapter, seed: int = 0) -> Roles:
    """teacher: the old network, of which only the embedder is asked. student: adapters on the blocks of the new one."""
    host.network.requires_grad_(False)
    apart = (named(new.network, EMBEDDERS, nn.Conv2d), named(new.network, HEADS, nn.Linear))
    layers = [name for name, module in new.network.named_modules() if type(module).__name__ in TARGETS and name not in apart]
    stage = Stage(new.network)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stage.add("student", replace(adapter, layers=tuple(layers)))
    student = Role("student", new, stage, ("student",), True)
    stage.train(student.parameters().values())
    return Roles(teacher=Role("teacher", host, None, (), False), student=student)


def write(trainer: Trainer, pipe: Any, folder: Path, call: Mapping[str, Any], told: Mapping[str, str]) -> None:
    """The pipeline with the averaged weights, adapters merged, as `save_pretrained` writes it; `hasten.json` has the call."""
    role, player = trainer.roles["student"], trainer.players["student"]
    weights = player.average or player.parameters
    network: Any = role.host.network
    plain = type(network).from_config(network.config)
    state = {
        name.replace(".base_layer.", "."): value.detach().clone()
        for name, value in network.state_dict().items() if ".lora_" not in name
    }  # fmt: skip
    for label, site in (("embedder", named(network, EMBEDDERS, nn.Conv2d)), ("head", named(network, HEADS, nn.Linear))):
        state |= {f"{site}.{end}": weights[f"heads.{label}.{end}"] for end in ("weight", "bias")}
    for name, low in lora_of(role, {n: w for n, w in weights.items() if not n.startswith("heads.")}).layers.items():
        state[f"{name}.weight"] = state[f"{name}.weight"] + low.change().to(state[f"{name}.weight"])
    plain.load_state_dict(state)
    done = type(pipe)(**(pipe.components | {role.host.site: plain}))

    def fill(part: Path) -> None:
        done.save_pretrained(part, safe_serialization=True)
        forget_paths(part)
        facts = dict(told) | {"call": dict(call), "method": trainer.method.model_dump(exclude={"autoencoder"})}
        (part / "hasten.json").write_text(json.dumps(facts, indent=1) + "\n")
        (part / "README.md").write_text(_card(trainer, told, call))

    replace_folder(folder, fill)


def _card(trainer: Trainer, told: Mapping[str, str], call: Mapping[str, Any]) -> str:
    pipe, steps = "DiffusionPipeline", trainer.settings.steps
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.items())
    return f"""---
base_model: {told["base"]}
library_name: diffusers
tags: [dc-gen, hasten]
---
# {told["base"]} on the latents of {told["autoencoder"]}

Moved by `hasten train dcgen` in {steps} steps of {trainer.settings.batch} pictures (seed {trainer.settings.seed}): {_tokens(trainer.roles["teacher"].host)}
tokens in an evaluation became {_tokens(trainer.roles["student"].host)}. How good it is was not measured here: nothing is claimed.

```python
from diffusers import {pipe}

pipe = {pipe}.from_pretrained("FOLDER")
picture = pipe("...", {arguments}).images[0]
```
"""


def _check(config: TrainConfig, method: DCGen) -> None:
    """What can be said before anything is loaded."""
    if not method.autoencoder:
        raise UsageError("Which autoencoder? Say --set method.autoencoder=FOLDER, with an AutoencoderKL that is deeper.")
    student = config.student
    given = {"full": student.full, "base_lora": student.base_lora, "start": student.start, "styles": student.styles,
             "attention": student.attention, "layers": student.layers}  # fmt: skip
    for name, value in given.items():
        if value:
            raise UsageError(f"student.{name} has no meaning for dcgen, which makes a model of its own. Leave it out.")
    if processes.count() > 1:
        raise UsageError("dcgen trains in one process. Start it without accelerate launch.")


def _unguided(pipe: Any) -> dict[str, float]:
    """Guidance is in the pictures already where the guided teacher made them."""
    known = inspect.signature(type(pipe).__call__).parameters
    return {name: 1.0 for name in ("true_cfg_scale", "guidance_scale") if name in known}


def _tokens(host: HostCall) -> int:
    """Tokens of the latents in one evaluation."""
    stride = embedder(host.network).stride
    assert isinstance(stride, tuple)
    return int((host.shape[1] // int(stride[0])) * (host.shape[2] // int(stride[1])))
