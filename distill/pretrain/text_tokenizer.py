"""The one tokenizer of all text models: byte-level BPE of 2,048 entries, trained on Python sources and list tasks.

It is committed (`configs/text-tokenizer.json`, SHA256 below), because another version of Python has other sources and
would give other merges. `python -m hasten.distill.pretrain.text_tokenizer FILE` makes it anew.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from hasten.errors import ModelError
from hasten.pipelines import list_tasks, python_sources

FILE = Path(__file__).parents[1] / "configs" / "text-tokenizer.json"
SHA256 = "16a57612c66e010fdd7f51a32cd701761642a427ef91fa0c46e2c1bc2e1e7c6d"
PAD, EOS, MASK = "<pad>", "<eos>", "<mask>"
"""Special entries, with the ids 0, 1 and 2."""
ENTRIES = 2048
_TASK_LINES = 20_000
"""So many questions make sure that each of their letters, digits, words and signs becomes one token."""


def train_tokenizer(texts: Iterable[str], entries: int = ENTRIES) -> Any:
    """A `tokenizers.Tokenizer` from these texts and the list tasks; every byte has an entry, so any text is encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[PAD, EOS, MASK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain(texts, _task_lines()), trainer)
    return tokenizer


def load_tokenizer(file: Path = FILE, sha256: str | None = SHA256) -> Any:
    """The committed tokenizer as a `PreTrainedTokenizerFast`; `ModelError` when the file is not the recorded one."""
    from transformers import PreTrainedTokenizerFast

    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if sha256 is not None and found != sha256:
        raise ModelError(
            f"'{file}' has the sha256 {found[:12]}..., expected {sha256[:12]}...: models trained with another"
            " tokenizer would read nonsense. Restore the file from the repository."
        )
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        pad_token=PAD,
        eos_token=EOS,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def _task_lines() -> Iterator[str]:
    for question in list_tasks.questions(_TASK_LINES, 0, held_out=False):
        yield question.prompt + question.answer


if __name__ == "__main__":
    target = Path(sys.argv[1])
    train_tokenizer(python_sources.texts("train")).save(str(target), pretty=False)
    print(hashlib.sha256(target.read_bytes()).hexdigest())
