"""`hasten train filter`: a filter that its model then uses by name, and clear words for what cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hasten.errors import RefusedError, UsageError
from hasten.pipelines.text.diffusion import TextDiffusionPipeline
from hasten.pipelines.text.filters import FILES
from hasten.samplers.commit import Unmask
from hasten.samplers.filter import Form, Learned, load
from tests.pipelines.text_pipes import saved, tokenizer

LINES = "".join(f"w{number} w{2 * number + 1} w{(7 * number) % 90}\n" for number in range(30))
SMALL = ("--prompts", "prompts.txt", "--new", 6, "--false-commits", 0.2, "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder with a small masked language model."""
    made: Path = saved(tmp_path_factory.mktemp("models") / "first")
    return made


def opened(folder: Path, recipe: Any = None, **more: Any) -> TextDiffusionPipeline:
    return TextDiffusionPipeline.from_pretrained(folder, recipe, device="cpu", probe=False, **more)


@pytest.mark.parametrize(("form", "name"), [("slots", "learned-filter"), ("block", "learn2pd")])
def test_a_filter_from_its_command_to_its_use(hasten: Any, folder: Path, form: Form, name: str, tmp_path: Path) -> None:
    Path("prompts.txt").write_text(LINES)
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    out = mine / FILES[form]
    ran = hasten("train", "filter", "--model", mine, "--out", out, "--form", form, *SMALL, "--json", "-")
    assert ran.code == 0, ran.err
    [card] = ran.json["rows"]
    assert card["filter"] == form and card["texts"] == 30 and card["kept"] == 10 and card["model"] == "mine"
    assert f'recipe="{name}"' in ran.err and "generated 30 of 30 texts" in ran.err
    assert opened(mine, name).generate(prompts="w1 w2", max_new_tokens=5).lengths.tolist() == [5]
    elsewhere = shutil.copy(out, "x.safetensors")
    assert opened(folder, f"{name}:weights=./{elsewhere}").generate(prompts="w1 w2", max_new_tokens=5).lengths.tolist() == [5]


def test_the_same_numbers_again(hasten: Any, folder: Path) -> None:
    Path("prompts.txt").write_text(LINES)
    for name in ("a", "b"):
        assert hasten("train", "filter", "--model", folder, "--out", f"{name}.safetensors", *SMALL).code == 0
    stored = [load_file(f"{name}.safetensors") for name in ("a", "b")]
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0]) and stored[0].keys() == stored[1].keys()
    assert str(folder) not in Path("a.safetensors").read_bytes().decode("latin-1"), "no paths of this machine"


def test_a_model_that_knows_list_tasks(hasten: Any, folder: Path, tmp_path: Path) -> None:
    """What the card says is asked: tasks without code. (Its words are no letters, which does not matter here.)"""
    mine = tmp_path / "tasks"
    shutil.copytree(folder, mine)
    (mine / "hasten.json").write_text(json.dumps({"data": {"tasks": True, "code": None}}))
    options = ("--texts", 12, "--false-commits", 0.4, "--device", "cpu", "--json", "-")
    ran = hasten("train", "filter", "--model", mine, "--out", "x.safetensors", *options)
    assert ran.code == 0, ran.err
    assert "12 list tasks" in ran.err and "learned-filter:weights=x.safetensors" in ran.err


def test_chat_prompts_go_through_the_template(hasten: Any, folder: Path) -> None:
    from hasten.distill.text.filter_prompts import given

    host = opened(folder).host
    asked = given(["w5 w6"], tokenizer(), 4, host.facts, chat=True)
    assert asked.prompts[0].tolist() == [1, 5, 6, 2]


