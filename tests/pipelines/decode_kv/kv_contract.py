"""What every cache policy for causal models must do, and one instance of each part of each family.

A part that is added later is tested without being named here.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from hasten.caching.decode import codec_numbers, codec_sparse, low_rank, score_attention  # noqa: F401  imports the members
from hasten.caching.decode.amount import Amount, HeadBudget, LayerBudget, Share, Tokens
from hasten.caching.decode.codec import Codec
from hasten.caching.decode.kept import KeptCache
from hasten.caching.decode.lazy import LazyTokens
from hasten.caching.decode.score import SlotScore
from hasten.caching.decode.score_attention import LastQueries
from hasten.part import Part, parse
from hasten.pipelines.decode_kv.cache import KVCache
from hasten.pipelines.decode_kv.session import KVSession, attach
from tests.contract import PartContract
from tests.pipelines.causal_models import build

NEEDED: dict[str, dict[str, Any]] = {"bytes": {"bytes": 64 * 20, "each": 64}, "last-queries": {"queries": 6}, "tokens": {"count": 14}}
FAMILIES: dict[type[Part], str] = {SlotScore: "score", Amount: "amount", LayerBudget: "layers", HeadBudget: "heads", Codec: "codec"}
MODEL = "llama"
TEXT = 40


def ours(family: type[Part]) -> list[Part]:
    found = [(kind, member) for kind, member in sorted(family.members().items()) if member.__module__.startswith("hasten.")]
    return [member(**NEEDED.get(kind, {})) for kind, member in found]


def parts() -> list[ParameterSet]:
    """Every part of every family by itself."""
    return [pytest.param(part, id=part.kind) for family in FAMILIES for part in ours(family)]


def policies() -> list[ParameterSet]:
    """A policy around every part, and some that combine."""
    found = []
    for family, field in FAMILIES.items():
        for part in ours(family):
            base: dict[str, Any] = {"sinks": 2, "window": 3}
            if field in ("heads", "layers"):
                base |= {"score": LastQueries(queries=6), "amount": Share(share=0.4)}
            if field == "score":
                base |= {"amount": Share(share=0.4)}
            if field == "amount":
                base |= {"score": LastQueries(queries=6)}
            if field == "codec":
                part = part.model_copy(update={"residual": 2})
            found.append(pytest.param(KeptCache(**{field: part, **base}), id=part.kind))
    prompt = KeptCache(score=LastQueries(queries=6), amount=Tokens(count=14), when="prompt", window=4)
    each = KeptCache(score=LastQueries(queries=6), amount=Tokens(count=14), every=4)
    lazy = KeptCache(lazy=LazyTokens(depths=(0.0, 0.4), shares=(0.6, 0.3)))
    return [*found, pytest.param(lazy, id="lazy"), pytest.param(prompt, id="at-the-prompt"), pytest.param(each, id="now-and-then")]


def full(part: KeptCache) -> KeptCache:
    """The same policy with room for everything, without a codec."""
    lazy = part.lazy and part.lazy.model_copy(update={"shares": (1.0,) * len(part.lazy.shares)})
    amount = None if lazy else Share(share=1.0)
    return part.model_copy(update={"amount": amount, "codec": None, "layers": KeptCache().layers, "lazy": lazy})


MODELS_BUILT = {MODEL: build(MODEL)}


def model() -> Any:
    """One model for all tests: each session has to leave it as it was."""
    return MODELS_BUILT[MODEL]


def text(rows: int = 1, length: int = TEXT, seed: int = 5) -> Tensor:
    """Tokens that do not repeat, where there are enough: two keys of one token are equally long, and scores would tie."""
    dice = torch.Generator().manual_seed(seed)
    if length > 94:
        return torch.randint(3, 97, (rows, length), generator=dice)
    return torch.stack([3 + torch.randperm(94, generator=dice)[:length] for _ in range(rows)])


def padded(lengths: tuple[int, ...] = (40, 23, 31)) -> tuple[Tensor, Tensor]:
    """Texts of these lengths with padding in front, and the mask."""
    ids, longest = text(len(lengths)), max(lengths)
    real = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~real, 0), real.long()


def generated(host: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> tuple[Tensor, Tensor]:
    """Greedy, without a token twice (scores of one token's keys would tie) and without padding: new tokens [B, n], and the
    logits they were chosen by [B, n, V]."""
    call = {"max_new_tokens": 10, "do_sample": False, "no_repeat_ngram_size": 1, "suppress_tokens": [0], "output_logits": True, "return_dict_in_generate": True} | more
    with torch.no_grad():
        out = host.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **call)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def open_session(part: KeptCache) -> KVSession:
    warnings.simplefilter("ignore", UserWarning)
    return attach(model(), part)


def steps(run: KVSession, cache: KVCache, pieces: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """Logits of texts that are given piece by piece."""
    found, at = [], 0
    with torch.no_grad():
        for piece in pieces:
            at += piece.shape[1]
            named = {} if mask is None else {"attention_mask": mask[:, :at]}
            positions = None if mask is None else (mask[:, :at].cumsum(1) - 1).clamp(min=0)[:, -piece.shape[1] :]
            found.append(run.host(piece, past_key_values=cache, position_ids=positions, **named).logits)
    return torch.cat(found, 1)


class PolicyContract:
    """Inherited by a test class with a fixture `part`."""

    def test_with_room_for_everything_nothing_changes(self, part: KeptCache) -> None:
        """Bit for bit, in a batch with padding, and after a close."""
        ids, mask = padded()
        plain = generated(model(), ids, mask)
        with open_session(full(part)):
            same = generated(model(), ids, mask)
        again = generated(model(), ids, mask)
        for one, other in ((plain, same), (plain, again)):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])

    def test_texts_do_not_know_of_each_other(self, part: KeptCache) -> None:
        if part.codec is not None and part.codec.group > 1:
            return  # a group begins where the batch does, in the padding
        ids, mask = padded()
        with open_session(part):
            tokens, logits = generated(model(), ids, mask)
        for row in range(len(ids)):
            own = ids[row : row + 1, int((mask[row] == 0).sum()) :]
            with open_session(part):
                alone, lone = generated(model(), own)
            torch.testing.assert_close(logits[row : row + 1], lone, atol=2e-4, rtol=2e-4)
            assert torch.equal(tokens[row : row + 1], alone)

    def test_slots_hold_what_their_places_say(self, part: KeptCache) -> None:
        """A key of the first layer depends on token and position alone; so does each that is still held."""
        ids = text()
        with open_session(full(part)) as run:
            everything = run.cache()
            steps(run, everything, [ids])
        want = everything.layers[0].slots.view()
        with open_session(part) as run:
            held = run.cache()
            steps(run, held, [ids[:, :30], *ids[:, 30:].split(1, 1)])
        slots = held.layers[0].slots
        got, heads = slots.view(), want.k.shape[1]
        place = got.place.expand(-1, heads, -1)
        assert sum(slots.tokens) <= TEXT and int(place.max()) == TEXT - 1
        near = place.long().clamp(min=0)[..., None].expand(-1, -1, -1, want.k.shape[3])
        error = ((got.k - want.k.gather(2, near)) * (place >= 0)[..., None]).abs()
        tolerance = 1e-5 if part.codec is None else float(want.k.abs().max()) * 0.6
        assert float(error.max()) <= tolerance

    def test_the_amount_is_kept_in_bytes(self, part: KeptCache) -> None:
        if part.lazy is not None:
            return  # hidden states are wider than keys
        ids, amount = text(2, 90), part.amount
        with open_session(part) as run:
            cache = run.cache()
            steps(run, cache, [ids[:, :80], *ids[:, 80:].split(1, 1)])
        if amount is None or amount.needs_worth:
            assert cache.bytes <= run.report().full_bytes * 1.1
            return
        slots = [layer.slots for layer in cache.layers]
        each = 2 * 2 * slots[0].k.shape[-1] * 4
        grown = 10 if part.when == "prompt" else part.every - 1
        factors = part.layers.factors(len(slots))
        for layer, factor in zip(slots, factors, strict=True):
            goal = min(90, round(amount.of(90, None) * factor)) + grown
            held = [t for x in layer.old or () for t in x.tensors()] + [layer.k[:, :, : layer.used], layer.v[:, :, : layer.used]]
            assert sum(t.numel() * t.element_size() for t in held) <= 1.06 * 2 * goal * each
            assert max(layer.tokens) <= goal

    def test_padding_is_never_read(self, part: KeptCache) -> None:
        """Though its embedding is not a number."""
        host = build(MODEL)
        with torch.no_grad():
            host.model.embed_tokens.weight[0] = float("nan")
        ids, mask = padded()
        with attach(host, part):
            tokens, logits = generated(host, ids, mask)
        assert bool(torch.isfinite(logits).all()) and bool((tokens > 0).all())

    def test_numbers_that_are_not_finite_evict_nothing(self, part: KeptCache) -> None:
        if part.codec is not None or part.lazy is not None:
            return  # see their own tests
        host = build(MODEL)
        with torch.no_grad():
            host.model.layers[1].self_attn.k_proj.weight[0] = float("nan")
        with attach(host, part) as run:
            steps(run, run.cache(), [text()])
            report = run.report()
        if part.score.kind in ("recency", "lot"):
            assert report.layers[1].evicted > 0
        else:
            assert report.layers[1].evicted == 0
            assert part.amount is None or any("not finite" in note for note in report.notes)

    def test_several_tokens_at_once_are_those_one_by_one(self, part: KeptCache) -> None:
        """After an eviction, whatever each layer and head holds: masks come from places."""
        if part.lazy is not None:
            return  # drafts are refused
        ids, policy = text(2), part.model_copy(update={"when": "prompt", "codec": None})
        with open_session(policy) as run:
            singly = run.cache()
            steps(run, singly, [ids])
            one = steps(run, singly, list(text(2, 4, seed=8).split(1, 1)))
            at_once = run.cache()
            steps(run, at_once, [ids])
            reads = torch.ones(1, 4, 4, dtype=torch.bool).tril()
            at_once.draft(reads, torch.arange(4)[None])
            several = steps(run, at_once, [text(2, 4, seed=8)])
        torch.testing.assert_close(several, one, atol=2e-4, rtol=2e-4)


class FamilyContract(PartContract):
    """Serialised, frozen, strict: for parts of five families at once."""

    def test_part_survives_its_own_serialised_form(self, part: Part) -> None:
        family = next(family for family in FAMILIES if isinstance(part, family))
        assert parse(family, part.model_dump(), "test") == part

    def test_unknown_key_is_refused(self, part: Part) -> None:
        self.family = next(family for family in FAMILIES if isinstance(part, family))
        super().test_unknown_key_is_refused(part)
