"""Causal models that do more or less than one token per evaluation: what all methods for them have in common, the gate, Medusa's
heads, multi-token prediction, block diffusion.

Shapes: B texts of at most L tokens, V logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Method
from hasten.distill.methods import first, medusa, mtp, ppd, sorted_exits
from hasten.distill.methods.block import KIND, BlockDiffusion, doubled_logits
from hasten.distill.methods.first import First
from hasten.distill.methods.medusa import Medusa, MedusaHeads
from hasten.distill.methods.mtp import MultiToken, masks_behind
from hasten.distill.methods.ppd import PromptTokens
from hasten.distill.methods.sorted_exits import SortedExits
from hasten.distill.network.host_call import Condition
from hasten.distill.network.roles import Adapter
from hasten.distill.text.gate import gated
from hasten.distill.text.roles import TextCall, TextRoles, Texts
from hasten.errors import UsageError
from tests.distill.test_text_methods import MASK, VOCAB, host, texts, trainer, weights

METHODS: tuple[Method, ...] = (
    Medusa(heads=2), MultiToken(masks=3), BlockDiffusion(block=4), PromptTokens(ensemble=2), First(), SortedExits(exits=(1,)),
)  # fmt: skip
WRITTEN = {
    "medusa": (medusa.FILE, "heads.medusa."), "mtp": (mtp.FILE, "heads.sampler."), "ppd": (ppd.FILE, "heads.prompts."),
    "first": (first.FILE, "heads.routers."),
}  # fmt: skip
"""Method -> the file of its heads, and what their names have in front in a training."""

each = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind)


def stirred() -> TextRoles:
    """Roles on a causal model whose adapter is far from zero."""
    roles = TextRoles.of_model(TextCall.of(host("causal")), ("student",), Adapter(4, 4.0))
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in roles["student"].parameters().values():
            value.copy_(torch.randn(value.shape, generator=g))
    return roles


def loss(method: Method, rows: Texts, numbers: list[int], out: Path) -> Tensor:
    state = trainer(method, out, kind="causal").state
    return state.loss("student", Batch(rows.condition, Condition({})), Draw(0, 2, numbers), 2, {}).rows


def some(rows: Texts, index: Tensor) -> Texts:
    return Texts(rows.ids[index], rows.start[index], rows.end[index])


# --- the gate ---------------------------------------------------------------------------------------


def test_ordinary_tokens_are_bit_identical_with_the_adapter_on() -> None:
    roles = stirred()
    ids = torch.randint(3, VOCAB, (5, 13), generator=torch.Generator().manual_seed(0))
    ids[:, 9:] = MASK  # behind: a causal model does not see them
    end, every = torch.full((5,), 13), torch.ones(5, 13, dtype=torch.bool)
    every[:, 0] = False
    teacher, student = roles.text("teacher"), roles.text("student")
    plain, loud = (role.states(ids, end, every).view(5, 12, -1) for role in (teacher, student))
    with gated(student.call.network, "student", MASK):
        found = student.states(ids, end, every).view(5, 12, -1)
    assert torch.equal(found[:, :8], plain[:, :8])
    assert not torch.isclose(found[:, 8:], plain[:, 8:]).all(2).any()
    assert not torch.isclose(loud[:, :8], plain[:, :8]).all(2).any()  # without the gate everything changes
    assert torch.equal(student.states(ids, end, every).view(5, 12, -1), loud)  # and the gate goes away


def test_nothing_to_gate_is_said() -> None:
    with pytest.raises(UsageError, match="no adapter 'other'"), gated(stirred().text("student").call.network, "other", MASK):
        pass


# --- all methods -----------------------------------------------------------------------------------


@each
def test_a_row_does_not_depend_on_its_neighbours(method: Method, tmp_path: Path) -> None:
    rows, order = texts(8), torch.randperm(8, generator=torch.Generator().manual_seed(0))
    whole = loss(method, rows, list(range(8)), tmp_path)
    torch.testing.assert_close(loss(method, some(rows, order), order.tolist(), tmp_path), whole[order], rtol=1e-4, atol=1e-4)
    for row in range(8):
        alone = loss(method, some(rows, torch.tensor([row])), [row], tmp_path)
        torch.testing.assert_close(alone, whole[row : row + 1], rtol=1e-4, atol=1e-4)


@each
def test_it_resumes_bit_for_bit_and_moves_every_weight(method: Method, tmp_path: Path) -> None:
    trainer(method, tmp_path / "whole", kind="causal").fit()
    trainer(method, tmp_path / "cut", kind="causal").fit(stop_after=3)
    done = trainer(method, tmp_path / "cut", kind="causal")
    before = {name: value.detach().clone() for name, value in done.players["student"].parameters.items()}
    assert done.fit(resume=True) == 6
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert done.players["student"].still(before) == []


@each
def test_models_that_write_in_any_order_are_refused(method: Method, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="from left to right"):
        trainer(method, tmp_path)


@each
def test_what_is_written_is_what_was_trained(method: Method, tmp_path: Path) -> None:
    done = trainer(method, tmp_path / "a", kind="causal", average=0.5)
    done.fit()
    state: Any = done.state
    state.write(tmp_path / "student", "tiny", "sequential", done.players["student"].average)
    assert (tmp_path / "student" / "adapter_model.safetensors").exists() == ("student" in method.trains)
    if isinstance(method, BlockDiffusion):
        assert json.loads((tmp_path / "student" / KIND).read_text()) == {"kind": "block", "block": 4, "shifted": True}
    elif isinstance(method, SortedExits):
        assert json.loads((tmp_path / "student" / sorted_exits.FILE).read_text()) == {"exits": [1, 2]}
    else:
        file, label = WRITTEN[method.kind]
        found, average = load_file(tmp_path / "student" / file), done.players["student"].average
        assert found and all(torch.equal(value, average[label + name]) for name, value in found.items())


# --- block diffusion --------------------------------------------------------------------------------


def test_one_pass_says_what_the_block_model_says_block_by_block() -> None:
    """For each block alone: clean text before it, masks in it, nothing behind it."""
    roles = TextRoles.of_model(TextCall.of(host("causal")), (), Adapter(4, 4.0))
    rows, blockwise = texts(), TextCall.of(host("block", shifted=True))  # the same weights
    assert blockwise.facts.block == 4
    inside = (rows.place >= rows.start[:, None]) & (rows.place < rows.end[:, None])
    asked = inside & (torch.rand(rows.ids.shape, generator=torch.Generator().manual_seed(1)) < 0.6)
    found = torch.zeros(*asked.shape, VOCAB)
    found[asked] = doubled_logits(roles.text("teacher"), rows, asked, MASK, 4)
    seen = 0
    for begin in range(0, 17, 4):
        mine = asked & (rows.place >= begin) & (rows.place < begin + 4)
        end = rows.end.clamp(max=begin + 4)
        expected = blockwise.logits(rows.ids.masked_fill(mine, MASK), end, mine)
        torch.testing.assert_close(found[mine], expected, rtol=1e-4, atol=1e-4)
        seen += int(mine.sum())
    assert seen == int(asked.sum())


# --- Medusa -----------------------------------------------------------------------------------------


def test_a_fresh_head_says_what_the_model_says_and_its_loss_is_that() -> None:
    """Head i begins as the model's own prediction, so that its loss is the model's cross-entropy on the token i + 2 on."""
    call, rows = TextCall.of(host("causal")), some(texts(), torch.tensor([0]))
    end = int(rows.end)
    logits = call.allowed(call.host.own(rows.ids[:, :end])[0])
    expected = torch.zeros(())
    for head, weight in ((0, 1.0), (1, 0.8)):
        at = [t for t in range(int(rows.start) - 1, end - 2) if t + 2 + head < end]
        cross = [F.cross_entropy(logits[t], rows.ids[0, t + 2 + head]) for t in at]
        expected = expected + weight * (torch.stack(cross).mean() if cross else 0)
    roles = TextRoles.of_model(call, (), Adapter(4, 4.0))
    from hasten.distill.method import Facts

    state = Medusa(heads=2).start(Facts(roles, 1, (17,)))
    found = state.loss("student", Batch(rows.condition, Condition({})), Draw(0, 0, [0]), 0, {}).rows
    torch.testing.assert_close(found, expected[None], rtol=1e-4, atol=1e-4)


class _Reads:
    """Stands for a model whose state at a place is the place, and whose last layer says a token for each state."""

    def __init__(self, texts: Texts, wrong: int) -> None:
        self.texts, self.wrong = texts, wrong

    def states(self, ids: Tensor, end: Tensor, asked: Tensor) -> Tensor:
        return asked.nonzero()[:, 1].float()[:, None]

    def read(self, states: Tensor) -> Tensor:
        place = states[:, 0].long()
        said = self.texts.ids[0, place.clamp(max=self.texts.ids.shape[1] - 1)]
        return F.one_hot(torch.where(place == self.wrong, 0, said), VOCAB).float()


def test_heads_are_accepted_up_to_the_first_that_is_wrong() -> None:
    rows = Texts(torch.arange(3, 13)[None], torch.tensor([3]), torch.tensor([9]))
    heads = lambda states: torch.stack([states + 2, states + 3])  # head i says the token i + 2 on
    found = medusa.accepted(_Reads(rows, 6), heads, rows)  # type: ignore[arg-type]
    assert found.tolist() == [2, 1, 0, 2, 1]  # places 2 to 6; behind the last there is one token only


# --- multi-token prediction -------------------------------------------------------------------------


def test_masks_stand_behind_the_cut_and_have_a_token_behind_them() -> None:
    rows = texts(30)
    for u in (0.0, 0.5, 0.99):
        cut = rows.start + (u * (rows.end - rows.start - 1).clamp(min=1)).long()
        asked = masks_behind(rows, cut, 3)
        assert bool((asked.sum(1) <= 3).all())
        assert not bool((asked & (rows.place + 1 >= rows.end[:, None])).any())
        assert torch.equal(asked.any(1), cut < rows.end - 1)
        assert bool((asked.float().argmax(1) == cut)[asked.any(1)].all())


def test_a_fresh_mask_is_told_by_the_teacher_in_closed_form(tmp_path: Path) -> None:
    """One row by hand: the adapter and the sampler head begin at nothing, so both losses are the model's own on its masks."""
    rows = some(texts(), torch.tensor([1]))
    method = MultiToken(masks=2, consistency=0.7)
    state: Any = trainer(method, tmp_path, kind="causal").state
    draw = Draw(0, 2, [1])
    cut = rows.start + (draw.uniform("cut") * (rows.end - rows.start - 1).clamp(min=1)).long()
    asked = masks_behind(rows, cut, 2)
    call, end = state.learner.call, int(asked.nonzero()[-1, 1]) + 1
    hidden = call.states(rows.ids.masked_fill(asked, MASK)[:, :end], torch.tensor([end]), asked[:, :end])
    aim = call.states(rows.ids, rows.end, asked)
    places = asked.nonzero()[:, 1]
    cross = F.cross_entropy(call.read(hidden), rows.ids[0, places + 1])
    expected = 2 * cross + 0.7 * (hidden - aim).square().mean()
    found = state.loss("student", Batch(rows.condition, Condition({})), draw, 2, {}).rows
    torch.testing.assert_close(found, expected[None], rtol=1e-4, atol=1e-4)


def test_masks_are_accepted_up_to_the_first_that_is_wrong() -> None:
    roles, rows = stirred(), texts(20)
    cut = rows.start
    heads = mtp.SamplerHead(24)
    student = roles.text("student")
    asked = masks_behind(rows, cut, 3)
    said = student.call.read(mtp.masked_states(student, rows, asked, MASK)).argmax(1)
    right = rows.ids.clone()
    right[asked.roll(1, 1)] = said  # a text in which every mask is right
    found = mtp.accepted(student, heads, Texts(right, rows.start, rows.end), cut, 3, MASK)
    assert torch.equal(found, asked.sum(1))
    wrong = right.clone()
    second = asked & (rows.place == cut[:, None] + 1)
    wrong[second.roll(1, 1)] = 0
    found = mtp.accepted(student, heads, Texts(wrong, rows.start, rows.end), cut, 3, MASK)
    assert torch.equal(found, asked.sum(1).clamp(max=1))


def test_heads_start_the_same_whatever_was_drawn_before() -> None:
    one, _, two = mtp.SamplerHead(6), torch.randn(3), mtp.SamplerHead(6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert all(not value.any() for value in MedusaHeads(6, 2).parameters())
