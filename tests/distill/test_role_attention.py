"""A student that reads less than its teacher, on the same weights: the teacher notices nothing, gradients are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.distill.network.host_call import Condition, HostCall, learn
from hasten.distill.network.role_attention import read_less
from hasten.distill.network.roles import Adapter, Roles
from hasten.errors import ModelError, RefusedError
from hasten.pipelines import loading, tiny_models
from hasten.pipelines.attention.sites import Site, Sites
from hasten.pipelines.recipes import recipe
from hasten.sparse_attn.autograd import planned_attention
from hasten.sparse_attn.layouts.layout import Identity
from hasten.sparse_attn.pattern import Pattern
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.scorers.mass import CachedMass
from hasten.sparse_attn.scorers.pooled import Pooled
from hasten.sparse_attn.selectors.top import TopK
from hasten.sparse_attn.stand_ins.compensate import Compensate

NAMES = ("student", "critic")


def reading(share: float, **more: Any) -> SparseAttention:
    """`share` of the key blocks, eight tokens each, those whose means agree best."""
    pattern = Pattern(layout=Identity(block=8), score=Pooled(), select=TopK(share=share))
    return SparseAttention(patterns=(pattern,), block_m=16, block_n=16, **more)


def cast(model: str, full: bool = False) -> tuple[Roles, HostCall, Condition]:
    """Student and critic, neither of which is the teacher any more."""
    pipe = loading.open_pipeline(model, device="cpu", quiet=True)
    host, conditions = learn(pipe, ["a seven", "a two"], **tiny_models.call_defaults(pipe))
    torch.manual_seed(0)
    roles = Roles.of_copies(host, NAMES) if full else Roles.on_one_base(host, NAMES, Adapter(4, 4.0, ("to_q", "to_v")))
    for name in NAMES:
        for value in roles[name].parameters().values():
            value.data += 0.02 * torch.randn_like(value)
    return roles, host, conditions


def said(roles: Roles, host: HostCall, conditions: Condition, name: str) -> Tensor:
    x = torch.randn(2, *host.shape, generator=torch.Generator().manual_seed(1))
    return roles[name].velocity(x, torch.tensor([0.4, 1.1], dtype=torch.float64), conditions)


def gradients(roles: Roles, host: HostCall, conditions: Condition) -> dict[str, Tensor]:
    """Of the student's weights, where the critic sees what it made."""
    made = said(roles, host, conditions, "student")
    tau = torch.full((2,), 0.7, dtype=torch.float64)
    loss = (roles["critic"].velocity(made, tau, conditions) - 1).square().mean()
    with roles["teacher"].playing():  # somebody else plays when gradients are taken
        loss.backward()
    found = {}
    for key, value in roles["student"].parameters().items():
        if value.grad is not None:
            found[key], value.grad = value.grad.clone(), None
    return found


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("model", ["tiny-flux", "tiny-image"])
def test_only_the_student_reads_less(model: str, full: bool) -> None:
    roles, host, conditions = cast(model, full)
    with torch.no_grad():
        before = {name: said(roles, host, conditions, name) for name in roles}
        read_less(roles, ["student"], reading(0.25), conditions)
        after = {name: said(roles, host, conditions, name) for name in roles}
        assert torch.equal(after["teacher"], before["teacher"]) and torch.equal(after["critic"], before["critic"])
        assert not torch.allclose(after["student"], before["student"], atol=1e-3)
        with roles["student"].playing():  # and within its turn everybody is still who they are
            assert torch.equal(said(roles, host, conditions, "critic"), before["critic"])
        roles["student"].attention.detach()  # type: ignore[union-attr]
        assert torch.equal(said(roles, host, conditions, "student"), before["student"])


def test_reading_everything_is_dense_attention() -> None:
    roles, host, conditions = cast("tiny-flux")
    dense = gradients(roles, host, conditions)
    with torch.no_grad():
        wanted = said(roles, host, conditions, "student")
    read_less(roles, ["student"], reading(1.0), conditions)
    with torch.no_grad():
        torch.testing.assert_close(said(roles, host, conditions, "student"), wanted, rtol=1e-4, atol=1e-5)
    found = gradients(roles, host, conditions)
    assert found.keys() == dense.keys()
    for name, value in dense.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6, msg=name)


