"""Drafted texts as jobs: who guessed each token, whether the text is the model's own, and that nothing on the way is anybody's path."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hasten
from hasten.errors import RecipeError
from hasten.pipelines import tiny_models
from hasten.ui.engine import Engine, RequestError, Snapshot, read
from hasten.ui.engine.cancel import Cancelled
from hasten.ui.engine.desk import Desk
from hasten.ui.engine.exactness import Exactness
from hasten.ui.engine.models import Models
from hasten.ui.engine.place import Place
from hasten.ui.engine.recipes import parsed, recipe_of
from hasten.ui.engine.restore import restore
from hasten.ui.engine.work.pieces import Pieces
from tests.ui.engines import done

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")

PROMPT = "a b c d e f a b c d e f a b c d e f a b c"
DECODE: dict[str, Any] = {"kind": "decode", "model": "tiny-lm", "prompt": PROMPT, "recipe": "look-up:every=true", "length": 24}
LOSSY = "draft:\n  kind: look-up\nverify:\n  kind: typical\n  allow_lossy: true\npace:\n  kind: steady\n"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tmp_path_factory.mktemp("home"), offline=True, device="cpu") as found:
        yield found


def plainly(length: int, **drawn: Any) -> list[int]:
    """What transformers writes."""
    model, tokenizer = tiny_models.text("tiny-lm")
    inputs = tokenizer([PROMPT], return_tensors="pt")
    torch.manual_seed(3)
    call = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    made = model.generate(**call, max_new_tokens=length, **{"do_sample": False, **drawn})
    return made[0, inputs["input_ids"].shape[1] :].tolist()


def new(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [token for token in result["tokens"] if not token["given"]]


# --- whose text it is ---------------------------------------------------------------------------------------


def test_a_greedy_text_is_plain_decodings_and_says_who_guessed_what(engine: Engine) -> None:
    found = done(engine, DECODE).result
    tokens, rounds, row = new(found), found["rounds"], found["row"]
    ids = plainly(24)
    assert found["text"] == "".join(token["text"] for token in tokens) == tiny_models.text("tiny-lm")[1].decode(ids)
    assert found["exact"]["verdict"] == "same" and f"{len(ids)} of {len(ids)} tokens" in found["exact"]["headline"] and row["exact_match"] == 1.0
    by = Counter(token["by"] for token in tokens)
    assert set(by) <= {"", "look-up"} and by["look-up"] == found["drafters"]["look-up"][1] == sum(each["accepted"] for each in rounds)
    assert Counter(token["round"] for token in tokens) == Counter({0: 1, **{at: each["written"] for at, each in enumerate(rounds, 1)}})
    assert row["forwards"] == len(rounds) and row["tokens_per_forward"] == (len(ids) - 1) / len(rounds)
    assert row["drafts_per_forward"] == sum(each["drafted"] for each in rounds) / len(rounds)
    leads = [token["lead"] for token in tokens]
    assert min(leads) == found["exact"]["lead"] >= 0
    assert row["plain_seconds"] > 0 and row["speedup"] > 0
    trace = json.loads(engine.outputs.file(found["output"], found["trace"]).read_text())
    assert trace["recipe"]["name"] == "look-up:every=true" and len(trace["rounds"]) == len(rounds)


def test_of_several_drafters_each_token_names_its_own(engine: Engine) -> None:
    found = done(engine, DECODE | {"recipe": "look-up-or-draft:every=true", "length": 32}).result
    by = Counter(token["by"] for token in new(found) if token["by"])
    assert by == Counter({name: kept for name, (_, kept) in found["drafters"].items() if kept})
    assert set(found["drafters"]) <= {"look-up", "small-model"} and found["exact"]["verdict"] == "same"


def test_a_drawn_text_says_which_law_and_is_the_librarys(engine: Engine) -> None:
    found = done(engine, DECODE | {"temperature": 0.8, "top_k": 20, "seed": 3}).result
    assert found["exact"]["verdict"] == "law" and "cannot be compared" in found["exact"]["sentence"]
    assert found["row"]["exact_match"] is None and all(token["lead"] is None for token in new(found))
    model, tokenizer = tiny_models.text("tiny-lm")
    inputs = tokenizer([PROMPT], return_tensors="pt")
    torch.manual_seed(3)
    with hasten.accelerate(model, "look-up:every=true"):
        call = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        made = model.generate(**call, max_new_tokens=24, do_sample=True, temperature=0.8, top_k=20)
    assert found["text"] == tokenizer.decode(made[0, inputs["input_ids"].shape[1] :])


def test_what_is_lossy_is_called_so(engine: Engine) -> None:
    for more in ({}, {"temperature": 1.0}):
        found = done(engine, DECODE | {"recipe": LOSSY} | more).result["exact"]
        assert "lossy: typical accepts" in found["sentence"] and found["lossy"]
        assert found["verdict"] in ({"lossy"} if more else {"same", "differs"})


def test_plain_decoding_is_shown_too(engine: Engine) -> None:
    found = done(engine, DECODE | {"recipe": "plain", "length": 8}).result
    assert found["exact"]["verdict"] == "plain" and found["row"]["plain_seconds"] is None and found["trace"] is None
    assert {token["by"] for token in new(found)} == {""} and all(each["written"] == 1 for each in found["rounds"])


def test_a_comparison_names_the_first_token_that_differs() -> None:
    base = Exactness("lossless", "", False, 3)
    found = base.compared([5, 6, 7], [5, 8, 7], ["a", "b", "c"], ["a", "x", "c"], [1.0, 0.002, 3.0])
    assert (found.verdict, found.same, found.ours, found.plain, found.gap, found.lead) == ("differs", 1, "b", "x", 0.002, 0.002)
    assert "token 2" in found.headline and "“b”" in found.sentence and "“x”" in found.sentence and "0.002 apart" in found.sentence
    shorter = base.compared([5, 6], [5, 6, 7], ["a", "b"], ["a", "b", "c"], [1.0, 2.0])
    assert shorter.verdict == "differs" and "the end of the text" in shorter.sentence
    parts = base.compared([5, 6], [5, 6, 7], ["a", "b"], ["a", "b", ""], [1.0, 2.0])
    assert parts.verdict == "differs" and "“…”" in parts.sentence, "a token that is a part of a character is one, too"
    assert base.compared([5, 6], [5, 6], ["a", "b"], ["a", "b"], [1.0, 2.0]).verdict == "same"
    assert Exactness("", "", False, 3).verdict == "plain" and Exactness("typical", "so", True, 3).verdict == "lossy"


# --- while it runs ------------------------------------------------------------------------------------------


def asked_at(tmp_path: Path, at: int | None) -> tuple[list[Snapshot], dict[str, Any] | None, int]:
    """A decode that is told to stop at one of the looks; what it told, its result, and the looks."""
    told: list[Snapshot] = []
    looks = [0]

    def stopped() -> bool:
        looks[0] += 1
        return looks[0] == at

    place = Place(tmp_path, device="cpu")
    place.make()
    desk = Desk(place)
    try:
        return told, desk.perform("0", read(DECODE | {"length": 12}), told.append, stopped), looks[0]
    except Cancelled:
        return told, None, looks[0]


def test_it_stops_within_a_forward_wherever_it_is(tmp_path: Path) -> None:
    _, whole, looks = asked_at(tmp_path, None)
    assert whole is not None and looks > 3 * 12
    for at in (2, looks // 4, looks // 2, looks - 2):
        _, found, seen = asked_at(tmp_path, at)
        assert found is None and seen == at, "the look that says stop is the last one"
    _, again, _ = asked_at(tmp_path, None)
    assert again is not None and new(again) == new(whole)


def test_the_text_is_seen_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["hasten.ui.engine.work.decode"], "SHOWN", 0.0)
    told, result, _ = asked_at(tmp_path, None)
    assert result is not None
    seen = [snapshot.data["tokens"] for snapshot in told if "tokens" in snapshot.data]
    lengths = [len(tokens) for tokens in seen]
    assert lengths == sorted(lengths) and lengths[0] == 2 and lengths[-1] == len(result["tokens"])
    known = [[(token["by"], token["round"]) for token in tokens if token["by"] is not None] for tokens in seen]
    final = [(token["by"], token["round"]) for token in new(result)]
    assert all(each == final[: len(each)] for each in known), "who guessed a token is not told before it is known"
    assert [snapshot.phase for snapshot in told if snapshot.phase.startswith("Decoding plainly")]


# --- what is allowed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changed", "said"), [
    ({"recipe": "h2o"}, "drafts nothing"), ({"model": "tiny-dllm"}, "does not write from left to right"), ({"length": 8192}, "do not fit"),
    ({"recipe": "dyspec:model=folder:none"}, "no model 'folder:none'"),
])  # fmt: skip
def test_what_cannot_be_decoded_fails_with_words(engine: Engine, changed: dict[str, Any], said: str) -> None:
    job = engine.wait(engine.submit(DECODE | changed).id)
    assert job.state == "failed" and job.error["kind"] == "refused" and said in job.error["sentence"], job.error


@pytest.mark.parametrize(("changed", "said"), [
    ({"temperature": -1.0}, "temperature"), ({"temperature": 0.001}, "temperature"), ({"top_k": 5}, "top_k"), ({"length": 0}, "length"),
    ({"temperature": 1.0, "top_k": 0}, "top_k"), ({"recipe": "dyspec:model=somewhere"}, "folder:NAME"), ({"path": "x"}, "path"),
])  # fmt: skip
def test_what_is_not_allowed_is_said_at_once(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        read(DECODE | changed)


@pytest.mark.parametrize("text", [
    "draft:\n  kind: small-model\n  model: /etc", "draft:\n  kind: small-model\n  model: ../there", "draft:\n  kind: candidates\n  model: ~/x",
    "draft:\n  kind: mixed\n  first: {kind: look-up}\n  second: {kind: small-model, model: /etc}", "draft:\n  kind: diffusion-draft\n  model: /etc",
    "draft:\n  kind: own-model\n  skip: {kind: routers, path: /etc/passwd}", "draft:\n  kind: medusa\n  path: /etc/passwd",
    "draft:\n  kind: look-up\n  nodes: 1000000000", "dyspec:model=/etc", "dyspec:model=~",
])  # fmt: skip
def test_a_drafter_names_no_path_and_no_forest(text: str) -> None:
    with pytest.raises(RecipeError):
        parsed(text)


# --- models of one's own ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with a causal model and a small one, both random, with tiny-lm's tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = tiny_models.text("tiny-lm")[1]
    for seed, name in enumerate(("large", "small")):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2 - seed, **sizes)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def test_folders_may_decode_and_draft_for_each_other(folders: Path, tmp_path: Path) -> None:
    with Engine(tmp_path, models=folders, offline=True, apart=False, device="cpu") as engine:
        assert [card.kind for card in engine.models.cards() if card.where == "folder"] == ["language", "language"]
        asked = DECODE | {"model": "folder:large", "recipe": "dyspec:model=folder:small,above=0,every=true", "length": 10}
        job = done(engine, asked)
        assert set(job.result["drafters"]) == {"small-model"} and job.result["exact"]["verdict"] == "same"
        program, text = engine.python(job.request), engine.yaml(job.request)
    assert f"model: {folders / 'small'}\n" in program and "model: folder:small" not in program
    compile(program, "exported.py", "exec")
    assert restore(text.encode(), engine.limits, tmp_path) == job.request


def test_a_folder_says_by_its_config_how_it_writes(tmp_path: Path) -> None:
    kinds = {
        "left": {"architectures": ["LlamaForCausalLM"]}, "own": {"architectures": ["XForCausalLM"], "auto_map": {"AutoModel": "x.X"}},
        "masks": {"architectures": ["LlamaForCausalLM"], "hasten_diffusion": {"kind": "full"}}, "odd": {"architectures": "LlamaForCausalLM"},
    }  # fmt: skip
    for name, config in kinds.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    models = Models(Place(tmp_path / "home", tmp_path))
    found = {card.id: card.kind for card in models.cards() if card.where == "folder"}
    assert found == {"folder:left": "language", "folder:own": "text", "folder:masks": "text", "folder:odd": "text"}
    assert set(models.drafting()) == {"folder:left"}
    assert recipe_of("dyspec:model=folder:left", {}, models.drafting()).draft.model == str(tmp_path / "left")  # type: ignore[union-attr]


# --- words --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["def f(x):\n    return x  # ok", "naïve — ∑ 漢字 🙂 é", "  two  spaces "])
def test_pieces_join_to_the_text_one_token_at_a_time(text: str) -> None:
    tokenizer = tiny_models.text("tiny-lm")[1]
    prompt, ids = tokenizer("say: ").input_ids, tokenizer(text, add_special_tokens=False).input_ids
    pieces = Pieces(tokenizer, prompt)
    growing = [pieces.of(ids[:at]) for at in range(1, len(ids) + 1)]
    assert all(long[: len(short)] == short for short, long in pairwise(growing))
    assert len(growing[-1]) == len(ids) and "".join(growing[-1]) == tokenizer.decode(ids)
