"""What every method of pictures does in the loop. A new method is tested by its line in `METHODS`; one without is missed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Method
from hasten.distill.methods import load_all
from hasten.distill.methods.dmd import DMD, DMDGAN
from hasten.distill.methods.flow import Lora
from hasten.distill.methods.guidance import Guidance
from hasten.distill.methods.ladd import LADD, SanaSprint
from hasten.distill.methods.lcm import LCM, LCMLoRA
from hasten.distill.methods.meanflow import MeanFlow
from hasten.distill.methods.pairs import Pairs
from hasten.distill.methods.progressive import Progressive
from hasten.distill.methods.scm import SCM
from hasten.distill.network.paths import VariancePreserving
from hasten.errors import UsageError
from hasten.part import Part
from tests.distill.test_trainer import same, weights
from tests.distill.timed import TABLE, losses, trainer

BLOCKS = ("first", "last")
METHODS: dict[str, Method] = {
    "lora": Lora(shift=2.0),
    "pairs": Pairs(),
    "pairs-own": Pairs(calls=3, own=True, huber=0.1),
    "pairs-way": Pairs(calls=3, way=True),
    "pairs-way-own": Pairs(calls=3, way=True, own=True),
    "lcm": LCM(scale=(1, 3)),
    "lcm-lora": LCMLoRA(scale=(1, 3), grid=10),
    "scm": SCM(scale=2, warmup=2, top=0.2),
    "scm-told": SCM(scale=(1, 3), told=True, adaptive=False, tangent=0.05),
    "meanflow": MeanFlow(scale=2, instant=0.3, whole=0.3),
    "guidance": Guidance(scale=2),
    "guidance-told": Guidance(scale=(1, 3), told=True),
    "progressive": Progressive(first=4),
    "dmd": DMD(scale=2),
    "dmd-4": DMD(calls=4, ratio=2, last=2),
    "dmd-ode": DMD(calls=3, how="ode", told=False, scale=1),
    "dmd-gan": DMDGAN(calls=2, ratio=2, blocks=BLOCKS, weight=0.1, judged=0.5),
    "ladd": LADD(blocks=BLOCKS, calls=3),
    "ladd-softplus": LADD(blocks=BLOCKS, rule="softplus", top=0.0),
    "sana-sprint": SanaSprint(scale=(1, 3), told=True, warmup=2, calls=2, adversary=LADD(blocks=BLOCKS)),
}
ELSEWHERE = {
    "causal": "test_chunks", "self-forcing": "test_chunks", "magic141": "test_chunks", "dydit": "test_dydit", "dcgen": "test_dcgen",
    "qalora": "test_qalora", "quest": "test_quest",
}  # fmt: skip
"""Methods that a toy cannot train, and whose file has these tests on networks of their own."""

each = pytest.mark.parametrize("name", METHODS)
either = pytest.mark.parametrize("full", [False, True], ids=["adapters", "copies"])


def test_no_method_is_missed() -> None:
    load_all()
    pictures = {kind for kind, member in Method.members().items() if member.data != "tokens" and "hasten.distill" in member.__module__}
    assert pictures == {method.kind for method in METHODS.values()} | ELSEWHERE.keys()
    assert all((Path(__file__).parent / f"{file}.py").is_file() for file in ELSEWHERE.values())


def test_no_number_of_a_method_hides_what_all_methods_have() -> None:
    """Where a field and a property share a name, the field is silently the property's value."""
    load_all()
    common = set(vars(Method)) | set(vars(Part))
    hidden = {kind: set(member.model_fields) & common for kind, member in Method.members().items()}
    assert not any(hidden.values()), hidden


@either
@each
def test_a_resumed_training_is_the_same_and_every_weight_has_moved(tmp_path: Path, name: str, full: bool) -> None:
    method = METHODS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a weight that nothing moves is one
        assert trainer(method, tmp_path / "whole", full).fit() == 6
    trainer(method, tmp_path / "cut", full).fit(stop_after=3)
    assert trainer(method, tmp_path / "cut", full).fit(resume=True) == 6
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@each
def test_a_batch_may_be_cut_into_parts(tmp_path: Path, name: str) -> None:
    trainer(METHODS[name], tmp_path / "one", lr=1e-3, steps=2).fit()
    trainer(METHODS[name], tmp_path / "four", lr=1e-3, steps=2, accumulate=4).fit()
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    for key, value in one.items():
        if "/weights/" in key:
            torch.testing.assert_close(four[key], value, rtol=1e-3, atol=1e-4, msg=key)


@each
def test_a_rows_loss_does_not_depend_on_its_neighbours(tmp_path: Path, name: str) -> None:
    """A row's loss is its own: in another order, in a smaller batch."""
    made = trainer(METHODS[name], tmp_path)
    made.fit(stop_after=2)
    whole, part = losses(made, list(range(6))), losses(made, [4, 1])
    for one, two in zip(whole, part, strict=True):
        torch.testing.assert_close(one.rows[[4, 1]], two.rows, rtol=1e-4, atol=1e-5)
        assert one.rows.shape == (6,) and one.rows.dtype == torch.float32 and bool((one.rows[1:] != one.rows[0]).all())


@each
def test_a_phase_trains_its_role_alone_and_all_of_it(tmp_path: Path, name: str) -> None:
    """Every weight of a trained role is reached within three steps, by the losses of its own phases."""
    made = trainer(METHODS[name], tmp_path)
    trained = {role: player for role, player in made.players.items() if player.optimizer is not None}
    reached: dict[str, set[str]] = {role: set() for role in trained}
    for step in range(3):
        draw, kept = Draw(0, step, range(8)), dict[str, Any]()
        for phase in made.state.phases(step):
            loss = made.state.loss(phase, made.data.batch(torch.arange(8), draw), draw, step, kept)
            kept |= loss.keep
            loss.rows.mean().backward()
            for role, player in made.players.items():
                moved = {n for n, p in player.parameters.items() if p.grad is not None and bool(p.grad.any())}
                assert role == phase or not moved, f"{phase} pulls {role}"
                if role == phase:
                    reached[role] |= moved
            optimizer = trained[phase].optimizer
            assert optimizer is not None
            optimizer.step()
            optimizer.zero_grad()
    assert reached == {role: set(player.parameters) for role, player in trained.items()}


@each
@pytest.mark.parametrize("output", ["epsilon", "v_prediction", "sample"])
def test_variance_preserving_networks_are_trained_too(tmp_path: Path, name: str, output: Any) -> None:
    method = METHODS[name]
    made = trainer(method, tmp_path, path=VariancePreserving(TABLE, output), steps=2)
    made.fit()
    steps, path = made.state.sampler(), made.roles["student"].host.path
    assert isinstance(path, VariancePreserving) and (steps is None or steps.angles[0] <= path.end)


@either
@each
def test_half_precision_loses_no_gradient(tmp_path: Path, name: str, full: bool) -> None:
    """Evaluations in bf16, some of them without gradient before those with; weights stay float32."""
    made = trainer(METHODS[name], tmp_path, full, precision="bf16", lr=1e-3)
    if getattr(METHODS[name], "tangent", "exact") != "exact":
        with pytest.raises(UsageError, match="rounding, not a tangent"):
            made.fit()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made.fit()
    assert all(p.dtype == torch.float32 for player in made.players.values() for p in player.parameters.values())
