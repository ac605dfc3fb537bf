"""The best schedule as the shortest way through groups of steps, exactly, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.errors import UsageError


def cheapest_groups(cost: Sequence[Sequence[float]], num: int) -> list[int]:
    """First steps of the `num` groups that [0, N) is cut into at the least total cost; ascending, 0 first.

    cost[i][k]: of a group that computes step i and lets it stand for i + 1 ... k - 1, for i < k <= N (N rows of N + 1;
    the others are not read). CacheQuant (arXiv 2503.01323), dynamic programming schedule: the best n groups of the first
    k steps end with a group (i, k) after the best n - 1 groups of the first i, so N^2 num comparisons find what
    N choose num schedules hold. Ties go to the earlier step. Raises `UsageError` unless 1 <= num <= N.
    """
    total = len(cost)
    if not 1 <= num <= total:
        raise UsageError(f"A run of {total} steps has between 1 and {total} computed steps, got {num}. Ask for fewer.")
    best = [0.0] + [float("inf")] * total
    came: list[list[int]] = []
    for _ in range(num):
        after, origin = [float("inf")] * (total + 1), [0] * (total + 1)
        for k in range(1, total + 1):
            for i in range(k):
                value = best[i] + cost[i][k]
                if value < after[k]:
                    after[k], origin[k] = value, i
        best, came = after, [*came, origin]
    starts, end = [], total
    for origin in reversed(came):
        end = origin[end]
        starts.append(end)
    return starts[::-1]


def holding_cost(gram: Tensor, weights: Sequence[float]) -> list[list[float]]:
    """cost[i][k] = sum over i < j < k of w_j^2 |y_j - y_i|^2, from gram (N, N) float64 of inner products y_i . y_j.

    weights: how far the solver moves with the output of each step; an error counts by its square. Never falls with k.
    """
    squares = gram.diagonal()
    apart = (squares[None, :] - 2 * gram + squares[:, None]).clamp_min(0) * torch.tensor(weights, dtype=gram.dtype) ** 2
    total = len(weights)
    later = torch.ones(total, total, dtype=gram.dtype).triu(1)
    sums = torch.cat([torch.zeros(total, 1, dtype=gram.dtype), (apart * later).cumsum(1)], 1)
    rows: list[list[float]] = sums.tolist()
    return rows
