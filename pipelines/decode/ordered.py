"""Verification where nobody knows what a logits processor remembers: it is called once for every written token, in order,
exactly as `generate` calls it. For one row and a chain of drafts; later drafts are asked about only when the earlier ones
stand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.pipelines.decode.laws import Processors
from hasten.samplers.decode.draws import sample
from hasten.samplers.decode.proposal import Proposal, chain
from hasten.samplers.decode.protocols import Verdict


def first_path(proposal: Proposal) -> Proposal:
    """The first child of the first child and so on, as points: tokens that are compared may be chosen in any way."""
    tokens, parent, usable = (each[0].tolist() for each in (proposal.tokens, proposal.parent, proposal.verified))
    at, line = 0, list[int]()
    for node in range(1, len(tokens)):
        if usable[node] and parent[node] == at:
            at = node
            line.append(tokens[node])
    drafts = torch.tensor([line], dtype=torch.long, device=proposal.tokens.device)
    name = proposal.sources[int(proposal.source[0, at])] if proposal.source is not None else proposal.sources[0]
    return chain(proposal.tokens[:, 0], drafts, torch.ones_like(drafts, dtype=torch.bool), name)


def in_order(
    proposal: Proposal, logits: Tensor, processors: Processors, ids: Tensor, most: int, ends: frozenset[int]
) -> tuple[Verdict, Tensor]:
    """Sample and match (or compare) along a chain, and the processed scores [1, count + 1, V]. logits [1, N, V]; ids int64
    [L]: the row so far; most: tokens that it may still write, ends: ids that end it, so that nothing behind is asked for."""
    drafts = proposal.tokens[0, 1:].tolist()
    scores, written = list[Tensor](), list[int]()
    for step in range(min(len(drafts) + 1, most)):
        prefix = torch.cat([ids, ids.new_tensor(written)])[None]
        scores.append(processors.first(prefix, logits[:, step]))
        drawn = sample(scores[-1].softmax(-1), 1, "iid")[:, 0] if processors.sampled else scores[-1].argmax(-1)
        written.append(int(drawn))
        if step == len(drafts) or written[-1] != drafts[step] or written[-1] in ends:
            break
    count = len(written) - 1
    index = torch.arange(proposal.size, device=ids.device)[None]
    verdict = Verdict(torch.where(index <= count, index, -1), index.new_tensor([count]), index.new_tensor(written[-1:]))
    return verdict, torch.stack(scores, 1)
