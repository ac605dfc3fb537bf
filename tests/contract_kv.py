"""What every KV policy for texts must do, whichever paper it is from. Like `contract.py`, on a small random Llama.

Shapes: B texts, L slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import hasten.caching.kv_attention
import hasten.caching.kv_echo
import hasten.caching.kv_front
import hasten.caching.kv_rollout
import hasten.caching.kv_scattered
import hasten.caching.kv_suffix
import hasten.caching.kv_values  # noqa: F401  imports every policy
from hasten.caching.kv import TokenKV
from hasten.caching.store import Pass
from hasten.canvas import Canvas, Row, TextFacts
from hasten.errors import RefusedError
from hasten.noise import uniform
from hasten.part import Part
from hasten.pipelines.text.loop import TextLoop
from hasten.pipelines.text_models.host import TextHost
from hasten.recipe import KVPolicy, Recipe
from hasten.samplers.commit import CommitRule, Quota, Unmask
from hasten.samplers.revise import RevisePolicy, ReviseState, Revision
from hasten.samplers.scores import Confidence, Draw, Score, Scores
from hasten.samplers.text_blocks import BlockRule, Fixed, InBlocks
from tests.contract import PartContract
from tests.text_models import EOS_ID, FIRST, MASK_ID, PAD_ID, VOCAB, prompts, texts

NEEDED: dict[str, dict[str, Any]] = {
    # so that each does what it is there for within a dozen steps:
    "vicinity": {"before": 2, "after": 3, "warmup": 2},
    "delayed": {"every": 4},
    "groups": {"full": 2, "local": 2},
    "sparse-suffix": {"window": 6, "decay": 2.0},
    "value-drift": {"prompt_every": 5, "every": 3},
    "attention-drift": {"below": 0.995},
    "rollout": {"most": 2, "spread": 2.0, "gap": 1},
}
"""Arguments for small texts."""

LAYERS = 4
MODELS: dict[str, tuple[int | None, bool]] = {
    "full": (None, False), "shifted": (None, True), "block": (4, False), "block-shifted": (4, True),
}  # fmt: skip
"""Name -> slots per block, shifted logits."""


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("delayed", {"every": 4, "reach": 1}),
    "waiting": ("attention-drift", {"below": 0.995, "wait": True}),
    "prompt-alike": ("value-drift", {"prompt_every": None, "every": 4}),
    "periodic": ("dual", {"every": 3}),
}
"""Settings that go other ways: name -> kind, arguments."""


def members() -> list[ParameterSet]:
    """One instance of every KV policy for texts, and of some more than one."""
    family = {kind: member for kind, member in KVPolicy.members().items() if issubclass(member, TokenKV)}
    found = [pytest.param(member(**NEEDED.get(kind, {})), id=kind) for kind, member in sorted(family.items())]
    return found + [pytest.param(family[kind](**given), id=name) for name, (kind, given) in VARIANTS.items()]


@cache
def _llama(layers: int) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


def llama(name: str = "full", layers: int = LAYERS) -> TextHost:
    """A Llama with random weights and some depth."""
    block, shifted = MODELS[name]
    facts = TextFacts(layers, VOCAB, MASK_ID, (EOS_ID,), PAD_ID, (PAD_ID, EOS_ID), shifted, block)
    return TextHost(_llama(layers), facts)


class Trial:
    """One generation. seen: after each step, the confidence of every slot that was evaluated, NaN elsewhere, [B, L]."""

    def __init__(
        self, host: TextHost, given: Sequence[Tensor], new: Sequence[int], kv: TokenKV, *, rule: CommitRule | None = None,
        score: Score | None = None, blocks: BlockRule | None = None, revise: RevisePolicy | None = None,
        temperature: float = 0.0, seed: int = 0, watch: Callable[[TextLoop], Any] | None = None,
    ) -> None:  # fmt: skip
        recipe = Recipe(
            kv=kv, commit=Unmask(rule=rule or Quota(steps=6), score=score or Confidence()), revise=revise,
            blocks=InBlocks(rule=blocks or Fixed(size=4)),
        )  # fmt: skip
        canvas = Canvas.of(given, new, host.facts)
        self.loop = TextLoop(host, recipe, canvas, Draw(torch.arange(seed, seed + len(given)), temperature))
        self.seen: list[Tensor] = []
        self.work = torch.zeros(len(given))
        host.tap.watch = watch(self.loop) if watch is not None else self._count
        try:
            self.loop.run(self._note)
        finally:
            host.tap.watch = None
        self.texts = texts(self.loop)

    def _note(self, number: int, canvas: Canvas, scores: Scores, rows: list[Row]) -> None:
        self.seen.append(torch.where(scores.seen, scores.confidence, float("nan")))

    def _count(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, now: Pass) -> None:
        if self.loop.host.tap.store is not self.loop.store:
            return  # the model's layers are tried out
        assert q.shape[2] == now.slots.shape[1]
        self.work[now.members] += (now.slots < self.loop.canvas.slots).sum(1)


GIVEN, NEW = (5, 9, 2), (10, 7, 12)


def trial(name: str, kv: TokenKV, rows: Sequence[int] = (0, 1, 2), **settings: Any) -> Trial:
    """A generation of some of three texts of several lengths, each with its own noise."""
    each = prompts(GIVEN)
    seed = settings.pop("seed", 7) + rows[0]
    return Trial(llama(name), [each[row] for row in rows], [NEW[row] for row in rows], kv, seed=seed, **settings)


def same(one: Trial, other: Trial, tolerance: float = 2e-4) -> None:
    """The same tokens, the same slots seen at each step, and the same confidence in them to rounding.

    Only slots that both have seen count: a window may see fewer.
    """
    assert one.texts == other.texts
    assert len(one.seen) == len(other.seen)
    for a, b in zip(one.seen, other.seen, strict=True):
        both = a.isfinite() & b.isfinite()
        assert bool(both.any())
        assert float((a - b)[both].abs().max()) < tolerance


class Restless(RevisePolicy):
    """Takes back and replaces slots at random: what no cache may overlook."""

    kind: ClassVar[str] = ""
    written: ClassVar[bool] = False

    def start(self, facts: TextFacts) -> ReviseState:
        return _RestlessState()


class _RestlessState(ReviseState):
    def revise(self, scores: Scores, written: Tensor, may: Tensor, canvas: Canvas) -> Revision:
        seed = torch.arange(len(canvas.ids))[:, None] * 0 + 11
        dice = uniform(seed, canvas.step[:, None], canvas.place - canvas.start[:, None], 1)[..., 0]
        return Revision(dice < 0.4, dice > 0.6, (canvas.ids + 7) % (VOCAB - FIRST) + FIRST)


class Fresh:
    """Watches the first layer: a value that is read there must be that of the token that stands there now."""

    def __init__(self, loop: TextLoop) -> None:
        self.loop, self.read = loop, 0

    def __call__(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, now: Pass) -> None:
        if layer > 0 or self.loop.host.tap.store is not self.loop.store:
            return
        canvas, model = self.loop.canvas, self.loop.host.model.model
        first = model.layers[0]
        states = first.input_layernorm(model.embed_tokens(canvas.ids))
        expected = first.self_attn.v_proj(states)[now.members]
        got = values.transpose(1, 2).flatten(2)
        if now.keep == "none":
            bins = torch.nn.functional.pad(expected, (0, 0, 0, 1))
            expected = bins.gather(1, now.slots[..., None].expand(-1, -1, expected.shape[-1]))
            real = (now.slots < canvas.slots)[..., None]
            assert float(((got - expected) * real).abs().max()) < 1e-4
            return
        read = now.visible.any(1) if now.visible is not None else torch.ones(got.shape[:2], dtype=torch.bool)
        read = read[:, : canvas.slots].expand(len(now.members), -1) & canvas.used[now.members]
        wrong = (got[:, : canvas.slots] - expected).abs().amax(-1) > 1e-4
        assert not bool((wrong & read).any()), "a key was read that is not that of its token"
        self.read += int(read.sum())


def refused(part: TokenKV, name: str) -> bool:
    """Is this policy for other models?"""
    return part.kind == "block-causal" and MODELS[name][0] is None


def says_no(part: TokenKV, name: str) -> None:
    """A policy for other models refuses this one before anything is computed."""
    with pytest.raises(RefusedError):
        trial(name, part)


def exact() -> list[ParameterSet]:
    """Policies that promise what recomputation gives, each with every model that it is for."""
    found = [(given.values[0], name) for given in members() for name in MODELS]
    return [pytest.param(kv, name, id=f"{kv.kind}-{name}") for kv, name in found if kv.exact and not refused(kv, name)]


class TokenKVContract(PartContract):
    family: type[Part] = KVPolicy

    @pytest.mark.parametrize("name", MODELS)
    def test_texts_do_not_know_of_each_other(self, part: TokenKV, name: str) -> None:
        if refused(part, name):
            says_no(part, name)
            return
        temperature = 0.0 if name == "full" else 1.0
        together = trial(name, part, temperature=temperature)
        for row in range(3):
            single = trial(name, part, [row], temperature=temperature)
            assert single.texts[0] == together.texts[row]
            assert int(single.loop.tally.evaluations[0]) == int(together.loop.tally.evaluations[row])
            assert float(single.loop.tally.layers[0]) == pytest.approx(float(together.loop.tally.layers[row]))

    @pytest.mark.parametrize("name", MODELS)
    def test_nothing_stale_is_read(self, part: TokenKV, name: str) -> None:
        """Though slots are taken back and replaced at random."""
        if refused(part, name):
            says_no(part, name)
            return
        watches: list[Fresh] = []

        def watch(loop: TextLoop) -> Fresh:
            watches.append(Fresh(loop))
            return watches[0]

        done = trial(name, part, revise=Restless(budget=1), watch=watch)
        assert not bool(done.loop.canvas.masked.any())
        assert watches[0].read > 0 or part.kind == "recompute"

    def test_work_is_what_the_layers_computed(self, part: TokenKV) -> None:
        """Token-layers, besides what it takes to decide (a share of a layer for each token asked about)."""
        name = "block" if refused(part, "full") else "full"
        done = trial(name, part)
        told, counted = done.loop.tally.layers, done.work.double()
        if part.kind == "value-drift":
            assert bool((told > counted).all()) and bool((told < 1.3 * counted).all())
        else:
            assert torch.equal(told, counted)
        assert bool((told <= done.loop.tally.tokens * LAYERS).all()) or part.kind == "value-drift"

    def test_the_model_is_left_as_it_was(self, part: TokenKV) -> None:
        name = "block" if refused(part, "full") else "full"
        host = llama(name)
        before = {key: value for key, value in vars(host.model.model).items()}  # type: ignore[union-attr, arg-type]
        trial(name, part)
        assert vars(host.model.model) == before  # type: ignore[union-attr, arg-type]

    def test_every_text_is_in_one_call(self, part: TokenKV) -> None:
        """A step evaluates each open text once, however the texts are put together."""
        name = "block" if refused(part, "full") else "full"
        done = trial(name, part)
        steps = [sum(row.open for row in rows) for rows in done.loop.tally.rows]
        assert int(done.loop.tally.evaluations.sum()) == sum(steps)

    @pytest.mark.parametrize("name", ["full", "shifted"])
    def test_open_slots_have_logits(self, part: TokenKV, name: str) -> None:
        """All of the active block, at every step; with groups and certainty priors some of them."""
        name = "block" if refused(part, name) and name == "full" else "block-shifted" if refused(part, name) else name
        done = trial(name, part)
        for seen, rows in zip(done.seen, done.loop.tally.rows, strict=True):
            counts = seen.isfinite().sum(1).tolist()
            for count, row in zip(counts, rows, strict=True):
                left = row.left if row.open else 0
                some = part.kind in ("groups", "rollout")
                assert 0 < count <= left or not left if some else count == left
