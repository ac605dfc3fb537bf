"""Activations that are made twice give the gradients of activations that are kept, whoever plays in the meantime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.distill.methods.heads import Judge, of_judge
from hasten.distill.methods.pairs import Pairs
from hasten.distill.network.host_call import Condition, HostCall, learn
from hasten.distill.network.roles import Adapter, Roles
from hasten.errors import ModelError
from hasten.pipelines import loading, tiny_models
from tests.distill import toys


def _cast(dtype: str | None = None, full: bool = False) -> tuple[Roles, HostCall, Condition]:
    """Student and critic on tiny-flux, neither of which is the teacher any more."""
    pipe = loading.open_pipeline("tiny-flux", device="cpu", dtype=dtype, quiet=True)
    host, conditions = learn(pipe, ["a seven", "a two"], **tiny_models.call_defaults(pipe))
    torch.manual_seed(0)
    names = ("student", "critic")
    roles = Roles.of_copies(host, names) if full else Roles.on_one_base(host, names, Adapter(4, 4.0, ("to_q", "to_v")))
    for name in names:
        for value in roles[name].parameters().values():
            value.data += 0.02 * torch.randn_like(value)
    return roles, host, conditions


def _gradients(roles: Roles, host: HostCall, conditions: Condition) -> dict[str, Tensor]:
    """Of a loss in which the critic sees what the student made, so that both are in one graph."""
    torch.manual_seed(1)
    x = torch.randn(2, *host.shape)
    tau = torch.tensor([0.4, 1.1], dtype=torch.float64)
    made = roles["student"].data(x, tau, conditions)
    loss = (roles["critic"].velocity(made, tau, conditions) - roles["teacher"].velocity(made, tau, conditions)).square().mean()
    with roles["teacher"].playing():  # somebody else plays when gradients are taken
        loss.backward()
    found = {}
    for name in ("student", "critic"):
        for key, value in roles[name].parameters().items():
            if value.grad is not None:
                found[f"{name}.{key}"] = value.grad.clone()
                value.grad = None
    return found


@pytest.mark.parametrize("full", [False, True])
def test_gradients_are_the_same(full: bool) -> None:
    roles, host, conditions = _cast(full=full)
    kept = _gradients(roles, host, conditions)
    block: Any = roles["student"].host.network.get_submodule("transformer_blocks.0")
    calls: list[int] = []
    hook = block.register_forward_pre_hook(lambda *_: calls.append(1))  # an evaluation may end early
    _gradients(roles, host, conditions)
    before = len(calls)
    roles.recompute()
    again = _gradients(roles, host, conditions)
    hook.remove()
    assert len(calls) - before > before, "no block was evaluated twice"
    assert again.keys() == kept.keys() and all(float(value.abs().sum()) > 0 for value in kept.values())
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-8, msg=name)


def test_a_judge_sees_and_pulls_the_same() -> None:
    """Heads listen by hooks that are gone when blocks are evaluated again."""
    roles, host, conditions = _cast()
    judge = Judge(roles["critic"])
    torch.manual_seed(2)
    for head in judge.heads:
        torch.nn.init.normal_(head.last.weight)  # type: ignore[union-attr, arg-type]
    x, z = torch.randn(2, 2, *host.shape)
    tau = torch.tensor([0.4, 1.1], dtype=torch.float64)

    def looked() -> dict[str, Tensor]:
        rows, pull = judge.pull(x, tau, z, conditions, "softplus")
        real, fake = (judge.asked(seen, tau, conditions) for seen in (x, z))
        with roles["teacher"].playing():
            of_judge(real, fake, "hinge").mean().backward()
        found = {"rows": rows, "pull": pull}
        for name, value in (*roles["critic"].parameters().items(), *judge.heads.named_parameters()):
            if value.grad is not None:
                found[name], value.grad = value.grad.clone(), None
        return found

    kept = looked()
    roles.recompute()
    again = looked()
    assert again.keys() == kept.keys() and len(kept) > 2 + len(list(judge.heads.parameters()))
    for name, value in kept.items():
        assert float(value.abs().sum()) > 0, name
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-7, msg=name)


def test_diffusers_own_way_would_not_do() -> None:
    """What the role is re-entered for: without it, blocks are evaluated again as somebody else."""
    roles, host, conditions = _cast()
    kept = _gradients(roles, host, conditions)
    network: Any = host.network
    network.enable_gradient_checkpointing()
    try:
        again = _gradients(roles, host, conditions)
    except torch.utils.checkpoint.CheckpointError:
        return
    assert any(not torch.allclose(again[name], value, rtol=1e-3) for name, value in kept.items() if name in again)


def test_networks_without_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Toy has no gradient checkpointing. Leave train.checkpointing out"):
        toys.trainer(Pairs(), tmp_path / "a", checkpointing=True)


def test_adapters_are_float32_on_a_base_in_bfloat16() -> None:
    roles, host, conditions = _cast("bfloat16")
    assert host.dtype == torch.bfloat16
    for name in ("student", "critic"):
        assert {value.dtype for value in roles[name].parameters().values()} == {torch.float32}
    assert {value.dtype for name, value in host.network.named_parameters() if "lora" not in name} == {torch.bfloat16}
    found = _gradients(roles, host, conditions)
    assert found and all(value.dtype == torch.float32 and bool(value.isfinite().all()) for value in found.values())
