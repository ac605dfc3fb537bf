"""Parallel prompt tokens: what they see, what they leave alone, and an oracle: the text's own tokens as prompt tokens.

Shapes: B texts of at most L tokens; P prompt tokens of E embeddings; G places; V logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch
from hasten.distill.methods.ppd import PromptEmbeddings, PromptTokens, accepted, prompt_logits, sight
from hasten.distill.network.host_call import Condition
from hasten.distill.text.roles import TextCall, Texts
from tests.distill.test_text_methods import VOCAB, host, texts, trainer


def same_tokens(rows: int = 5, length: int = 13) -> Texts:
    """Texts that say one token again and again, so that all places have the same future."""
    ids = (torch.arange(rows) + 5)[:, None].expand(rows, length).contiguous()
    return Texts(ids, torch.full((rows,), 4), torch.arange(rows) + length - rows + 1)


def own_tokens(call: TextCall, token: int, distances: int, ensemble: int) -> Tensor:
    network: Any = call.network
    embedded: Tensor = network.get_input_embeddings().weight[token]
    return embedded.detach().expand(distances, ensemble, -1)


def test_a_prompt_token_sees_the_text_up_to_its_place_and_its_own_kind() -> None:
    at, n, count, ensemble = torch.tensor([[0, 3], [4, 2]]), 6, 2, 3
    seen = sight(at, n, count, ensemble)[:, 0]
    names = [(g, p, e) for g in range(2) for p in range(count) for e in range(ensemble)]
    for row in range(2):
        for i in range(n):
            assert seen[row, i].nonzero()[:, 0].tolist() == list(range(i + 1))
        for number, (g, p, e) in enumerate(names):
            others = [n + k for k, (h, q, f) in enumerate(names) if h == g and f == e and q <= p]
            assert seen[row, n + number].nonzero()[:, 0].tolist() == [*range(int(at[row, g]) + 1), *others]


@pytest.mark.parametrize("ensemble", [1, 3])
def test_prompt_tokens_that_are_the_text_s_own_say_what_the_model_says(ensemble: int) -> None:
    """Behind each place of a text, the embeddings of the tokens that stand there: nothing else is what the model reads."""
    call, rows = TextCall.of(host("causal")), texts(4)
    network: Any = call.network
    for row in range(4):
        one = Texts(rows.ids[row : row + 1], rows.start[row : row + 1], rows.end[row : row + 1])
        plain = call.allowed(call.host.own(one.ids[:, : int(one.end)])[0])
        for at in range(int(one.end) - 2):
            behind = one.ids[0, at + 1 : int(one.end)][:3]
            prompts = network.get_input_embeddings()(behind).detach()[:, None].expand(-1, ensemble, -1)
            said, own = prompt_logits(call, prompts, one, torch.tensor([[at]]))
            torch.testing.assert_close(said[0, 0], plain[at + 1 : at + 1 + len(behind)], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(own, said, rtol=1e-4, atol=1e-4)


def test_what_the_model_itself_says_does_not_depend_on_prompt_tokens() -> None:
    call, rows = TextCall.of(host("causal")), texts(6)
    at, g = rows.start[:, None] - 1, torch.Generator().manual_seed(0)
    one, two = (torch.randn(2, 2, 24, generator=g) for _ in range(2))
    (said, own), (other, again) = (prompt_logits(call, prompts, rows, at) for prompts in (one, two))
    assert torch.equal(own, again) and not torch.isclose(said, other).all()
    changed = two.clone()
    changed[1] += 1  # the second prompt token: the first does not see it
    assert torch.equal(prompt_logits(call, changed, rows, at)[0][:, :, 0], other[:, :, 0])


def test_the_mean_of_an_ensemble_is_that_of_its_members() -> None:
    call, rows = TextCall.of(host("causal")), texts(4)
    prompts, at = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0)), rows.start[:, None] - 1
    each = [prompt_logits(call, prompts[:, e : e + 1], rows, at)[0] for e in range(3)]
    torch.testing.assert_close(prompt_logits(call, prompts, rows, at)[0], torch.stack(each).mean(0), rtol=1e-4, atol=1e-4)


def test_the_loss_is_nothing_where_prompt_tokens_say_what_the_model_says(tmp_path: Path) -> None:
    state: Any = trainer(PromptTokens(distances=2, ensemble=2, places=3), tmp_path, kind="causal").state
    rows, found = same_tokens(), []
    for row in range(5):
        one = Texts(rows.ids[row : row + 1], rows.start[row : row + 1], rows.end[row : row + 1])
        for prompts in (own_tokens(state.learner.call, row + 5, 2, 2), torch.zeros(2, 2, 24)):
            state.prompts.weight.data.copy_(prompts)
            loss = state.loss("student", Batch(one.condition, Condition({})), Draw(0, 1, [row]), 1, {})
            found.append(float(loss.rows))
    assert max(found[::2]) < 1e-4 and min(found[1::2]) > 1e-2


def test_the_loss_is_the_weighted_divergence_of_one_place(tmp_path: Path) -> None:
    method = PromptTokens(distances=3, ensemble=2, places=1, decay=0.5)
    state: Any = trainer(method, tmp_path, kind="causal").state
    rows, draw = texts(1), Draw(0, 2, [0])
    room = rows.over((1,)) - rows.start
    at = rows.start - 1 + (draw.uniform("place 0") * room).long()
    said, _ = prompt_logits(state.learner.call, state.prompts.weight, rows, at[:, None])
    plain = state.learner.call.allowed(state.learner.call.host.own(rows.ids[:, : int(rows.end)])[0])
    expected = torch.zeros(())
    for i in range(3):
        place = int(at) + 1 + i
        if place + 1 < int(rows.end):
            p, q = plain[place].softmax(0), said[0, 0, i].softmax(0)
            expected = expected + 0.5**i * (p * (p.clamp(min=1e-30) / q.clamp(min=1e-30)).log()).sum()
    loss = state.loss("student", Batch(rows.condition, Condition({})), draw, 2, {})
    assert float(expected) > 0
    torch.testing.assert_close(loss.rows, expected[None], rtol=1e-3, atol=1e-4)


def test_prompt_tokens_are_accepted_up_to_the_first_that_is_wrong() -> None:
    call, rows = TextCall.of(host("causal")), texts(20)
    prompts, at = torch.randn(3, 1, 24, generator=torch.Generator().manual_seed(0)), rows.start[:, None] - 1
    said = prompt_logits(call, prompts, rows, at)[0].argmax(3)[:, 0]
    right = rows.ids.clone()
    for i in range(3):  # a text in which they are right; none of them sees what is behind its place
        right[torch.arange(20), (at[:, 0] + 2 + i).clamp(max=16)] = said[:, i]
    room = (rows.end - at[:, 0] - 2).clamp(0, 3)
    assert torch.equal(accepted(call, prompts, Texts(right, rows.start, rows.end), at)[:, 0], room)
    right[torch.arange(20), at[:, 0] + 3] = (said[:, 1] + 1) % VOCAB
    assert torch.equal(accepted(call, prompts, Texts(right, rows.start, rows.end), at)[:, 0], room.clamp(max=1))


def test_first_embeddings_follow_from_the_model_alone() -> None:
    table = torch.randn(50, 6, generator=torch.Generator().manual_seed(3)) * 0.3 + 2
    one, _, two = PromptEmbeddings(40, 50, table), torch.randn(3), PromptEmbeddings(40, 50, table)
    assert torch.equal(one.weight, two.weight)
    torch.testing.assert_close(one.weight.mean((0, 1)), table.mean(0), atol=0.05, rtol=0)