class Masked:
    """A walk that does the same with a mask over all pairs: the slow twin."""

    def __init__(self, keep: dict[int, Tensor]) -> None:
        self.keep = keep

    def wants(self, site: Site) -> bool:
        return site.number in self.keep

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, named: dict[str, Any]) -> Tensor:
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~self.keep[site.number], float("-inf"))
        return scores.softmax(-1) @ v


def test_gradients_are_those_of_masked_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    roles, host, conditions = cast("tiny-image")
    read_less(roles, ["student"], reading(0.25), conditions)
    attention = roles["student"].attention
    assert attention is not None
    keep: dict[int, Tensor] = {}
    seen = _plans(monkeypatch)
    found = gradients(roles, host, conditions)
    sites = attention.sites
    for (number, _), plan in zip(sorted(attention.learned), seen.values(), strict=False):  # what was read, as a mask
        v = torch.eye(plan.keys).expand(plan.heads[0], plan.heads[2], -1, -1)
        q = torch.zeros(plan.heads[0], plan.heads[1], plan.queries, 4)
        keep[number] = planned_attention(q, torch.zeros(*q.shape[:2], plan.keys, 4), v, plan)[0] > 0
    density = float(torch.stack([mask.float().mean() for mask in keep.values()]).mean())
    assert len(keep) == 6 and 0.2 < density < 0.3, density
    monkeypatch.setattr(attention, "sparse", lambda: sites.walking(Masked(keep)))
    masked = gradients(roles, host, conditions)
    assert masked.keys() == found.keys()
    for name, value in masked.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6, msg=name)


def _plans(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """The plans of all calls, in their order."""
    from hasten.sparse_attn import policy

    found: dict[int, Any] = {}
    real = policy.planned_attention

    def noted(q: Tensor, k: Tensor, v: Tensor, plan: Any, *args: Any, **named: Any) -> Any:
        found[len(found)] = plan
        return real(q, k, v, plan, *args, **named)

    monkeypatch.setattr(policy, "planned_attention", noted)
    return found


def test_what_stands_in_for_the_rest_has_gradients() -> None:
    """Against differences, on the policy alone in float64."""
    from hasten.distill.network.role_attention import STEP
    from hasten.sparse_attn.segments import Tokens, text, video

    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 2, 29, 6, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
    tokens = Tokens((video(1, 4, 6), text(5)))
    policy = reading(0.4, compensate=Compensate(order=1)).in_every_step()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return policy.start().differentiable(q, k, v, STEP, tokens, tokens, 6**-0.5)

    assert not torch.allclose(attend(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-3)
    # The means are kept in float32, so that a difference sees steps of that size.
    assert torch.autograd.gradcheck(attend, (q, k, v), eps=1e-3, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("full", [False, True])
def test_activations_may_be_made_again(full: bool) -> None:
    roles, host, conditions = cast("tiny-flux", full)
    read_less(roles, ["student"], reading(0.25), conditions)
    kept = gradients(roles, host, conditions)
    roles.recompute()
    again = gradients(roles, host, conditions)
    assert again.keys() == kept.keys() and kept
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (recipe("re-ttention").attention, "learns from dense steps"),
        (SparseAttention(patterns=(Pattern(score=CachedMass(), select=TopK(share=0.2)),)), "learns from dense steps"),
        (recipe("linear-branch").attention, "No gradient passes through compensation by"),
        (reading(0.3, min_tokens=100), "none has 100 tokens"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_nothing(policy: Any, words: str) -> None:
    roles, host, conditions = cast("tiny-image")
    with pytest.raises(RefusedError, match=words):
        read_less(roles, ["student"], policy, conditions)
    assert roles["student"].attention is None
    Sites(host.network).detach()  # which would be refused, were there sites on it already


def test_tangents_are_refused_in_words_and_differences_work() -> None:
    from hasten.distill.network.jvp import tangent

    roles, host, conditions = cast("tiny-image")
    read_less(roles, ["student"], reading(0.25), conditions)
    x, tau = torch.randn(2, *host.shape), torch.tensor([0.4, 1.1], dtype=torch.float64)
    with pytest.raises(ModelError, match=r"Use tangent =\s*0.001"):
        tangent(roles["student"], x, tau, conditions, torch.ones_like(x), torch.ones_like(tau))
    _, change = tangent(roles["student"], x, tau, conditions, torch.ones_like(x), torch.ones_like(tau), 1e-3)
    assert bool(change.isfinite().all())
