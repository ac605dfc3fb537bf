"""The bundled text models: their cards are honest, and they can do what the list tasks are for."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

import hasten
from hasten.distill.pretrain import text_judge
from hasten.distill.pretrain.text_tokenizer import FILE, SHA256
from hasten.errors import UsageError
from hasten.pipelines import tiny_models
from hasten.pipelines.list_tasks import DETERMINISTIC, ask

TEXTS = [name for name in tiny_models.names() if tiny_models.card(name)["kind"] == "text"]
LEARNED = [name for name in ("tiny-dllm",) if name in TEXTS]
SOLVED = [name for name in ("tiny-dllm", "tiny-dllm-shifted") if name in TEXTS]
MATES = [name for name in ("tiny-lm", "tiny-draft") if name in TEXTS]

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


@pytest.mark.parametrize("name", SOLVED)
def test_list_tasks_are_solved_one_token_a_forward(name: str) -> None:
    model, tokenizer = tiny_models.text(name)
    rows = text_judge.tasks_rows(model, tokenizer, 16)
    match = {row["task"]: row["exact_match"] for row in rows}
    assert sum(match[task] for task in DETERMINISTIC) >= 0.95 * len(DETERMINISTIC), match
    assert all(row["nll"] < row["closed_form"] + 3 for row in rows), rows  # a guess among nine letters alone costs 20 nats


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


@pytest.mark.parametrize("name", MATES)
def test_a_causal_mate_continues_texts(name: str) -> None:
    """In transformers' own pipeline, under its own classes, and as a text diffusion model whose blocks are single tokens."""
    asked = [ask("reverse", random.Random(number), held_out=True) for number in range(4)]
    prompts = [question.prompt for question in asked]
    pipe = hasten.load(name)
    found = pipe(prompts, max_new_tokens=text_judge.SLOTS, do_sample=False, return_full_text=False)
    texts = [one["generated_text"] for [one] in found]
    assert sum(question.right(text) for question, text in zip(asked, texts, strict=True)) >= 3, texts
    same = AutoModelForCausalLM.from_pretrained(tiny_models.path(name), dtype=torch.float32).eval()
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), pipe.model.parameters(), strict=True))
    left_to_right = hasten.TextDiffusionPipeline(pipe.model, pipe.tokenizer, "sequential+exact-cache")
    assert not left_to_right.notes
    written = left_to_right.generate(prompts=prompts, max_new_tokens=text_judge.SLOTS)
    assert written.texts == texts
    assert int(written.nfe.max()) <= text_judge.SLOTS


@pytest.mark.parametrize("name", [name for name in MATES if "tiny-dllm" in TEXTS])
def test_a_causal_mate_guides_a_diffusion_model(name: str) -> None:
    """Nothing is written that only the guide wants; what it costs is counted; sizes that differ are refused at once."""
    model, tokenizer = tiny_models.text("tiny-dllm")
    guide, words = tiny_models.text(name)
    pipe = hasten.TextDiffusionPipeline(model, tokenizer, "guided", guide=guide, guide_tokenizer=words, probe=False)
    asked = [ask(task, random.Random(7), held_out=True) for task in DETERMINISTIC]
    output = pipe.generate(prompts=[question.prompt for question in asked], max_new_tokens=text_judge.SLOTS)
    assert output.texts is not None
    right = [question.right(text) for question, text in zip(asked, output.texts, strict=True)]
    assert sum(right) >= len(asked) - 1, output.texts
    assert float(output.nfe.double().mean()) < text_judge.SLOTS / 2
    assert output.report.generations[0].guide > 0
    guide.resize_token_embeddings(words.vocab_size - 1)
    with pytest.raises(UsageError, match="2047 tokens and the guided model 2048"):
        hasten.TextDiffusionPipeline(model, tokenizer, "guided", guide=guide, probe=False)
