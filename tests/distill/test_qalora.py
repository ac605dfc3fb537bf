"""Students in few bits: what is merged is what was trained, and the time alone chooses ranges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import hasten
from hasten.distill.export.quantised import packed_of
from hasten.distill.export.student import student_of
from hasten.distill.loop.draw import Draw
from hasten.distill.methods.qalora import QALoRA, QALoRAState
from hasten.distill.network.calibrate import look, steps_of
from hasten.distill.network.host_call import Condition
from hasten.distill.network.paths import VariancePreserving, spread, turned
from hasten.distill.network.quantised import LowRank, TrainedLayer
from hasten.distill.network.roles import Adapter, Roles
from hasten.distill.train_config import load_config
from hasten.errors import HastenError, ModelError, RefusedError, UsageError
from hasten.pipelines.quantised import HEAD, Quantised, packed, rounded, unpacked, whole
from hasten.pipelines.seams.quantised import Moment, put_on
from hasten.session import Attachment
from tests.distill.quantised_students import SHORT, latents, state_of, training
from tests.distill.test_trainer import same, weights
from tests.distill.toys import Toy, host, store, trainer

QALORA = QALoRA(rank=3, **SHORT)


def layer(weight: Tensor, bits: int, trained: bool = True) -> TrainedLayer:
    """A layer's share of a student, as if trained."""
    g = torch.Generator().manual_seed(2)
    made = TrainedLayer(steps_of(weight, bits), torch.tensor([-1.0, 0.5]), torch.tensor([0.1, 0.2]), bits, 4, LowRank(weight, 3))
    for parameter in made.parameters() if trained else ():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=g)
    return made


# --- the arithmetic -------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_two_weights_share_a_byte(shape: list[int], seed: int) -> None:
    q = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    assert torch.equal(unpacked(packed(q), tuple(shape)), q)
    assert packed(q).numel() == (q.numel() + 1) // 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(5, 7), (6, 3, 2, 2)])
def test_merged_weights_are_the_trained_ones_bit_for_bit(bits: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    made = layer(weight, bits)
    merged = made.finished(weight)
    file = Quantised("transformer", {"a.b": merged}, 2, 999.0).save(tmp_path / "x.safetensors")
    loaded = Quantised.load(file).layers["a.b"]
    assert torch.equal(loaded.weight().view(torch.int32), made.weight(weight).detach().view(torch.int32))
    assert not torch.equal(loaded.q, layer(weight, bits, trained=False).finished(weight).q)
    assert -(2 ** (bits - 1)) <= int(loaded.q.min()) and int(loaded.q.max()) < 2 ** (bits - 1)
    for mine, theirs in zip(made.ranges(), (loaded.low, loaded.step), strict=True):
        assert torch.equal(mine, theirs)


def test_gradients_go_straight_through_and_stop_at_the_ends() -> None:
    weight = torch.tensor([[-9.0, -0.3, 0.6, 2.2, 30.0]], requires_grad=True)
    s = torch.tensor([1.0], requires_grad=True)
    (whole(weight, s, 4) * s).sum().backward()
    assert torch.equal(weight.grad, torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]]))
    # LSQ, equation 3: q - w / s inside, the end itself where it is cut off
    assert float(s.grad) == pytest.approx(-8 + 0.3 + 0.4 - 0.2 + 7, abs=1e-5)
    x = torch.tensor([-1.0, 0.24, 9.0], requires_grad=True)
    rounded(x, torch.tensor(0.0), torch.tensor(0.1), 4).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 1.0, 0.0]))


def test_a_step_of_the_optimiser_changes_all_scales_alike() -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    small, large = layer(weight, 4), layer(1024 * weight, 4)
    assert torch.equal(small.finished(weight).q, large.finished(1024 * weight).q)


