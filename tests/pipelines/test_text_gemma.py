"""DiffusionGemma's own way: the same numbers as transformers' loop, texts that do not depend on their neighbours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)

import hasten
from hasten.errors import LimitError, ModelError, RefusedError, UsageError
from hasten.limits import Limits
from hasten.noise import gumbel, seeds
from hasten.pipelines import tiny_models
from hasten.pipelines.quiet import no_bars
from hasten.pipelines.text.gemma_pipeline import DiffusionGemmaPipeline
from hasten.pipelines.text_models.families import choose
from hasten.pipelines.text_models.gemma import Denoising, GemmaLoop, takes
from hasten.recipe import Recipe
from hasten.samplers.commit import Threshold, Unmask
from hasten.samplers.commit_history import Settled
from hasten.samplers.commit_sure import EntropyBound
from hasten.samplers.commit_told import Agreed
from hasten.samplers.revise import RevisePolicy
from tests.pipelines.text_pipes import tokenizer
from tests.text_hosts import FAMILIES
from tests.text_hosts.diffusion_gemma import CANVAS

SEEDS = torch.tensor([11, 12, 13])


def prompts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 88, (length,), generator=generator) for length in lengths]


def loop(**kwargs: Any) -> GemmaLoop:
    return GemmaLoop(FAMILIES["diffusion-gemma"](1).model, **kwargs)


class OurNoise:
    """transformers' draws, replaced by ours: its canvases and tokens as `GemmaLoop` would draw them."""

    def __init__(self, ours: GemmaLoop, seed: Tensor) -> None:
        self.ours, self.seed, self.canvas, self.step, self.fresh = ours, seed, -1, 0, True

    @property
    def clock(self) -> int:
        return self.canvas * (self.ours.how.steps + 1) + self.step

    def initialize(self, sampler: Any, batch_size: int, device: Any) -> Tensor:
        if self.fresh:  # no token has been drawn since the last: a canvas begins
            self.canvas, self.step = self.canvas + 1, 0
        self.fresh = True
        return self.ours._noise(self.seed, self.clock)

    def multinomial(self, probs: Tensor, num_samples: int) -> Tensor:
        self.step, self.fresh = self.step + 1, False
        slot = torch.arange(CANVAS)
        noise = gumbel(self.seed[:, None], torch.full_like(slot, self.clock), slot, probs.shape[-1]).flatten(0, 1)
        return (probs.log() + noise).argmax(-1, keepdim=True)


@pytest.mark.parametrize(("bound", "stable", "confident"), [(0.1, 0, 2.35), (3.0, 0, 2.35), (0.1, 1, 0.005)])
def test_the_loop_is_that_of_transformers(
    monkeypatch: pytest.MonkeyPatch, bound: float, stable: int, confident: float
) -> None:
    """Token for token, with texts whose canvases are over after different numbers of evaluations."""
    how = Denoising(steps=5, stable=stable, confident=confident)
    ours = loop(recipe=Recipe(commit=Unmask(rule=EntropyBound(bound=bound))), denoising=how)
    given, seed = prompts(9, 9), SEEDS[:2]
    found = ours.run(given, [20, 20], seed)
    noise = OurNoise(ours, seed)
    monkeypatch.setattr(EntropyBoundSampler, "initialize_canvas", lambda *a, **k: noise.initialize(*a, **k))
    monkeypatch.setattr(torch, "multinomial", noise.multinomial)
    theirs = ours.model.generate(
        torch.stack(given), max_new_tokens=20, max_denoising_steps=5, t_min=how.cold, t_max=how.hot,
        stability_threshold=stable, confidence_threshold=confident, sampler_config=EntropyBoundSamplerConfig(entropy_bound=bound),
    )  # fmt: skip
    counts = found.canvases.diff(dim=1, prepend=torch.zeros(2, 1, dtype=torch.long))
    assert (counts[0] != counts[1]).any() or stable
    for row, text in enumerate(found.texts):
        assert 9 < len(text) <= 29
        assert torch.equal(text, theirs.sequences[row, : len(text)])


def test_texts_are_those_they_would_be_alone() -> None:
    ours = loop(denoising=Denoising(steps=4))
    given, new = prompts(3, 21, 10), [17, 5, 8]
    together = ours.run(given, new, SEEDS)
    for row in range(3):
        alone = ours.run(given[row : row + 1], new[row : row + 1], SEEDS[row : row + 1])
        assert torch.equal(alone.texts[0], together.texts[row])
        assert int(alone.evaluations[0]) == int(together.evaluations[row])


