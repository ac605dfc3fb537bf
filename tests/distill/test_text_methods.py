"""Trainings of language models: roles, data, certainty forcing, and what they write.

Shapes: B texts of at most L tokens, V logits.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.distill.data.store import Store
from hasten.distill.loop.draw import Draw
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.method import Batch, Facts, Method
from hasten.distill.methods.dparallel import DParallel, certainty_forcing, drawn_block
from hasten.distill.methods.pairs import Pairs
from hasten.distill.network.host_call import Condition
from hasten.distill.network.roles import Adapter
from hasten.distill.text.roles import NEVER, TextCall, TextRoles, Texts
from hasten.distill.text.student import save_student
from hasten.distill.text.teach import make_texts
from hasten.distill.text.training import train_text
from hasten.distill.train_config import load_config
from hasten.errors import UsageError
from hasten.pipelines.recipes import recipe
from hasten.pipelines.text_models.families import choose
from hasten.pipelines.text_models.family import Family

MASK, EOS, PAD, VOCAB = 2, 1, 0, 48


def model(kind: str = "full", shifted: bool = False, seed: int = 0) -> Any:
    """A Llama of random weights, as our small models say what they are."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
            num_key_value_heads=3, initializer_range=0.3, max_position_embeddings=64, eos_token_id=EOS, pad_token_id=PAD,
            bos_token_id=None,
        )  # fmt: skip
        made = LlamaForCausalLM(config).eval()
    made.config.mask_token_id = MASK
    made.config.hasten_diffusion = {"kind": kind, "block": 4, "shifted": shifted}
    return made


def host(kind: str = "full", shifted: bool = False) -> Family:
    found = choose(model(kind, shifted))
    assert isinstance(found, Family)
    return found


