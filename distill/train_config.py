"""The configuration of a training: strict, read from YAML, with the spellings that other trainers' users know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from hasten.distill.loop.settings import TrainSettings
from hasten.distill.method import Method
from hasten.distill.methods import load_all
from hasten.distill.pretrain.config import Strict, parse_as, read_config
from hasten.errors import UsageError, nearest
from hasten.part import parse
from hasten.pipelines.recipes import recipe
from hasten.recipe import Attention
from hasten.sparse_attn.policy import SparseAttention

ALIASES = {
    # diffusers' scripts and trl
    "pretrained_model_name_or_path": "model",
    "teacher": "model",
    "max_train_steps": "train.steps",
    "train_batch_size": "train.batch",
    "gradient_accumulation_steps": "train.accumulate",
    "learning_rate": "train.lr",
    "lr_scheduler": "train.schedule",
    "lr_warmup_steps": "train.warmup",
    "optimizer": "train.optimizer",
    "adam_weight_decay": "train.weight_decay",
    "max_grad_norm": "train.clip",
    "ema_decay": "train.average",
    "mixed_precision": "train.precision",
    "gradient_checkpointing": "train.checkpointing",
    "checkpointing_steps": "train.checkpoint_every",
    "report_to": "train.report_to",
    "validation_steps": "train.samples_every",
    "num_validation_images": "train.samples",
    "seed": "train.seed",
    "rank": "student.rank",
    "lora_alpha": "student.alpha",
    "lora_target_modules": "student.layers",
    "train_data_dir": "data.folder",
    "prompts": "data.prompts",
    "data_file": "data.file",
    "start": "student.start",
    "base_lora": "student.base_lora",
    "full": "student.full",
    "composable": "student.styles",
    # kohya's
    "network_dim": "student.rank",
    "network_alpha": "student.alpha",
    "network_weights": "student.base_lora",
    "optimizer_type": "train.optimizer",
    "log_with": "train.report_to",
    "save_every_n_steps": "train.checkpoint_every",
    "sample_every_n_steps": "train.samples_every",
}
"""Other trainers' names -> ours."""


