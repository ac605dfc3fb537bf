"""Is a way of drafting lossless? A test that everyone can run on their own drafter, verifier and model.

    from hasten.testing import assert_lossless, first_divergence
    print(assert_lossless(LookUp(nodes=8), MultiRound(), model))
    print(first_divergence(model, inputs, "look-up", max_new_tokens=200))

What a sampled text may be is enumerated with the model alone, and compared with what many drafted runs wrote (chi-square,
total variation). Greedy texts have to be the same, token for token: in a batch of prompts of different lengths, at every
maximum length, and with every token that they contain as the end token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hasten
from hasten.divergence import Divergence, first_divergence
from hasten.errors import UsageError
from hasten.recipe import Drafting, Recipe, Verify

__all__ = ["Agreement", "Divergence", "assert_lossless", "compare", "exact_law", "first_divergence"]

Cell = tuple[int, ...]
"""The new tokens of a row, with padding behind its end."""

MOST_CELLS = 4096


@dataclass(frozen=True)
class Agreement:
    """How well drafted texts of one prompt fit the model's law.

    cells: possible texts. runs: drafted ones. total_variation: half the sum of the differences of their shares; `expected`:
    about what as many runs of the model itself have. p_value: of the chi-square test, cells of fewer than 5 expected runs
    pooled; 0.0 where a text was written that the model cannot write. accepted: share of drafts that were accepted.
    """

    cells: int
    runs: int
    total_variation: float
    expected: float
    p_value: float
    accepted: float

    def __str__(self) -> str:
        return (
            f"{self.runs:,} texts of {self.cells} possible ones: total variation {self.total_variation:.4f} (by chance"
            f" {self.expected:.4f}), p = {self.p_value:.2g}, {self.accepted:.0%} of the drafts accepted"
        )


def assert_lossless(
    drafter: Drafting, verifier: Verify | None, model: Any, inputs: dict[str, Tensor] | None = None, *,
    tokens: int = 3, runs: int = 20_000, least_p: float = 1e-4, seed: int = 0, greedy: bool = True, **call: Any,
) -> list[Agreement]:  # fmt: skip
    """Raise `AssertionError` where drafted texts are not the model's own, with the numbers; returns how well they agree.

    drafter, verifier: parts (None: `lossless`); drafts are tried in every round. model: a causal language model of
    transformers. inputs: input_ids and attention_mask int64 [B, L] on the model's device; None for two short prompts of a
    dozen different tokens, of different lengths, which suit models of few tokens. tokens: new tokens of a text; the first is never drafted. runs: for each
    prompt. least_p: below this p-value the laws differ; with 20 tests of 1e-4 a false alarm is 1 in 500. call: arguments
    of `generate`; it should leave few possible texts (default top_k=4, temperature=0.8). greedy: test greedy texts, too.

    Raises `UsageError` where there are more than 4,096 possible texts.
    """
    inputs = _prompts(model) if inputs is None else inputs
    recipe = Recipe(draft=drafter, verify=verifier, pace=_every_round())
    if greedy:
        _assert_same(model, recipe, inputs, {**call, "top_k": None, "temperature": None, "top_p": None})
    call = {"top_k": 4, "temperature": 0.8} | call if not {"top_k", "top_p"} & set(call) else call
    found = [
        _agreement(model, recipe, {name: each[row : row + 1] for name, each in inputs.items()}, tokens, runs, seed + row, call)
        for row in range(len(inputs["input_ids"]))
    ]
    for row, each in enumerate(found):
        assert each.p_value >= least_p, (
            f"{_named(recipe)} does not write the model's texts (prompt {row}): {each}. Drafts were accepted that should not have"
            " been, or what replaces a refused one has another law."
        )
    return found


def exact_law(model: Any, inputs: dict[str, Tensor], tokens: int, call: dict[str, Any]) -> dict[Cell, float]:
    """Probability of every text of `tokens` new tokens behind one prompt, by the model alone."""
    ends, pad = _ends(model, call)
    law: dict[Cell, float] = {(): 1.0}
    for step in range(tokens):
        open_ = [cell for cell in law if not set(cell) & ends]
        new = {cell + (pad,): share for cell, share in law.items() if set(cell) & ends}
        for cell, row in zip(open_, _next(model, inputs, open_, tokens, call) if open_ else [], strict=True):
            for token in row.nonzero()[:, 0].tolist():
                new[cell + (token,)] = law[cell] * float(row[token])
        if len(new) > MOST_CELLS:
            raise UsageError(
                f"There are {len(new):,} possible texts of {step + 1} tokens, and at most {MOST_CELLS:,} are compared. Pass a smaller"
                " top_k, or fewer tokens."
            )
        law = new
    return law


def compare(law: dict[Cell, float], seen: Counter[Cell], accepted: float = 0.0) -> Agreement:
    """How well the texts in `seen` fit `law`."""
    runs = sum(seen.values())
    distance = 0.5 * sum(abs(seen[cell] / runs - share) for cell, share in law.items())
    strange = sum(number for cell, number in seen.items() if cell not in law)
    chance = sum((share * (1 - share) / runs / (2 * torch.pi)) ** 0.5 for share in law.values())
    pooled, rest, rest_seen = [], 0.0, 0
    for cell, share in law.items():
        if share * runs >= 5:
            pooled.append((share * runs, seen[cell]))
        else:
            rest, rest_seen = rest + share * runs, rest_seen + seen[cell]
    pooled += [(rest, rest_seen)] if rest >= 5 else []
    square = sum((number - mean) ** 2 / mean for mean, number in pooled)
    free = torch.tensor(max(1, len(pooled) - 1) / 2, dtype=torch.float64)
    p_value = 0.0 if strange else float(torch.special.gammaincc(free, torch.tensor(square / 2, dtype=torch.float64)))
    return Agreement(len(law), runs, distance + 0.5 * strange / runs, chance, p_value, accepted)


def _agreement(
    model: Any, recipe: Recipe, inputs: dict[str, Tensor], tokens: int, runs: int, seed: int, call: dict[str, Any]
) -> Agreement:
    law = exact_law(model, inputs, tokens, call)
    pad = _ends(model, call)[1]
    seen: Counter[Cell] = Counter()
    torch.manual_seed(seed)
    with hasten.accelerate(model, recipe) as run:
        for begin in range(0, runs, 4096):
            made = model.generate(
                **inputs, max_new_tokens=tokens, do_sample=True, num_return_sequences=min(4096, runs - begin), **call
            )[:, inputs["input_ids"].shape[1] :]
            made = torch.nn.functional.pad(made, (0, tokens - made.shape[1]), value=pad)
            seen.update(tuple(row) for row in made.tolist())
        report: Any = run.report()
    assert report.calls.get("drafted"), f"{_named(recipe)}: no call was drafted, so that nothing was tested. {report.warnings}"
    drafted, right = (sum(pair[at] for pair in report.drafters.values()) for at in (0, 1))
    assert right, (
        f"{_named(recipe)}: none of {drafted:,} drafts was accepted, so that nothing was tested. Pass inputs whose continuation it"
        " can guess, or a model of few tokens."
    )
    return compare(law, seen, right / drafted)


def _assert_same(model: Any, recipe: Recipe, inputs: dict[str, Tensor], call: dict[str, Any]) -> None:
    """Greedy texts: the whole batch, every maximum length, every end token."""
    width = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, max_new_tokens=12, do_sample=False, **call)
    cases: list[dict[str, Any]] = [{"max_new_tokens": new} for new in (1, 2, 3, 5, 8, 12)]
    cases += [{"max_new_tokens": 12, "eos_token_id": end, "pad_token_id": 0} for end in free[:, width:].unique().tolist()[:6]]
    for case in cases:
        asked = {**inputs, "do_sample": False, **call, **case}
        plain = model.generate(**asked)
        with hasten.accelerate(model, recipe):
            drafted = model.generate(**asked)
        assert torch.equal(plain, drafted), (
            f"{_named(recipe)} writes another greedy text than the model with {case}:\n{drafted[:, width:].tolist()} in place of\n"
            f"{plain[:, width:].tolist()}"
        )


def _next(model: Any, inputs: dict[str, Tensor], cells: list[Cell], tokens: int, call: dict[str, Any]) -> Tensor:
    """The model's law behind each of `cells`, float64 [cells, V]: plain `generate` is made to write these cells."""
    step = len(cells[0])

    def force(ids: Tensor, scores: Tensor) -> Tensor:
        done = ids.shape[1] - inputs["input_ids"].shape[1]
        if done >= step:
            return scores
        forced = torch.tensor([cell[done] for cell in cells], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, forced[:, None], 0.0)

    wide = {name: each.expand(len(cells), -1) for name, each in inputs.items()}
    own = call | {"logits_processor": [*(call.get("logits_processor") or []), force]}
    made = model.generate(
        **wide, max_new_tokens=tokens, do_sample=True, return_dict_in_generate=True, output_scores=True, **own
    )
    law: Tensor = made.scores[step].double().softmax(-1)
    return law


def _prompts(model: Any) -> dict[str, Tensor]:
    """Two prompts of few different tokens, padded on the left, so that whatever comes next has stood there before."""
    few = min(12, model.config.get_text_config().vocab_size - 1)
    rows = [torch.randint(1, 1 + few, (length,), generator=torch.Generator().manual_seed(length)) for length in (40, 27)]
    ids = torch.stack([torch.nn.functional.pad(row, (40 - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (40 - len(row), 0)) for row in rows])
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def _ends(model: Any, call: dict[str, Any]) -> tuple[set[int], int]:
    """Ids that end a text, and the one behind it."""
    given = call.get("eos_token_id", model.generation_config.eos_token_id)
    ends = set() if given is None else {given} if isinstance(given, int) else set(given)
    pad = call.get("pad_token_id", model.generation_config.pad_token_id)
    return ends, min(ends, default=0) if pad is None else int(pad)


def _every_round() -> Any:
    """The pace that always drafts."""
    return hasten.recipe("look-up:every=true").pace


def _named(recipe: Recipe) -> str:
    verifier = recipe.verify.kind if recipe.verify else "lossless"
    return f"{recipe.draft.kind if recipe.draft else 'no drafter'} with {verifier}"
