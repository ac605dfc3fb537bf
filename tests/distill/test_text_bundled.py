"""The bundled text models: their cards are honest, and they can do what the list tasks are for."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import pytest
import torch

from hasten.distill import text_judge
from hasten.distill.text_tokenizer import FILE, SHA256
from hasten.pipelines import tiny_models
from hasten.pipelines.list_tasks import DETERMINISTIC, ask

TEXTS = [name for name in tiny_models.names() if tiny_models.card(name)["kind"] == "text"]
LEARNED = [name for name in ("tiny-lists", "tiny-dllm") if name in TEXTS]

pytestmark = pytest.mark.skipif(not TEXTS, reason="the bundled text models are not in this checkout")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", TEXTS)
def test_card_matches_the_files(name: str) -> None:
    card, folder = tiny_models.card(name), tiny_models.path(name)
    assert card["name"] == name and card["steps"]["text"] > 0 and all(tiny_models.verify(name).values())
    model, tokenizer = tiny_models.text(name)
    assert sum(p.numel() for p in model.parameters()) == sum(card["parameters"].values())
    assert tokenizer.get_vocab() == text_vocabulary() and card["tokenizer"] == SHA256
    assert {file.suffix for file in folder.iterdir()} <= {".json", ".safetensors"}


def text_vocabulary() -> dict[str, int]:
    from tokenizers import Tokenizer

    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == SHA256
    found: dict[str, int] = Tokenizer.from_file(str(FILE)).get_vocab()
    return found


@pytest.mark.parametrize("name", LEARNED)
def test_list_tasks_are_solved_one_token_a_forward(name: str) -> None:
    model, tokenizer = tiny_models.text(name)
    rows = text_judge.tasks_rows(model, tokenizer, 16)
    match = {row["task"]: row["exact_match"] for row in rows}
    assert sum(match[task] for task in DETERMINISTIC) >= 0.95 * len(DETERMINISTIC), match
    assert all(row["nll"] < row["closed_form"] + 2 for row in rows), rows


@pytest.mark.parametrize("name", LEARNED)
def test_one_shot_decoding_fails_where_letters_depend_on_each_other(name: str) -> None:
    """What the list tasks are for: at n = 8, n! / n^n = 0.2 % of independent draws are orders."""
    model, tokenizer = tiny_models.text(name)
    rng = random.Random(78)
    asked = [ask("shuffle", rng, held_out=True, length=8) for _ in range(8)]
    prompt = torch.tensor(tokenizer([q.prompt for q in asked]).input_ids)
    masks = torch.full((len(asked), text_judge.SLOTS), model.config.mask_token_id)
    with torch.no_grad():
        once = text_judge.logits(model, torch.cat([prompt, masks], 1)).argmax(-1)[:, prompt.shape[1] :]
    slowly = text_judge.decode(model, prompt)[:, prompt.shape[1] :]
    texts = [[text_judge.read(tokenizer, row) for row in rows] for rows in (once, slowly)]
    right = [sum(q.right(text) for q, text in zip(asked, found, strict=True)) for found in texts]
    assert right[0] <= 2 and right[1] >= 7
