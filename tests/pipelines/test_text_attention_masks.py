"""Masks of transformers as rules in a few numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.pipelines.causal.mask import Rule, read
from hasten.pipelines.causal.site import pairs_of
from hasten.sparse_attn.mask import Mask


@pytest.mark.parametrize("left", [None, 0, 3, 30])
@pytest.mark.parametrize("offset", [0, 2, 7])
def test_pairs_of_a_mask_are_counted(left: int | None, offset: int) -> None:
    mask = Mask(left=left, right=0, offset=offset)
    allowed = mask.allowed(torch.arange(11), torch.arange(11 + offset), 11 + offset)
    assert pairs_of(mask, 11) == int(allowed.sum())


def causal_mask(n: int, s: int, offset: int, window: int | None = None) -> Tensor:
    i, j = torch.arange(n)[:, None] + offset, torch.arange(s)[None]
    found = j <= i
    return (found if window is None else found & (j > i - window))[None, None]


def test_rules_of_masks() -> None:
    assert read(None, 2, 1, 9, None) == Rule(8, 9) and read(None, 2, 5, 9, None) == Rule(0, 5)
    assert read(causal_mask(5, 9, 0), 1, 5, 9, None) == Rule(0, 5), "a static cache has room"
    assert read(causal_mask(5, 9, 2), 1, 5, 9, None) == Rule(2, 7)
    assert read(causal_mask(9, 9, 0, 4), 1, 9, 9, 4) == Rule(0, 9, window=4)
    assert read(causal_mask(9, 9, 0), 1, 9, 9, 4) == Rule(0, 9), "the mask says whether the window holds"
    left = causal_mask(9, 9, 0).repeat(2, 1, 1, 1)
    left[1, :, :, :3] = False
    assert read(left, 2, 9, 9, None) == Rule(0, 9, (0, 3), (9, 9))
    right = causal_mask(9, 9, 0).repeat(2, 1, 1, 1)
    right[0, :, :, 6:] = False
    assert read(right, 2, 9, 9, None) == Rule(0, 9, (0, 0), (6, 9))
    assert read(causal_mask(9, 9, 0, 4), 3, 9, 9, 4) == Rule(0, 9, window=4), "one mask for all samples"


def test_rules_of_drafts() -> None:
    mask = causal_mask(3, 9, 5).repeat(2, 1, 1, 1)
    mask[:, 0, 2, 6] = False  # places 5 to 7 are the draft's; the last reads the first, not the second
    rule = read(mask, 2, 3, 9, None)
    assert rule is not None and rule.tree is not None and rule.tree.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert (rule.offset, rule.end, rule.first) == (5, 8, None)
    mask[1, 0, 2, 6] = True
    assert read(mask, 2, 3, 9, None) is None, "another tree in each sample"
    mask[1, 0, 2, 6] = mask[:, 0, 1, 3] = False
    assert read(mask, 2, 3, 9, None) is None, "something of the past is left out"


@pytest.mark.parametrize("place", [(3, 7), (8, 0), (5, 5)])
def test_one_element_makes_it_another_mask(place: tuple[int, int]) -> None:
    mask = causal_mask(9, 9, 0)
    mask[0, 0, place[0], place[1]] ^= True
    assert read(mask, 1, 9, 9, None) is None
    assert read(mask.float(), 1, 9, 9, None) is None and read(mask, 1, 9, 8, None) is None