def test_lengths_and_ends() -> None:
    ours = loop(denoising=Denoising(steps=2))
    found = ours.run(prompts(4, 6), [0, 11], SEEDS[:2])
    assert len(found.texts[0]) == 4 and int(found.evaluations[0]) == 0
    written = found.texts[1][6:]
    ends = torch.isin(written, torch.tensor(ours.eos)).nonzero().flatten()
    assert len(written) == 11 or ends.tolist() == [len(written) - 1]
    assert torch.equal(found.texts[1][:6], prompts(4, 6)[1])


def test_when_a_canvas_is_over() -> None:
    sure = Denoising(steps=6, stable=0, confident=100.0)
    early, never = (
        loop(denoising=how).run(prompts(5), [CANVAS], SEEDS[:1]) for how in (sure, replace(sure, forever=True))
    )
    assert (int(early.evaluations[0]), int(never.evaluations[0])) == (1, 6)
    assert int(never.tokens[0]) == 6 * CANVAS


def test_any_commit_rule_accepts() -> None:
    few = loop(recipe=Recipe(commit=Unmask(rule=Threshold(above=1.0))), denoising=Denoising(steps=4))
    all_ = loop(recipe=Recipe(commit=Unmask(rule=Threshold(above=0.0))), denoising=Denoising(steps=4))
    texts = [each.run(prompts(6), [CANVAS], SEEDS[:1]).texts[0] for each in (few, all_)]
    assert not torch.equal(*texts)


def test_rules_that_look_at_distributions_see_them() -> None:
    rules = (Settled(above=0.0, drift=1e-12, lasting=1), Settled(above=0.0, drift=1e9, lasting=1))
    never, soon = (loop(recipe=Recipe(commit=Unmask(rule=rule)), denoising=Denoising(steps=4)) for rule in rules)
    texts = [each.run(prompts(6), [CANVAS], SEEDS[:1]).texts[0] for each in (never, soon)]
    assert not torch.equal(*texts)


def test_what_cannot_be_asked_for() -> None:
    assert takes(loop().model) and not takes(FAMILIES["llada"](1).model)
    with pytest.raises(ModelError, match="DiffusionGemmaPipeline"):
        choose(loop().model)
    for wrong, message in (
        (([], []), "at least one token"),
        (([torch.zeros(0, dtype=torch.long)], [4]), "at least one token"),
        ((prompts(4), [-1]), "negative"),
        ((prompts(100), [25]), "the context is 128"),
    ):
        with pytest.raises(UsageError, match=message):
            loop().run(*wrong, SEEDS[:1])
    with pytest.raises(UsageError, match="at least 1 step"):
        Denoising(steps=0)
    with pytest.raises(RefusedError, match="takes revise from no recipe"):
        loop(recipe=Recipe(revise=RevisePolicy()))
    ours = loop()
    ours.model.train()
    with pytest.raises(ModelError, match="training mode"):
        ours.run(prompts(4), [4], SEEDS[:1])


# --- the pipeline ----------------------------------------------------------------------------------


class Kept:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.drafts = self.ended = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def put_draft(self, value: Tensor) -> None:
        self.drafts += 1

    def end(self) -> None:
        self.ended += 1


def pipeline(**kwargs: Any) -> DiffusionGemmaPipeline:
    return DiffusionGemmaPipeline(FAMILIES["diffusion-gemma"](1).model, denoising=Denoising(steps=3), **kwargs)


def test_pipeline_gives_what_the_loop_gives() -> None:
    pipe, given = pipeline(), prompts(5, 9)
    readers = [Kept(), Kept()]
    out = pipe.generate(
        [ids.tolist() for ids in given], max_new_tokens=13, generator=torch.Generator().manual_seed(4), streamer=readers
    )
    right = loop(denoising=pipe.denoising).run(given, [13, 13], seeds(torch.Generator().manual_seed(4), 2))
    for row, (text, ids) in enumerate(zip(right.texts, given, strict=True)):
        start = 9 - len(ids)
        assert torch.equal(out.sequences[row, start : start + len(text)], text)
        assert readers[row].tokens == text.tolist() and readers[row].ended == 1 and readers[row].drafts
        count = len(text) - len(ids)
        assert int(out.lengths[row]) == count
        commits = out.commit_step[row]
        assert (commits[:count] >= 0).all() and (commits[count:] == -1).all()
        assert int(commits[count - 1]) + 1 == int(out.nfe[row]) == int(right.evaluations[row])
    assert out.texts is None and "DiffusionGemma" in str(out.report)
    assert out.token_layers.tolist() == [
        2 * (count * CANVAS + len(ids) + CANVAS * (len(text) - len(ids) > CANVAS))
        for count, ids, text in zip(out.nfe.tolist(), given, right.texts, strict=True)
    ]


