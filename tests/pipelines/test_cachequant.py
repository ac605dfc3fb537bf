"""Calibration: the schedule is the best there is, the fits are least squares, and quantised weights are repaired."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hasten
from hasten.caching.network import NetworkReuse
from hasten.caching.rules_partition import cheapest_groups, holding_cost
from hasten.errors import RecipeError, UsageError
from hasten.forecast import Hold
from hasten.forecast_affine import Affine, ChannelTable
from hasten.part import parse
from hasten.pipelines.cachequant import calibrate, least_squares
from hasten.recipe import Recipe, from_yaml
from tests.contract import seeded
from tests.hosts import FLUX_CALL, PIXART_CALL, WAN_CALL, small_flux, small_pixart, small_wan

PROMPTS = ["a seven", "a red cat", "the blue dog", "three moving left", "one standing still", "nine fast"]


# --- schedule -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.data())
def test_groups_are_the_best_of_all(total: int, data: st.DataObject) -> None:
    """Any cost at all, also one that no distance has: compared with every way to cut."""
    row = st.lists(st.floats(0, 10), min_size=total + 1, max_size=total + 1)
    cost = data.draw(st.lists(row, min_size=total, max_size=total))
    num = data.draw(st.integers(1, total))

    def price(starts: tuple[int, ...]) -> float:
        return sum(cost[i][k] for i, k in itertools.pairwise((*starts, total)))

    every = [(0, *rest) for rest in itertools.combinations(range(1, total), num - 1)]
    found = cheapest_groups(cost, num)
    assert found[0] == 0 and found == sorted(set(found)) and len(found) == num
    assert price(tuple(found)) == pytest.approx(min(map(price, every)))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(0, 1000))
def test_cost_is_what_holding_costs_and_falls_with_more_steps(total: int, seed: int) -> None:
    values = seeded(seed, total, 5, dtype=torch.float64)
    weights = seeded(seed + 1, total, dtype=torch.float64).abs().tolist()
    cost = holding_cost(values @ values.T, weights)
    for i, k in itertools.combinations(range(total + 1), 2):
        by_hand = sum(weights[j] ** 2 * float((values[j] - values[i]).square().sum()) for j in range(i + 1, k))
        assert cost[i][k] == pytest.approx(by_hand, abs=1e-9)
        assert k == i + 1 or cost[i][k] >= cost[i][k - 1]
    paid = []
    for num in range(1, total + 1):
        starts = cheapest_groups(cost, num)
        paid.append(sum(cost[i][k] for i, k in itertools.pairwise((*starts, total))))
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(paid)) and paid[-1] == 0


def test_ties_go_to_the_earlier_step() -> None:
    assert cheapest_groups([[0.0] * 5] * 4, 2) == [0, 1]


@pytest.mark.parametrize("num", [0, 5])
def test_a_number_that_does_not_fit_is_an_error(num: int) -> None:
    with pytest.raises(UsageError, match="between 1 and 4"):
        cheapest_groups([[0.0] * 5] * 4, num)


# --- fits and tables ------------------------------------------------------------------------------


def test_least_squares_finds_scale_and_shift_and_survives_constants() -> None:
    x = torch.stack([seeded(0, 50), torch.full((50,), 3.0)])
    a, b = least_squares(x, 2 * x - 1)
    torch.testing.assert_close(a, torch.tensor([2.0, 1.0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b, torch.tensor([-1.0, 2.0]), rtol=1e-5, atol=1e-5)


def test_a_table_acts_at_its_times_on_its_channels_only() -> None:
    table = ChannelTable(times=(0.2, 0.5), scale=((2.0, 3.0), (1.0, 1.0)), shift=((0.0, 1.0), (5.0, 0.0)))
    state, y = table.start(), seeded(0, 1, 2, 3, 3)
    torch.testing.assert_close(state.apply(0.2004, y), y * torch.tensor([2.0, 3.0]).view(1, 2, 1, 1) + torch.tensor([0.0, 1.0]).view(1, 2, 1, 1))
    torch.testing.assert_close(state.apply(0.5, y)[:, 0], y[:, 0] + 5)
    assert state.apply(0.3, y) is y and state.apply(0.2, seeded(0, 1, 4, 3, 3)) is not None
    assert state.apply(0.2, wider := seeded(0, 1, 4, 3, 3)) is wider
    tokens = table.model_copy(update={"dim": -1}).start().apply(0.2, seeded(0, 1, 5, 2))
    torch.testing.assert_close(tokens[..., 0], 2 * seeded(0, 1, 5, 2)[..., 0])
    half = seeded(0, 1, 2, 3, 3, dtype=torch.bfloat16)
    assert state.apply(0.2, half).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "wrong",
    [
        {"times": [0.5, 0.2], "scale": [[1.0], [1.0]], "shift": [[0.0], [0.0]]},
        {"times": [0.2, 0.5], "scale": [[1.0]], "shift": [[0.0], [0.0]]},
        {"times": [0.2, 0.5], "scale": [[1.0, 2.0], [1.0]], "shift": [[0.0], [0.0]]},
    ],
)
def test_a_table_that_does_not_add_up_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="table"):
        parse(Affine, {"table": wrong}, "recipe.yaml")


def test_a_run_it_was_not_calibrated_for_is_told() -> None:
    part = Affine(run=(1.0, 0.8, 0.6, 0.4, 0.2))
    assert part.refusal([1.0, 0.8, 0.6, 0.4, 0.2]) == "" and part.refusal([0.4, 0.2]) == ""
    assert "2 of the 3 steps" in part.refusal([1.0, 0.66, 0.33])


# --- the whole ------------------------------------------------------------------------------------


def run_wan(pipe: Any, sample: int, steps: int = 12) -> Tensor:
    call = {**WAN_CALL, "num_inference_steps": steps, "output_type": "latent", "return_dict": False}
    return pipe(PROMPTS[sample], generator=torch.Generator().manual_seed(sample), **call)[0]


def drifting_wan() -> Any:
    """A Wan whose output's scale and mean drift with time, as trained networks' do: holding it is off by that."""
    pipe = small_wan()
    inner = pipe.transformer.forward

    def forward(hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        (y,) = inner(hidden_states, timestep, *args, **{**kwargs, "return_dict": False})
        t = timestep.view(-1, 1, 1, 1, 1) / 1000
        bias = torch.linspace(-40, 40, 16).view(1, 16, 1, 1, 1)
        return (y * (0.5 + 2 * t) + bias * t,)

    pipe.transformer.forward = forward
    return pipe


def off(pipe: Any, recipe: Recipe, truth: Any, sample: int = 5) -> float:
    plain = run_wan(truth, sample)
    with hasten.accelerate(pipe, recipe):
        found = run_wan(pipe, sample)
    return float((found - plain).norm() / plain.norm())


def without(recipe: Recipe, **changes: Any) -> Recipe:
    assert isinstance(recipe.reuse, NetworkReuse)
    return recipe.model_copy(update={"reuse": recipe.reuse.model_copy(update=changes)})


def test_correction_beats_holding_on_a_prompt_it_has_not_seen() -> None:
    pipe = drifting_wan()
    recipe = calibrate(pipe, run_wan, 4, samples=3)
    assert isinstance(recipe.reuse, NetworkReuse)
    assert len(recipe.reuse.rule.computed(12)) == 4  # type: ignore[attr-defined]
    corrected, held = off(pipe, recipe, pipe), off(pipe, without(recipe, forecast=Hold()), pipe)
    assert corrected < 0.8 * held
    assert from_yaml(recipe.to_yaml()) == recipe


def quantised(pipe: Any, bits: int) -> Any:
    """Every linear layer's weights rounded to a signed grid of `bits` with one step per output channel."""
    twin = copy.deepcopy(pipe)
    for layer in twin.transformer.modules():
        if isinstance(layer, nn.Linear):
            step = layer.weight.detach().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            layer.weight.data = (layer.weight / step).round() * step
    return twin


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_repaired_and_cached(bits: int) -> None:
    exact = small_wan()
    rough = quantised(exact, bits)
    recipe = calibrate(rough, run_wan, 6, samples=4, reference=exact)
    assert isinstance(recipe.reuse, NetworkReuse) and recipe.reuse.repair is not None
    assert len(recipe.reuse.repair.times) == 6
    both = off(rough, recipe, exact)
    alone = off(rough, Recipe(), exact) + off(exact, calibrate(exact, run_wan, 6, samples=4), exact)
    assert both < 1.2 * alone, "the errors of quantisation and of caching must not multiply"
    with hasten.accelerate(rough, recipe) as run:
        run_wan(rough, 5)
    assert run.report().computed_fraction == 0.5


