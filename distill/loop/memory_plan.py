"""What a training will take, from a model's configuration and the heads of its files: no weight is read.

weights: of all parts of the pipeline, and a copy of the network for every role where the student is full. trained: for each
number of an adapter or a copy its gradient, two of AdamW and, for the student, an average, all float32. activations: an
estimate,

    rows x tokens x width x blocks x K,    K = (34 linear and elementwise results + the adapters' inputs) x bytes,

for the one evaluation that is differentiated; with `checkpointing` the inputs of the blocks and one block's own. What a
method evaluates beside it (judges, a critic) comes on top, and the share of attention that is written out grows with tokens.
`benchmarks/activations.py` prints how far off it is on the bundled models.

Shapes: none of its own.
"""

from __future__ import annotations

import inspect
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn

from hasten.distill.loop import processes
from hasten.distill.loop.trainer import Trainer
from hasten.distill.network.roles import Adapter, Roles, Stage
from hasten.distill.train_config import TrainConfig
from hasten.errors import UsageError
from hasten.pipelines import loading, tiny_models

NETWORKS = ("transformer", "unet")
"""Folders of a pipeline in which the network lies that is trained."""

RESULTS = 34
"""Results of a block that are kept for its gradient, in numbers per token and channel."""

OVER = 1.7
"""The estimate of activations was up to so many times what was kept: what does not fit by the estimate alone is not refused."""

UNKNOWN = "it needs data.call.height and width, and a network of equal blocks"
"""Why activations have no estimate."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes for each process; `activations` is 0 where there is no estimate. One checkpoint is `disk` bytes."""

    weights: int
    trained: int
    activations: int
    disk: int

    @property
    def whole(self) -> int:
        """All of it."""
        return self.weights + self.trained + self.activations

    def told(self) -> str:
        """In words."""
        doubt = " It may not fit." if self.whole > free() else ""
        about = f"about {size(self.activations)}" if self.activations else f"not estimated ({UNKNOWN})"
        return (
            f"Memory plan: weights {size(self.weights)}, what is trained with gradients, AdamW and average {size(self.trained)},"
            f" activations {about}: {size(self.whole)} of {size(free())} that are free.{doubt}"
        )


def plan(config: TrainConfig) -> MemoryPlan | None:
    """What this training takes. None for a hub id of which nothing is on this disk yet, and for pipelines whose network lies
    elsewhere. Raises `UsageError` for an adapter that fits no layer."""
    folder = _folder(config.model)
    name = next((name for name in NETWORKS if folder is not None and (folder / name / "config.json").is_file()), None)
    if folder is None or name is None:
        return None
    settings, student, roles = config.train, config.student, len(config.method.trains)
    told = json.loads((folder / name / "config.json").read_text())
    network = _empty(told)
    own = sum(p.numel() for p in network.parameters())
    plain = torch.float32 if student.full else loading.pick_dtype(None, loading.pick_device(None))
    parts = sum(_numbers(part) for part in folder.iterdir() if part.is_dir() and part.name != name)
    if student.full:
        each, base = own, own * (1 + roles)
    else:
        each, base = _adapter(network, Adapter(student.rank, float(student.alpha or student.rank), student.layers)), own
    cut = processes.launched() if settings.shard else 1
    if not roles:  # what such a method trains, it says itself
        each = 0
    changed = roles - len(config.method.averages)
    kept = each * (3 * changed + bool(settings.average)) * 4 + (0 if student.full else each * roles * 4)
    rows = max(1, settings.batch // (processes.launched() * settings.accumulate))
    usual = tiny_models.call_defaults(config.model) if config.model in tiny_models.names() else _usual(folder)
    active = _activations(told, folder, usual | config.data.call, network, rows, config, plain)
    disk = each * 4 * (roles + 2 * changed + bool(settings.average))
    return MemoryPlan(base * plain.itemsize // cut + parts * plain.itemsize, kept // cut, active, disk)


def check_fits(found: MemoryPlan) -> None:
    """Raises `UsageError` where there is not as much memory, with what to change."""
    if found.weights + found.trained + found.activations / OVER <= free():
        return
    parts = {"weights": found.weights, "what is trained": found.trained, "activations": found.activations}
    worst = max(parts, key=lambda name: parts[name])
    advice = {
        "weights": "Train an adapter instead of copies (leave student.full out), or cut the weights among several processes"
        " (train.shard=true under torchrun).",
        "what is trained": "Lower student.rank, name fewer student.layers, or train an adapter (leave student.full out).",
        "activations": "Lower train.batch, raise train.accumulate, make smaller data (data.call), or say"
        " train.checkpointing=true.",
    }
    told = found.told().removesuffix(" It may not fit.")
    raise UsageError(f"{told} It does not fit; most are {worst}. {advice[worst]}")


def memory(roles: Roles) -> str:
    """What weights, gradients and optimisers take, in words. Activations come on top."""
    networks = {id(role.host.network): role.host.network for role in roles.values()}
    held = sum(t.numel() * t.element_size() for n in networks.values() for t in n.parameters())
    trained = sum(p.numel() for role in roles.values() if role.trained for p in role.parameters().values())
    return (
        f"Memory: weights {size(held)} for {len(roles)} roles on {len(networks)} network(s); {trained / 1e6:.2f} M numbers"
        f" are trained, with gradients and AdamW {size(12 * trained)}; activations come on top."
    )


def check_disk(trainer: Trainer) -> None:
    """Raises `UsageError` where the disk has no room for a checkpoint beside the one before it."""
    one = 0
    for player in trainer.players.values():
        weights = sum(t.numel() * t.element_size() for t in player.parameters.values())
        one += weights * (1 + bool(player.average) + 2 * (player.optimizer is not None))
    check_room(one, trainer.out)


def check_room(one: int, out: Path) -> None:
    """Raises `UsageError` where two checkpoints of so many bytes do not fit on the disk of `out`."""
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < 2 * one:
        raise UsageError(
            f"Two checkpoints of {size(one)} must fit on the disk, and '{out}' has {size(free)} free. Make room,"
            " or give another folder, before anything is trained."
        )


def free() -> int:
    """Bytes that may be had on the device that a training would take."""
    if loading.pick_device(None).type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available) // processes.launched()


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.2f} GiB" if count > 2**29 else f"{count / 2**20:.1f} MiB"


