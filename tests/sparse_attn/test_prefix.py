"""Shared prefixes give what each sample would get with a copy of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.text.decode import whole
from hasten.sparse_attn.text.exact import exact
from hasten.sparse_attn.text.prefix import Level, attend_levels


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alone(q: Tensor, k: Tensor, v: Tensor, reads: Tensor | None = None) -> Tensor:
    """Float64 attention of one batch whose keys are all its own."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    logits = q.double() @ k.mT * q.shape[-1] ** -0.5
    if reads is not None:
        logits = logits.masked_fill(~reads, float("-inf"))
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("width", [8, 5])
@pytest.mark.parametrize("n", [1, 3])
def test_a_tree_of_prefixes(n: int, width: int) -> None:
    """6 samples: one system prompt for all, one document for each three, a suffix of their own."""
    q = draw(6, 4, n, 8, seed=1)
    sizes = ((1, 13), (2, 9), (6, 5))
    keys = [draw(copies, 2, tokens, 8, seed=2 + tokens) for copies, tokens in sizes]
    values = [draw(copies, 2, tokens, width, seed=3 + tokens) for copies, tokens in sizes]
    causal = Mask(left=None, right=0, offset=5 - n)
    levels = [Level(k, v, mask=causal if k.shape[0] == 6 else None) for k, v in zip(keys, values, strict=True)]
    out = attend_levels(q, levels)
    k, v = (torch.cat([x.repeat_interleave(6 // x.shape[0], 0) for x in each], 2) for each in (keys, values))
    reads = torch.cat([torch.ones(n, 22, dtype=torch.bool), torch.ones(n, 5, dtype=torch.bool).tril(5 - n)], 1)
    torch.testing.assert_close(out.o.double(), alone(q, k, v, reads), rtol=1e-5, atol=1e-5)


def test_masks_of_shared_levels_go_by_the_number_of_the_new_query() -> None:
    q, k = draw(4, 4, 3, 8, seed=1), draw(2, 2, 9, 8, seed=2)
    mask = Mask(left=4, right=0, offset=6)
    out = attend_levels(q, [Level(k, k, mask=mask)])
    own = k.repeat_interleave(2, 0)
    reads = mask.allowed(torch.arange(3), torch.arange(9), 9)
    torch.testing.assert_close(out.o.double(), alone(q, own, own, reads), rtol=1e-5, atol=1e-5)


def test_ragged_suffixes() -> None:
    q, prefix = draw(3, 4, 1, 8, seed=1), draw(1, 2, 21, 8, seed=2)
    suffix, lengths = draw(3, 2, 10, 8, seed=3), torch.tensor([10, 0, 4])
    out = attend_levels(q, [Level(prefix, prefix), Level(suffix, suffix, whole(lengths, 2, 10, 4, 4))])
    for sample, length in enumerate(lengths.tolist()):
        one = slice(sample, sample + 1)
        k = torch.cat([prefix, suffix[one, :, :length]], 2)
        torch.testing.assert_close(out.o[one].double(), alone(q[one], k, k), rtol=1e-5, atol=1e-5)


def test_exact_says_the_lse_whichever_way_it_takes() -> None:
    q, k, v = draw(2, 4, 7, 8, seed=1), draw(2, 2, 19, 8, seed=2), draw(2, 2, 19, 8, seed=3)
    everything = Mask(left=None, right=None)
    one, other = exact(q, k, v, 0.3), exact(q, k, v, 0.3, everything)
    torch.testing.assert_close(one.o, other.o, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.lse, other.lse, rtol=1e-5, atol=1e-5)
    nothing = exact(q, k[:, :, :0], v[:, :, :0], 0.3)
    assert (nothing.o == 0).all() and (nothing.lse == float("-inf")).all()


def test_mistakes_say_what_fits() -> None:
    q, k = draw(3, 2, 1, 8), draw(2, 2, 5, 8)
    with pytest.raises(UsageError, match="2 copies cannot be shared by 3"):
        attend_levels(q, [Level(k, k)])
    with pytest.raises(UsageError, match="no levels"):
        attend_levels(q, [])
