"""What is kept of a network's inside: by branch and site, under the key it was computed with, and as it was then."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.caching.histories import Histories, key_of
from hasten.forecast import Hold, Polynomial
from tests.contract import seeded


def found(held: Histories, x: Tensor, branch: int = 0, site: str = "a", t: float = 0.5) -> list[Tensor] | None:
    return held.estimate(branch, site, key_of(x), t)


def test_a_history_belongs_to_its_branch_and_its_site() -> None:
    held, x = Histories(Hold()), seeded(0, 2, 3)
    held.store(0, "a", key_of(x), 0.9, [x, 2 * x])
    again = found(held, x)
    assert again is not None and torch.equal(again[0], x) and torch.equal(again[1], 2 * x)
    assert found(held, x, branch=1) is None and found(held, x, site="b") is None


def test_another_key_begins_anew_also_where_the_values_look_alike() -> None:
    """A line through values of two sizes would be no forecast of either."""
    held, small, large, value = Histories(Polynomial(order=1)), seeded(0, 2, 3), seeded(0, 2, 4), seeded(1, 5)
    held.store(0, "a", key_of(small), 0.9, [value])
    held.store(0, "a", key_of(large), 0.8, [3 * value])
    assert found(held, small) is None
    after = found(held, large)
    assert after is not None and torch.equal(after[0], 3 * value), "one value is known, so it is held"


def test_another_number_of_values_begins_anew() -> None:
    held, x = Histories(Hold()), seeded(0, 2, 3)
    held.store(0, "a", key_of(x), 0.9, [x])
    held.store(0, "a", key_of(x), 0.8, [x, x])
    again = found(held, x)
    assert again is not None and len(again) == 2


def test_what_is_kept_is_a_copy() -> None:
    held, x = Histories(Hold()), seeded(0, 2, 3)
    held.store(0, "a", key_of(x), 0.9, [x])
    before = x.clone()
    x.fill_(7.0)
    again = found(held, before)
    assert again is not None and torch.equal(again[0], before)


def test_a_branch_that_gave_nan_is_forgotten_and_no_other() -> None:
    held, x = Histories(Hold()), seeded(0, 2, 3)
    for branch in (0, 1):
        held.store(branch, "a", key_of(x), 0.9, [x])
    held.check(0, [x, x / 0])
    held.check(1, [x])
    assert held.drop_poisoned() == [0]
    assert found(held, x) is None and found(held, x, branch=1) is not None
    assert held.drop_poisoned() == [], "it is asked once"


def test_bytes_are_counted_and_sites_can_be_dropped() -> None:
    held, x = Histories(Hold()), seeded(0, 2, 3)
    for site in ("a", "b"):
        held.store(0, site, key_of(x), 0.9, [x])
    assert held.num_bytes() == 2 * 6 * 4
    held.keep({"b"})
    assert held.num_bytes() == 6 * 4 and found(held, x) is None
    held.forget()
    assert held.num_bytes() == 0