def _folder(model: str) -> Path | None:
    kind = loading.check_name(model)
    if kind == "bundled":
        return tiny_models.path(model)
    if kind == "folder":
        return Path(model).expanduser()
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "model_index.json")
    return Path(found).parent if isinstance(found, str) else None


def _empty(told: Mapping[str, Any]) -> nn.Module:
    """The network of this configuration, without memory for its weights."""
    import diffusers

    kind: Any = getattr(diffusers, told["_class_name"])
    with init_empty_weights():
        made: nn.Module = kind.from_config(dict(told))
    return made


def _adapter(network: nn.Module, adapter: Adapter) -> int:
    """How many numbers an adapter has on this network."""
    with torch.device("meta"):
        Stage(network).add("student", adapter)
    return sum(p.numel() for name, p in network.named_parameters() if ".lora_" in name)


def _numbers(folder: Path) -> int:
    """Numbers in the safetensors files of a part; of two variants the plain one."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if "." not in file.stem] or files
    return sum(math.prod(shape) for file in plain for shape in _shapes(file))


def _shapes(file: Path) -> Iterator[list[int]]:
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118  # not a dict
            yield opened.get_slice(name).get_shape()


def _activations(
    told: Mapping[str, Any], folder: Path, call: Mapping[str, Any], network: nn.Module, rows: int, config: TrainConfig,
    plain: torch.dtype,
) -> int:  # fmt: skip
    """The estimate of the module's docstring; 0 for networks without one width, such as UNets."""
    heads, width = told.get("num_attention_heads"), told.get("attention_head_dim")
    blocks = max((len(m) for m in network.modules() if isinstance(m, nn.ModuleList)), default=0)
    blocks = sum(v for k, v in told.items() if k in ("num_layers", "num_single_layers") and isinstance(v, int)) or blocks
    count = _tokens(told, folder, call)
    if not isinstance(heads, int) or not isinstance(width, int) or not count:
        return 0
    bytes_each = 2 if config.train.precision == "bf16" else plain.itemsize
    block = rows * count * heads * width * RESULTS * bytes_each
    if config.train.checkpointing:
        return block + blocks * rows * count * heads * width * bytes_each
    return block * blocks


def _usual(folder: Path) -> dict[str, int]:
    """The numbers that the pipeline takes where the call says nothing: its size, frames, tokens of text."""
    import diffusers

    kind = getattr(diffusers, str(json.loads((folder / "model_index.json").read_text()).get("_class_name")), None)
    known = inspect.signature(kind.__call__).parameters if kind is not None else {}
    return {name: p.default for name, p in known.items() if type(p.default) is int}


def _tokens(told: Mapping[str, Any], folder: Path, call: Mapping[str, Any]) -> int:
    """How many tokens a row has in the network's blocks; 0 where neither call nor network says a size."""
    file = folder / "vae" / "config.json"
    vae = json.loads(file.read_text()) if file.is_file() else {}
    levels = len(vae.get("block_out_channels", vae.get("dim_mult", [0] * 4)))
    space = int(vae.get("scale_factor_spatial") or 2 ** (levels - 1))
    patch = told.get("patch_size", 1)
    patch = int(patch[-1] if isinstance(patch, list | tuple) else patch)
    if "joint_attention_dim" in told and patch == 1:
        patch = 2  # folded by the pipeline
    frames = 1 + (int(call.get("num_frames", 1)) - 1) // int(vae.get("scale_factor_temporal") or 4)
    text = int(call.get("max_sequence_length", 512)) if "joint_attention_dim" in told else 0
    usual = told.get("sample_size")
    sides = [call.get(side) or (usual * space if isinstance(usual, int) else 0) for side in ("height", "width")]
    high, wide = (int(side) // (space * patch) for side in sides)
    return frames * high * wide + text if high * wide else 0