def test_pipeline_says_what_it_does_not_take() -> None:
    pipe = pipeline()
    for wrong, message in (
        ({"threshold": 0.9}, "threshold says nothing to DiffusionGemma"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"steps": 2, "max_denoising_steps": 3}, "both were given"),
        ({"tempo": 1}, "tempo says nothing"),
    ):
        with pytest.raises(UsageError, match=message):
            pipe.generate(prompts(4)[0][None], **wrong)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="TextDiffusionPipeline"):
        DiffusionGemmaPipeline(FAMILIES["llada"](1).model)
    ids = pipe.generate(prompts(4)[0], max_denoising_steps=2, max_new_tokens=3, return_dict_in_generate=False)
    assert ids.shape[0] == 1  # type: ignore[attr-defined]


# --- the front door --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = tmp_path_factory.mktemp("gemma")
    FAMILIES["diffusion-gemma"](1).model.save_pretrained(made)
    tokenizer().save_pretrained(made)
    return made


def test_the_front_door_chooses_by_the_config(folder: Any) -> None:
    made = hasten.TextDiffusionPipeline.from_pretrained(folder, device="cpu", probe=False)
    assert type(made) is hasten.DiffusionGemmaPipeline
    given = prompts(5)[0]
    same = pipeline().generate(given, max_new_tokens=9, steps=3, generator=torch.Generator().manual_seed(4))
    out = made(given, max_new_tokens=9, steps=3, generator=torch.Generator().manual_seed(4))
    assert torch.equal(out.sequences, same.sequences)
    assert out.texts is not None and made.to("cpu").device.type == "cpu"
    with pytest.raises(UsageError, match="block say"):
        hasten.TextDiffusionPipeline.from_pretrained(folder, device="cpu", block=4)
    with pytest.raises(RefusedError, match="takes kv from no recipe"):
        hasten.TextDiffusionPipeline.from_pretrained(folder, "fast-dllm", device="cpu")
    with pytest.raises(ModelError, match=r"hasten\.DiffusionGemmaPipeline"):
        hasten.TextDiffusionPipeline(made.model)


def test_load_opens_a_folder_without_a_bar(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    for active in (True, False):
        before, hub = logging._tqdm_active, are_progress_bars_disabled()
        logging._tqdm_active = active
        try:
            assert type(hasten.load(folder)) is hasten.DiffusionGemmaPipeline
            with pytest.raises(ModelError), no_bars():
                assert not logging.is_progress_bar_enabled()
                raise ModelError("on the way")
            assert logging._tqdm_active is active and are_progress_bars_disabled() is hub
        finally:
            logging._tqdm_active = before
    for bundled in ("tiny-draft", tiny_models.path("tiny-draft"), tiny_models.path("tiny-image")):
        hasten.load(bundled)
    assert "Loading" not in capsys.readouterr().err


def test_a_session_on_it() -> None:
    pipe, few = pipeline(), Recipe(name="few", commit=Unmask(rule=Threshold(above=1.0)))
    with hasten.accelerate(pipe, few) as run:
        assert run.report().family == "DiffusionGemma" and "Nothing was generated" in str(run.report())
        inside = pipe.generate(prompts(6)[0], max_new_tokens=CANVAS, generator=torch.Generator().manual_seed(1))
        pipe.generate(prompts(6)[0], max_new_tokens=CANVAS, recipe=Recipe())  # has a recipe of its own
        with pytest.raises(RefusedError, match="takes kv from no recipe"):
            hasten.accelerate(pipe, "dual-cache")
    assert run.closed and not pipe.sessions
    assert run.report().recipe == few and run.report().evaluations == int(inside.nfe.sum())
    direct = pipe.generate(prompts(6)[0], max_new_tokens=CANVAS, recipe=few, generator=torch.Generator().manual_seed(1))
    assert torch.equal(direct.sequences, inside.sequences)


def test_a_session_sets_the_limits() -> None:
    pipe = pipeline()
    with hasten.accelerate(pipe, Recipe(), limits=Limits(max_tokens=4)), pytest.raises(LimitError, match="max_new_tokens"):
        pipe.generate(prompts(4)[0], max_new_tokens=5)


def test_named_recipes_lose_their_blocks_and_the_report_says_so() -> None:
    own = Recipe(commit=Unmask(rule=Threshold(above=0.9)))
    named, bare = (
        pipeline(recipe=recipe).generate(prompts(6)[0], max_new_tokens=CANVAS, generator=torch.Generator().manual_seed(1))
        for recipe in ("threshold", own)
    )
    assert torch.equal(named.sequences, bare.sequences)
    assert "blocks and ends were left out" in str(named.report) and "left out" not in str(bare.report)


def test_rules_that_ask_somebody_else_are_refused() -> None:
    with pytest.raises(RefusedError, match="second model"):
        pipeline(recipe=Recipe(commit=Unmask(rule=Agreed())))
