"""Streamers, stopping criteria and callbacks: what they get, and when."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MaxLengthCriteria,
    StoppingCriteriaList,
    TextDiffusionStreamer,
    TextIteratorStreamer,
    TextStreamer,
)

from hasten.caching.kv import Dual
from hasten.canvas import Canvas
from hasten.errors import UsageError
from hasten.pipelines.text.stream import Reader
from hasten.recipe import Recipe
from hasten.samplers.commit import Threshold, Unmask
from hasten.samplers.revise_edit import Edit
from hasten.samplers.text_blocks import Fixed, InBlocks, Whole
from tests.pipelines.text_pipes import MASK, VOCAB, pipe, tokenizer

PROMPT = [[1, 2, 3]]
WHOLE = Recipe(name="whole", commit=Unmask(rule=Threshold(above=0.15)), blocks=InBlocks(rule=Whole(), end=None))
BLOCKS = Recipe(
    name="blocks", commit=Unmask(rule=Threshold(above=0.15)), blocks=InBlocks(rule=Fixed(size=4), end=None), kv=Dual()
)


class Heard:
    """A streamer that remembers, with the canvases between."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        self.events.append(("put", value.flatten().tolist()))

    def put_draft(self, value: Tensor) -> None:
        assert value.shape[0] == 1
        self.events.append(("draft", value[0].tolist()))

    def end(self) -> None:
        self.events.append(("end", None))

    @property
    def tokens(self) -> list[int]:
        return [token for kind, tokens in self.events if kind == "put" for token in tokens]