def texts(count: int = 9, seed: int = 3) -> Texts:
    """Random texts of odd lengths, with poison where no token is."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(1, 6, (count,), generator=g)
    end = start + torch.randint(1, 10, (count,), generator=g)
    ids = torch.randint(3, VOCAB, (count, 17), generator=g)
    return Texts(ids.masked_fill(torch.arange(17) >= end[:, None], -7), start, end)


def store(count: int = 9) -> Store:
    return Store((), texts(count).condition, Condition({}), torch.arange(count))


def trainer(method: Method, out: Path, *, full: bool = False, kind: str = "full", **settings: Any) -> Trainer:
    """A training of a small model; the same arguments give the same training."""
    torch.manual_seed(0)
    call = TextCall.of(host(kind))
    roles = TextRoles.of_model_copies(call, method.trains) if full else TextRoles.of_model(call, method.trains, Adapter(4, 4.0))
    chosen = TrainSettings(**{"steps": 6, "batch": 6, "lr": 1e-2, "warmup": 2, **settings})
    return Trainer(method, roles, store(), chosen, out, (17,), progress=False)


def weights(out: Path) -> dict[str, Tensor]:
    files = sorted((out / "latest").glob("*/*.safetensors"))
    return {f"{f.parent.name}/{f.stem}/{k}": v for f in files for k, v in load_file(f).items()}


# --- roles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "shifted"), [("full", False), ("full", True), ("block", False), ("causal", False)])
def test_logits_are_those_of_each_text_alone(kind: str, shifted: bool) -> None:
    network = host(kind, shifted)
    call, rows = TextCall.of(network), texts()
    asked = (rows.place >= rows.start[:, None]) & (rows.place < rows.end[:, None]) & (rows.place % 2 == 1)
    found = call.logits(rows.ids, rows.end, asked)
    alone = []
    for ids, end, mine in zip(rows.ids, rows.end.tolist(), asked, strict=True):
        whole = network.own(ids[None, :end])[0]
        at = mine.nonzero()[:, 0] - (1 if network.facts.shifted else 0)
        alone.append(whole[at])
    expected = torch.cat(alone).float()
    expected[:, sorted(network.facts.forbidden)] = NEVER
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_student_is_the_teacher_at_first_and_leaves_it_alone(tmp_path: Path) -> None:
    done = trainer(DParallel(block=4), tmp_path)
    teacher, student = (done.roles[name] for name in ("teacher", "student"))
    rows = texts()
    asked = rows.place == rows.start[:, None]
    before = teacher.logits(rows.ids, rows.end, asked)  # type: ignore[attr-defined]
    assert torch.equal(before, student.logits(rows.ids, rows.end, asked))  # type: ignore[attr-defined]
    done.fit()
    assert torch.equal(before, teacher.logits(rows.ids, rows.end, asked))  # type: ignore[attr-defined]
    assert not torch.equal(before, student.logits(rows.ids, rows.end, asked))  # type: ignore[attr-defined]
    assert not any("lm_head" in name for name in student.parameters())


def test_methods_for_pictures_say_what_they_cannot_train(tmp_path: Path) -> None:
    with pytest.raises((UsageError, AttributeError)):
        trainer(Pairs(), tmp_path).fit()
    with pytest.raises(UsageError, match="for language models"):
        DParallel().start(Facts({}, 1, ()))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Tokens are needed"):
        Texts.of(Batch(Condition({"text": torch.zeros(1)}), Condition({})))


def test_a_text_is_over_behind_its_first_end() -> None:
    ids = torch.tensor([[EOS, 5, 6, EOS, EOS, 7], [5, 5, 6, 7, 8, 9], [5, 5, 6, 7, EOS, EOS], [5, 5, 6, 7, 9, EOS]])
    rows = Texts(ids, torch.tensor([1, 2, 2, 2]), torch.tensor([6, 6, 6, 5]))
    assert rows.over((EOS, 40)).tolist() == [4, 6, 5, 5] and rows.over(()).tolist() == [6, 6, 6, 5]
    assert rows.written((EOS,))[0].tolist() == [False, True, True, True, False, False]


# --- certainty forcing ------------------------------------------------------------------------------


def test_the_loss_is_the_closed_form_of_a_table_of_logits() -> None:
    """Two logits a = ln 3 and 0: p = 3/4, 1/4; at a temperature of 1/2: 9/10, 1/10."""
    table = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 3.0], [1.0, 1.0]], dtype=torch.float64).log()
    target, row = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 2])
    h = -(0.9 * torch.tensor(0.9).log() + 0.1 * torch.tensor(0.1).log())
    cross = -torch.tensor([0.75, 0.25, 0.75, 0.5]).log()
    expected = torch.stack([(cross[0] + cross[1]) / 2 + 2 * h, cross[2] + 2 * h, cross[3]])  # a tie goes to the first: wrong
    found = certainty_forcing(table, target, row, 4, 2.0, 0.5)
    torch.testing.assert_close(found.rows[:3], expected.double())
    assert found.rows[3] == 0
    assert float(found.metrics["right"]) == 0.5


def test_tokens_that_are_never_written_leave_loss_and_gradient_finite() -> None:
    logits = torch.tensor([[1.0, 0.0, NEVER]], requires_grad=True)
    loss = certainty_forcing(logits, torch.tensor([0]), torch.tensor([0]), 1, 2.0, 0.5).rows.sum()
    torch.autograd.backward(loss)
    assert logits.grad is not None
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]


def test_wrong_answers_are_not_made_sure() -> None:
    logits = torch.tensor([[2.0, 0.0]], requires_grad=True)
    grads = []
    for beta in (0.0, 5.0):
        rows = certainty_forcing(logits, torch.tensor([1]), torch.tensor([0]), 1, beta, 0.5).rows
        grads.append(torch.autograd.grad(rows.sum(), logits)[0])
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("block", [1, 4, 32])
def test_blocks_cover_every_slot_and_no_other(block: int) -> None:
    rows = texts()
    seen = torch.zeros(rows.ids.shape, dtype=torch.bool)
    for u in torch.linspace(0, 1 - 1e-9, 40, dtype=torch.float64):
        low, high = drawn_block(rows, block, u.expand(len(rows.ids)))
        assert bool((high > low).all()) and bool((high - low <= block).all())
        seen |= (rows.place >= low[:, None]) & (rows.place < high[:, None])
    assert torch.equal(seen, (rows.place >= rows.start[:, None]) & (rows.place < rows.end[:, None]))


class _Spy:
    """Stands for a network: keeps what it was shown, and answers with zeros."""

    def __init__(self) -> None:
        self.shown: list[tuple[Tensor, Tensor]] = []

    def __call__(self, ids: Tensor, end: Tensor, asked: Tensor) -> Tensor:
        self.shown.append((ids, asked))
        return torch.zeros(int(asked.sum()), VOCAB)


@pytest.mark.parametrize("masked", [(0.5, 0.5), (0.2, 1.0)])
def test_masks_are_complements_and_every_row_has_its_own(tmp_path: Path, masked: tuple[float, float]) -> None:
    state: Any = trainer(DParallel(block=5, masked=masked), tmp_path).state
    spy = state.learner.logits = _Spy()
    rows = texts(40)
    state.loss("student", Batch(rows.condition, Condition({})), Draw(0, 1, range(40)), 1, {})
    ids, asked = spy.shown[0]
    one, two = asked.chunk(2)
    assert not bool((one & two).any())
    assert torch.equal(ids == MASK, asked | (ids == MASK) & ~(one | two).repeat(2, 1))
    assert torch.equal(ids[~(ids == MASK)], rows.ids.repeat(2, 1)[~(ids == MASK)])
    first, last = (one | two).float().argmax(1), 16 - (one | two).flip(1).float().argmax(1)
    for row in range(40):  # one block, all of it, and everything behind it is masked in both passes
        assert bool((one | two)[row, first[row] : last[row] + 1].all())
        assert bool((ids.view(2, 40, 17)[:, row, last[row] + 1 :] == MASK).all())
    assert len({tuple(place) for place in one.tolist()}) > 20


def loss_rows(rows: Texts, numbers: list[int], out: Path) -> Tensor:
    """Losses of these rows as they stand, drawn as rows of these numbers."""
    state = trainer(DParallel(block=2, masked=(0.3, 1.0)), out).state
    with torch.no_grad():
        return state.loss("student", Batch(rows.condition, Condition({})), Draw(0, 2, numbers), 2, {}).rows


def test_a_row_does_not_depend_on_its_neighbours_or_their_order(tmp_path: Path) -> None:
    rows, order = texts(8), torch.randperm(8, generator=torch.Generator().manual_seed(0))
    whole = loss_rows(rows, list(range(8)), tmp_path)
    mixed = loss_rows(Texts(rows.ids[order], rows.start[order], rows.end[order]), order.tolist(), tmp_path)
    torch.testing.assert_close(mixed, whole[order], rtol=1e-4, atol=1e-4)
    for row in range(8):
        some = slice(row, row + 1)
        alone = loss_rows(Texts(rows.ids[some], rows.start[some], rows.end[some]), [row], tmp_path)
        torch.testing.assert_close(alone, whole[some], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("full", [False, True])
def test_a_resumed_text_training_is_the_same_bit_for_bit(tmp_path: Path, full: bool) -> None:
    method = DParallel(block=4)
    assert trainer(method, tmp_path / "whole", full=full).fit() == 6
    trainer(method, tmp_path / "cut", full=full).fit(stop_after=3)
    half = weights(tmp_path / "cut")
    assert trainer(method, tmp_path / "cut", full=full).fit(resume=True) == 6
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert not all(torch.equal(one[k], half[k]) for k in one)


# --- data and results -------------------------------------------------------------------------------


def test_texts_are_what_the_teacher_writes_in_any_batch() -> None:
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([9, 4]), torch.tensor([8, 3, 3, 11])]
    made = make_texts(host(), None, prompts, [6, 5, 7], recipe("sequential"), batch=2)
    found = Texts(**made.conditions.tensors)
    assert found.start.tolist() == [3, 2, 4] and found.end.tolist() == [9, 7, 11]
    for row, prompt in enumerate(prompts):
        alone = Texts(**make_texts(host(), None, [prompt], [6, 5, 7][row : row + 1], recipe("sequential")).conditions.tensors)
        assert torch.equal(found.ids[row, : int(found.end[row])], alone.ids[0])
        assert torch.equal(alone.ids[0, : len(prompt)], prompt)
    assert not bool((found.ids == MASK).any())


def test_texts_are_stored_and_read_again(tmp_path: Path) -> None:
    store().save(tmp_path / "data.safetensors", {"a": 1})
    again = Store.load(tmp_path / "data.safetensors").batch(torch.tensor([4, 1]), Draw(0, 0, range(2)))
    found, rows = Texts.of(again), texts()
    assert torch.equal(found.ids, rows.ids[[4, 1]]) and torch.equal(found.end, rows.end[[4, 1]])


def test_the_student_loads_in_plain_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    done = trainer(DParallel(block=4), tmp_path / "a", average=0.5)
    done.fit()
    student: Any = done.roles["student"]
    save_student(student, tmp_path / "student", "tiny", recipe("dparallel"))
    loaded: Any = PeftModel.from_pretrained(model(), str(tmp_path / "student"))
    rows = texts()
    asked = rows.place == rows.start[:, None]
    twin = TextCall.of(choose(loaded.merge_and_unload().eval()))
    torch.testing.assert_close(
        twin.logits(rows.ids, rows.end, asked), student.logits(rows.ids, rows.end, asked), rtol=1e-3, atol=1e-3
    )
    told = json.loads((tmp_path / "student" / "adapter_config.json").read_text())
    assert told["r"] == 4 and told["peft_type"] == "LORA"


def test_the_command_trains_a_bundled_model_and_goes_on(tmp_path: Path) -> None:
    given = {
        "model": "tiny-dllm", "data.count": 10, "data.call": {"recipe": "threshold"}, "train.steps": 4, "train.batch": 2,
        "student.rank": 2,
    }  # fmt: skip
    config = load_config("dparallel", None, given)
    train_text(config, tmp_path / "a", progress=False, stop_after=2)
    assert not (tmp_path / "a" / "student").exists()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    train_text(config, tmp_path / "b", progress=False, resume=True)
    assert {f.name for f in (tmp_path / "b" / "student").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "recipe.yaml",
    }  # fmt: skip
    with pytest.raises(UsageError, match="data.call"):
        train_text(load_config("dparallel", None, given | {"data.call": {"steps": 3}}), tmp_path / "c")


@pytest.mark.parametrize(
    "given",
    [{"data.drop": 0.5}, {"data.file": "other.safetensors"}, {"student.start": "other"}, {"student.experts": 2}],
    ids=str,
)
def test_settings_that_a_language_model_would_pass_over_are_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(UsageError, match=rf"{name} = .* has no meaning for a language model"):
        train_text(load_config("dparallel", None, {"model": "tiny-dllm", **given}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
