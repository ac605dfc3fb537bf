"""Pages: Quest's bounds are bounds, and both ways read the page that matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten.sparse_attn.text.pages import Pages
from hasten.sparse_attn.text.reader import Everything


def keys(pages: int = 20, page: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, pages * page + 3, 8, generator=dice), torch.randn(2, 2, pages * page + 3, 8, generator=dice)


def test_no_key_is_above_its_pages_bound() -> None:
    k, _ = keys()
    state: Any = Pages(page=4, top=2).start()
    q = torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(1))
    state.work(q, k, None, 1.0)
    own = q.reshape(2, 2, 2, 8)
    bound = own.clamp(min=0) @ state.high.mT + own.clamp(max=0) @ state.low.mT
    products = (own @ k[:, :, :80].mT).view(2, 2, 2, 20, 4).amax(-1)
    assert bool((products <= bound + 1e-5).all())


@pytest.mark.parametrize("by", ["bounds", "means"])
def test_a_page_that_holds_all_the_mass_is_found(by: Any) -> None:
    k, v = keys()
    q = torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(1))
    k[:, :, 36:40] = 6 * q[:, ::2]
    q[:, 1::2] = q[:, ::2]
    part = Pages(page=4, top=1, by=by, sinks=1)
    state = part.start()
    out = state.attend(q, k, v, None, 1.0)
    want = Everything().start().attend(q, k, v, None, 1.0)
    torch.testing.assert_close(out.o, want.o, atol=1e-3, rtol=1e-3)
    assert int(state.read) == 4 * (4 + 4 + 3)  # type: ignore[arg-type]
    assert state.num_bytes() > 0


def test_summaries_grow_with_the_cache_and_are_made_anew_for_another() -> None:
    k, v = keys()
    state: Any = Pages(page=4, top=2).start()
    q = torch.randn(2, 4, 1, 8)
    for length in (41, 42, 50, 83):
        state.attend(q, k[:, :, :length], v[:, :, :length], None, 1.0)
    assert torch.equal(state.low, k[:, :, :80].unflatten(2, (20, 4)).amin(3))
    state.attend(q, -k, v, None, 1.0)
    assert torch.equal(state.low, -k[:, :, :80].unflatten(2, (20, 4)).amax(3))
