"""Dynamic width: masks in training are slices in use, everything follows from the time, and every router learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.caching.routed import RoutedReuse
from hasten.caching.routers import RoutedModule, Routers
from hasten.distill.data.store import Store
from hasten.distill.export.student import student_of
from hasten.distill.loop.draw import Draw
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.method import Facts
from hasten.distill.methods.dydit import DyDiT
from hasten.distill.network.host_call import Condition, HostCall, learn
from hasten.distill.network.roles import Adapter, Roles
from hasten.distill.network.routed import Routed, routers_of
from hasten.errors import ModelError, RefusedError, UsageError
from hasten.pipelines.recipes import recipe
from hasten.pipelines.seams.routed import RoutedWalk
from hasten.pipelines.seams.width_gate import WidthGates
from hasten.pipelines.work import watch
from hasten.recipe import Adapter as RecipeAdapter
from hasten.recipe import Recipe
from hasten.time_table import PACE, TimeTable
from tests.contract import seeded
from tests.distill import toys
from tests.hosts import FLUX_CALL, PIXART_CALL, WAN_CALL, small_flux, small_pixart, small_wan

pytestmark = pytest.mark.filterwarnings("ignore:hasten")

HOSTS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "pixart": (small_pixart, PIXART_CALL), "wan": (small_wan, WAN_CALL), "flux": (small_flux, FLUX_CALL),
}  # fmt: skip
PROMPTS = ("a seven", "a three moving left")


class Case:
    """A student on a small pipeline, untrained but changed, with routers of which some are shut."""

    def __init__(self, which: str = "pixart", dtype: torch.dtype = torch.float64, shut: bool = True) -> None:
        make, call = HOSTS[which]
        self.pipe, self.call = make(), call
        host, conditions = learn(self.pipe, [*PROMPTS, ""], **call)
        self.conditions = Condition({k: v.to(dtype) if v.is_floating_point() else v for k, v in conditions.tensors.items()})
        host.network.to(dtype)
        self.host: HostCall = replace(host, dtype=dtype, fixed={k: _cast(v, dtype) for k, v in host.fixed.items()})
        self.roles = Roles.on_one_base(self.host, ("student",), Adapter(rank=3, alpha=6.0))
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.roles["student"].parameters().values():
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=g).to(dtype)
        self.x = seeded(7, 2, *self.host.shape, dtype=dtype)
        self.tau = torch.tensor([0.4, 1.2], dtype=torch.float64)
        self.routers, self.sites = routers_of(
            self.roles["student"], self.x[:1], self.tau[:1], self.conditions.rows(torch.tensor([0])), groups=4, tokens=True
        )
        if shut:
            with torch.no_grad():
                self.routers.table.values.copy_(seeded(11, *self.routers.table.values.shape) * 2 / PACE)
        self.routed = Routed(self.roles["student"], self.routers, self.sites)

    def u(self, tau: Tensor) -> Tensor:
        return self.host.path.time(tau) / getattr(self.host.path, "unit", 1000.0)

    def masked(self, rows: Tensor, tau: Tensor) -> Tensor:
        with torch.no_grad():
            return self.routed.answer(self.x[rows], tau, self.conditions.rows(rows), self.routers(self.u(tau)))

    def sliced(self, rows: Tensor, tau: float) -> tuple[Tensor, float]:
        """(answer, share of the work that was saved) with sliced weights and gathered tokens."""
        gates = WidthGates(self.host.network)
        angle = torch.full((len(rows),), tau, dtype=torch.float64)
        role = self.roles["student"]
        with torch.no_grad(), role.playing():
            assert gates.learn(lambda: role.answer(self.x[rows], angle, self.conditions.rows(rows)), "stored", tokens=True)
            walk = RoutedWalk(self.routers, self.routers.openings(float(self.u(angle)[0])))
            made = gates.run(lambda: role.answer(self.x[rows], angle, self.conditions.rows(rows)), walk)
        gates.detach()
        return made, walk.saved / gates.flops


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


ALL = torch.arange(2)


@pytest.mark.parametrize("which", list(HOSTS))
def test_masked_is_sliced(which: str) -> None:
    case = Case(which)
    for tau in (0.4, 1.2):
        masked = case.masked(ALL, torch.full((2,), tau, dtype=torch.float64))
        sliced, saved = case.sliced(ALL, tau)
        torch.testing.assert_close(sliced, masked, rtol=1e-9, atol=1e-10)
        with torch.no_grad():
            whole = case.roles["student"].answer(case.x, torch.full((2,), tau, dtype=torch.float64), case.conditions.rows(ALL))
            work = float(case.routers.work(case.routers(case.u(torch.tensor([tau], dtype=torch.float64)))))
        assert float((whole - masked).abs().max()) > 1e-4  # something was really shut
        assert 0.5 * (1 - work) < saved < (1 - work) * (1 + 1e-6)  # tokens are whole ones


def test_masked_is_sliced_in_single_precision_to_its_own_rounding() -> None:
    exact, single = Case(), Case(dtype=torch.float32)
    tau = torch.full((2,), 0.4, dtype=torch.float64)
    masked, (sliced, _) = single.masked(ALL, tau), single.sliced(ALL, 0.4)
    own = float((masked.double() - exact.masked(ALL, tau)).abs().max())
    assert own > 0
    assert float((sliced - masked).abs().max()) <= 2 * own


@pytest.mark.parametrize("which", list(HOSTS))
def test_open_routers_change_no_bit(which: str) -> None:
    case = Case(which, torch.float32, shut=False)
    role, rows = case.roles["student"], case.conditions.rows(ALL)
    gates = case.routers(case.u(case.tau))
    assert all(bool((gate == 1).all()) for gate in [*gates.units.values(), *gates.tokens.values()])
    with torch.no_grad():
        assert torch.equal(case.routed.answer(case.x, case.tau, rows, gates), role.answer(case.x, case.tau, rows))
    assert float(case.routers.work(gates).detach().min()) == 1.0
    assert all(opening.all for opening in case.routers.openings(0.3).values())


def test_a_row_does_not_depend_on_its_neighbours_nor_on_what_came_before() -> None:
    case = Case()
    both = case.masked(ALL, case.tau)
    for row in range(2):
        torch.testing.assert_close(case.masked(ALL[row : row + 1], case.tau[row : row + 1])[0], both[row], rtol=1e-9, atol=1e-10)
    first, _ = case.sliced(ALL, 0.4)
    case.sliced(ALL, 1.2)
    again, _ = case.sliced(ALL, 0.4)
    assert torch.equal(first, again)
    one, _ = case.sliced(ALL[:1], 0.4)
    torch.testing.assert_close(one[0], first[0], rtol=1e-9, atol=1e-10)


def test_the_most_important_gate_never_shuts_and_one_token_runs() -> None:
    case = Case()
    with torch.no_grad():
        case.routers.table.values.fill_(-100 / PACE)
    for one in case.routers.routed:
        opening = case.routers.openings(0.5)[one.name]
        start, stop = one.bounds(0)
        assert opening.units is not None
        assert opening.units.tolist() == case.routers.orders[one.name][start:stop].sort().values.tolist()
        if one.width:
            assert case.routers.chosen(one.name, seeded(1, 2, 9, one.width).double(), opening.tokens).shape == (2, 1)
    made, saved = case.sliced(ALL, 0.4)
    assert torch.isfinite(made).all() and saved == pytest.approx(1 - case.routers.floor(), abs=0.12)


def _store(case: Case) -> Store:
    rows = torch.arange(2)
    g = torch.Generator().manual_seed(1)
    x0, z = torch.randn(2, 6, *case.host.shape, generator=g)
    single = Condition({k: _cast(v, torch.float32) for k, v in case.conditions.tensors.items()})
    return Store(PROMPTS, single.rows(rows), single.rows(torch.tensor([2])), torch.arange(6) % 2, x0, z, case.host.shape)


def _trainer(out: Path, method: DyDiT | None = None, **settings: Any) -> Trainer:
    case = Case(dtype=torch.float32, shut=False)
    chosen = TrainSettings(**{"steps": 4, "batch": 4, "lr": 1e-2, "warmup": 1, **settings})
    method = method or DyDiT(target=0.6, groups=4)
    torch.manual_seed(0)
    host, _ = learn(small_pixart(), list(PROMPTS), **PIXART_CALL)
    roles = Roles.on_one_base(host, ("student",), Adapter(rank=3))
    return Trainer(method, roles, _store(case), chosen, out, host.shape, progress=False)


def test_every_router_and_every_weight_gets_a_gradient(tmp_path: Path) -> None:
    done = _trainer(tmp_path / "a")
    with torch.no_grad():
        for parameter in done.roles["student"].parameters().values():
            parameter.add_(0.1 * seeded(5, *parameter.shape))
    state: Any = done.state
    batch = done.data.batch(torch.arange(6), Draw(0, 0, range(6)))
    loss = state.loss("student", batch, Draw(0, 3, range(6)), 3, {})
    loss.rows.mean().backward()
    table = state.routers.table.values.grad
    silent = [place for place in range(table.shape[1]) if not table[:, place].any()]
    place, firsts = 0, []
    for one in state.routers.routed:
        firsts.append(place)
        place += one.gates + bool(one.width)
    assert set(silent) <= set(firsts)  # those are always open
    assert all(bool(weight.grad.any()) for weight in state.routers.scores)
    assert all(bool(p.grad.any()) for p in done.roles["student"].parameters().values() if p.grad is not None)


def test_the_work_that_is_asked_for_falls_and_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    done = _trainer(tmp_path / "a", steps=10)
    state: Any = done.state
    assert state.target(0) == pytest.approx(0.92) and state.target(4) == state.target(9) == pytest.approx(0.6)
    batch = done.data.batch(torch.arange(6), Draw(0, 0, range(6)))
    whole = state.loss("student", batch, Draw(0, 3, range(6)), 3, {}).rows
    half = done.data.batch(torch.arange(2), Draw(0, 0, range(2)))
    part = state.loss("student", half, Draw(0, 3, range(2)), 3, {}).rows
    torch.testing.assert_close(part, whole[:2], rtol=1e-4, atol=1e-6)


def test_a_resumed_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    from tests.distill.test_trainer import same, weights

    _trainer(tmp_path / "whole").fit()
    _trainer(tmp_path / "cut").fit(stop_after=2)
    _trainer(tmp_path / "cut").fit(resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert any("heads.routers.table" in name for name in weights(tmp_path / "whole"))


def test_a_student_runs_less_under_its_recipe_and_leaves_no_trace(tmp_path: Path) -> None:
    done = _trainer(tmp_path / "a", steps=12, lr=3e-2, average=0.0)
    done.fit()
    pipe = small_pixart()
    folder = student_of(done, pipe, "some/teacher", call=PIXART_CALL).save(tmp_path / "student")
    assert (folder / "routers.safetensors").is_file() and "routers.safetensors" in (folder / "README.md").read_text()
    call = PIXART_CALL | {"output_type": "latent", "latents": seeded(3, 1, *done.shape)}
    plain = pipe("a seven", **call)[0]
    with hasten.accelerate(pipe, Recipe(adapter=RecipeAdapter(path=str(folder)))):
        full = pipe("a seven", **call)[0]
    seen: list[Any] = []
    with hasten.accelerate(pipe, str(folder / "recipe.yaml")) as run:
        first = pipe("a seven", **call)[0]
        hook = pipe.transformer.register_forward_hook(lambda *call: seen.append(call[1:]), with_kwargs=True)
        with watch(pipe) as work:  # the first run of a session proves that cutting is right, which is work, too
            made = pipe("a seven", **call)[0]
        hook.remove()
        report = run.report()
    with watch(pipe) as whole:
        assert torch.equal(pipe("a seven", **call)[0], plain)
    assert torch.equal(made, first) and not torch.equal(made, full)
    assert not [w for w in report.warnings if "nothing" in w or "refused" in w], report.warnings
    assert report.computed_fraction < 0.9
    state: Any = done.state
    assert len(seen) == 6
    for args, kwargs, answer in seen:  # what ran in use is what was trained, time by time
        with torch.no_grad(), done.roles["student"].playing(), state.routed.on(state.routers(kwargs["timestep"] / 1000)):
            trained = done.roles["student"].host.network(*args, **kwargs)
        torch.testing.assert_close(answer[0], trained[0], rtol=1e-4, atol=1e-5)
    # Beside what the report counts: the adapter, and the scores of the tokens.
    low = sum(p.numel() for p in done.roles["student"].parameters().values()) / sum(p.numel() for p in pipe.transformer.parameters())
    assert report.computed_fraction < work.flops / whole.flops < report.computed_fraction + 2 * low


@pytest.mark.parametrize(
    ("told", "sentence"),
    [("floor", "cannot be reached"), ("toy", "can be run in part"), ("file", "no routers"), ("other", "of another network")],
)
def test_what_does_not_fit_is_said(tmp_path: Path, told: str, sentence: str) -> None:
    if told == "floor":
        with pytest.raises(UsageError, match=sentence):
            _trainer(tmp_path, DyDiT(target=0.01, groups=4))
    elif told == "toy":
        with pytest.raises(RefusedError, match=sentence):
            toys.trainer(DyDiT(), tmp_path)
    else:
        file = tmp_path / "routers.safetensors"
        if told == "other":
            file.write_bytes(Routers([RoutedModule("blocks.0.attn1", 2, 2, 0.1)], {"blocks.0.attn1": torch.arange(2)}).packed())
        with pytest.raises(ModelError, match=sentence):
            hasten.accelerate(small_pixart(), Recipe(reuse=RoutedReuse(path=str(file))))


def test_a_method_without_a_row_says_so() -> None:
    host = toys.host()
    facts = Facts(Roles.on_one_base(host, ("student",), Adapter(rank=2)), 3, host.shape)
    with pytest.raises(UsageError, match="looks at a row"):
        DyDiT().start(facts)


def test_routers_come_back_from_their_file(tmp_path: Path) -> None:
    case = Case()
    file = tmp_path / "r.safetensors"
    file.write_bytes(case.routers.packed())
    back = Routers.load(file)
    assert back.routed == case.routers.routed and not any(p.requires_grad for p in back.parameters())
    for name, opening in case.routers.openings(0.37).items():
        other = back.openings(0.37)[name]
        assert opening.tokens == other.tokens and (opening.units is None) == (other.units is None)
        assert opening.units is None or torch.equal(opening.units, other.units)  # type: ignore[arg-type]


def test_a_table_is_straight_between_its_knots() -> None:
    table = TimeTable(3, 2)
    assert table.constant
    with torch.no_grad():
        table.values.copy_(torch.tensor([[0.0, 1.0], [1.0, 1.0], [3.0, 1.0]]) / PACE)
    got = table(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.5, -1.0], dtype=torch.float64))
    torch.testing.assert_close(got[:, 0], torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 3.0, 0.0]))
    torch.testing.assert_close(got[:, 1], torch.ones(7))
    assert not table.constant
    one = TimeTable(1, 2)
    assert one(torch.tensor([0.3])).shape == (1, 2)


def test_routers_are_looked_for_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(Recipe(reuse=RoutedReuse(path="routers.safetensors")).to_yaml())
    found = recipe(str(tmp_path / "recipe.yaml"))
    for each in (found, found.replace({"name": "other"})):
        assert isinstance(each.reuse, RoutedReuse) and each.reuse.place == tmp_path / "routers.safetensors"
        assert str(tmp_path) not in each.to_yaml()
