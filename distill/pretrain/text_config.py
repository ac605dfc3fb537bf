"""The configuration of a text model's training: strict (unknown keys are errors), read from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from hasten.distill.pretrain.config import PretrainConfig, Strict, parse_as, parse_config, read_config
from hasten.errors import UsageError, nearest
from hasten.pipelines.list_tasks import PLACES

if TYPE_CHECKING:
    from hasten.distill.pretrain.masked_images_config import MaskedImageConfig

LONGEST_QUESTION = PLACES + 6
"""Tokens of `insert x at 3: (eight places) =`."""
LONGEST_ANSWER = PLACES + 2
"""Nine letters and the end of the text."""

KINDS = ("video", "image", "text", "masked-image", "image-tokens")


class ModelConfig(Strict):
    """A Llama-class transformer with tied embeddings.

    attention: `full` (every token sees every token), `block` (blocks of `block` tokens see themselves and the blocks
    before them, as in BD3-LM, https://arxiv.org/abs/2503.09573) or `causal` (an ordinary language model).
    shifted: the output at position i - 1 predicts token i, as in Dream; a causal model always does that.
    """

    width: PositiveInt = 256
    layers: PositiveInt = 6
    heads: PositiveInt = 8
    ffn: PositiveInt = 640
    positions: PositiveInt = 512
    attention: Literal["full", "block", "causal"] = "full"
    block: PositiveInt | None = None
    shifted: bool = False

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width must be a multiple of 2 x heads ({2 * self.heads}), as rotary positions turn pairs,"
                f" got {self.width}"
            )
        if (self.attention == "block") != (self.block is not None):
            raise ValueError("block goes with attention: block, and only with it")
        if self.shifted and self.attention != "full":
            raise ValueError("shifted goes with attention: full (a causal model always predicts the next token)")
        return self


class TasksConfig(Strict):
    """List tasks: `batch` questions a step, each with its answer filled up with ends of text to one length.

    The length is drawn anew for every step from `shortest` to `longest` tokens, so that the number of tokens after
    the question is nothing the model could rely on.
    """

    batch: PositiveInt = 96
    later: PositiveInt | None = None
    shortest: PositiveInt = 26
    longest: PositiveInt = 38
    tail: PositiveFloat = 0.1
    """Weight in the loss of each end of text after the first."""

    @model_validator(mode="after")
    def _long_enough(self) -> TasksConfig:
        least = LONGEST_QUESTION + LONGEST_ANSWER
        if not least <= self.shortest <= self.longest:
            raise ValueError(
                f"needed: {least} <= shortest <= longest, as the longest question and answer have {least} tokens,"
                f" got {self.shortest} and {self.longest}"
            )
        return self


class CodeConfig(Strict):
    """Python sources: `batch` windows of `length` tokens a step; every other one keeps its beginning unmasked."""

    batch: PositiveInt = 16
    later: PositiveInt | None = None
    length: PositiveInt = 128


class RecallConfig(Strict):
    """Windows of Python sources that end with a passage of their own again: what heads that look back are learned from.

    The passage has `shortest` to `longest` tokens and stands anywhere in the window; in every other window its tokens
    are drawn by lot, so that nothing but looking back tells how it goes on.
    """

    batch: PositiveInt = 8
    length: PositiveInt = 256
    shortest: PositiveInt = 8
    longest: PositiveInt = 32

    @model_validator(mode="after")
    def _fits(self) -> RecallConfig:
        if not 4 <= self.shortest <= self.longest <= self.length // 2:
            raise ValueError(
                f"needed: 4 <= shortest <= longest <= length / 2, got {self.shortest}, {self.longest} and {self.length}"
            )
        return self


class TrainingConfig(Strict):
    """Steps and optimisers; as for the denoisers."""

    steps: PositiveInt = 4000
    lr: PositiveFloat = 2e-3
    muon_lr: PositiveFloat = 2e-3
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: int = Field(default=100, ge=0)
    cooldown: float = Field(default=0.4, ge=0, le=1)
    ema: float = Field(default=0.998, ge=0, lt=1)
    clip: PositiveFloat = 1.0
    precision: Literal["no", "bf16"] = "bf16"


class TextPretrainConfig(Strict):
    """One text model: what it is, what it learns from and how long. At least one of `tasks` and `code`.

    From step `later_from` on, a batch of tasks or code has `later` texts: the tasks are learned early, code is not.
    """

    name: str
    kind: Literal["text"]
    seed: int = 0
    model: ModelConfig = ModelConfig()
    tasks: TasksConfig | None = None
    code: CodeConfig | None = None
    recall: RecallConfig | None = None
    later_from: PositiveInt | None = None
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _learns(self) -> TextPretrainConfig:
        if self.tasks is None and self.code is None:
            raise ValueError("give tasks, code, or both: there is nothing to learn from")
        if (self.later_from is None) != all(part is None or part.later is None for part in (self.tasks, self.code)):
            raise ValueError("later_from goes with tasks.later or code.later, and they with it")
        if self.recall is not None and (self.code is None or self.model.attention != "causal"):
            raise ValueError("recall goes with code and attention: causal")
        parts = (self.code, self.recall)
        longest = max(self.tasks.longest if self.tasks else 0, *(part.length if part else 0 for part in parts))
        if longest > self.model.positions:
            raise ValueError(f"model.positions must be {longest} at least, as texts are, got {self.model.positions}")
        return self


Part = TypeVar("Part", TasksConfig, CodeConfig)


def at_step(part: Part, later_from: int | None, step: int) -> Part:
    """A section with the size of batch that it has at a step."""
    if later_from is None or part.later is None or step < later_from:
        return part
    return part.model_copy(update={"batch": part.later})


def load_any(
    path: str | Path, overrides: Mapping[str, Any] | None = None
) -> PretrainConfig | TextPretrainConfig | MaskedImageConfig:
    """Read the configuration of a picture, text or masked image model (a YAML file or a bundled name) with dotted overrides."""
    raw, where = read_config(path, overrides)
    kind = raw.get("kind")
    if kind not in KINDS:
        hint = nearest(str(kind), KINDS)
        raise UsageError(f"{where}: 'kind' must be one of {', '.join(KINDS)}, got {kind!r}.{hint}")
    if kind in ("masked-image", "image-tokens"):
        # not above: it is made of sections of this file
        from hasten.distill.pretrain.masked_images_config import MaskedImageConfig

        return parse_as(MaskedImageConfig, raw, where)
    return parse_as(TextPretrainConfig, raw, where) if kind == "text" else parse_config(raw, where)


def load_text_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TextPretrainConfig:
    """The same for a text model; `UsageError` for another kind."""
    config = load_any(path, overrides)
    if not isinstance(config, TextPretrainConfig):
        raise UsageError(f"'{path}' is the configuration of a {config.kind} model, expected kind: text.")
    return config