class Plain:
    """A streamer without drafts."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("recipe", [WHOLE, BLOCKS, BLOCKS.model_copy(update={"revise": Edit(above=0.05)})], ids=["whole", "blocks", "edit"])
def test_tokens_come_once_final_and_in_order(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    heard, subject = Heard(), pipe()
    monkeypatch.setattr(subject.host, "repeats", 1.0)  # random weights give nothing back; revise all the same
    output = subject.generate(PROMPT, max_new_tokens=10, recipe=recipe, streamer=heard)
    assert heard.tokens == output.sequences[0].tolist()
    assert heard.events[0] == ("put", PROMPT[0])
    assert [kind for kind, _ in heard.events].count("end") == 1
    assert heard.events[-1][0] == "end"
    assert MASK not in heard.tokens


def test_drafts_are_what_is_behind_the_final_tokens() -> None:
    heard = Heard()
    pipe().generate(PROMPT, max_new_tokens=10, recipe=WHOLE, streamer=heard)
    told = 0
    for kind, tokens in heard.events[1:]:
        if kind == "put":
            told += len(tokens)
        elif kind == "draft":
            assert len(tokens) == 10 - told
            assert tokens[0] == MASK, "what is written and final should have been put"
    assert [kind for kind, _ in heard.events].count("draft") > 2


def test_with_a_reviser_tokens_wait_for_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    heard, subject = Heard(), pipe()
    monkeypatch.setattr(subject.host, "repeats", 1.0)
    recipe = BLOCKS.model_copy(update={"revise": Edit(above=0.05)})
    subject.generate(PROMPT, max_new_tokens=8, recipe=recipe, streamer=heard)
    puts = [len(tokens) for kind, tokens in heard.events[1:] if kind == "put"]
    assert puts == [4, 4]


def test_a_streamer_for_each_text() -> None:
    each = [Plain(), Plain()]
    output = pipe().generate([[1, 2, 3], [4]], max_new_tokens=[3, 8], recipe=WHOLE, streamer=each)
    assert each[0].tokens == output.sequences[0, :6].tolist()
    assert each[1].tokens == output.sequences[1, 2:].tolist()
    assert [one.ended for one in each] == [1, 1]
    with pytest.raises(UsageError, match="a list with a streamer for each"):
        pipe().generate([[1, 2, 3], [4]], streamer=Plain())


def test_transformers_streamers(capsys: pytest.CaptureFixture[str]) -> None:
    output = pipe().generate(PROMPT, max_new_tokens=6, recipe=BLOCKS, streamer=TextStreamer(tokenizer(), skip_prompt=True))
    assert output.texts is not None
    assert capsys.readouterr().out.split() == output.texts[0].split()
    pipe().generate(PROMPT, max_new_tokens=6, recipe=BLOCKS, streamer=TextDiffusionStreamer(tokenizer(), skip_prompt=True))
    assert capsys.readouterr().out.split()[-1] == output.texts[0].split()[-1]


def test_an_iterator_in_a_thread() -> None:
    stream = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=30)
    arguments = {"input_ids": PROMPT, "max_new_tokens": 6, "recipe": BLOCKS, "streamer": stream}
    thread = Thread(target=pipe().generate, kwargs=arguments)
    thread.start()
    text = "".join(stream)
    thread.join()
    output = pipe().generate(PROMPT, max_new_tokens=6, recipe=BLOCKS)
    assert output.texts is not None
    assert text.split() == output.texts[0].split()


# --- stopping criteria --------------------------------------------------------------------------------


def test_a_criterion_ends_a_text_where_it_says_so() -> None:
    plain = pipe().generate(PROMPT, max_new_tokens=10, recipe=WHOLE).sequences[0].tolist()
    for length in (4, 7, 13):
        output = pipe().generate(PROMPT, max_new_tokens=10, recipe=WHOLE, stopping_criteria=[MaxLengthCriteria(length)])
        assert output.sequences[0].tolist() == plain[:length]
        assert output.lengths.tolist() == [length - 3]
        assert not output.interrupted


def test_each_text_has_its_own_end() -> None:
    prompts = [[1, 2, 3], [4]]
    plain = pipe().generate(prompts, max_new_tokens=8, recipe=BLOCKS)
    word = int(plain.sequences[0, 3 + 2])

    def stops(ids: Tensor, scores: Any) -> Tensor:
        assert ids.shape[0] == 1
        return ids[:, -1] == word

    together = pipe().generate(prompts, max_new_tokens=8, recipe=BLOCKS, stopping_criteria=StoppingCriteriaList([stops]))
    for number, prompt in enumerate(prompts):
        alone = pipe().generate([prompt], max_new_tokens=8, recipe=BLOCKS, stopping_criteria=stops)
        count = int(alone.lengths[0])
        assert together.lengths[number] == count
        assert together.sequences[number, 3 : 3 + count].tolist() == alone.sequences[0, len(prompt) :].tolist()
    assert together.lengths[0] <= 3
    assert together.nfe[0] <= plain.nfe[0]


def test_a_stop_word_written_in_the_middle_of_a_step() -> None:
    """Criteria see every prefix, as if tokens had come one by one, however many a step makes final."""
    plain = pipe().generate(PROMPT, max_new_tokens=10, recipe=WHOLE).sequences[0].tolist()
    word = tokenizer().decode([plain[5]])
    asked: list[int] = []

    def stops(ids: Tensor, scores: Any) -> bool:
        asked.append(ids.shape[1])
        return tokenizer().decode(ids[0, 3:]).endswith(word)

    output = pipe().generate(PROMPT, max_new_tokens=10, recipe=WHOLE, stopping_criteria=stops)
    length = 3 + plain[3:].index(plain[5]) + 1
    assert output.sequences[0].tolist() == plain[:length]
    assert asked == list(range(4, length + 1))


def test_streamers_stop_with_the_criterion() -> None:
    heard = Plain()
    output = pipe().generate(PROMPT, max_new_tokens=10, recipe=WHOLE, streamer=heard, stopping_criteria=MaxLengthCriteria(6))
    assert heard.tokens == output.sequences[0].tolist()
    assert len(heard.tokens) == 6
    assert heard.ended == 1


# --- callbacks ----------------------------------------------------------------------------------------


def test_a_callback_sees_each_step() -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []

    def look(owner: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert owner is pipe()
        assert step == timestep == len(seen)
        seen.append((step, tensors["ids"].clone(), tensors["transfer_index"].clone()))
        assert torch.equal(tensors["ids"], tensors["cur_x"])
        assert tensors["sampled_probs"].shape == tensors["ids"].shape
        return tensors

    names = ["ids", "transfer_index", "cur_x", "sampled_probs"]
    output = pipe().generate(
        PROMPT, max_new_tokens=6, recipe=WHOLE, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names
    )
    assert len(seen) == int(output.nfe[0])
    for step, ids, wrote in seen:
        assert torch.equal(wrote[0, 3:], output.commit_step[0] == step)
        assert (ids[wrote] != MASK).all()
        assert (ids < VOCAB).all()


def test_a_callback_can_stop() -> None:
    def stop(owner: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        owner.interrupt = step == 1
        return {}

    output = pipe().generate(PROMPT, max_new_tokens=6, callback_on_step_end=stop)
    assert output.interrupted
    assert output.nfe.tolist() == [2]
    assert output.lengths.tolist() == [2]
    assert int((output.sequences == MASK).sum()) == 4
    assert not pipe().generate(PROMPT, max_new_tokens=6).interrupted


def test_a_callback_cannot_change_the_text() -> None:
    def change(owner: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"ids": tensors["ids"] + 1}

    with pytest.raises(UsageError, match="looked at only"):
        pipe().generate(PROMPT, max_new_tokens=6, callback_on_step_end=change)


def test_reading_along_does_not_look_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """One look per step with a streamer, a criterion and a callback, as without them; one before the first, one after."""
    looks = []
    own = Canvas._table
    monkeypatch.setattr(Canvas, "_table", lambda canvas, *told: looks.append(1) or own(canvas, *told))
    output = pipe().generate(PROMPT, max_new_tokens=8, recipe=BLOCKS)
    without, steps = len(looks), int(output.nfe[0])
    looks.clear()
    more: Any = {"streamer": Heard(), "stopping_criteria": MaxLengthCriteria(64), "callback_on_step_end": lambda *step: {}}
    pipe().generate(PROMPT, max_new_tokens=8, recipe=BLOCKS, **more)
    assert len(looks) == without == steps + 2


def test_what_is_read_is_what_stands_there() -> None:
    """What `Reader` gets is what stands on the canvas, and nothing is handed on twice."""
    facts = pipe().host.facts
    canvas = Canvas.of([torch.tensor([1, 2])], [3], facts)
    canvas.enter(canvas.open, torch.stack([canvas.start, canvas.end], 1))
    heard = Plain()
    reader = Reader([torch.tensor([1, 2])], [heard], [], False)
    token = torch.tensor([[0, 0, 7, 8, 9]])
    for chosen, told in (([3], []), ([2], [7, 8]), ([4], [7, 8, 9])):
        canvas.write(torch.isin(canvas.place, torch.tensor(chosen))[None], token, torch.ones(1, 5))
        canvas.open = canvas.masked.any(1)
        assert reader(*canvas.read()) == {}
        assert heard.tokens == [1, 2, *told]
    assert heard.ended == 1