def test_the_calibrated_step_is_no_worse_than_the_full_range() -> None:
    weight = torch.randn(4, 200, generator=torch.Generator().manual_seed(1))
    full = weight.abs().amax(1) / 7

    def error(s: Tensor) -> Tensor:
        return (whole(weight, s, 4) * s[:, None] - weight).square().sum(1)

    assert bool((error(steps_of(weight, 4)) < 0.9 * error(full)).all())


# --- the time -------------------------------------------------------------------------------------


def test_rows_of_a_table_are_chosen_by_time() -> None:
    moment = Moment(Toy(), 4, 1000.0)
    assert moment.of(torch.tensor([0, 249, 250, 999, 1000, 1500])).tolist() == [0, 0, 1, 3, 3, 3]
    moment.now = moment.of(torch.tensor([999.0, 0.0]))
    assert moment.spread(torch.arange(4.0), torch.zeros(4, 3)).flatten().tolist() == [3, 3, 0, 0]
    with pytest.raises(ModelError, match="reads 3 rows where its network was called with 2"):
        moment.spread(torch.arange(4.0), torch.zeros(3, 3))
    moment.now = None
    with pytest.raises(ModelError, match="outside of its network"):
        moment.spread(torch.arange(4.0), torch.zeros(4, 3))


def test_skipped_steps_split_branches_and_any_order_change_nothing(tmp_path: Path) -> None:
    done, _ = training("pixart", QALORA, tmp_path)
    student, batch = state_of(done).student(), done.data.batch(torch.tensor([0, 1]), Draw(0, 0, [0, 1]))
    x = torch.randn(2, *batch.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():

        def say(tau: float, rows: list[int]) -> Tensor:
            taus = torch.full((len(rows),), tau, dtype=torch.float64)
            return student.answer(x[rows], taus, batch.condition.rows(torch.tensor(rows)))

        angles = (1.5, 1.0, 0.6, 0.2)
        forward = {tau: say(tau, [0, 1]) for tau in angles}
        for tau in reversed(angles[::2]):
            assert torch.equal(say(tau, [0, 1]), forward[tau])
        for row in (1, 0):  # a branch at a time
            torch.testing.assert_close(say(0.6, [row]), forward[0.6][[row]], rtol=1e-4, atol=1e-5)
        mixed = student.answer(x, torch.tensor([1.5, 0.2], dtype=torch.float64), batch.condition)
        torch.testing.assert_close(mixed, torch.stack([forward[1.5][0], forward[0.2][1]]), rtol=1e-4, atol=1e-5)
        for each in student.layers.values():  # the table matters: with its rows turned round, other answers
            each.step, each.low = each.step.flip(0), each.low.flip(0)
        assert not torch.allclose(say(1.5, [0, 1]), forward[1.5], rtol=1e-2)


# --- the training ---------------------------------------------------------------------------------


def test_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    assert trainer(QALORA, tmp_path / "whole").fit() == 6
    trainer(QALORA, tmp_path / "cut").fit(stop_after=3)
    shutil.copytree(tmp_path / "cut", tmp_path / "none")
    assert trainer(QALORA, tmp_path / "cut").fit(resume=True) == 6
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "none"))


def test_a_row_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    state = trainer(QALORA, tmp_path).state
    rows = store()

    def losses(index: list[int]) -> Tensor:
        draw = Draw(0, 1, index)
        return state.loss("student", rows.batch(torch.tensor(index), draw), draw, 1, {}).rows

    torch.testing.assert_close(losses([4, 2, 9]), torch.cat([losses([4]), losses([2]), losses([9])]))


