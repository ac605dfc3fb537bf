"""Adapters: what they read from a config, and that a followed model gives its own logits, wherever its tokens stand."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.caching.kv import Rows
from hasten.caching.store import KVStore
from hasten.canvas import Canvas
from hasten.errors import ModelError, RefusedError, UsageError
from hasten.pipelines.text import calls
from hasten.pipelines.text_models.families import choose
from hasten.pipelines.text_models.family import Family
from tests.text_hosts import MASKED, bd3lm, bundled, mdlm
from tests.text_hosts.facts import MASK, filled

TAPPED = [name for name in MASKED if name != "mdlm-flash"]
CLOSE = 2e-5


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def texts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    found = [torch.randint(0, 93, (length,), generator=generator) for length in lengths]
    for ids in found:
        ids[2::3] = MASK
    return found


def adapter(name: str, seed: int = 1) -> Family:
    model, facts = MASKED[name](seed)
    return choose(model, **facts.told)


def evaluated(host: Family, canvas: Canvas, tokens: Tensor, keep: Any, store: KVStore) -> Tensor:
    """Logits [m, R, V] of the tokens, bool [B, L], as they come out."""
    facts = dataclasses.replace(host.facts, shifted=False)
    width = int(tokens.sum(1).max())
    rows = Rows(list(range(len(tokens))), tokens, width, keep)
    now = calls.plain(rows, canvas, calls.Wanted(tokens, width), facts, store)
    with host.attached():
        return host.run(now, store)


@pytest.mark.parametrize("name", MASKED)
def test_facts_are_those_of_the_family(name: str) -> None:
    model, facts = MASKED[name](1)
    read = choose(model, **facts.told).facts
    assert (read.mask_id, read.shifted, read.context, read.layers) == (facts.mask, facts.shifted, facts.context, 2)
    assert read.block == {"full": None, "block": facts.block, "causal": 1}[facts.kind]
    assert read.vocab == facts.plain(model, torch.zeros(1, 9, dtype=torch.long)).shape[-1]
    assert facts.mask in read.forbidden and all(token in read.forbidden for token in range(facts.vocab, read.vocab))
    if facts.pad is not None:
        assert read.pad_id == facts.pad and read.eos_ids == (facts.eos,)


@pytest.mark.parametrize("name", MASKED)
def test_own_call_is_the_authors(name: str) -> None:
    model, facts = MASKED[name](1)
    ids = torch.stack(texts(19, 19))
    assert (choose(model, **facts.told).own(ids) - facts.plain(model, ids)).abs().max() < CLOSE


@pytest.mark.parametrize("keep", ["none", "store"])
@pytest.mark.parametrize("name", TAPPED)
def test_texts_of_several_lengths_are_each_as_alone(name: str, keep: str) -> None:
    host = adapter(name)
    each = texts(19, 7, 12)
    canvas = Canvas.of(each, [0, 0, 0], host.facts)
    logits = evaluated(host, canvas, canvas.used, keep, KVStore(3, canvas.slots, host.device))
    for row, ids in enumerate(each):
        assert (logits[row, : len(ids)] - host.own(ids[None])[0]).abs().max() < CLOSE, row


@pytest.mark.parametrize("name", TAPPED)
def test_windows_stand_where_they_are_told(name: str) -> None:
    """Other windows in each text, of one token too, read the rest from the store and give the logits of whole texts."""
    host = adapter(name)
    each = texts(19, 13)
    canvas, block = Canvas.of(each, [0, 0], host.facts), host.facts.block or 1
    store = KVStore(2, canvas.slots, host.device)
    evaluated(host, canvas, canvas.used, "store", store)
    own = [host.own(ids[None])[0] for ids in each]
    for low, high in (((8, 0), (19, 8)), ((16, 8), (17, 9)), ((0, 4), (1, 5))):
        low = tuple(start // block * block for start in low)
        tokens = canvas.inside(torch.tensor(low), torch.tensor(high))
        logits = evaluated(host, canvas, tokens, "store", store)
        for row, right in enumerate(own):
            found = logits[row, : high[row] - low[row]]
            assert (found - right[low[row] : high[row]]).abs().max() < CLOSE, (low, row)


@pytest.mark.parametrize("name", TAPPED)
def test_only_wanted_tokens_reach_the_head(name: str) -> None:
    host = adapter(name)
    (ids,) = texts(17)
    canvas, store = Canvas.of([ids], [0], host.facts), KVStore(1, 17, host.device)
    head, seen = host.head(), []
    assert head is not None
    hook = head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    wanted = torch.zeros(1, 17, dtype=torch.bool)
    wanted[0, [3, 11]] = True
    facts = dataclasses.replace(host.facts, shifted=False)
    now = calls.plain(Rows([0], canvas.used, 17, "none"), canvas, calls.Wanted(wanted, 2), facts, store)
    with host.attached():
        logits = host.run(now, store)
    hook.remove()
    assert seen == [2]
    assert (logits[0] - host.own(ids[None])[0, [3, 11]]).abs().max() < CLOSE


@pytest.mark.parametrize("name", TAPPED)
def test_the_model_is_left_as_it_was(name: str) -> None:
    model, facts = MASKED[name](1)
    host = choose(model, **facts.told)
    ids = torch.stack(texts(17))
    before, dicts = facts.plain(model, ids), [dict(module.__dict__) for module in model.modules()]
    canvas = Canvas.of(list(ids), [0], host.facts)
    evaluated(host, canvas, canvas.used, "store", KVStore(1, 17, host.device))
    with pytest.raises(RuntimeError, match="stop"), host.attached():
        raise RuntimeError("stop")
    for module, was in zip(model.modules(), dicts, strict=True):
        assert module.__dict__.keys() == was.keys()
        for name_, value in was.items():
            assert module.__dict__[name_] is value or name_.startswith("_"), name_
        assert not module._forward_pre_hooks and not module._forward_hooks
    assert torch.equal(facts.plain(model, ids), before)


def test_keys_are_kept_once_for_a_group_of_queries() -> None:
    for name, heads in (("llada-unmasked", 2), ("dream", 2), ("fast-dllm-v2", 2), ("sdar", 2), ("llada", 4)):
        host = adapter(name)
        canvas = Canvas.of(texts(9), [0], host.facts)
        store = KVStore(1, 9, host.device)
        evaluated(host, canvas, canvas.used, "store", store)
        assert {keys.shape[2] for keys in store.keys.values()} == {heads}, name


@pytest.mark.parametrize("name", TAPPED)
def test_layers_can_be_run_on_tokens_apart(name: str) -> None:
    """Whether the rotary module is asked once per call or in each layer, and whatever stands beside the tokens."""
    host = adapter(name)
    before = dict(host.model.__dict__)
    with host.attached(), host.layers.attached():
        pass
    assert host.model.__dict__.keys() == before.keys()


@pytest.mark.parametrize("name", TAPPED)
def test_who_watches_sees_every_query(name: str) -> None:
    """Also of a single token, which transformers hands over packed by its groups of heads."""
    host = adapter(name)
    canvas = Canvas.of(texts(9, 9), [0, 0], host.facts)
    store = KVStore(2, canvas.slots, host.device)
    evaluated(host, canvas, canvas.used, "store", store)
    seen: list[tuple[int, ...]] = []
    host.tap.watch = lambda layer, q, keys, values, now: seen.append((layer, *q.shape))
    low = torch.tensor([8, 8])
    evaluated(host, canvas, canvas.inside(low, low + 1), "store", store)
    assert [shape[:3] for shape in seen] == [(0, 2, 4), (1, 2, 4)] and all(shape[3] == 1 for shape in seen)


def test_bd3lm_generates_beside_its_own_cache() -> None:
    model, facts = MASKED["bd3lm"](1)
    host = choose(model)
    ids = torch.stack(texts(12))
    right = facts.plain(model, ids)
    model.reset_kv_cache(1)
    cache = model.backbone.blocks[0].kv_cache
    canvas = Canvas.of(list(ids), [0], host.facts)
    found = evaluated(host, canvas, canvas.used, "none", KVStore(1, 12, host.device))
    assert (found - right).abs().max() < CLOSE and (host.own(ids) - right).abs().max() < CLOSE
    assert model.backbone.blocks[0].kv_cache is cache


def test_mdlm_that_looks_at_the_noise_is_told_the_share_of_masks() -> None:
    model = filled(mdlm.MDLM(mdlm.MDLMConfig(time_conditioning=True)), 1)
    host = choose(model)
    assert not host.caches
    short, long = texts(8, 14)
    canvas = Canvas.of([short, long], [0, 0], host.facts)
    logits = evaluated(host, canvas, canvas.used, "none", KVStore(2, 14, host.device))
    for row, ids in enumerate((short, long)):
        share = (ids == MASK).float().mean()
        right = model(ids[None], -torch.log1p(-(1 - 1e-3) * share)[None]).logits
        assert (logits[row, : len(ids)] - right[0]).abs().max() < CLOSE
    with pytest.raises(RefusedError, match="noise level"):
        choose(filled(bd3lm.BD3LM(bd3lm.BD3LMConfig(time_conditioning=True)), 1))


# --- what is said before anything is computed ------------------------------------------------------


def test_mask_tokens_come_from_who_knows_them() -> None:
    model = MASKED["llada-moe"](1).model
    with pytest.raises(ModelError, match="156895, is none of the 96"):
        choose(model)
    assert choose(model, mask_token_id=4).facts.mask_id == 4
    assert choose(model, tokens(96, mask=7)).facts.mask_id == 7
    with pytest.raises(ModelError, match="96, is none of the 96"):
        choose(model, mask_token_id=96)
    with pytest.raises(ModelError, match="-1, is none"):
        choose(model, mask_token_id=-1)
    model = MASKED["a2d-qwen3"](1).model
    model.config.mask_token_id = None
    with pytest.raises(ModelError, match="Nothing says which token"):
        choose(model)
    assert choose(MASKED["mdlm"](1).model).facts.mask_id == 95


def tokens(count: int, mask: int | None = None) -> Any:
    class Tokenizer(SimpleNamespace):
        def __len__(self) -> int:
            return count

    return Tokenizer(mask_token_id=mask, eos_token_id=5, pad_token_id=6)


def test_tokens_that_the_tokenizer_lacks_are_never_written() -> None:
    facts = choose(MASKED["llada"](1).model, tokens(90)).facts
    assert facts.forbidden == tuple(range(90, 128)) and facts.eos_ids == (94, 5) and facts.pad_id == 93


def test_what_the_caller_says_counts() -> None:
    assert choose(MASKED["dream"](1).model, shifted=False).facts.shifted is False
    assert choose(MASKED["bundled-shifted"](1).model).facts.shifted is True
    assert choose(MASKED["bundled-shifted"](1).model, shifted=False).facts.shifted is False
    assert choose(MASKED["sdar"](1).model, block=16).facts.block == 16
    with pytest.raises(UsageError, match="LLaDA has no blocks of its own, got block=8"):
        choose(MASKED["llada"](1).model, block=8)
    model = MASKED["sdar"](1).model
    model.config.block_size = None
    with pytest.raises(ModelError, match="how long its blocks are"):
        choose(model)


@pytest.mark.parametrize("told", ["full", {"kind": "half"}, {"kind": "block"}, {"kind": "block", "block": 0}, {}])
def test_our_own_key_is_checked(told: Any) -> None:
    model = bundled.build(1).model
    model.config.hasten_diffusion = told
    with pytest.raises(ModelError, match="hasten_diffusion"):
        choose(model)


def test_what_is_no_such_model_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    plain = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=2)).eval()  # fmt: skip
    with pytest.raises(ModelError, match="LlamaForCausalLM is none of the masked language models .*hasten_diffusion"):
        choose(plain)
    with pytest.raises(ModelError, match="no config"):
        choose(torch.nn.Linear(2, 2))
    model = MASKED["llada"](1).model
    with pytest.raises(UsageError, match="training mode"):
        choose(model.train())


def test_windows_of_attention_are_refused() -> None:
    model = MASKED["bundled-block"](1).model
    model.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(RefusedError, match="sliding_attention"):
        choose(model)


def test_a_class_is_known_by_config_or_name() -> None:
    model = MASKED["dream"](1).model
    for names, kind in ((["DreamModel"], "other"), ([], "Dream"), (None, "other")):
        model.config.architectures, model.config.model_type = names, kind
        assert choose(model).family == "Dream"
