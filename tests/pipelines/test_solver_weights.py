"""A solver by weights: what the scheduler is given is the mix that the recipe names."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from hasten.pipelines.solver import scheduler_for
from hasten.recipe import Recipe, from_yaml
from hasten.samplers.solver import Solver

TIMES = (1.0, 0.7, 0.4, 0.1)
AB2 = ((1.0,), (1.5, -0.5), (1.5, -0.5), (1.5, -0.5))


def walked(scheduler: object, outputs: list[Tensor], x: Tensor, start: int = 0) -> Tensor:
    scheduler.set_timesteps(50)  # type: ignore[attr-defined]
    scheduler.set_begin_index(start)  # type: ignore[attr-defined]
    for t, y in zip(scheduler.timesteps[start:], outputs, strict=True):  # type: ignore[attr-defined]
        x = scheduler.step(y, t, x, return_dict=False)[0]  # type: ignore[attr-defined]
    return x


def drawn(count: int) -> tuple[list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, 4, 3, 3, generator=draw) for _ in range(count)], torch.randn(1, 4, 3, 3, generator=draw)


def test_euler_by_weights_moves_by_their_mix() -> None:
    outputs, x = drawn(4)
    found = walked(scheduler_for(FlowMatchEulerDiscreteScheduler(), Solver(name="euler", times=TIMES, weights=AB2)), outputs, x)
    expected = x + (0.7 - 1) * outputs[0]
    for k, h in ((1, -0.3), (2, -0.3), (3, -0.1)):
        expected = expected + h * (1.5 * outputs[k] - 0.5 * outputs[k - 1])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("host", "name"), [(FlowMatchEulerDiscreteScheduler(), "euler"), (DDIMScheduler(), "ddim")])
def test_weights_of_the_newest_alone_change_nothing(host: object, name: str) -> None:
    outputs, x = drawn(4)
    plain = walked(scheduler_for(host, Solver(name=name, times=TIMES)), outputs, x)  # type: ignore[arg-type]
    newest = scheduler_for(host, Solver(name=name, times=TIMES, weights=((1.0,), (1.0, 0.0), (1.0,), (1.0,))))  # type: ignore[arg-type]
    assert torch.equal(walked(newest, outputs, x), plain)
    assert torch.equal(walked(newest, outputs, x), plain), "a second run starts anew"


def test_a_run_that_starts_later_weighs_what_it_has() -> None:
    outputs, x = drawn(2)
    solver = Solver(name="euler", times=TIMES, weights=AB2)
    found = walked(scheduler_for(FlowMatchEulerDiscreteScheduler(), solver), outputs, x, start=2)
    expected = x - 0.3 * outputs[0] - 0.1 * (1.5 * outputs[1] - 0.5 * outputs[0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_recipe_with_weights_is_read_back() -> None:
    recipe = Recipe(name="fitted", sampler=Solver(name="euler", times=TIMES, weights=AB2))
    assert from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "unipc", "times": TIMES, "weights": AB2}, "first-order one (euler, ddim), got unipc"),
        ({"name": "euler", "weights": AB2}, "got 4 for 0"),
        ({"name": "euler", "times": TIMES, "weights": AB2[:3]}, "got 3 for 4"),
        ({"name": "euler", "times": TIMES, "weights": ((1.0, 0.0), *AB2[1:])}, "row 0 weighs 2 outputs; by then there are 1 to 1"),
    ],
)
def test_weights_that_do_not_fit_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError) as caught:  # pydantic wraps ours
        Solver(**given)  # type: ignore[arg-type]
    assert said in str(caught.value)