def test_repair_undoes_a_known_error_of_the_weights() -> None:
    """Weights whose error is a scale and a shift of the output, exactly what the table can say."""
    exact = small_wan()
    with torch.no_grad():
        exact.transformer.proj_out.bias.zero_()
    rough = copy.deepcopy(exact)
    with torch.no_grad():
        rough.transformer.proj_out.weight.mul_(1.2)
        rough.transformer.proj_out.bias.add_(0.3)
    recipe = calibrate(rough, run_wan, 12, samples=2, reference=exact)
    assert off(rough, recipe, exact) < 1e-3
    assert off(rough, without(recipe, repair=None), exact) > 0.05


@pytest.mark.parametrize("name", ["pixart", "flux"])
def test_other_hosts_calibrate(name: str) -> None:
    """A batch of both branches with a variance beside the mean and a multistep solver; packed tokens."""
    make, call = {"pixart": (small_pixart, PIXART_CALL), "flux": (small_flux, FLUX_CALL)}[name]
    pipe = make()

    def generate(host: Any, sample: int) -> None:
        host(PROMPTS[sample], generator=torch.Generator().manual_seed(sample), output_type="latent", **call)

    recipe = calibrate(pipe, generate, 3, samples=2)
    assert isinstance(recipe.reuse, NetworkReuse) and isinstance(recipe.reuse.forecast, Affine)
    table = recipe.reuse.forecast.table
    assert len(table.times) == 3 and len(table.scale[0]) == {"pixart": 8, "flux": 4}[name]
    assert table.dim == {"pixart": 1, "flux": -1}[name]
    with hasten.accelerate(pipe, recipe) as run:
        generate(pipe, 1)
    assert run.report().computed_fraction == 0.5


def test_another_number_of_steps_is_said_and_held() -> None:
    pipe = small_wan()
    recipe = calibrate(pipe, lambda host, sample: run_wan(host, sample, 6), 3, samples=1)
    with hasten.accelerate(pipe, recipe), pytest.warns(UserWarning, match="calibrated for runs of 6 steps"):
        run_wan(pipe, 0, 9)


def test_wrong_calibration_runs_are_errors() -> None:
    pipe = small_wan()
    with pytest.raises(UsageError, match="same steps"):
        calibrate(pipe, lambda host, sample: run_wan(host, sample, 4 + sample), 2, samples=2)
    with pytest.raises(UsageError, match="once and to its end"):
        calibrate(pipe, lambda host, sample: None, 2, samples=1)
    with pytest.raises(UsageError, match="at least one run"):
        calibrate(pipe, run_wan, 2, samples=0)
    assert not pipe.transformer._forward_hooks and "step" not in vars(pipe.scheduler)
