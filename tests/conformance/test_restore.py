"""Closing a session leaves a network as it was: the same bits, the same attributes, the same state_dict."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.recipe import Recipe
from tests.conformance.loop import ALTERNATE, ALTERNATE_BLOCKS, Loop, accelerated, assert_same, built, plain


def attributes(model: nn.Module) -> dict[str, int]:
    """Everything that is set on the network and its modules, by name, as identities."""
    return {
        f"{path}.{name}": id(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
    }


@pytest.mark.parametrize("recipe", [ALTERNATE, ALTERNATE_BLOCKS], ids=["network", "blocks"])
def test_exact_restore(name: str, recipe: Recipe) -> None:
    model, loop = built(name)[1], Loop(steps=3)
    expected = plain(name, loop)  # first, because networks keep notes (position tables) of their own
    first = attributes(model)
    plain(name, loop)
    own = {
        key for key, number in attributes(model).items() if number != first.get(key)
    }  # made anew in each run
    before, weights = attributes(model), {key: value.clone() for key, value in model.state_dict().items()}
    assert accelerated(name, recipe, loop).stood_in
    assert attributes(model).keys() == before.keys()
    assert [
        key for key, number in attributes(model).items() if number != before[key] and key not in own
    ] == []
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert_same(plain(name, loop), expected, tolerance=0)
