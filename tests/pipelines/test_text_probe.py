"""The probe: what it finds on every family, and on models that are not what they are taken for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.caching.kv import Dual
from hasten.canvas import Canvas
from hasten.errors import ModelError, RefusedError
from hasten.pipelines.text.loop import TextLoop
from hasten.pipelines.text_models.families import choose
from hasten.pipelines.text_models.probe import SENTENCE, Whole, probe
from hasten.recipe import Recipe
from hasten.samplers.scores import Draw
from hasten.session import Attachment
from tests.text_hosts import MASKED, bundled, mdlm
from tests.text_hosts.facts import MASK


@pytest.mark.parametrize("name", MASKED)
def test_every_family_is_what_it_is_taken_for(name: str) -> None:
    model, facts = MASKED[name](1)
    host = choose(model, **facts.told)
    found = probe(host)
    holds = {finding.check: finding.holds for finding in found.findings}
    assert holds["blocks"] is True and holds["shift"] is None
    if not facts.tapped:
        assert isinstance(found.host, Whole) and holds["followed"] is False and not found.host.caches
        assert "could be followed" in found.sentences[0]
        return
    assert found.host is host and host.caches
    assert holds["followed"] is holds["windows"] is holds["batches"] is True
    assert found.embeddings is facts.embeds
    assert not found.sentences


def test_a_model_that_looks_at_the_noise_is_asked_about_whole_texts_only() -> None:
    host = choose(mdlm.filled(mdlm.MDLM(mdlm.MDLMConfig(time_conditioning=True)), 1))
    found = probe(host)
    assert found.host is host and not host.caches and not found.sentences
    assert {finding.check for finding in found.findings} == {"followed", "batches", "blocks", "shift", "embeddings"}


def test_positions_that_are_lost_take_the_caches_away() -> None:
    model, _ = MASKED["dream-fast-dllm"](1)
    host = choose(model)
    host.shadow = lambda attachment: None  # type: ignore[method-assign]
    found = probe(host)
    assert found.host is host and not host.caches
    assert "positions it is given" in found.sentences[0]


def test_logits_of_another_model_are_not_used() -> None:
    model, _ = MASKED["llada"](1)
    host = choose(model)

    def shadow(attachment: Attachment, was: Any = host.shadow) -> None:
        was(attachment)
        block = model.model.transformer["blocks"][0]
        attachment.replace(block.q_proj, "forward", lambda x: x * 0.5)

    host.shadow = shadow  # type: ignore[method-assign]
    found = probe(host)
    assert isinstance(found.host, Whole) and "other logits than its own call" in found.sentences[0]


def test_a_neighbour_that_matters_takes_batches_away() -> None:
    model, _ = MASKED["llada"](1)
    host = choose(model)
    was = host.forward

    def forward(ids: Tensor, positions: Tensor, now: Any) -> Any:
        given = was(ids, positions, now)
        return given.logits + 0.1 * (ids.shape[0] - 1) * given.logits.roll(1, -1)

    host.forward = forward  # type: ignore[method-assign]
    found = probe(host)
    assert isinstance(found.host, Whole) and "beside a longer one" in found.sentences[0]


def test_a_causal_model_is_not_taken_for_a_bidirectional_one() -> None:
    model, _ = bundled.build(1)
    forward = type(model).forward

    class Causal(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
            return forward(self, input_ids=input_ids, **kwargs)

    model.__class__ = Causal
    with pytest.raises(RefusedError, match="no token sees those behind it"):
        probe(choose(model))


def test_a_model_that_sees_later_blocks_is_refused() -> None:
    model, _ = MASKED["llada2"](1)
    forward = type(model).forward

    class Full(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
            return forward(self, input_ids=input_ids, **kwargs)

    model.__class__ = Full
    model.config.architectures = ["LLaDA2MoeModelLM"]
    with pytest.raises(RefusedError, match="blocks of 8, but sees later blocks"):
        probe(choose(model, mask_token_id=MASK, block=8))


class Letters:
    """A tokenizer of letters."""

    mask_token_id = None
    eos_token_id = 94
    pad_token_id = 93

    def __len__(self) -> int:
        return 96

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 90 for letter in text][:40]}


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("real", [False, True])
def test_shift_is_measured_on_a_known_text(declared: bool, real: bool) -> None:
    host = choose(MASKED["bundled-shifted" if declared else "bundled-full"](1).model)
    text = torch.tensor(Letters()(SENTENCE)["input_ids"])
    shape = host.own(text[None]).shape
    about = text.roll(-1) if real else text
    own = host.own

    def knowing(ids: Tensor) -> Tensor:
        if ids.shape[1] != len(text):
            return own(ids)
        return torch.zeros(len(ids), *shape[1:]).scatter(-1, about.expand(len(ids), -1)[..., None], 5.0)

    host.own = knowing  # type: ignore[method-assign]
    (finding,) = (finding for finding in probe(host, Letters()).findings if finding.check == "shift")
    assert finding.holds is (declared is real)
    assert (f"Pass shifted={real}" in finding.sentence) is (declared is not real)


def test_shift_of_an_untrained_model_is_not_measured() -> None:
    for name in ("bundled-full", "dream", "llada-tied"):
        findings = probe(choose(MASKED[name](1).model), Letters()).findings
        (shift,) = (finding for finding in findings if finding.check == "shift")
        assert shift.holds is None and "too little" in shift.sentence


# --- generation ------------------------------------------------------------------------------------


def written(model: Any, facts: Any, prompt: Tensor, new: int) -> Tensor:
    """One token per evaluation of the authors' call, the surest of the active block first."""
    ids = torch.cat([prompt, torch.full((new,), facts.mask)])
    block = {"full": 32, "block": facts.block, "causal": 1}[facts.kind]
    aligned = facts.kind != "full"
    low = len(prompt)
    while low < len(ids):
        high = min((low // block + 1) * block if aligned else low + block, len(ids))
        for _ in range(high - low):
            logits = facts.plain(model, ids[None])[0].float()
            if facts.shifted:
                logits = logits.roll(1, 0)
            logits[:, [facts.mask, *range(facts.vocab, logits.shape[-1])]] = -torch.inf
            sure = logits.softmax(-1).max(-1)
            open_ = (ids == facts.mask) & (torch.arange(len(ids)) >= low) & (torch.arange(len(ids)) < high)
            slot = torch.where(open_, sure.values, -1.0).argmax()
            ids[slot] = sure.indices[slot]
        low = high
    return ids


def generated(host: Any, prompts: list[Tensor], new: list[int], recipe: Recipe) -> Canvas:
    canvas = Canvas.of(prompts, new, host.facts)
    return TextLoop(host, recipe, canvas, Draw(torch.zeros(len(prompts), dtype=torch.int64))).run()


@pytest.mark.parametrize("name", MASKED)
def test_sequential_writing_is_the_authors(name: str) -> None:
    """Three texts of different lengths at once; what is behind an end token does not count."""
    model, facts = MASKED[name](2)
    found = probe(choose(model, **facts.told)).host
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 92, (length,), generator=generator) for length in (5, 9, 2)]
    new = [6, 3, 11]
    canvas = generated(found, prompts, new, Recipe())
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            right = written(model, facts, prompt, new[row])
            end = int(canvas.end[row])
            assert torch.equal(canvas.ids[row, :end], right[:end])
            assert end == len(right) or int(canvas.ids[row, end - 1]) == facts.eos


def test_what_cannot_be_followed_takes_no_caches() -> None:
    host = probe(choose(MASKED["mdlm-flash"](1).model)).host
    with pytest.raises(ModelError, match="without a cache and without drafts"):
        generated(host, [torch.arange(4), torch.arange(6)], [40, 40], Recipe(kv=Dual()))


def test_models_without_caches_get_no_copies_of_slots() -> None:
    from hasten.pipelines.text.job import fitting
    from hasten.samplers.revise_erase import NarrowOut
    from hasten.samplers.verify import FreeDave

    host = probe(choose(MASKED["mdlm-flash"](1).model)).host
    with pytest.raises(RefusedError, match="revises by copies of slots"):
        fitting(Recipe(revise=NarrowOut()), host)
    assert fitting(Recipe(verify=FreeDave()), host).verify == FreeDave(), "drafts are whole texts"