def test_what_is_matched_is_where_a_step_leads(tmp_path: Path) -> None:
    path = VariancePreserving([0.99, 0.8, 0.5, 0.2, 0.04, 0.001])
    state = trainer(QALoRA(rank=2, matched="step", **SHORT), tmp_path, path=path).state
    assert isinstance(state, QALoRAState)
    batch = store().batch(torch.tensor([0, 1]), Draw(0, 0, [0, 1]))
    way = state.trajectory(batch, Draw(0, 0, [0, 1]))
    taus = torch.tensor(way.taus, dtype=torch.float64)
    weights = state.weights(taus)
    off = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).double()
    led = []
    for now, after in zip(taus, (*taus[1:], torch.tensor(0.0)), strict=True):
        tau = now.expand(2)
        p, q = (spread(factor, off) for factor in path.factors(tau))
        x, y = off.flip(0), off.roll(1)
        there = [turned(x, p * x + q * answer, tau - after) for answer in (y, y + off)]
        led.append((there[1] - there[0]).square().mean())
    size = torch.stack(led)
    torch.testing.assert_close(size / size.mean(), weights)
    assert weights.max() > 3 * weights.min()


def test_training_comes_nearer_to_the_teacher(tmp_path: Path) -> None:
    trainer(QALoRA(rank=4, weights=3, inputs=6, **SHORT), tmp_path, steps=60, lr=3e-2).fit()
    loss = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(loss[-10:]) < 0.5 * sum(loss[:10])


def test_first_and_last_layers_have_eight_bits_and_layers_know_the_time(tmp_path: Path) -> None:
    done, _ = training("flux", QALORA, tmp_path)
    state = state_of(done)
    bits = {name: (each.bits, each.inputs) for name, each in state.student().layers.items()}
    assert {name for name, each in bits.items() if each == (8, 8)} == {"x_embedder", "proj_out"}
    assert set(bits.values()) == {(8, 8), (4, 4)}
    assert "time_text_embed.timestep_embedder.linear_1" in state.sight.clocks and "norm_out.linear" in state.sight.clocks
    assert "context_embedder" not in state.sight.clocks


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["pixart", "wan"])
def test_a_recipe_gives_the_picture_of_the_training_and_leaves_no_trace(which: str, tmp_path: Path) -> None:
    done, pipe = training(which, QALORA, tmp_path / "run", average=0.0)
    plain = latents(pipe, which)
    done.fit()
    student = state_of(done).student()
    with student.playing(), torch.no_grad():
        trained = latents(pipe, which)
    folder = student_of(done, pipe, "some/teacher", call={}, merge=False).save(tmp_path / "student")
    own = {name: dict(vars(module)) for name, module in pipe.transformer.named_modules()}
    with hasten.accelerate(pipe, folder / "recipe.yaml") as run:
        assert torch.equal(latents(pipe, which), trained)
        assert "layers quantised" in run.trace.facts["adapter"]
    assert not torch.equal(trained, plain)
    assert torch.equal(latents(pipe, which), plain)
    assert all(vars(module) == own[name] for name, module in pipe.transformer.named_modules())
    layers = Quantised.load(folder).layers.values()
    size = (folder / "quantised.safetensors").stat().st_size
    assert sum(x.q.numel() for x in layers) / 2 < size
    card = (folder / "README.md").read_text()
    assert "base_model_relation: quantized" in card and "nothing is claimed" in card and "hasten generate" in card


