"""What the host has to know of a round, brought over in one transfer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.rounds import Round
from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Verdict


@dataclass(frozen=True)
class Told:
    """Lists [B][N] of a proposal and its verdict. size: nodes, node 0 included."""

    nodes: list[list[int]]
    parent: list[list[int]]
    verified: list[list[int]]
    source: list[list[int]]
    path: list[list[int]]
    count: list[int]
    token: list[int]
    sources: tuple[str, ...]

    @classmethod
    def of(cls, proposal: Proposal, verdict: Verdict) -> Told:
        """Waits for the device."""
        rows, size = proposal.tokens.shape
        if size == 1:
            none = [[0]] * rows
            return cls(none, [[-1]] * rows, none, none, none, [0] * rows, verdict.token.tolist(), proposal.sources)
        source = torch.zeros_like(proposal.tokens) if proposal.source is None else proposal.source
        wide = torch.stack([proposal.tokens, proposal.parent, proposal.verified.long(), source, verdict.path])
        flat = torch.cat([wide.flatten(), verdict.count, verdict.token]).tolist()
        lists = [flat[begin : begin + size] for begin in range(0, 5 * rows * size, size)]
        nodes, parent, verified, source_, path = (lists[rows * each : rows * (each + 1)] for each in range(5))
        ends = flat[5 * rows * size :]
        return cls(nodes, parent, verified, source_, path, ends[:rows], ends[rows:], proposal.sources)

    def tokens(self, row: int) -> list[int]:
        """The new tokens of a row: its accepted drafts, and the verdict's own."""
        return [self.nodes[row][node] for node in self.path[row][1 : self.count[row] + 1]] + [self.token[row]]

    def by(self, row: int, length: int) -> tuple[str, ...]:
        """Who guessed each of the first `length` new tokens of a row: a drafter, "" for the model itself."""
        accepted = self.path[row][1 : min(self.count[row], length) + 1]
        names = tuple(self.sources[self.source[row][node]] for node in accepted)
        return names + ("",) * (length - len(names))

    def straight(self, lengths: list[int]) -> bool:
        """Are the nodes that each row keeps, `lengths` of them, 0, 1, 2, and so on?"""
        return all(node == place for path, length in zip(self.path, lengths, strict=True) for place, node in enumerate(path[:length]))

    def written(self, lengths: list[int], device: torch.device) -> Tensor:
        """These tokens as far as they were written, int64 [B, most], -1 behind them."""
        most = max(lengths)
        rows = [self.tokens(row)[:length] for row, length in enumerate(lengths)]
        return torch.tensor([row + [-1] * (most - len(row)) for row in rows], dtype=torch.long, device=device)

    def round(self, asked: int, active: list[bool], lengths: list[int], ahead: int, clock: list[float]) -> Round:
        """For the account. ahead: see `Round`. clock: when drafting, reading and committing began, and when they were over."""
        rows = [row for row, here in enumerate(active) if here]
        size = len(self.nodes[0])
        ranks, sources, depths = [0] * (size - 1), Counter[tuple[int, int]](), Counter[tuple[int, int]]()
        for row in rows:
            accepted = set(self.path[row][1 : lengths[row] + 1]) - {-1}
            depth = [0] * size
            for node in range(1, size):
                depth[node] = depth[self.parent[row][node]] + 1
                if self.verified[row][node]:
                    right = node in accepted
                    ranks[node - 1] += right
                    for counter, key in ((sources, self.source[row][node]), (depths, depth[node])):
                        counter[key, 0] += 1
                        counter[key, 1] += right
        return Round(
            asked=asked, nodes=size - 1,
            drafted=tuple(sum(self.verified[row]) for row in rows), written=tuple(lengths[row] for row in rows),
            ranks=tuple(ranks),
            sources=tuple((name, sources[at, 0], sources[at, 1]) for at, name in enumerate(self.sources) if sources[at, 0]),
            depths=tuple((depths[at, 0], depths[at, 1]) for at in range(1, 1 + max((key for key, _ in depths), default=0))),
            by=tuple(self.by(row, lengths[row]) for row in rows), ahead=ahead,
            draft=clock[1] - clock[0], verify=clock[2] - clock[1], commit=clock[3] - clock[2],
        )  # fmt: skip
