"""Saved contexts: continued in a new process, refused on other weights, small when they may be rounded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hasten.caching.decode.amount import Share
from hasten.caching.decode.kept import KeptCache
from hasten.caching.decode.score_attention import LastQueries
from hasten.errors import OutputError, RefusedError, UsageError
from hasten.pipelines.decode_kv.saved import load_context, save_context
from hasten.pipelines.decode_kv.session import attach
from tests.pipelines.causal_models import build
from tests.pipelines.decode_kv.kv_contract import generated, model, open_session, steps, text

EVICTING = KeptCache(score=LastQueries(queries=4), amount=Share(share=0.5), when="prompt")

CONTINUE = """
import sys, torch
from hasten.caching.decode.kept import KeptCache
from hasten.pipelines import tiny_models
from hasten.pipelines.decode_kv.saved import load_context
from hasten.pipelines.decode_kv.session import attach
model, tokenizer = tiny_models.text("tiny-lm")
with attach(model, KeptCache()) as run, torch.no_grad():
    cache, tokens = load_context(run, sys.argv[1])
    more = torch.cat([tokens, torch.tensor([[300, 301]])], 1)
    print(run.host.generate(more, attention_mask=torch.ones_like(more), past_key_values=cache, max_new_tokens=6, do_sample=False).tolist())
"""


@pytest.mark.parametrize("part", [KeptCache(), EVICTING], ids=["all", "evicted"])
def test_a_context_goes_on_where_it_was(part: KeptCache, tmp_path: Path) -> None:
    ids, next_ = text(), text(1, 4, seed=2)
    with open_session(part) as run:
        cache = run.cache()
        steps(run, cache, [ids])
        save_context(cache, tmp_path / "c.safetensors", ids)
        want = steps(run, cache, [next_])
        again, tokens = load_context(run, tmp_path / "c.safetensors")
        assert torch.equal(tokens, ids) and torch.equal(steps(run, again, [next_]), want)


def test_a_new_process_continues(tmp_path: Path) -> None:
    from hasten.pipelines import tiny_models

    host, tokenizer = tiny_models.text("tiny-lm")
    ids = torch.tensor([tokenizer("def mean(values):\n    return sum(values) / ")["input_ids"]])
    file = tmp_path / "c.safetensors"
    with attach(host, KeptCache()) as run:
        cache = run.cache()
        steps(run, cache, [ids])
        save_context(cache, file, ids)
        more = torch.cat([ids, torch.tensor([[300, 301]])], 1)
        want = generated(host, more, max_new_tokens=6, no_repeat_ngram_size=0, suppress_tokens=None)[0]
    done = subprocess.run([sys.executable, "-c", CONTINUE, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(torch.cat([more, want], 1).tolist())


def test_rounded_contexts_are_small_and_near(tmp_path: Path) -> None:
    from hasten.pipelines import python_sources, tiny_models

    host, tokenizer = tiny_models.text("tiny-lm")
    source = Path(python_sources.__file__).read_text(encoding="utf-8")
    ids = torch.tensor([tokenizer(source)["input_ids"][:300]])
    with attach(host, KeptCache()) as run:
        cache = run.cache()
        steps(run, cache, [ids[:, :-1]])
        sizes, errors = {}, {}
        want = steps(run, load_and_save(run, cache, tmp_path / "e", ids[:, :-1], None), [ids[:, -1:]]).log_softmax(-1)
        full = (tmp_path / "e").stat().st_size
        for levels in (8, 32):
            other = load_and_save(run, cache, tmp_path / "r", ids[:, :-1], levels)
            got = steps(run, other, [ids[:, -1:]]).log_softmax(-1)
            sizes[levels] = (tmp_path / "r").stat().st_size / full
            errors[levels] = float((want.exp() * (want - got)).sum())
    assert sizes[8] < sizes[32] < 0.25
    assert errors[32] < 0.05 and errors[32] < errors[8]


def load_and_save(run, cache, path, ids, levels):  # type: ignore[no-untyped-def]
    save_context(cache, path, ids, levels=levels)
    return load_context(run, path)[0]


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    file, ids = tmp_path / "c.safetensors", text()
    with open_session(KeptCache()) as run:
        cache = run.cache()
        with pytest.raises(UsageError, match="holds something"):
            save_context(cache, file, ids)
        steps(run, cache, [ids])
        with pytest.raises(UsageError, match="has read tokens of shape"):
            save_context(cache, file, ids[:, :5])
        with pytest.raises(UsageError, match="4 to 128"):
            save_context(cache, file, ids, levels=2)
        save_context(cache, file, ids)
        (tmp_path / "torn").write_bytes(file.read_bytes()[:2000])
        with pytest.raises(OutputError, match="Cannot read"):
            load_context(run, tmp_path / "torn")
        save_file(load_file(file), tmp_path / "plain")
        with pytest.raises(OutputError, match="not a saved context"):
            load_context(run, tmp_path / "plain")
        with pytest.raises(OutputError, match="Cannot read"):
            load_context(run, tmp_path / "missing")
    other = build("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with attach(other, KeptCache()) as run, pytest.raises(RefusedError, match="another model"):
        load_context(run, file)
    assert model() is not other
