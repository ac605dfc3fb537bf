"""Directions of tangents: sketches keep cosines, the log gets them, and what turns back all the time is said."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from hasten.distill.loop.direction import KEEP, NUMBERS, TURN, Headings, Sketch, numbers
from hasten.distill.loop.draw import Draw
from hasten.distill.loop.health import BACK, SLOW, Health
from hasten.distill.method import Batch, Loss
from hasten.distill.methods.ladd import LADD, SanaSprint
from hasten.distill.methods.meanflow import MeanFlow
from hasten.distill.methods.pairs import Pairs
from hasten.distill.methods.scm import SCM
from tests.distill.test_chunks import training
from tests.distill.test_dmd import trainer as with_features
from tests.distill.toys import WIDTH, trainer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosines(directions: list[Tensor]) -> list[float]:
    """Of each with those before it, without the first."""
    headings = Headings()
    found = [headings.cosine("a", each.tolist()) for each in directions]
    assert found[0] is None
    return [value for value in found[1:] if value is not None]


# --- sketches -------------------------------------------------------------------------------------------


@given(st.integers(1, NUMBERS), st.integers(1, 5), st.integers(0, 99))
def test_up_to_64_numbers_keep_their_inner_products(size: int, rows: int, seed: int) -> None:
    sketch, (x, y) = Sketch((size,)), normal(2, rows, size, seed=seed)
    assert torch.allclose(sketch(x) @ sketch(y), x.mean(0) @ y.mean(0), atol=1e-5)


def test_larger_ones_keep_them_to_an_eighth() -> None:
    """Over many pairs of vectors in many numbers the error of a cosine has deviation 1/8 and no mean."""
    shape = (3, 7, 11, 5)
    sketch, errors = Sketch(shape), []
    for seed in range(200):
        x, other = normal(2, 1, *shape, seed=seed)
        y = 0.6 * x + 0.8 * other
        told = functional.cosine_similarity(sketch(x), sketch(y), dim=0) - functional.cosine_similarity(x.flatten(), y.flatten(), dim=0)
        errors.append(float(told))
    found = torch.tensor(errors)
    # The sketches' angle is that of 64 numbers: deviation (1 - c^2) / sqrt(64) at cosine c.
    assert abs(float(found.mean())) < 0.02 and float(found.std()) == pytest.approx((1 - 0.36) / 8, rel=0.2)


@pytest.mark.parametrize("shape", [(5,), (3, 7, 11)])
def test_a_sketch_is_linear_in_rows_and_the_same_everywhere(shape: tuple[int, ...]) -> None:
    x = normal(6, *shape).requires_grad_()
    whole, parts = Sketch(shape)(x), [Sketch(shape)(part) for part in x.split(2)]
    assert whole.shape == (NUMBERS,) and not whole.requires_grad
    assert torch.allclose(whole, torch.stack(parts).mean(0), atol=1e-5)
    assert Sketch(shape)(x.detach().bfloat16()).dtype == torch.float32
    # Flat and large alike: signs and order are not those of the data.
    smooth = torch.ones(1, *shape)
    assert float(Sketch(shape)(smooth).square().sum()) < 2 * smooth.numel()


# --- cosines --------------------------------------------------------------------------------------------


def test_cosines_with_the_running_mean_in_closed_form() -> None:
    e, f = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    assert cosines([e, 5 * e, 0.1 * e, -e]) == pytest.approx([1, 1, -1])
    assert cosines([e, -2 * e] * 20) == pytest.approx([-1] * 39)  # the mean has the last one's sign
    # After e and f the mean is a multiple of (k, 1).
    assert cosines([e, f, f]) == pytest.approx([0, 1 / math.hypot(KEEP, 1)])


def test_nothing_has_no_direction_and_what_is_not_finite_is_said() -> None:
    headings = Headings()
    assert headings.cosine("a", [0.0, 0.0]) is None and headings.held == {}
    assert headings.cosine("a", [1.0, 0.0]) is None and headings.cosine("a", [0.0, 0.0]) is None
    assert headings.cosine("a", [2.0, 0.0]) == 1
    for bad in (math.nan, math.inf):
        found = headings.cosine("a", [bad, 0.0])
        assert found is not None and math.isnan(found)
    assert headings.held == {"a": [pytest.approx(1 - KEEP**2), 0.0]}


def test_the_share_that_comes_back_in_noise() -> None:
    """g' = -r g + noise in many numbers, against the formula that the limit is taken from."""
    for r in (0.3, 0.8):
        g, made = normal(2000), []
        for step in range(400):
            g = -r * g + math.sqrt(1 - r * r) * normal(2000, seed=1 + step)
            made.append(g)
        wanted = -r * math.sqrt((1 - KEEP**2) / (1 - (KEEP * r) ** 2))
        assert sum(cosines(made)[50:]) / 349 == pytest.approx(wanted, abs=0.02)
    assert wanted == pytest.approx(BACK, abs=0.01)


