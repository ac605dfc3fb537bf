"""The configuration of `hasten train pretrain`: strict (unknown keys are errors), read from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from hasten.errors import UsageError, nearest

_MAX_BYTES = 100_000

Parsed = TypeVar("Parsed", bound=BaseModel)


class Strict(BaseModel):
    """A section of a configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Strict):
    """What the pictures look like."""

    canvas: PositiveInt = 32
    digit: PositiveInt = 20
    frames: PositiveInt = 17


class TextConfig(Strict):
    """The frozen random text encoder and the padded prompt length."""

    dim: PositiveInt = 64
    layers: PositiveInt = 1
    length: PositiveInt = 16


class VaeConfig(Strict):
    """The autoencoder and its training; or `weights`, the bundled model whose autoencoder is taken as it is."""

    weights: str | None = None
    base_dim: PositiveInt = 16
    latents: PositiveInt = 8
    steps: PositiveInt = 1000
    batch: PositiveInt = 8
    frames: PositiveInt = 9
    lr: PositiveFloat = 2e-3
    warmup: int = Field(default=50, ge=0)
    kl: float = Field(default=1e-4, ge=0)

    @model_validator(mode="after")
    def _taken_or_trained(self) -> VaeConfig:
        unused = sorted(self.model_fields_set - {"weights"})
        if self.weights is not None and unused:
            raise ValueError(
                f"vae.weights takes the autoencoder of {self.weights} as it is, so {', '.join(unused)} would do"
                " nothing: drop them, or drop weights"
            )
        return self


class LatentsConfig(Strict):
    """How many encoded clips or images the denoiser sees."""

    count: PositiveInt = 16384
    batch: PositiveInt = 32


class ShallowConfig(Strict):
    """A shallower transformer that is trained first, and from which the denoiser is then grown."""

    layers: PositiveInt
    steps: PositiveInt


class JointConfig(Strict):
    """Joint attention over image and text (Flux): `denoiser.layers` double-stream blocks, then `single` others.

    rope: how many of a head's dimensions turn with the index, the row and the column of a token.
    """

    single: PositiveInt
    rope: tuple[PositiveInt, PositiveInt, PositiveInt]


class DenoiserConfig(Strict):
    """The transformer and its training."""

    heads: PositiveInt = 2
    head_dim: PositiveInt = 64
    layers: PositiveInt = 8
    shallow: ShallowConfig | None = None
    joint: JointConfig | None = None
    ffn: PositiveInt = 512
    patch: PositiveInt = 1
    shift: PositiveFloat = 3.0
    steps: PositiveInt = 4000
    batch: PositiveInt = 12
    lr: PositiveFloat = 1.5e-3
    muon_lr: PositiveFloat = 2e-3
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: int = Field(default=100, ge=0)
    cooldown: float = Field(default=0.4, ge=0, le=1)
    ema: float = Field(default=0.998, ge=0, lt=1)
    drop_prompt: float = Field(default=0.1, ge=0, le=1)
    clip: PositiveFloat = 1.0
    precision: Literal["no", "bf16"] = "bf16"

    @model_validator(mode="after")
    def _grows(self) -> DenoiserConfig:
        if self.shallow is not None and self.shallow.layers >= self.layers:
            raise ValueError(
                f"shallow.layers must be below layers ({self.layers}), got {self.shallow.layers}: the denoiser grows"
                " from it"
            )
        return self

    @model_validator(mode="after")
    def _fits_flux(self) -> DenoiserConfig:
        if self.joint is None:
            return self
        if sum(self.joint.rope) != self.head_dim or any(axis % 2 for axis in self.joint.rope):
            raise ValueError(
                f"joint.rope must be three even numbers with sum head_dim ({self.head_dim}), got {self.joint.rope}"
            )
        if self.patch != 2:
            raise ValueError(
                f"with joint, patch must be 2, as FluxPipeline packs the latents, got {self.patch}"
            )
        if "ffn" in self.model_fields_set or self.shallow is not None:
            raise ValueError(
                "with joint, drop ffn (Flux blocks have 4 x width) and shallow (not made for two lists)"
            )
        return self


