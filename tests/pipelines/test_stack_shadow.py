"""Where more than an addition happens between blocks, they are learned in a second pass without them, and nothing is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hasten.caching.rules import Every
from hasten.caching.stack import StackReuse
from hasten.recipe import Recipe
from tests.contract import seeded
from tests.pipelines.test_block_recipes import loop

pytestmark = pytest.mark.filterwarnings("ignore:hasten")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.ran = nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.ran += 1
        return x + torch.tanh(self.linear(x))


class Turns(nn.Module):
    """Blocks over rows and blocks over columns take turns; the stream is regrouped between them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = (nn.ModuleList(Block() for _ in range(4)) for _ in range(2))

    def forward(self, hidden_states: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        x = hidden_states
        for i, (row, column) in enumerate(zip(self.rows, self.columns, strict=True)):
            x = row(x).transpose(0, 1)
            x = x + 0.1 if i == 0 else x
            x = column(x).transpose(0, 1)
        return (x,)


class Beside(nn.Module):
    """Behind every block an adapter is given the stream, and what it returns is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.adapters = (nn.ModuleList(Block() for _ in range(3)) for _ in range(2))

    def forward(self, hidden_states: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        x = hidden_states
        for block, adapter in zip(self.blocks, self.adapters, strict=True):
            x = block(x)
            x = x + 0.3 * adapter(x)
        return (x,)


def reuse(lead: int) -> Recipe:
    return Recipe(reuse=StackReuse(lead=lead, rule=Every(interval=2)))


@pytest.mark.parametrize("lead", [0, 1, 2])
def test_lists_that_take_turns(lead: int) -> None:
    torch.manual_seed(0)
    model, call = Turns(), {"hidden_states": seeded(0, 3, 5, 8)}
    with torch.no_grad():
        plain = model(**call)[0]
    for block in [*model.rows, *model.columns]:
        block.ran = 0
    outputs, run = loop(model, reuse(lead), lambda _: call, steps=8)
    assert any("take turns, so computed steps run once more" in note for note in run.trace.notes)
    for out in outputs:
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    # 8 steps, the extra one that discovers the structure, and the leading blocks once more in the one that proves it.
    for blocks in (model.rows, model.columns):
        assert [block.ran for block in blocks] == [10] * lead + [5] * (4 - lead)


def test_an_adapter_beside_the_stream_is_no_list_of_the_chain() -> None:
    torch.manual_seed(0)
    model, call = Beside(), {"hidden_states": seeded(0, 3, 5, 8)}
    with torch.no_grad():
        plain = model(**call)[0]
    outputs, run = loop(model, reuse(1), lambda _: call, steps=8)
    assert any("adapters: its blocks take turns with those of blocks" in note for note in run.trace.notes)
    assert {event.site.rpartition(".")[2] for event in run.trace.events if event.action == "reuse"} == {"blocks"}
    for out in outputs:
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)


def test_a_skipped_step_adds_what_the_pass_without_blocks_lacks() -> None:
    """The formula, on an input that has moved: y(x') = s(x') + y(x) - s(x), s the network without its blocks."""
    torch.manual_seed(0)
    model, x, moved = Beside(), seeded(0, 3, 5, 8), seeded(1, 3, 5, 8)

    def without(x: Tensor) -> Tensor:
        for adapter in model.adapters[:-1]:
            x = x + 0.3 * adapter(x)
        return x

    with torch.no_grad():
        last, inner = model.adapters[-1], model.blocks

        def whole(x: Tensor) -> Tensor:
            for block, adapter in zip(inner[:-1], model.adapters[:-1], strict=True):
                x = block(x)
                x = x + 0.3 * adapter(x)
            return inner[-1](x)

        stood_in = without(moved) + whole(x) - without(x)
        expected = stood_in + 0.3 * last(stood_in)
    outputs, _ = loop(model, reuse(0), lambda i: {"hidden_states": moved if i == 1 else x}, steps=2)
    torch.testing.assert_close(outputs[1], expected, rtol=1e-5, atol=1e-5)
