"""Adapters whose strength follows the time: nothing at first, by t and nothing else, there and back, or refused as ordinary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.distill.export.student import Student
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.methods.pairs import Pairs
from hasten.distill.network.few_steps import FewSteps
from hasten.distill.network.host_call import learn
from hasten.distill.network.roles import Adapter, Roles
from hasten.distill.network.timed_lora import HOLDER, gates_of
from hasten.errors import ModelError, RefusedError, UsageError
from hasten.pipelines.lora import FILE as ORDINARY
from hasten.pipelines.timed_lora import FILE, TimedGates, TimedLora, read_adapter
from hasten.session import Attachment
from hasten.time_table import PACE
from tests.contract import seeded
from tests.distill import toys
from tests.distill.test_trainer import same, weights
from tests.hosts import PIXART_CALL, small_pixart

pytestmark = pytest.mark.filterwarnings("ignore:hasten")


def toy(experts: int, shaken: float = 0.5) -> Roles:
    """A toy with a trained adapter on it, whose gates are as at first."""
    roles = Roles.on_one_base(toys.host(), ("student",), Adapter(rank=4, experts=experts))
    with torch.no_grad():
        for name, parameter in roles["student"].parameters().items():
            if HOLDER not in name:
                parameter.copy_(shaken * seeded(3, *parameter.shape))
    return roles


def move(roles: Roles, constant: bool = False) -> TimedGates:
    """Gates as if trained."""
    gates: Any = roles["student"].host.network.get_submodule(f"{HOLDER}.student")
    with torch.no_grad():
        value = seeded(5, *gates.table.values.shape) / PACE
        gates.table.values.copy_(value[:1].expand_as(value) if constant else value)
    return gates


def answer(roles: Roles, tau: Tensor, rows: Tensor) -> Tensor:
    x, store = seeded(1, 3, toys.WIDTH), toys.store()
    with torch.no_grad():
        return roles["student"].velocity(x[rows], tau, store.conditions.rows(rows))


ROWS, TAU = torch.arange(3), torch.tensor([0.2, 0.8, 1.4], dtype=torch.float64)


@pytest.mark.parametrize("experts", [2, 4])
def test_before_training_it_is_the_ordinary_one_bit_for_bit(experts: int) -> None:
    assert torch.equal(answer(toy(experts), TAU, ROWS), answer(toy(1), TAU, ROWS))


def test_each_row_has_its_time_and_nothing_else_counts() -> None:
    roles = toy(2)
    before = answer(roles, TAU, ROWS)
    move(roles)
    after = answer(roles, TAU, ROWS)
    assert float((after - before).abs().min(1).values.max()) > 1e-3
    for row in (2, 0, 1):  # in another order, and alone
        torch.testing.assert_close(answer(roles, TAU[row : row + 1], ROWS[row : row + 1])[0], after[row])
    assert torch.equal(answer(roles, TAU, ROWS), after)
    with torch.no_grad():
        teacher = roles["teacher"].velocity(seeded(1, 3, toys.WIDTH), TAU, toys.store().conditions.rows(ROWS))
        plain = toys.roles(Pairs())["teacher"].velocity(seeded(1, 3, toys.WIDTH), TAU, toys.store().conditions.rows(ROWS))
    assert torch.equal(teacher, plain)  # the teacher hears nothing of it


def test_the_change_is_what_the_formula_says() -> None:
    roles = toy(2)
    gates = move(roles)
    network: Any = roles["student"].host.network
    x, u = seeded(9, 3, 16), torch.tensor([0.1, 0.5, 0.9])
    layer = network.get_submodule("last")
    g = gates(u)[:, gates.layers.index("last")]
    down, up = layer.lora_A["student"].weight, layer.lora_B["student"].weight
    change = sum(g[:, e, None] * (x @ down[2 * e : 2 * e + 2].T @ up[:, 2 * e : 2 * e + 2].T) for e in range(2))
    wanted = layer.base_layer(x) + layer.scaling["student"] * change
    gates._now = gates(u)
    with roles["student"].playing():
        torch.testing.assert_close(layer(x), wanted)


def _trainer(out: Path, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    roles = Roles.on_one_base(toys.host(), ("student",), Adapter(rank=4, experts=2))
    chosen = TrainSettings(**{"steps": 6, "batch": 8, "lr": 1e-2, "warmup": 2, **settings})
    return Trainer(Pairs(calls=3), roles, toys.store(), chosen, out, (toys.WIDTH,), progress=False)


def test_any_method_trains_the_gates_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    done = _trainer(tmp_path / "whole")
    done.fit()
    gates = gates_of(done.roles["student"])
    assert gates is not None and not gates.table.constant
    _trainer(tmp_path / "cut").fit(stop_after=3)
    _trainer(tmp_path / "cut").fit(resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    averaged = gates_of(done.roles["student"], done.players["student"].average)
    assert averaged is not None and not torch.equal(averaged.table.values, gates.table.values)


def student(constant: bool, **more: Any) -> tuple[Roles, Student, Any]:
    pipe = small_pixart()
    host, _ = learn(pipe, ["a seven"], **PIXART_CALL)
    roles = Roles.on_one_base(host, ("student",), Adapter(rank=4, alpha=8.0, experts=2))
    with torch.no_grad():
        for name, parameter in roles["student"].parameters().items():
            if HOLDER not in name:
                parameter.copy_(0.2 * seeded(3, *parameter.shape))
    move(roles, constant)
    return roles, Student(roles["student"], pipe, "some/teacher", FewSteps.even(2, host.path, "ode"), call=PIXART_CALL, **more), pipe


def test_a_student_is_sampled_under_its_recipe_as_it_was_trained(tmp_path: Path) -> None:
    roles, made, _ = student(constant=False)
    folder = made.save(tmp_path / "student")
    assert (folder / FILE).is_file() and not (folder / ORDINARY).exists()
    assert "No other program loads it" in (folder / "README.md").read_text()
    read = read_adapter(folder)
    assert isinstance(read, TimedLora) and read.gates.experts == 2
    pipe = small_pixart()
    x, time = seeded(2, 2, *roles["student"].host.shape), torch.tensor([90.0, 700.0])
    host, conditions = learn(pipe, ["a seven", "a three"], **PIXART_CALL)
    with torch.no_grad():
        with roles["student"].playing():
            wanted = roles["student"].host(x, time, conditions)
        before = host(x, time, conditions)
        with hasten.accelerate(pipe, str(folder / "recipe.yaml")) as run:
            got = host(x, time, conditions)
            assert "2 experts by the time" in run.trace.facts["adapter"]
        assert torch.equal(host(x, time, conditions), before)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, before, atol=1e-2)
    assert "forward" not in vars(pipe.transformer)


def test_constant_gates_become_an_ordinary_adapter(tmp_path: Path) -> None:
    roles, made, _ = student(constant=True)
    folder = made.save(tmp_path / "student")
    assert (folder / ORDINARY).is_file() and not (folder / FILE).exists()
    pipe = small_pixart()
    host, conditions = learn(pipe, ["a seven"], **PIXART_CALL)
    x, time = seeded(2, 1, *host.shape), torch.tensor([400.0])
    with torch.no_grad(), roles["student"].playing():
        wanted = roles["student"].host(x, time, conditions)
    with torch.no_grad(), hasten.accelerate(pipe, str(folder / "recipe.yaml")):
        torch.testing.assert_close(host(x, time, conditions), wanted, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="changes with the time"):
        student(constant=False, also=("kohya",))[1].save(tmp_path / "student")
    with pytest.raises(UsageError, match="does not divide among 3 experts"):
        Roles.on_one_base(toys.host(), ("student",), Adapter(rank=4, experts=3))
    roles, *_ = student(constant=False)
    with pytest.raises(UsageError, match="Experts follow the time"):
        roles.recompute()
    broken = tmp_path / "broken.safetensors"
    student(constant=False)[1].save(tmp_path / "s")
    content = (tmp_path / "s" / FILE).read_bytes().replace(b'\\"experts\\"', b'\\"expertz\\"')
    broken.write_bytes(content)
    with pytest.raises(ModelError, match="not complete"):
        read_adapter(broken)


def test_times_that_do_not_fit_the_rows_are_refused() -> None:
    gates = TimedGates(["last"], 2, 1000.0)
    network: Any = toy(1)["student"].host.network
    gates.put_on(Attachment(), network, "student")
    x = seeded(1, 3, toys.WIDTH)
    with pytest.raises(ModelError, match="one for each row"):
        network(x, torch.zeros(3, 4), x)
    with toys.roles(Pairs())["student"].playing():
        gates._now = gates(torch.zeros(2))
        layer = network.get_submodule("last")
        layer.set_adapter(["student"])
        layer.enable_adapters(True)
        with pytest.raises(ModelError, match="sees 3 rows"):
            layer(seeded(1, 3, 16))
