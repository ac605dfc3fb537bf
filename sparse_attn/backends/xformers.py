"""xformers as a backend: block-diagonal plans through its varlen attention.

Every group of queries that reads one range of keys becomes a "sequence" of xformers' BlockDiagonalGappyKeysMask, with
the planes laid end to end. It is taken when asked for by name. Written for xformers 0.0.30 to 0.0.35, whose operators for such a mask
are those of FlashAttention 2 and 3 (`SUPPORTED_...` of `xformers.ops.fmha.flash` says what they take).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hasten.errors import RefusedError
from hasten.sparse_attn.backends.jobs import Jobs, jobs_of
from hasten.sparse_attn.plan import Compensation, Output, Plan

if TYPE_CHECKING:
    from hasten.sparse_attn.backends.choice import Call

MULTIPLE, WIDEST, AMPERE = 8, 256, (8, 0)
"""Of head dimensions, and the oldest GPU, of the operators that take gaps between keys."""


def refuses(call: Call) -> str | None:
    """Why xformers cannot run a call; None where it can. Waits for the device, to look at the plan."""
    from hasten.sparse_attn.backends.choice import HALF, installed

    if not installed("xformers"):
        return "xformers is not installed (pip install xformers)."
    if call.device.type != "cuda":
        return f"the tensors are on {call.device}, xformers' kernels run on CUDA devices."
    if call.dtype not in HALF:
        return f"the tensors are {call.dtype}, xformers' varlen kernels take float16 and bfloat16."
    if call.compensated:
        return "it has no place for what stands in for blocks that are not read."
    wide, wide_v = call.head_dims
    if wide != wide_v or wide % MULTIPLE or wide > WIDEST:
        return f"head dimensions are {wide} and {wide_v}; its kernels take equal ones, multiples of {MULTIPLE} up to {WIDEST}."
    if torch.cuda.is_available() and torch.cuda.get_device_capability(call.device) < AMPERE:
        return "its kernels need a GPU of compute capability 8.0 or newer."
    return not_diagonal(call.plan)


def not_diagonal(plan: Plan) -> str | None:
    """Why a plan is not block-diagonal: each group of queries has one range of keys, which no other group reads."""
    if plan.mask is not None:
        return "the plan has a mask within its blocks; xformers runs those without."
    jobs = jobs_of(plan)
    if not jobs.rows.whole[jobs.row].all():
        return "a row of the plan reads several ranges of keys; xformers runs those that read one."
    start, order = _ranges(jobs)
    tokens = jobs.rows.tokens[jobs.row[order]]
    if (start[1:] < start[:-1] + tokens[:-1]).any():
        return "rows of the plan read overlapping ranges of keys; xformers runs block-diagonal plans."
    return None


def execute(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, compensation: Compensation | None = None
) -> Output:
    """As `executor.execute`, for plans that `refuses` let pass."""
    fmha = importlib.import_module("xformers.ops.fmha")
    jobs = jobs_of(plan)
    o = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = torch.full(q.shape[:3], float("-inf"), device=q.device)
    if not jobs.row.size:  # nobody reads anything, and a mask of no sequences is an error
        return Output(o, lse)
    starts, order = _ranges(jobs)
    places = np.concatenate([jobs.places[jobs.first[j] : jobs.first[j] + jobs.count[j]] for j in order])
    at = torch.as_tensor(places, device=q.device)
    bias = fmha.attn_bias.BlockDiagonalGappyKeysMask.from_seqlens(
        q_seqlen=jobs.count[order].tolist(),
        kv_seqstarts=[*starts.tolist(), k.shape[0] * k.shape[1] * plan.keys],
        kv_seqlen=jobs.rows.tokens[jobs.row[order]].tolist(),
        device=q.device,
    )
    found, found_lse = fmha.memory_efficient_attention_forward_requires_grad(
        q.reshape(-1, q.shape[-1])[at][None, :, None], *(x.reshape(1, -1, 1, x.shape[-1]) for x in (k, v)),
        attn_bias=bias, scale=scale,
    )  # fmt: skip
    if found_lse.shape[:2] != (1, 1):
        raise RefusedError(
            f"xformers gave an LSE of shape {list(found_lse.shape)}, padded for each sequence, as it does on old versions of"
            ' PyTorch. Update both, or take backend="auto".'
        )
    o.view(-1, v.shape[-1]).index_copy_(0, at, found[0, :, 0])
    lse.view(-1).index_copy_(0, at, found_lse[0, 0, : len(places)].float())
    return Output(o, lse)


def _ranges(jobs: Jobs) -> tuple[np.ndarray, np.ndarray]:
    """First key of each job among those of all planes, ascending, and the jobs in that order."""
    starts = jobs.key_plane * jobs.plan.keys + jobs.rows.low[jobs.row]
    order = np.argsort(starts, kind="stable")
    return starts[order], order
