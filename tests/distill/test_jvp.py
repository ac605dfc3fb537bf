"""Tangents: exact through attention, adapters and hooks of real networks; refused where they would be noise."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.nn import functional

from hasten.distill.network.hint import Hint, Hinted
from hasten.distill.network.host_call import Condition, HostCall, learn
from hasten.distill.network.jvp import difference, jvp_safe_attention, tangent
from hasten.distill.network.paths import Flow
from hasten.distill.network.roles import Adapter, Role, Roles
from hasten.errors import ModelError, UsageError
from hasten.pipelines.host import Layout
from tests import hosts

MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "keys": {"attn_mask": torch.arange(23).reshape(1, 1, 1, 23) % 3 > 0},
    "added": {"attn_mask": torch.linspace(-1, 1, 19 * 23, dtype=torch.float64).reshape(19, 23), "scale": 0.3},
}


def qkv(seed: int, heads: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(2, 4, 19, 8), (2, heads, 23, 8), (2, heads, 23, 5)]
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def central(f: Callable[[float], Tensor], h: float) -> Tensor:
    """f'(0) to fourth order."""
    with torch.no_grad():
        return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


@pytest.mark.parametrize("length", [100, 5], ids=["written out", "in chunks"])
@pytest.mark.parametrize("kind", MASKS)
def test_attention_has_its_exact_tangent(kind: str, length: int) -> None:
    given, moved = qkv(0), qkv(1)

    def attend(*qkv: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(*qkv, **MASKS[kind])

    with torch.no_grad(), jvp_safe_attention(length, chunk=8):
        value, change = torch.func.jvp(attend, tuple(given), tuple(moved))
        _, of_query = torch.func.jvp(lambda q: attend(q, *given[1:]), (given[0],), (moved[0],))
    torch.testing.assert_close(value, attend(*given), rtol=0, atol=1e-14)
    slope = central(lambda h: attend(*(a + h * b for a, b in zip(given, moved, strict=True))), 1e-3)
    torch.testing.assert_close(change, slope, rtol=0, atol=1e-9)
    slope = central(lambda h: attend(given[0] + h * moved[0], *given[1:]), 1e-3)
    torch.testing.assert_close(of_query, slope, rtol=0, atol=1e-9)


@pytest.mark.parametrize("length", [100, 5], ids=["written out", "in chunks"])
@pytest.mark.parametrize("rows", [19, 1])
def test_a_mask_may_move(rows: int, length: int) -> None:
    given, mask = qkv(0), torch.linspace(-1, 1, rows * 23, dtype=torch.float64).reshape(rows, 23)

    def attend(mask: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(*given, attn_mask=mask)

    with torch.no_grad(), jvp_safe_attention(length, chunk=8):
        _, change = torch.func.jvp(attend, (mask,), (mask.square(),))
    slope = central(lambda h: attend(mask + h * mask.square()), 1e-3)
    torch.testing.assert_close(change, slope, rtol=0, atol=1e-9)


def test_shared_keys_are_those_of_their_group() -> None:
    (q, k, v), (tq, tk, tv) = qkv(0, heads=2), qkv(1, heads=2)
    full = [t.repeat_interleave(2, 1) for t in (k, v, tk, tv)]

    def grouped(*qkv: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(*qkv, enable_gqa=True)

    with torch.no_grad(), jvp_safe_attention():
        one = torch.func.jvp(grouped, (q, k, v), (tq, tk, tv))
        two = torch.func.jvp(functional.scaled_dot_product_attention, (q, *full[:2]), (tq, *full[2:]))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_go_through_a_tangent_where_it_is_written_out_and_are_refused_in_chunks() -> None:
    given, moved = qkv(0), qkv(1)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def change() -> Tensor:
        def attend(q: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(weight * q, *given[1:])

        return torch.func.jvp(attend, (given[0],), (moved[0],))[1].square().sum()

    with jvp_safe_attention():
        (slope,) = torch.autograd.grad(change(), weight)
    h = 1e-5
    with torch.no_grad(), jvp_safe_attention():
        weight += h
        up = change()
        weight -= 2 * h
        torch.testing.assert_close((up - change()) / (2 * h), slope, rtol=1e-7, atol=0)
    with jvp_safe_attention(length=5), pytest.raises(ModelError, match=r"no backward pass.*`length`"):
        torch.autograd.grad(change(), weight)


def test_no_switch_is_left_and_other_threads_keep_theirs() -> None:
    seen: list[str] = []

    def elsewhere() -> None:
        try:
            one = torch.ones(1, 1, 2, 4)
            torch.func.jvp(lambda q: functional.scaled_dot_product_attention(q, q, q), (one,), (one,))
        except (NotImplementedError, RuntimeError):
            seen.append("fused")

    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    with jvp_safe_attention():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    elsewhere()
    assert seen == ["fused", "fused"], "if torch has learned the tangent of its fused attention, use that"
    assert before == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())


def test_a_long_sequence_holds_one_chunk_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    import hasten.distill.network.jvp as module

    largest, plain = 0, module._softmax

    def watched(*args: Any) -> Tensor:
        nonlocal largest
        found = plain(*args)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setattr(module, "_softmax", watched)
    x = torch.randn(1, 1, 300, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), jvp_safe_attention(length=100, chunk=16):
        torch.func.jvp(lambda q: functional.scaled_dot_product_attention(q, q, q), (x,), (x,))
    assert largest == 16 * 300


def test_dropout_has_no_tangent() -> None:
    q, k, v = qkv(0)
    with jvp_safe_attention(), pytest.raises(ModelError, match=r"dropout 0.1 has no tangent.*eval mode"):
        functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


# --- networks ----------------------------------------------------------------------------------------


def _sd3() -> tuple[HostCall, Condition]:
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4, pos_embed_max_size=8,
        qk_norm="rms_norm",
    ).eval()  # fmt: skip
    host = HostCall(network, "transformer", Layout.of(network), {}, Flow(), (4, 6, 6), torch.float32, 1.0, None)
    shapes = {"encoder_hidden_states": (2, 5, 24), "pooled_projections": (2, 12)}
    return host, Condition({name: torch.randn(shape) for name, shape in shapes.items()})


def _of(make: Callable[[], Any], call: dict[str, Any]) -> tuple[HostCall, Condition]:
    return learn(make(), ["a seven", "a two"], **call)


NETWORKS: dict[str, Callable[[], tuple[HostCall, Condition]]] = {
    "flux": lambda: _of(lambda: hosts.small_flux(layers=1, single_layers=1), hosts.FLUX_CALL),
    "wan": lambda: _of(lambda: hosts.small_wan(layers=1), hosts.WAN_CALL),
    "pixart": lambda: _of(lambda: hosts.small_pixart(layers=1), hosts.PIXART_CALL),
    "unet": lambda: _of(hosts.small_unet, hosts.UNET_CALL),
    "sd3": _sd3,
}


def student(name: str, dtype: torch.dtype = torch.float64) -> tuple[Role, Condition, Hint]:
    """A role with a rank-2 adapter that changes its network, and a hint that does, too."""
    host, condition = NETWORKS[name]()
    host = dataclasses.replace(host, network=host.network.to(dtype), dtype=dtype)
    made = Roles.on_one_base(host, ["student"], Adapter(rank=2))["student"]
    hint, g = Hint(host.network), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in [*made.parameters().values(), hint.module.last.weight]:
            weight += 0.05 * torch.randn(weight.shape, generator=g, dtype=weight.dtype)
    return made, Condition({k: v.to(dtype) if v.is_floating_point() else v for k, v in condition.tensors.items()}), hint


@pytest.mark.parametrize("name", NETWORKS)
def test_the_tangent_of_a_network_is_its_slope(name: str) -> None:
    role, condition, hint = student(name)
    told = Hinted(role, hint, 1.3)
    x, dx = torch.randn(2, 2, *role.host.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tau, dtau = torch.tensor([0.4, 1.1], dtype=torch.float64), torch.tensor([0.5, -1.0], dtype=torch.float64)
    still = torch.zeros_like(x), torch.zeros_like(tau)

    def at(h: float, dx: Tensor, dtau: Tensor) -> Tensor:
        return told.velocity(x + h * dx, tau + h * dtau, condition)

    # Features of the time turn once in six of its 1000 units, and diffusers rounds them to float32 (3e-5 units): what a
    # difference along the time can show.
    for directions, h, within in (((dx, still[1]), 1e-3, 1e-4), ((still[0], dtau), 2e-5, 1e-2)):
        _, change = tangent(told, x, tau, condition, *directions)
        slope = central(lambda h, along=directions: at(h, *along), h)  # type: ignore[misc]
        assert float((change - slope).norm() / slope.norm()) < within

    value, change = tangent(told, x, tau, condition, dx, dtau)
    assert not change.requires_grad and not value.requires_grad
    torch.testing.assert_close(value, at(0.0, *still).detach(), rtol=0, atol=1e-12)
    parts = [tangent(told, x, tau, condition, *way)[1] for way in ((dx, still[1]), (still[0], dtau))]
    torch.testing.assert_close(sum(parts), change, rtol=1e-4, atol=1e-4)
    without = Role("teacher", role.host, role.stage, (), False)
    _, other = tangent(without, x, tau, condition, dx, dtau)
    assert float((other - change).norm() / change.norm()) > 1e-2, "adapter and hint are part of the tangent"


def test_a_difference_in_half_precision_is_refused() -> None:
    def f(x: Tensor, tau: Tensor) -> Tensor:
        return x.square()

    x, tau = torch.ones(2, 3), torch.tensor([0.3, 1.2])
    with pytest.raises(UsageError, match=r"in torch.bfloat16 is rounding.*exact"):
        difference(f, x.bfloat16(), tau, x.bfloat16(), tau, 1e-3)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UsageError, match=r"bfloat16.*precision = 'no'"):
        difference(f, x, tau, x, tau, 1e-3)
    with pytest.raises(UsageError, match="answers in torch.float16"):
        difference(lambda x, tau: x.half(), x, tau, x, tau, 1e-3)


def test_a_difference_stays_between_noise_and_data() -> None:
    seen: list[Tensor] = []

    def f(x: Tensor, tau: Tensor) -> Tensor:
        seen.append(tau)
        return x * tau.sin()[:, None]

    end, step = 1.5, 0.01
    ends = torch.tensor([0.0, end, 0.0, end, 0.6, 0.004, end - 0.004], dtype=torch.float64)
    dtau = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.5, -0.5, 2.0], dtype=torch.float64)
    x = torch.ones(7, 2, dtype=torch.float64)
    _, change = difference(f, x, ends, x, dtau, step, end)
    told = torch.stack(seen)
    assert float(told.min()) >= 0 and float(told.max()) <= end
    assert torch.equal(told[1:, 4], ends[4] + step * dtau[4] * torch.tensor([-1.0, 1.0]).double()), "both sides if there is room"
    torch.testing.assert_close(change[:, 0], ends.sin() + dtau * ends.cos(), rtol=0, atol=1e-3)


class _Closed(torch.autograd.Function):
    """An operation without a forward derivative, as somebody's fused kernel."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None: ...


def test_a_network_that_cannot_be_differentiated_is_named_with_the_way_out() -> None:
    class Net:
        def playing(self) -> AbstractContextManager[None]:
            return nullcontext()

        def velocity(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
            out: Tensor = _Closed.apply(x)
            return out

    x, tau = torch.ones(2, 3), torch.tensor([0.3, 1.2]).double()
    with pytest.raises(ModelError, match="without a forward derivative.*tangent = 0.001"):
        tangent(Net(), x, tau, Condition({}), x, tau)
    _, change = tangent(Net(), x, tau, Condition({}), x, tau, 0.01)
    torch.testing.assert_close(change, 2 * x, rtol=1e-3, atol=1e-3)
