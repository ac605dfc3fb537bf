"""List tasks have exactly the answers they claim; their texts fit the committed tokenizer; the sources are split."""

from __future__ import annotations

import math
import random
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.distill.pretrain.text_config import LONGEST_ANSWER, LONGEST_QUESTION
from hasten.distill.pretrain.text_tokenizer import ENTRIES, FILE, load_tokenizer, train_tokenizer
from hasten.errors import ModelError, UsageError
from hasten.pipelines import python_sources
from hasten.pipelines.list_tasks import DETERMINISTIC, LETTERS, PLACES, TASKS, ask, questions


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer()


@settings(max_examples=200, deadline=None)
@given(task=st.sampled_from(TASKS), seed=st.integers(0, 10**6), held_out=st.booleans())
def test_answers_are_right_and_changed_ones_wrong(task: str, seed: int, held_out: bool) -> None:
    question = ask(task, random.Random(seed), held_out=held_out)
    items = question.answer.split()
    assert question.held_out == held_out and question.right(question.answer)
    assert not question.right(" ".join(items[:-1])), "one letter is missing"
    assert not question.right(" ".join([*items, items[0]])), "one letter too many"
    assert not question.right(" ".join([*items[:-1], "z"])), "a letter that nobody gave"
    swapped = " ".join([items[1], items[0], *items[2:]])
    assert question.right(swapped) == (task == "shuffle" or (task == "insert" and _inserted(question, swapped)))


def _inserted(question: Any, text: str) -> bool:
    rest = [item for item in text.split() if item != question.given[0]]
    return tuple(rest) == question.items


@pytest.mark.parametrize("task", TASKS)
def test_the_closed_form_counts_the_right_answers(task: str) -> None:
    question = ask(task, random.Random(3), length=4)
    letters = sorted({*question.items, *(x for x in question.given if x in LETTERS)})
    width = len(question.answer.split())
    right = sum(question.right(" ".join(letters_)) for letters_ in permutations(letters, width))
    assert right >= 1 and math.isclose(question.entropy, math.log(right), abs_tol=1e-9)
    assert (question.entropy == 0) == (task in DETERMINISTIC)


def test_the_answers_themselves() -> None:
    told = {q.task: q for q in questions(len(TASKS), 5, held_out=False)}
    for task, question in told.items():
        items, found = list(question.items), question.answer.split()
        if task == "replace":
            old, new = question.given
            assert found == [new if x == old else x for x in items] and new not in items
        if task == "insert-at":
            letter, _, place = question.given
            items.insert(int(place), letter)
            assert found == items
        if task == "sort":
            assert found == sorted(items)
        if task == "reverse":
            assert found == items[::-1]


def test_training_never_asks_what_tests_ask() -> None:
    trained = {q.prompt for q in questions(3000, 1, held_out=False)}
    tested = {q.prompt for q in questions(700, 2, held_out=True)}
    assert not trained & tested
    assert questions(20, 7, held_out=True) == questions(20, 7, held_out=True)
    assert {len(q.items) for q in questions(200, 1, held_out=False)} == set(range(4, PLACES + 1))


def test_every_word_letter_and_sign_is_one_token(tokenizer: Any) -> None:
    lengths: dict[str, set[int]] = {}
    for q in questions(350, 4, held_out=False):
        prompt, answer = tokenizer(q.prompt).input_ids, tokenizer(q.answer).input_ids
        assert len(answer) == len(q.answer.split())
        assert tokenizer(q.prompt + q.answer).input_ids == prompt + answer
        lengths.setdefault(q.task, set()).add(len(prompt))
        assert len(prompt) <= LONGEST_QUESTION and len(answer) < LONGEST_ANSWER
    assert all(len(found) == 1 for found in lengths.values()), "a task's question always has the same length"
    assert max(max(found) for found in lengths.values()) == LONGEST_QUESTION
    assert len(set().union(*lengths.values())) >= 3, "questions of different tasks make ragged batches"


@given(st.text(max_size=40))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_tokenizer_is_the_recorded_one(tokenizer: Any, tmp_path: Path) -> None:
    assert len(tokenizer) == ENTRIES
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id] == [0, 1, 2]
    other = tmp_path / "tokenizer.json"
    other.write_text(FILE.read_text().replace("Ġreturn", "Ġreturm", 1))
    with pytest.raises(ModelError, match="Restore the file"):
        load_tokenizer(other)


def test_training_the_tokenizer_twice_gives_the_same_one() -> None:
    texts = ["def f(x):\n    return x\n", "class A:\n    pass\n"]
    one, two = (train_tokenizer(texts, 400).to_str() for _ in range(2))
    assert one == two


def test_sources_are_split_by_file(tmp_path: Path) -> None:
    train, validation = (set(python_sources.files(split)) for split in ("train", "validation"))
    assert train and validation and not train & validation
    assert not [path for path in train | validation if "test" in path.parts or "site-packages" in path.parts]
    with pytest.raises(UsageError, match="Name a folder with more Python sources"):
        python_sources.files("train", tmp_path)
    (tmp_path / "broken.py").write_bytes(b"x = '\xff'")
    for i in range(60):
        (tmp_path / f"m{i}.py").write_text(f"x = {i}\n")
    both = [len(list(python_sources.texts(split, tmp_path))) for split in ("train", "validation")]
    assert sum(both) == 60 and min(both) >= 1
