"""What vLLM and SGLang are told of a recipe, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hasten
from hasten.errors import ModelError, RefusedError, UsageError
from hasten.pipelines import tiny_models
from hasten.pipelines.handover import lengths
from hasten.pipelines.handover.medusa import HEADS, serve_medusa
from hasten.pipelines.handover.sglang import serve_sglang
from hasten.pipelines.handover.vllm import serve_vllm
from hasten.pipelines.recipes import names
from hasten.samplers.decode.verify_law import Block


def test_look_up_is_an_ngram_of_vllm() -> None:
    found = hasten.to_vllm("look-up:width=1,nodes=6,longest=5", "owner/name")
    assert found == {
        "model": "owner/name",
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_min": 1, "prompt_lookup_max": 5},
    }
    served = serve_vllm("look-up:width=1,nodes=6,longest=5", "owner/name")
    assert served.argv[:3] == ["vllm", "serve", "owner/name"]
    assert json.loads(served.argv[4]) == found["speculative_config"]
    assert any("goodput" in note for note in served.notes)
    assert not any("goodput" in note for note in serve_vllm("look-up:width=1,every=true").notes)


def test_look_up_is_a_tree_of_sglang() -> None:
    argv = hasten.to_sglang("look-up:nodes=10,width=2,longest=8", "owner/name")
    told = dict(zip(argv[::2], argv[1::2], strict=True))
    assert told == {
        "--model-path": "owner/name", "--speculative-algorithm": "NGRAM", "--speculative-num-draft-tokens": "11",
        "--speculative-ngram-min-bfs-breadth": "1", "--speculative-ngram-max-bfs-breadth": "2",
        "--speculative-ngram-match-type": "BFS", "--speculative-ngram-max-trie-depth": "18",
    }  # fmt: skip


@pytest.mark.parametrize("to", [hasten.to_vllm, hasten.to_sglang])
def test_what_no_server_has_is_refused_with_its_reason(to: object) -> None:
    cases = [
        ("snapkv", "leaves tokens out of the cache"), ("kivi", "packed as 'kivi'"), ("minference", "sets attention"),
        ("dual-cache", "any order"),
    ]  # fmt: skip
    for name, reason in cases:
        with pytest.raises(RefusedError, match=reason):
            to(name)  # type: ignore[operator]
    lossy = hasten.recipe("look-up:width=1").replace({"verify": {"kind": "typical", "allow_lossy": True}})
    with pytest.raises(RefusedError, match="'typical' accepts drafts that the model would not write"):
        to(lossy)  # type: ignore[operator]


def test_vllm_has_no_trees() -> None:
    with pytest.raises(RefusedError, match="drafts trees, and vLLM verifies chains. Take look-up:width=1"):
        hasten.to_vllm("look-up")


def test_small_models_and_tries() -> None:
    draft = str(tiny_models.path("tiny-draft"))
    assert hasten.to_vllm("speculative:nodes=5,every=true")["speculative_config"] == {
        "method": "draft_model", "model": draft, "num_speculative_tokens": 5, "draft_sample_method": "probabilistic",
    }  # fmt: skip
    with pytest.raises(RefusedError, match="trees, and vLLM verifies chains. Take speculative"):
        hasten.to_vllm("dyspec")
    tree = serve_sglang("dyspec:nodes=12,width=3,depth=5").config
    assert tree == {
        "speculative_algorithm": "STANDALONE", "speculative_draft_model_path": draft, "speculative_num_steps": 5,
        "speculative_eagle_topk": 3, "speculative_num_draft_tokens": 13,
    }  # fmt: skip
    chain = serve_sglang("speculative:nodes=5", lengths={1: 4}).config
    assert chain["speculative_num_draft_tokens"] == chain["speculative_num_steps"] + 1 == 5
    trie = serve_sglang("lookahead-trie:nodes=16,branch=12").config
    assert (trie["speculative_ngram_match_type"], trie["speculative_ngram_max_trie_depth"]) == ("PROB", 16)
    with pytest.raises(RefusedError, match="suffix"):
        hasten.to_vllm("lookahead-trie")
    with pytest.raises(RefusedError, match="--heads STUDENT"):
        hasten.to_vllm("medusa")
    with pytest.raises(RefusedError, match="Hand the heads over to vLLM"):
        hasten.to_sglang("medusa")


def test_transformers_candidates() -> None:
    assert hasten.to_vllm("candidates")["speculative_config"]["prompt_lookup_max"] == 2
    assisted = hasten.to_vllm("candidates:which=assisted")["speculative_config"]
    assert (assisted["method"], assisted["draft_sample_method"]) == ("draft_model", "greedy")  # points, whatever logits they had
    assert hasten.to_vllm("candidates:which=mtp,nodes=2")["speculative_config"] == {"method": "mtp", "num_speculative_tokens": 2}
    assert serve_sglang("candidates:which=mtp,nodes=2").config["speculative_num_draft_tokens"] == 3


def test_every_recipe_is_handed_over_or_refused() -> None:
    """None fails in another way; what is handed over sets something, or says why there is nothing to set."""
    for name in names():
        for serve in (serve_vllm, serve_sglang):
            try:
                served = serve(name, "m")
            except RefusedError as error:
                assert "cannot be handed over" in str(error)
            else:
                assert len(served.config) > 1 or served.notes or not hasten.recipe(name).axes, name


def test_caches_that_servers_have() -> None:
    assert hasten.to_vllm("fp8-kv") == {"kv_cache_dtype": "fp8"}
    assert hasten.to_sglang("fp8-kv") == ["--kv-cache-dtype", "fp8_e4m3"]
    both = serve_vllm(hasten.recipe("look-up:width=1") | hasten.recipe("fp8-kv"))
    assert set(both.config) == {"speculative_config", "kv_cache_dtype"}
    shared = serve_sglang("hydragen")
    assert shared.config == {} and "need no setting" in shared.notes[0]


def test_verifiers() -> None:
    block = hasten.recipe("look-up:width=1").model_copy(update={"verify": Block()})
    assert hasten.to_vllm(block)["speculative_config"]["rejection_sample_method"] == "block"
    assert any("no block verification" in note for note in serve_sglang(block).notes)


# --- lengths --------------------------------------------------------------------------------------


def test_lengths_become_a_schedule_without_gaps() -> None:
    assert lengths.schedule({1: 8, 4: 8, 16: 2, 64: 0}, 6) == [[1, 15, 6], [16, 63, 2], [64, 1024, 0]]
    assert lengths.schedule({4: 3}, 10) == [[1, 1024, 3]]
    with pytest.raises(UsageError, match="1 at least"):
        lengths.schedule({0: 3}, 10)
    found = hasten.to_vllm("look-up:width=1,nodes=6", lengths={1: 5, 8: 1})["speculative_config"]
    assert found["num_speculative_tokens"] == 5
    assert found["num_speculative_tokens_per_batch_size"] == [[1, 7, 5], [8, 1024, 1]]
    served = serve_sglang("look-up:nodes=6", lengths={1: 5, 8: 1})
    assert served.config["speculative_num_draft_tokens"] == 6
    assert any("for EAGLE only" in note for note in served.notes)


def test_lengths_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "decode.json"
    row = {"recipe": "look-up", "batch": 1, "asked": 8.0}
    file.write_text(json.dumps({"rows": [row, row | {"asked": 9.0}, row | {"batch": 4, "asked": 2.0}, {"recipe": "plain", "batch": 1}]}))
    assert lengths.of_file(file, "look-up") == {1: 8, 4: 2}
    with pytest.raises(UsageError, match="It has: look-up"):
        lengths.of_file(file, "plain")
    file.write_text("[]")
    with pytest.raises(UsageError, match="no result of hasten bench decode"):
        lengths.of_file(file, "look-up")


def test_lengths_of_a_session() -> None:
    model, tokenizer = tiny_models.text("tiny-lm")
    inputs = tokenizer("copy: a b c d =", return_tensors="pt")
    with hasten.accelerate(model, "look-up:nodes=4,every=true") as run:
        model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert set(lengths.of_session(run)) == {1}
    assert 0 < lengths.of_session(run)[1] <= 4


# --- Medusa heads ---------------------------------------------------------------------------------


def test_medusa_heads_in_vllms_layout(tmp_path: Path) -> None:
    model, _ = tiny_models.text("tiny-lm")
    width = model.config.hidden_size
    weights = {f"blocks.{i}.{name}": torch.randn(shape) for i in range(2) for name, shape in (("weight", (width, width)), ("bias", (width,)))}
    (tmp_path / "student").mkdir()
    save_file(weights, tmp_path / "student" / HEADS)
    served = serve_medusa(model, "owner/name", tmp_path / "student", tmp_path / "vllm")
    assert served.config["speculative_config"] == {"method": "medusa", "model": str(tmp_path / "vllm"), "num_speculative_tokens": 2}
    config = json.loads((tmp_path / "vllm" / "config.json").read_text())
    assert (config["model_type"], config["num_heads"], config["num_hidden_layers"]) == ("medusa", 2, 1)
    assert config["medusa_fc_bias"] and config["original_lm_head"] and config["vocab_size"] == 2048
    found = load_file(tmp_path / "vllm" / "model.safetensors")
    assert sorted(found) == [
        "blocks.0.layers.0.bias", "blocks.0.layers.0.weight", "blocks.1.layers.0.bias", "blocks.1.layers.0.weight", "lm_heads.0.weight",
    ]  # fmt: skip
    # x + SiLU(W x + b), then the last layer: what vLLM computes of this folder, and the training did of its own
    x = torch.randn(3, width)
    theirs = x + torch.nn.functional.silu(x @ found["blocks.1.layers.0.weight"].T + found["blocks.1.layers.0.bias"])
    ours = x + torch.nn.functional.silu(x @ weights["blocks.1.weight"].T + weights["blocks.1.bias"])
    assert torch.equal(theirs, ours) and torch.equal(found["lm_heads.0.weight"], model.get_output_embeddings().weight)


def test_heads_that_are_none(tmp_path: Path) -> None:
    model, _ = tiny_models.text("tiny-lm")
    with pytest.raises(ModelError, match="no Medusa heads"):
        serve_medusa(model, "m", tmp_path, tmp_path / "out")
    save_file({"blocks.0.weight": torch.zeros(8, 8)}, tmp_path / HEADS)
    with pytest.raises(ModelError, match="width 8"):
        serve_medusa(model, "m", tmp_path, tmp_path / "out")
    save_file({"blocks.1.weight": torch.zeros(model.config.hidden_size, model.config.hidden_size)}, tmp_path / HEADS)
    with pytest.raises(ModelError, match="no complete"):
        serve_medusa(model, "m", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
