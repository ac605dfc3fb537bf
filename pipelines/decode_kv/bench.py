"""What cache policies cost in quality, and what they hold: the measurements behind `hasten bench decode`'s table of caches.

Every policy reads the same prompts, then the same continuation token by token (teacher forcing), so that one wrong token
does not decide the rest; the whole cache does the same in the same run. Text alone would crown windows, since what
predicts code is mostly near. So letters of a list have to be found again, too (the list tasks of the bundled models), and
passages that are hidden in a prompt, where the model can find these at all.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.caching.decode.kept import KeptCache
from hasten.pipelines import list_tasks, python_sources
from hasten.pipelines.decode_kv.session import attach
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.recipe import Recipe

SHARES = (0.10, 0.25, 0.50)
EVICTING = (
    "streaming-llm", "h2o", "keyformer", "snapkv:queries=8", "pyramid-kv", "ada-kv:queries=8", "knorm",
    "loop-serve:queries=8,every=4", "zipvl", "lazy-llm", "random-kv",
)  # fmt: skip
"""Windows of 8 queries: the texts are short, and 32 would be more than a tenth of them."""
READING = {"quest": 1, "landmarks": 2, "shadow-kv": 2}
"""What reads some pages of all that is kept -> pages that it reads in any case."""
PAGE = 4
"""Tokens of a page; papers' 8 and 16 are for prompts of thousands."""
PACKING = ("int8-kv", "fp8-kv", "kivi", "mustafar", "mustafar:keys=0.7,values=0.7")
FULL = "full"
RIGHT = ("copy", "reverse", "sort", "replace", "insert-at")
"""List tasks with one right answer each."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts int64 [B, n] of held-out code, and what really follows, int64 [B, m]."""

    prompts: Tensor
    following: Tensor


@dataclass(frozen=True, slots=True)
class Questions:
    """List tasks: prompts int64 [B, n] with padding in front, mask; answers int64 [B, m], -1 behind their ends."""

    prompts: Tensor
    mask: Tensor
    answers: Tensor


@dataclass(frozen=True, slots=True)
class Needles:
    """Prompts int64 [B, n] that hold a passage at some depth and begin it again at their end; answer int64 [B, m]: how it
    goes on. without: the same prompts with another passage in its place, for what can be guessed."""

    prompts: Tensor
    without: Tensor
    answer: Tensor


def code(tokenizer: Any, count: int, given: int = 320, new: int = 64, seed: int = 5) -> Texts:
    """`count` stretches of sources that the bundled models were not trained on."""
    pieces = torch.tensor(list(_pieces(tokenizer, count, given + new, seed)))
    return Texts(pieces[:, :given], pieces[:, given:])


def questions(tokenizer: Any, count: int, seed: int = 7) -> Questions:
    """`count` held-out questions of each list task that has one right answer."""
    prompts, answers = [], []
    for task in RIGHT:
        dice = random.Random(f"{seed}-{task}")
        for question in (list_tasks.ask(task, dice, held_out=True) for _ in range(count)):
            prompts.append(tokenizer(question.prompt).input_ids)
            answers.append(tokenizer(question.answer).input_ids)
    width, longest = max(map(len, prompts)), max(map(len, answers))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return Questions(ids, mask, torch.tensor([answer + [-1] * (longest - len(answer)) for answer in answers]))


def needles(tokenizer: Any, count: int, given: int = 320, passage: int = 24, begun: int = 12, seed: int = 6) -> Needles:
    """`count` prompts; passages stand at depths from 5 to 75 percent, and all but their last `begun` tokens are repeated."""
    hay = list(_pieces(tokenizer, count, given - passage - begun, seed))
    found, other = (list(_pieces(tokenizer, count, passage, seed + number)) for number in (1, 2))
    prompts: list[list[int]] = []
    without: list[list[int]] = []
    for row in range(count):
        at = int(len(hay[row]) * (0.05 + 0.70 * row / max(1, count - 1)))
        for which, into in ((found, prompts), (other, without)):
            into.append(hay[row][:at] + which[row] + hay[row][at:] + found[row][:begun])
    answer = torch.tensor([row[begun:] for row in found])
    return Needles(torch.tensor(prompts), torch.tensor(without), answer)


def _pieces(tokenizer: Any, count: int, length: int, seed: int) -> Iterator[list[int]]:
    dice = random.Random(seed)
    files = [tokenizer(text, verbose=False).input_ids for text in python_sources.texts("validation")]
    files = [ids for ids in files if len(ids) > length]
    for _ in range(count):
        ids = dice.choice(files)
        at = dice.randrange(len(ids) - length)
        yield ids[at : at + length]


@dataclass(frozen=True, slots=True)
class Reading:
    """logits float32 [B, m, V] of what was read token by token; bytes: held at the end; share: of the whole cache; far: bytes in
    the slower of two memories, as a share of the whole cache, too."""

    logits: Tensor
    bytes: int
    share: float
    kept: float | None
    far: float = 0.0


