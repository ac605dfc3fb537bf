"""`hasten train learn2pd`: the filter in the trainer, from its states of decoding to a file that its model uses.

Shapes: B rows of I inputs and O outputs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts
from hasten.distill.methods.dparallel import DParallel
from hasten.distill.methods.learn2pd import Learn2PD
from hasten.distill.methods.medusa import Medusa
from hasten.distill.network.host_call import Condition
from hasten.distill.network.roles import Adapter
from hasten.distill.text.filter import held_back, risk
from hasten.distill.text.roles import TextCall, TextRoles
from hasten.distill.text.training import train_text
from hasten.distill.train_config import load_config
from hasten.errors import UsageError
from hasten.pipelines.text.diffusion import TextDiffusionPipeline
from hasten.pipelines.text.filters import FILES
from hasten.samplers.filter import INPUTS, Form, load
from tests.distill.test_text_methods import host
from tests.pipelines.text_pipes import saved

LINES = tuple(f"w{number} w{2 * number + 1} w{(7 * number) % 90}" for number in range(12))
ROW = 5 * INPUTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = saved(tmp_path_factory.mktemp("models") / "small")
    return made


def config(folder: Path, form: Form = "slots", **more: Any) -> Any:
    given = {
        "model": str(folder), "method.form": form, "method.false_commits": 0.4, "data.prompts": LINES,
        "data.call": {"max_new_tokens": 5}, "train.steps": 4, "train.batch": 16, "train.lr": 1e-2, "train.warmup": 0,
    }  # fmt: skip
    return load_config("learn2pd", None, given | more)


@pytest.mark.parametrize("form", ["slots", "block"])
def test_it_resumes_bit_for_bit_and_its_model_uses_it(folder: Path, form: Form, tmp_path: Path) -> None:
    whole = train_text(config(folder, form), tmp_path / "whole", progress=False)
    train_text(config(folder, form), tmp_path / "cut", progress=False, stop_after=2)
    assert not (tmp_path / "cut" / "student").exists()
    train_text(config(folder, form), tmp_path / "cut", progress=False, resume=True)
    one, two = (load_file(tmp_path / name / "student" / FILES[form]) for name in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert whole.players["student"].average, "what is written is the average"
    assert torch.equal(one["first.weight"], whole.players["student"].average["heads.filter.first.weight"])
    found = load(tmp_path / "whole" / "student" / FILES[form], form)
    assert risk(found.net, held_back(whole.data), found.above) <= 0.4  # type: ignore[arg-type]  # a Store
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    shutil.copy(tmp_path / "whole" / "student" / FILES[form], mine)
    name = "learned-filter" if form == "slots" else "learn2pd"
    pipe = TextDiffusionPipeline.from_pretrained(mine, name, device="cpu", probe=False)
    assert pipe.generate(prompts="w1 w2", max_new_tokens=5).lengths.tolist() == [5]


def test_the_loss_is_cross_entropy_of_open_slots() -> None:
    roles = TextRoles.of_model(TextCall.of(host()), (), Adapter(4, 4.0))
    state: Any = Learn2PD(form="block", hidden=3).start(Facts(roles, 1, ()))
    g = torch.Generator().manual_seed(0)
    right, valid = torch.rand(2, 6, 32, generator=g) < 0.5
    valid[2] = False
    inputs = torch.rand(6, 32, generator=g)
    batch = Batch(Condition({"inputs": inputs, "right": right, "valid": valid}), Condition({}))
    rows = state.loss("student", batch, Draw(0, 0, range(6)), 0, {}).rows
    said = state.net(inputs)
    for row in range(6):
        mine = valid[row]
        expected = F.binary_cross_entropy_with_logits(said[row][mine], right[row][mine].float()) if mine.any() else said.new_zeros(())
        torch.testing.assert_close(rows[row], expected)


def test_filters_start_the_same_and_see_one_more_than_before() -> None:
    roles = TextRoles.of_model(TextCall.of(host()), (), Adapter(4, 4.0))
    one, _, two = (Learn2PD().start(Facts(roles, 1, ())), torch.randn(3), Learn2PD().start(Facts(roles, 1, ())))
    assert all(torch.equal(a, b) for a, b in zip(one.net.parameters(), two.net.parameters(), strict=True))  # type: ignore[attr-defined]
    assert one.net.first.in_features == ROW  # type: ignore[attr-defined]


def test_models_of_the_other_kind_are_refused_before_they_write(tmp_path: Path) -> None:
    for kind, words in (("learn2pd", "any order"), ("dparallel", "any order")):
        with pytest.raises(UsageError, match=words):
            train_text(load_config(kind, None, {"model": "tiny-lm", "train.steps": 2}), tmp_path / kind)
        assert not (tmp_path / kind).exists()
    for method in (Learn2PD(), DParallel()):
        with pytest.raises(UsageError, match="any order"):
            method.fits(host("causal").facts)
    with pytest.raises(UsageError, match="from left to right"):
        Medusa().fits(host().facts)


def test_too_few_prompts_and_other_data_are_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 297 prompts"):
        train_text(config(folder, **{"method.false_commits": 0.01}), tmp_path / "few", progress=False)
    roles = TextRoles.of_model(TextCall.of(host()), (), Adapter(4, 4.0))
    state = Learn2PD().start(Facts(roles, 1, ()))
    with pytest.raises(UsageError, match="states of decoding"):
        state.loss("student", Batch(Condition({"ids": torch.zeros(2, 3)}), Condition({})), Draw(0, 0, range(2)), 0, {})