def test_the_average_is_what_is_written(tmp_path: Path) -> None:
    done, pipe = training("pixart", QALORA, tmp_path / "run", average=0.5)
    done.fit()
    student, player = state_of(done).student(), done.players["student"]
    before = {name: p.detach().clone() for name, p in player.parameters.items()}
    written = Quantised.load(student_of(done, pipe, "some/teacher").save(tmp_path / "student"))
    own, mean = packed_of(student), packed_of(student, player.average)
    assert all(torch.equal(written.layers[n].s, mean.layers[n].s) for n in mean.layers)
    assert any(not torch.equal(own.layers[n].s, mean.layers[n].s) for n in mean.layers)
    assert all(torch.equal(p, before[name]) for name, p in player.parameters.items())


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    network = Toy()
    made = Quantised("toy", {"first": layer(network.first.weight.detach(), 4).finished(network.first.weight)}, 2, 1000.0)
    file = made.save(tmp_path / "x.safetensors")
    put_on(Attachment(), network, Quantised.load(file))
    with pytest.raises(ModelError, match="'first' is"):
        put_on(Attachment(), _wider(), made)
    other = Quantised("toy", made.layers, 2, 1000.0, {"network": "UNet"})
    with pytest.raises(ModelError, match="a UNet's, and this is a Toy"):
        put_on(Attachment(), Toy(), other)
    with pytest.raises(ModelError, match="is missing in this Toy"):
        put_on(Attachment(), Toy(), Quantised("toy", {"third": made.layers["first"]}, 2, 1000.0))
    raw = file.read_bytes()
    (tmp_path / "y.safetensors").write_bytes(raw.replace(b'\\"bits\\": 4', b'\\"bits\\": 8'))
    assert HEAD.encode() in raw
    with pytest.raises(ModelError, match="holds no quantised weights, or is damaged"):
        Quantised.load(tmp_path / "y.safetensors")
    wrapped = Toy()
    Roles.on_one_base(_host_of(wrapped), ("student",), Adapter(rank=2))
    with pytest.raises(RefusedError, match="has an adapter on it"):
        put_on(Attachment(), wrapped, made)


def test_a_factor_on_whole_weights_is_refused(tmp_path: Path) -> None:
    done, pipe = training("pixart", QALORA, tmp_path / "run")
    folder = student_of(done, pipe, "some/teacher").save(tmp_path / "student")
    found = hasten.recipe(folder / "recipe.yaml")
    with pytest.raises(UsageError, match="quantised weights are whole"):
        hasten.accelerate(pipe, found.replace({"adapter.scale": 0.5}))


# --- what does not fit ----------------------------------------------------------------------------


class Sideways(Toy):
    """A layer that reads tokens before rows, so that nobody knows which row's time it is."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        told = torch.cat([hidden_states, (timestep / 1000)[:, None], encoder_hidden_states], 1)
        return (self.last(self.first(told[None].transpose(0, 1)).tanh().transpose(0, 1)[0].reshape(1, -1, 16))[0],)


def _host_of(network: nn.Module) -> Any:
    from dataclasses import replace

    return replace(host(), network=network)


def _wider() -> nn.Module:
    network = Toy()
    network.first = nn.Linear(11, 17)
    return network


def test_networks_that_cannot_be_told_the_time_are_refused() -> None:
    batch = store().batch(torch.tensor([0]), Draw(0, 0, [0]))
    with pytest.raises(RefusedError, match="last of Sideways reads 1 rows for one of a batch and 1 for three"):
        look(Roles.on_one_base(_host_of(Sideways()), (), Adapter())["teacher"], batch)
    roles = Roles.on_one_base(host(), ("student",), Adapter(rank=2))
    with pytest.raises(UsageError, match="has an adapter on it"):
        look(roles["teacher"], batch)


def test_a_time_for_each_token_is_refused() -> None:
    network, hold = Toy(), Attachment()
    made = layer(network.first.weight.detach(), 4).finished(network.first.weight)
    put_on(hold, network, Quantised("toy", {"first": made}, 2, 1000.0))
    x = Condition({"x": torch.zeros(2, 5)}).tensors["x"]
    with pytest.raises(ModelError, match="a time for each token"):
        network(x, torch.zeros(2, 3), x)
    hold.restore()
    assert "forward" not in vars(network.first) and not network._forward_pre_hooks


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"rank": 8}, "student.rank would do nothing"),
        ({"full": True}, "student.full would do nothing"),
        ({"method.points": 30}, "points must be at most steps"),
        ({"method.weights": 1}, "weights"),
    ],
)
def test_settings_that_do_not_fit_are_said(more: dict[str, Any], words: str) -> None:
    with pytest.raises(HastenError, match=words):
        load_config("qalora", None, {"model": "tiny-flux", **more})
