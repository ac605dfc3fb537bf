"""Configurations of trainings: strict, with other trainers' spellings."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten.distill.methods.pairs import Pairs
from hasten.distill.train_config import ALIASES, TrainConfig, load_config, methods
from hasten.errors import HastenError


def test_other_trainers_names_mean_ours() -> None:
    diffusers = {"pretrained_model_name_or_path": "tiny-flux", "max_train_steps": 7, "train_batch_size": 4, "rank": 8,
                 "learning_rate": 1e-3, "mixed_precision": "bf16", "gradient-checkpointing": True}  # fmt: skip
    config = load_config("pairs", None, diffusers)
    assert (config.train.steps, config.train.batch, config.train.lr, config.train.precision) == (7, 4, 1e-3, "bf16")
    assert config.student.rank == 8 and config.train.checkpointing
    assert load_config("pairs", None, {"model": "x", "network_dim": 3, "network_alpha": 1.5}).student.alpha == 1.5


def test_looking_stopping_and_sizes_in_other_trainers_words() -> None:
    diffusers = {"model": "x", "optimizer": "AdamW", "lr_scheduler": "constant_with_warmup", "report_to": "tensorboard",
                 "checkpointing_steps": 500, "validation_steps": 100, "resolution": 512}  # fmt: skip
    config = load_config("pairs", None, diffusers)
    assert (config.train.optimizer, config.train.schedule, config.train.report_to) == ("adamw", "constant", "tensorboard")
    assert (config.train.checkpoint_every, config.train.samples_every) == (500, 100)
    assert config.data.call == {"width": 512, "height": 512}
    kohya = {"model": "x", "resolution": "768,512", "optimizer_type": "AdamW8bit", "save_every_n_steps": 7, "sample_every_n_steps": 9}
    config = load_config("pairs", None, kohya)
    assert config.data.call == {"width": 768, "height": 512} and config.train.optimizer == "adamw8bit"
    with pytest.raises(HastenError, match="expected a side .512., or width and height"):
        load_config("pairs", None, {"model": "x", "resolution": "large"})


def test_every_alias_names_a_field() -> None:
    for ours in ALIASES.values():
        section, _, name = ours.partition(".")
        kind = TrainConfig.model_fields[section].annotation
        assert not name or name in kind.model_fields, ours  # type: ignore[union-attr]


def test_a_file_with_changes(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: tiny-flux\nmethod: {kind: pairs, calls: 4}\ntrain: {steps: 9}\n")
    config = load_config("pairs", file, {"train.steps": 5, "method.huber": 0.1})
    assert config.method == Pairs(calls=4, huber=0.1) and config.train.steps == 5
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "there is no model"),
        ({"lerning_rate": 1}, "Did you mean 'learning_rate'"),
        ({"model": "x", "train.stps": 3}, "steps"),
        ({"model": "x", "method.kind": "lcn"}, "hasten train lcn"),
        ({"model": "x", "method.hubar": 1}, "hubar"),
        ({"model": "x", "train.lr": -1}, "lr"),
        ({"model": "x", "report_to": "wandb"}, "'none', 'tensorboard' or 'trackio'"),
        ({"model": "x", "train.recall": 3}, "recall of fewer than 16 samples says nothing"),
        ({"model": "x", "prompts": "/no/such/file"}, "no prompts file"),
        ({"model": "x", "method.calls": 0}, r"options: method: calls: .* greater than or equal to 1, got 0\.$"),
        ({"model": "x", "composable": "a"}, r"options: pairs learns from data .* progressive, scm$"),
        ({"model": "x", "student.attention": "teacache"}, r"options: student.attention = 'teacache' is no .* radial is one\.$"),
    ],
)
def test_what_is_wrong_is_said(given: dict[str, object], words: str) -> None:
    with pytest.raises(HastenError, match=words):
        load_config("pairs", None, given)


def test_help_names_every_method() -> None:
    from hasten.cli.train_method import METHODS

    kinds = {name for name in methods() if not name.startswith("test-")}
    assert set(METHODS) == kinds, "hasten/cli/train_method.py: METHODS says what each does"