def read(model: Any, recipe: Recipe, prompts: Tensor, following: Tensor, mask: Tensor | None = None) -> Reading:
    """`following` [B, m] token by token behind `prompts` [B, n]; logits that predict each of them. mask: int64 [B, n], 0
    where a prompt is padding (in front)."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)
        with attach(model, recipe) as run:
            cache = run.cache(last=True)
            logits = [model(prompts, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits]
            for at in range(following.shape[1] - 1):
                logits.append(model(following[:, at : at + 1], past_key_values=cache).logits)
            report = run.report()
    shares = [row.share for row in report.layers if row.share is not None]
    return Reading(torch.cat(logits, 1).float(), report.bytes, report.share, min(shares) if shares else None, report.far_bytes / report.full_bytes)


def row(name: str, budget: float | None, found: Reading, full: Reading, texts: Texts) -> dict[str, Any]:
    """Numbers of one policy against the whole cache."""
    p, q = full.logits.log_softmax(-1), found.logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    bits = -q.gather(-1, texts.following[..., None]) / math.log(2)
    return {
        "policy": name, "budget": budget, "n": int(texts.prompts.shape[0]), "tokens": int(kl.numel()), "kl": float(kl.mean()),
        "kl_worst_text": float(kl.mean(1).max()), "agreement": float((p.argmax(-1) == q.argmax(-1)).float().mean()),
        "bits_per_token": float(bits.mean()), "bytes_held": found.bytes, "bytes_share": found.share,
        "far_share": found.far, "attention_kept_least": found.kept,
    }  # fmt: skip


def found_again(model: Any, recipe: Recipe, hidden: Needles) -> float:
    """Share of the answers' tokens that are the model's first choice, each after the right ones before it."""
    got = read(model, recipe, hidden.prompts, hidden.answer).logits.argmax(-1)
    return float((got == hidden.answer).float().mean())


def answered(model: Any, recipe: Recipe, asked: Questions) -> float:
    """The same for the answers of list tasks."""
    got = read(model, recipe, asked.prompts, asked.answers.clamp(min=0), asked.mask).logits.argmax(-1)
    real = asked.answers >= 0
    return float((got == asked.answers)[real].float().mean())


def budgeted(name: str, share: float, given: int) -> Recipe:
    """A recipe with this share of the text, a prompt of `given` tokens, as its amount; of a reader, what it reads of it."""
    if name in READING:
        top = max(1, round(share * given / PAGE) - READING[name])
        sizes = f"chunk={PAGE},near={2 * PAGE},outliers=1" if name == "shadow-kv" else f"page={PAGE},min_tokens=0"
        found = find_recipe(f"{name}:top={top},{sizes}{',outliers=1' if name == 'landmarks' else ''}")
        return found if found.kv is not None else found | Recipe(kv=KeptCache())
    amount = f"most={share}" if name == "zipvl" else f"share={share}"
    return find_recipe(f"{name}{',' if ':' in name else ':'}{amount}")


def table(
    model: Any, tokenizer: Any, *, count: int = 8, given: int = 320, new: int = 64, seed: int = 5, names: Sequence[str] = (*EVICTING, *READING),
    shares: Sequence[float] = SHARES, packing: Sequence[str] = PACKING, told: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows for the whole cache, each policy at each share, and each codec. "letters": of list tasks, found; "needles": None
    where the model cannot find them with the whole cache either: less than half of what it does not guess without them."""
    texts, hidden = code(tokenizer, count, given, new, seed), needles(tokenizer, 2 * count, given, 16, 8, seed=seed + 1)
    asked = questions(tokenizer, count)
    everything = Recipe(kv=KeptCache())
    told(FULL)
    full = read(model, everything, texts.prompts, texts.following)
    guessed = found_again(model, everything, Needles(hidden.without, hidden.without, hidden.answer))
    seen = found_again(model, everything, hidden)
    can = seen - guessed >= 0.5 * (1 - guessed)
    first = {"letters": answered(model, everything, asked), "needles": seen, "needles_guessed": guessed, "finds_needles": can}
    rows = [row(FULL, None, full, full, texts) | first]
    jobs: list[tuple[str, float | None]] = [(name, share) for share in shares for name in names]
    for name, share in [*jobs, *((name, None) for name in packing)]:
        told(name if share is None else f"{name} at {share:.0%}")

        def policy(prompts: Tensor, name: str = name, share: float | None = share) -> Recipe:
            return find_recipe(name) if share is None else budgeted(name, share, prompts.shape[1])

        one = row(name, share, read(model, policy(texts.prompts), texts.prompts, texts.following), full, texts)
        found = {
            "letters": answered(model, policy(asked.prompts), asked),
            "needles": found_again(model, policy(hidden.prompts), hidden) if can else None,
        }
        rows.append(one | found)
    return rows