def test_numbers_and_sketches_lie_side_by_side() -> None:
    headings = Headings()
    told = {"a": torch.tensor(3.0), TURN: torch.tensor([0.0, 2.0]), "b": torch.tensor(4.0)}
    flat = torch.tensor([3.0, 0.0, 2.0, 4.0])
    assert numbers(told, flat, headings) == {"a": 3, "b": 4}
    assert numbers(told, flat, headings) == {"a": 3, TURN: 1, "b": 4}


# --- the alarm ------------------------------------------------------------------------------------------


def alarmed(values: list[float]) -> int | None:
    """The step at which the alarm is raised."""
    health = Health()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        steps = [step for step, value in enumerate(values) if "alarm.turning" in health.look(step, {TURN: value})]
    assert len(steps) <= 1 and len(said) == len(steps) and all("Tangents turn back" in str(each.message) for each in said)
    return steps[0] if steps else None


def test_the_alarm_wants_seventy_steps_of_turning_back() -> None:
    first = math.ceil(math.log(1 + BACK) / math.log(SLOW))
    assert alarmed([-1.0] * 200) == first - 1 == 68
    assert alarmed([1.0] * 1000 + [-1.0] * 400) == 1000 + math.ceil(math.log(0.25) / math.log(SLOW)) - 1
    assert alarmed([-0.49] * 2000) is None


@pytest.mark.parametrize("size", [1, 2, 500])
def test_tangents_of_pure_chance_raise_none(size: int) -> None:
    for seed in range(3):
        assert alarmed(cosines(list(normal(1500, size, seed=seed)))) is None


def test_an_optimiser_that_goes_too_far_is_told_from_one_that_does_not() -> None:
    """Steepest descent on a parabola with noisy gradients, below and above 9/10 of the rate at which it diverges."""
    for rate, said in ((0.5, False), (1.5, False), (1.9, True)):
        w, made = normal(300), []
        for step in range(500):
            g = w + normal(300, seed=1 + step)
            made.append(w.clone())
            w = w - rate * g
        assert (alarmed(cosines(made)) is not None) is said, rate


# --- in a training --------------------------------------------------------------------------------------


class _Told(Pairs):
    """Tangents as they are told: `way` for each step."""

    kind = "test-told"

    def start(self, facts: Any) -> Any:
        state: Any = super().start(facts)
        sketch, loss = Sketch((WIDTH,)), state.loss

        def told(phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
            found: Loss = loss(phase, batch, draw, step, kept)
            assert batch.x0 is not None
            found.metrics[TURN] = sketch((-1.0) ** step * (batch.x0 * 0 + torch.arange(1.0, WIDTH + 1)))
            return found

        state.loss = told
        return state


def rows(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time"} for row in found]


def test_a_training_that_flips_says_so_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="mean cosine of each with those before it is -0.50"):
        trainer(_Told(), tmp_path / "whole", steps=80).fit()
    whole = rows(tmp_path / "whole")
    assert TURN not in whole[0] and all(row[TURN] == pytest.approx(-1) for row in whole[1:])
    assert [row["step"] for row in whole if "alarm.turning" in row] == [69]
    trainer(_Told(), tmp_path / "cut", steps=80).fit(stop_after=40)
    with pytest.warns(UserWarning, match="Tangents turn back"):
        trainer(_Told(), tmp_path / "cut", steps=80).fit(resume=True)
    assert rows(tmp_path / "cut") == whole


BEGIN: dict[str, Any] = {"scm": trainer, "meanflow": training, "sana-sprint": with_features}


@pytest.mark.parametrize("method", [SCM(), MeanFlow(instant=0.0), SanaSprint(adversary=LADD(blocks=("first", "last")))], ids=lambda m: m.kind)
def test_methods_with_tangents_log_their_direction(tmp_path: Path, method: Any) -> None:
    for parts in (1, 2):
        made: Any = BEGIN[method.kind](method, tmp_path / str(parts), accumulate=parts, lr=1e-4)
        made.fit()
        assert len(made.headings.held[TURN]) == NUMBERS
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert TURN not in one[0] and all(-1 <= row[TURN] <= 1 for row in one[1:])
    assert [row.get(TURN, 0) for row in two] == pytest.approx([row.get(TURN, 0) for row in one], abs=1e-2)


def test_the_direction_is_the_tangents_own(tmp_path: Path) -> None:
    """On a toy, whose five numbers a sketch keeps: the log's cosines are those of tangents taken by hand."""
    made = trainer(SCM(adaptive=False), tmp_path / "a", steps=5)
    seen: list[Tensor] = []
    keep: Any = made.state
    own = keep.sketch

    def watched(rows: Tensor) -> Tensor:
        seen.append(rows.detach().mean(0))
        found: Tensor = own(rows)
        return found

    keep.sketch = watched
    made.fit()
    assert [row[TURN] for row in rows(tmp_path / "a")[1:]] == pytest.approx(cosines(seen), abs=1e-5)
