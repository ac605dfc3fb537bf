"""A cache with a policy under the decode loop's own protocol."""

from __future__ import annotations

import torch

from hasten.caching.decode.amount import Tokens
from hasten.caching.decode.kept import KeptCache
from hasten.pipelines.decode_kv.tail import KeptTail
from hasten.samplers.decode.tree import Tree
from tests.pipelines.decode_kv.kv_contract import model, open_session, padded, steps, text


def test_the_loops_tail_commits_what_was_accepted() -> None:
    ids, mask = padded((40, 30))
    tokens = text(2, 4, seed=6)
    tree = Tree(tokens[:, 0])
    root = torch.zeros(2, 1, dtype=torch.int64)
    first = tree.add(root, tokens[:, 1:2])
    tree.add(root, tokens[:, 2:3])
    tree.add(first, tokens[:, 3:4])
    proposal = tree.proposal()
    with open_session(KeptCache(amount=Tokens(count=16), when="prompt")) as run:
        cache = run.cache()
        steps(run, cache, [ids], mask)
        tail = KeptTail(cache)
        assert tail.space() is None
        with torch.no_grad():
            drafted = run.host(input_ids=proposal.tokens, **tail.inputs(proposal)).logits
        path = torch.tensor([[0, 1, 3], [0, 2, 0]])
        tail.commit(path, torch.tensor([3, 2]), 44)
        assert cache.lengths == [43, 32] and tail.finish(False) is None and tail.finish(True) is cache
        after = steps(run, cache, [text(2, 1, seed=9)])
        for row, chosen in enumerate(([0, 1, 3], [0, 2])):
            alone = run.cache()
            steps(run, alone, [ids[row : row + 1, -(40, 30)[row] :]])
            chain = steps(run, alone, list(proposal.tokens[row : row + 1, chosen].split(1, 1)))
            torch.testing.assert_close(drafted[row : row + 1, chosen], chain, atol=1e-4, rtol=1e-4)
            last = steps(run, alone, [text(2, 1, seed=9)[row : row + 1]])
            torch.testing.assert_close(after[row : row + 1], last, atol=1e-4, rtol=1e-4)
    assert model() is not None
