"""Sparse attention for one role: the student reads a part of the keys, teacher and critic read all, on the same weights.

Sparse distillation: the student learns to make up for what it does not read (FastVideo's sparse-distill, whose attention is
VSA, arXiv 2505.13389; there every role is a network of its own). The sites are those of `pipelines/attention`, so that the
student is later sampled by the same recipe axis; here they are sparse in every evaluation, with gradients. What is read is
chosen anew in each and is a constant of the loss.

Shapes: B rows, Hq, Hk heads, Sq, Sk tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.distill.network.host_call import Condition, HostCall
from hasten.errors import RefusedError
from hasten.pipelines.attention.masks import readable_keys, understand, with_padding
from hasten.pipelines.attention.seam import latents_of, unfit
from hasten.pipelines.attention.sites import Site, Sites, Walk
from hasten.pipelines.attention.tokens import CROSS, TEXT_ONLY, Key, Learned, learn
from hasten.pipelines.host import Call
from hasten.pipelines.seams.writes import twin
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.segments import Tokens
from hasten.step import Step

if TYPE_CHECKING:
    from hasten.distill.network.roles import Roles

STEP = Step(0, 1, 0.0)
"""Policies are told of a step; those that are trained do not look at it."""


class RoleAttention:
    """The attention of one network, sparse while `sparse` is open and the network's own otherwise, bit for bit.

    condition: one row, for one evaluation in which is found out which tokens are text. Stays on until `detach`.
    Raises `RefusedError` where the policy cannot be trained, or no attention of the network can be sparse.
    """

    def __init__(self, host: HostCall, policy: SparseAttention, condition: Condition) -> None:
        self.policy = policy.in_every_step()
        self.sites = Sites(host.network)
        try:
            self.learned = self._learned(host, condition)
        except BaseException:
            self.sites.detach()
            raise

    def sparse(self) -> AbstractContextManager[None]:
        """While open, attention of this thread is sparse."""
        return self.sites.walking(_Training(self.policy, self.learned))

    def dense(self) -> AbstractContextManager[None]:
        """While open, it is the network's own, also within `sparse`."""
        return self.sites.walking(None)

    def present(self) -> Callable[[], AbstractContextManager[None]]:
        """How to be as it is now, later or in another thread."""
        return self.dense if self.sites.walks.now is None else self.sparse

    def detach(self) -> None:
        """Put the network back as it was."""
        self.sites.detach()

    @torch.no_grad()
    def _learned(self, host: HostCall, condition: Condition) -> dict[Key, Learned]:
        """The calls that will be sparse."""
        kind = type(host.network).__name__
        one = torch.promote_types(host.dtype, torch.float32)
        device = next(host.network.parameters()).device
        x, time = torch.zeros(1, *host.shape, dtype=one, device=device), torch.zeros(1, device=device)
        call = Call(host.layout, (), host.arguments(x, time, condition.rows(torch.zeros(1, dtype=torch.int64)).to(device)))

        def evaluate(marked: Call, walk: Walk) -> None:
            with self.sites.walking(walk, everywhere=True):
                host.network(*marked.args, **marked.kwargs)

        found, _ = learn(twin(call), evaluate, *latents_of(host.network))
        least = self.policy.min_tokens or 0
        chosen = {key: each for key, each in found.items() if each.q is not None and each.shapes[0][2] >= least}
        if not chosen:
            why = {each.reason for each in found.values()} - {"", TEXT_ONLY, CROSS} or {f"none has {least} tokens"}
            raise RefusedError(f"No attention of {kind} can be sparse: {'; '.join(sorted(why))}. Leave student.attention out.")
        if any(visit for _, visit in chosen):
            raise RefusedError(f"{kind} calls one attention module twice in an evaluation; a sparse student is not known there.")
        return chosen


@dataclass(slots=True)
class _Training:
    """A walk of which every call is sparse and can be differentiated. paddings: what masks hide, once for each of them."""

    policy: SparseAttention
    learned: dict[Key, Learned]
    paddings: dict[int, tuple[Tensor, Tokens]] = field(default_factory=dict)

    def wants(self, site: Site) -> bool:
        """Those that can be sparse."""
        return (site.number, 0) in self.learned

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, named: dict[str, Any]) -> Tensor:
        """o [B, Hq, Sq, Dv]. Raises `RefusedError` for calls unlike the one that was looked at: nothing is dense unseen."""
        about = self.learned[site.number, 0]
        assert about.q is not None and about.k is not None
        if about.layer < self.policy.dense_layers:
            return site.dense(q, k, v, **named)
        reason = unfit(about, q, k, named) or ("it is causal" if named.get("is_causal") else "")
        if reason:
            raise RefusedError(f"{site.name} cannot be sparse: {reason}. Leave student.attention out.")
        keys = self._keys(site, about.k, (q.shape, k.shape), named.get("attn_mask"))
        queries = keys if about.q == about.k else about.q
        scale = named.get("scale")
        attend = partial(self.policy.start(about.layer).differentiable, q, k, v, STEP, queries, keys)
        return attend(q.shape[-1] ** -0.5 if scale is None else scale).to(q.dtype)

    def _keys(self, site: Site, tokens: Tokens, shapes: tuple[torch.Size, torch.Size], mask: Tensor | None) -> Tokens:
        """With what a mask hides. It is read in every evaluation: other prompts have other padding."""
        if mask is None:
            return tokens
        if id(mask) not in self.paddings:
            padding = understand(mask, shapes, tokens)
            if padding.reason:
                raise RefusedError(f"{site.name} cannot be sparse: {padding.reason}. Leave student.attention out.")
            # The mask is kept with it, so that its id is nobody else's.
            kept = with_padding(tokens, padding, readable_keys(mask, shapes)) if padding.segments else tokens
            self.paddings[id(mask)] = mask, kept
        return self.paddings[id(mask)][1]


def read_less(roles: Roles, names: Iterable[str], policy: SparseAttention, condition: Condition) -> None:
    """`names` read what `policy` says from now on; everybody else on their networks reads all. Raises as `RoleAttention`."""
    chosen, found = set(names), dict[int, RoleAttention]()
    for name in chosen:
        host = roles.of(name).host
        if id(host.network) not in found:
            found[id(host.network)] = RoleAttention(host, policy, condition)
    for role in roles.values():
        role.attention = found.get(id(role.host.network))
        role.sparse = role.name in chosen
