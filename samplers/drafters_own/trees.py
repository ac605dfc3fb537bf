"""Trees of guesses about several places at once: the most probable paths, or the same ranks every time.

Shapes: B rows, m paths, K guesses for a place, N nodes. Nodes are points: right for tokens chosen in any way.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Context, Outcome

Guess = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""(depth from 1, tokens before int64 [B, m]) -> most probable tokens int64 [B, m, K] and their chances [B, m, K]."""

Ranks = tuple[int, ...]
"""A path by ranks: (1, 0) is the best guess behind the second best."""


def ranked(context: Context, guess: Guess, depth: int, nodes: int, source: str) -> Proposal:
    """The `nodes` paths of greatest chance, down to `depth` (EAGLE-2's re-ranked tree, arXiv 2406.16858). A path's chance is the
    product of its tokens'; so a parent is never less likely than its children."""
    root = context.last[:, None]
    tokens, parent, score, depths = [root], [torch.full_like(root, -1)], [torch.ones_like(root, dtype=torch.float32)], [0]
    front, at, chance, size = root, torch.zeros_like(root), score[0], 1
    for step in range(1, min(depth, context.reach, nodes) + 1):
        found, likely = guess(step, front)
        wide = (chance[..., None] * likely.float().clamp(max=1)).flatten(1)
        best, place = wide.topk(min(nodes, wide.shape[1]), 1)
        front, chance = found.flatten(1).gather(1, place), best
        tokens.append(front)
        parent.append(at.gather(1, place // found.shape[-1]))
        score.append(chance)
        depths += [step] * place.shape[1]
        at = torch.arange(size, size + place.shape[1], device=root.device).expand_as(place)
        size += place.shape[1]
    level = torch.tensor(depths, device=root.device).expand(len(root), -1)
    return _best(context, [torch.cat(each, 1) for each in (tokens, parent, score)], level, nodes, source)


def along(context: Context, guess: Guess, paths: Sequence[Ranks], nodes: int, source: str) -> Proposal:
    """The first `nodes` of `paths`, each behind the path without its last rank: one shape for all rounds and rows, as in
    Medusa (arXiv 2401.10774). `paths`: parents first; see `grown`."""
    paths = [path for path in paths if len(path) <= context.reach][:nodes]
    number = {(): 0} | {path: at for at, path in enumerate(paths, 1)}
    tokens, score = [context.last], [torch.ones_like(context.last, dtype=torch.float32)]
    made: dict[Ranks, tuple[Tensor, Tensor]] = {}
    for path in paths:
        above = path[:-1]
        if above not in made:
            found, likely = guess(len(path), tokens[number[above]][:, None])
            made[above] = found[:, 0], likely[:, 0].float()
        rank = min(path[-1], made[above][0].shape[1] - 1)
        tokens.append(made[above][0][:, rank])
        score.append(score[number[above]] * made[above][1][:, rank])
    parent = torch.tensor([-1] + [number[path[:-1]] for path in paths], device=context.last.device)
    level = torch.tensor([0] + [len(path) for path in paths], device=context.last.device)
    rows = len(context.last)
    return Proposal(
        torch.stack(tokens, 1), parent.expand(rows, -1), usable(context, level.expand(rows, -1)), torch.stack(score, 1), sources=(source,)
    )


def grown(accuracy: Sequence[Sequence[float]], nodes: int) -> tuple[Ranks, ...]:
    """The static tree of most accepted tokens: accuracy[d][r] is how often the guess of rank r at depth d + 1 is right if the
    path before it is (Medusa, section 2.3.3). Paths in the order in which they are worth having."""
    heap: list[tuple[float, Ranks]] = [(-chance, (rank,)) for rank, chance in enumerate(accuracy[0])]
    heapq.heapify(heap)
    found: list[Ranks] = []
    while heap and len(found) < nodes:
        worth, path = heapq.heappop(heap)
        found.append(path)
        if len(path) < len(accuracy):
            for rank, chance in enumerate(accuracy[len(path)]):
                heapq.heappush(heap, (worth * chance, (*path, rank)))
    return tuple(found)


def usable(context: Context, level: Tensor) -> Tensor:
    """bool [B, N]: nodes at depth `level` int64 [B, N] that their row has room for; of finished rows node 0 alone."""
    room = [max(0, room - 1) if active else 0 for room, active in zip(context.room, context.active, strict=True)]
    return level <= torch.tensor([min(each, 1 << 30) for each in room], device=level.device)[:, None]


def last_node(outcome: Outcome) -> Tensor:
    """int64 [B]: the last accepted node of every row."""
    return outcome.verdict.path.gather(1, outcome.verdict.count[:, None])[:, 0].clamp(min=0)


def at_node(each: Tensor, node: Tensor) -> Tensor:
    """Of `each` [B, N, X], what belongs to `node` int64 [B]: [B, X]."""
    return each[torch.arange(len(node), device=node.device), node]


def _best(context: Context, columns: list[Tensor], level: Tensor, nodes: int, source: str) -> Proposal:
    """The nodes of greatest chance. columns: tokens, parent, score [B, M], node 0 first."""
    tokens, parent, score = columns
    # A stable order keeps parents before children of the same chance.
    order = torch.sort(score[:, 1:], dim=1, descending=True, stable=True).indices[:, :nodes] + 1
    order = torch.cat([torch.zeros_like(order[:, :1]), order], 1)
    place = torch.zeros_like(parent).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    above = parent.gather(1, order)
    moved = torch.where(above < 0, above, place.gather(1, above.clamp(min=0)))
    valid = usable(context, level.gather(1, order)) & (score.gather(1, order) > 0)
    valid[:, 0] = True
    return Proposal(tokens.gather(1, order), moved, valid, score.gather(1, order), sources=(source,))