class StudentConfig(Strict):
    """What is trained. full: the whole network instead of an adapter, with a copy for every role.

    rank, alpha: of the adapters; null for alpha is rank (a scale of 1). layers: ends of the names of the layers they
    are on, null for all. base_lora: a LoRA (file or folder) that teacher and student both keep. start: folder of a finished
    training with a student of the same kind, whose weights this one begins with. experts: parts of an adapter's ranks whose
    weights follow the time (TD-LoRA); 1 for an ordinary LoRA.

    merge: whether the file that is written holds the base LoRA, too. styles: LoRA files, or folders with some, of which
    each step has one on teacher and student, or none, so that the student goes with such styles later. attention: a recipe's
    name, its file, or the axis itself: the student reads so little in every evaluation, the teacher everything.
    """

    full: bool = False
    rank: int = Field(32, ge=1)
    alpha: float | None = Field(None, gt=0)
    layers: tuple[str, ...] | None = None
    base_lora: str | None = None
    start: str | None = None
    experts: int = Field(1, ge=1)
    merge: bool = False
    styles: tuple[str, ...] = ()
    attention: SparseAttention | None = None

    @field_validator("styles", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("attention", mode="before")
    @classmethod
    def _axis(cls, value: Any) -> Any:
        if value is None or isinstance(value, SparseAttention):
            return value
        found = recipe(value).attention if isinstance(value, str) else parse(Attention, value, "student.attention")
        if not isinstance(found, SparseAttention):
            raise UsageError(f"student.attention = {value!r} is no sparse attention of images and clips; radial is one.")
        return found

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.styles and self.full:
            raise ValueError("styles are adapters on the weights that teacher and student share; leave full out")
        if self.merge and not self.base_lora:
            raise ValueError("merge puts base_lora into the student's file, and there is none")
        return self


class DataConfig(Strict):
    """What it is trained on. prompts: a list, or the name of a file with one a line. count: samples that the teacher
    makes, for methods that need latents or pairs and where no folder is given. folder: own pictures or clips with
    captions; resize: whether files of another size are scaled and cut, or skipped; uncaptioned: whether files without a
    caption get the empty prompt, or are skipped. file: `data.safetensors` of another training with the same teacher.
    call: arguments of the teacher's pipeline (steps, guidance, size). drop: share of rows without prompt.
    """

    prompts: tuple[str, ...] | str = ()
    count: int = Field(512, ge=1)
    folder: str | None = None
    file: str | None = None
    resize: bool = True
    uncaptioned: bool = False
    call: dict[str, Any] = Field(default_factory=dict)
    drop: float = Field(0.0, ge=0, lt=1)


class TrainConfig(Strict):
    """One training. model: a bundled model, a folder, or a hub id. method: its kind and numbers."""

    model: str
    method: Method
    student: StudentConfig = StudentConfig()
    data: DataConfig = DataConfig()
    train: TrainSettings = TrainSettings()

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Method:
        load_all()
        return parse(Method, value, "method")  # type: ignore[type-abstract]  # a member is what comes

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        kind, student = self.method.kind, self.student
        if self.method.data == "tokens" and (student.styles or student.attention is not None):
            raise ValueError(f"student.styles and student.attention are for pictures and clips, and {kind} trains a text model")
        if student.styles and not self.method.composable:
            raise ValueError(
                f"{kind} learns from data that were made without a style, so student.styles would teach two things at once;"
                " possible with dmd, guidance, lcm, lcm-lora, meanflow, progressive, scm"
            )
        plain = StudentConfig()
        unused = [name for name in StudentConfig.model_fields if getattr(student, name) != getattr(plain, name)]
        if unused and not self.method.trains and self.method.data != "tokens":
            raise ValueError(
                f"{kind} trains the network's own layers, without an adapter or a copy, so student.{unused[0]} would do nothing;"
                " drop it (what it trains is said by method.*)"
            )
        return self


def load_config(
    method: str, file: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The configuration in `file` (or an empty one) with `overrides` in it, for this method.

    overrides: dotted names of ours, or other trainers' names (`ALIASES`, dashes or underscores). Raises `UsageError`
    naming what is unknown, contradicts, or is missing.
    """
    given = {key: plain for name, value in (overrides or {}).items() for key, plain in spelt(name, value).items()}
    raw, where = read_config(file, given) if file is not None else (_tree(given), "the options")
    kind = raw.setdefault("method", {}).setdefault("kind", method)
    if kind != method:
        raise UsageError(f"{where} is for method {kind!r}, and {method!r} was asked for. Use hasten train {kind}.")
    if "model" not in raw:
        raise UsageError(f"{where}: there is no model. Say --model tiny-flux, a folder, or a hub id.")
    if isinstance(raw.get("data", {}).get("prompts"), str) and not Path(raw["data"]["prompts"]).is_file():
        raise UsageError(f"There is no prompts file {raw['data']['prompts']!r}: a text file with one prompt a line.")
    return parse_as(TrainConfig, raw, where)


def methods() -> list[str]:
    """Names of all ways of training."""
    load_all()
    return sorted(Method.members())


def spelt(name: str, value: Any) -> dict[str, Any]:
    """An option in our names. `--resolution 512` is a square; kohya's `--resolution 768,512` is width and height."""
    if name != "resolution":
        return {ours(name): value}
    sides = value.replace("x", ",").split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        numbers = [int(side) for side in sides]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) not in (1, 2):
        raise UsageError(f"--resolution {value}: expected a side (512), or width and height (768,512).")
    return {"data.call.width": numbers[0], "data.call.height": numbers[-1]}


def ours(name: str) -> str:
    plain = name.replace("-", "_")
    if plain in ALIASES:
        return ALIASES[plain]
    if "." in name or plain in TrainConfig.model_fields:
        return name
    known = [*ALIASES, "resolution", *TrainConfig.model_fields]
    raise UsageError(f"Unknown option --{name}.{nearest(plain, known)} Dotted names work, too: --set train.lr=1e-4.")


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    raw: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        place = raw
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return raw