class PretrainConfig(Strict):
    """One tiny model: what it is, what it learns from and how long."""

    name: str
    kind: Literal["video", "image"]
    seed: int = 0
    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    vae: VaeConfig = VaeConfig()
    latents: LatentsConfig = LatentsConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    call: dict[str, int | float | bool | str] = Field(default_factory=dict)

    @property
    def family(self) -> Literal["wan", "pixart", "flux"]:
        """Which pipeline it becomes: WanPipeline, PixArtSigmaPipeline or FluxPipeline."""
        if self.kind == "video":
            return "wan"
        return "pixart" if self.denoiser.joint is None else "flux"

    @model_validator(mode="after")
    def _is_a_pipeline(self) -> PretrainConfig:
        if self.kind == "video" and (self.denoiser.joint is not None or self.vae.weights is not None):
            raise ValueError("denoiser.joint and vae.weights are for kind: image; drop them for video")
        return self


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> PretrainConfig:
    """Read a YAML file (or the name of a bundled one) and apply dotted overrides such as {"denoiser.steps": 100}."""
    return parse_config(*read_config(path, overrides))


def read_config(
    path: str | Path, overrides: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], str]:
    """The plain mapping of a YAML file with the overrides in it, and the file's name for messages."""
    file = find_config(path)
    if file.stat().st_size > _MAX_BYTES:
        raise UsageError(f"'{file}' is larger than {_MAX_BYTES} bytes: a configuration is a short YAML file.")
    raw = yaml.safe_load(file.read_text())
    if not isinstance(raw, dict):
        raise UsageError(f"'{file}' holds {type(raw).__name__}, expected a mapping of keys to values.")
    for key, value in (overrides or {}).items():
        _assign(raw, key, value)
    return raw, str(file)


def parse_config(raw: Mapping[str, Any], where: str = "configuration") -> PretrainConfig:
    """Validate a plain mapping; an unknown key is an error that names the nearest valid one."""
    return parse_as(PretrainConfig, raw, where)


def parse_as(kind: type[Parsed], raw: Mapping[str, Any], where: str) -> Parsed:
    """The same for another configuration class."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(kind, item) for item in error.errors()]
        raise UsageError(f"{where}: " + "; ".join(lines)) from None


def find_config(path: str | Path) -> Path:
    """The file itself, or the bundled configuration of that name."""
    bundled = Path(__file__).parents[1] / "configs"
    for candidate in (Path(path), bundled / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(p.stem for p in bundled.glob("*.yaml"))
    raise UsageError(f"no configuration '{path}': give a YAML file, or one of {', '.join(names)}.")


def _assign(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise UsageError(f"cannot set '{key}': '{parent}' is a value, not a section.")
    raw[last] = value


def _explain(kind: type[BaseModel], item: Any) -> str:
    path = ".".join(str(p) for p in item["loc"])
    if item["type"] != "extra_forbidden":
        said, got = item["msg"].removeprefix("Value error, "), repr(item["input"])
        told = isinstance(item["input"], Mapping) or got in said  # a whole section says nothing; a value is said once
        where = f"'{path}': " if path and not said.startswith(path) else ""
        return where + (said if told else f"{said.removesuffix('.')}, got {got}")
    model: Any = kind
    for part in (part for part in item["loc"][:-1] if isinstance(part, str)):  # the others are places in lists
        model = _section(model.model_fields[part].annotation)
    allowed = list(model.model_fields)
    return (
        f"unknown key '{path}'; allowed here: {', '.join(allowed)}.{nearest(str(item['loc'][-1]), allowed)}"
    )


def _section(annotation: Any) -> Any:
    """The model class of a section, also of one that may be absent (`Section | None`)."""
    return next((a for a in get_args(annotation) if a is not type(None)), annotation)