class TestWhoseFilter:
    @pytest.fixture(scope="class")
    def filters(self, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        from hasten.distill.methods.learn2pd import Learn2PD, fit
        from hasten.distill.text.filter_prompts import Asked
        from hasten.pipelines.recipes import recipe

        host = opened(folder).host
        out = tmp_path_factory.mktemp("filters") / FILES["slots"]
        asked = Asked([torch.tensor([number, 3]) for number in range(12)], [4] * 12, "")
        fit(host, asked, recipe("sequential"), out, Learn2PD(false_commits=0.5))
        return out

    def test_another_model_s_is_refused(self, filters: Path, tmp_path: Path) -> None:
        other = saved(tmp_path / "other", seed=1)
        shutil.copy(filters, other)
        with pytest.raises(RefusedError, match=r"was trained for another model.*hasten train filter --model .*other"):
            opened(other, "learned-filter")
        pipe = opened(other)
        with pytest.raises(RefusedError, match="another model"):
            pipe.generate(prompts="w1", max_new_tokens=3, recipe=f"learned-filter:weights={filters}")

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_is_the_same_model(self, filters: Path, folder: Path, dtype: str) -> None:
        pipe = opened(folder, f"learned-filter:weights={filters}", dtype=dtype)
        assert isinstance(pipe.recipe.commit, Unmask) and isinstance(pipe.recipe.commit.rule, Learned)

    def test_training_it_further_makes_it_another(self, filters: Path, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        pipe = TextDiffusionPipeline(model, tokenizer(), f"learned-filter:weights={filters}", probe=False)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
        with pytest.raises(RefusedError, match="another model"):
            pipe.generate(prompts="w1", max_new_tokens=3)

    def test_a_file_that_does_not_say_is_refused(self, folder: Path) -> None:
        from tests.contract_text import filter_file

        with pytest.raises(RefusedError, match="does not say which model"):
            opened(folder, f"learned-filter:weights={filter_file('slots')}")

    def test_none_at_all(self, folder: Path) -> None:
        with pytest.raises(UsageError, match=r"its folder has no filter-block.safetensors.*--form block --out .*first.filter-block"):
            opened(folder, "learn2pd")
        pipe = opened(folder)
        pipe.model.config._name_or_path = "owner/name"
        with pytest.raises(UsageError, match=r"not loaded from a folder.*--model owner/name .*name that file"):
            pipe.generate(prompts="w1", recipe="learned-filter")

    def test_outside_of_a_pipeline(self) -> None:
        with pytest.raises(UsageError, match="only a TextDiffusionPipeline can put in"):
            Learned().start()

    def test_a_filter_within_either_is_told_too(self, filters: Path, folder: Path) -> None:
        """learn2pd's filter is one of two rules; what it is told goes into a copy."""
        pipe = opened(folder)
        with pytest.raises(UsageError, match="of the form 'slots', and 'block' is needed"):
            pipe.generate(prompts="w1", recipe=f"learn2pd:weights={filters}")
        assert load(filters, "slots").stamp is not None


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--out", "x.safetensors", "--form", "wide"), "there are slots and block"),
        (("--out", "x.bin"), "a filter is a .safetensors file"),
        (("--out", "x.safetensors", "--data", "nowhere"), "There is no data folder nowhere"),
        (("--out", "x.safetensors", "--new", 4), "--new goes with --prompts"),
        (("--out", "x.safetensors", "--chat"), "--chat goes with --prompts"),
        (("--out", "x.safetensors", "--prompts", "nowhere.txt"), "Cannot read the prompts file"),
        (("--out", "x.safetensors", "--false-commits", 0), "must be between 0 and 1"),
        (("--out", "x.safetensors", "--texts", 30), "needs at least 297 prompts"),
        (("--out", "x.safetensors"), "Nobody knows what"),
        (("--out", "x.safetensors", *SMALL[:2], "--new", 90, "--false-commits", 0.2), "positions for 64"),
    ],
)
def test_what_cannot_be_is_said(hasten: Any, folder: Path, args: tuple[Any, ...], said: str) -> None:
    Path("prompts.txt").write_text(LINES)
    ran = hasten("train", "filter", "--model", folder, *args)
    assert ran.code == 2
    assert said in ran.sentence
    assert not Path("x.safetensors").exists()


def test_a_model_without_masks(hasten: Any, tmp_path: Path) -> None:
    from tests.pipelines.text_pipes import model

    bare = model()
    bare.config.mask_token_id = None
    bare.save_pretrained(tmp_path / "bare")
    plain = tokenizer()
    Path("prompts.txt").write_text(LINES)
    plain.save_pretrained(tmp_path / "bare")
    file = tmp_path / "bare" / "tokenizer_config.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "mask_token"}))
    ran = hasten("train", "filter", "--model", tmp_path / "bare", "--out", "x.safetensors", *SMALL)
    assert ran.code == 2 and "is the mask" in ran.sentence and "mask_token_id" in ran.sentence
