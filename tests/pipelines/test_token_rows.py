"""Tokens run apart only where that is proved to be right; what leaves nothing out is refused with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.caching.rules import Every
from hasten.caching.spans import Chosen
from hasten.caching.stack import StackReuse
from hasten.caching.tokens import MovedTokens
from hasten.pipelines.session import Session
from hasten.recipe import Recipe
from tests.contract import seeded
from tests.hosts import FLUX_CALL, WAN_CALL, small_flux, small_wan
from tests.pipelines.test_block_recipes import loop

pytestmark = pytest.mark.filterwarnings("ignore:hasten")


def tokens(share: float = 0.5, **changes: Any) -> Recipe:
    fields = {"lead": 0, "rule": Every(interval=2), "tokens": MovedTokens(early=share, late=share)}
    return Recipe(reuse=StackReuse(**{**fields, **changes}))


def partial(run: Session) -> list[float]:
    return [event.share for event in run.trace.events if event.action == "compute" and event.share < 1.0]


class Mixer(nn.Module):
    """Blocks over [batch, tokens, channels] that see each token alone, or with its neighbour."""

    def __init__(self, neighbour: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(neighbour) for _ in range(4))

    def forward(self, hidden_states: Tensor, table: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        for block in self.blocks:
            hidden_states = block(hidden_states, table)
        return (hidden_states,)


class Block(nn.Module):
    def __init__(self, neighbour: bool) -> None:
        super().__init__()
        self.linear, self.neighbour = nn.Linear(8, 8), neighbour

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        y = x.roll(1, dims=1) if self.neighbour else x
        return x + torch.tanh(self.linear(y)) * table[:, None]


def mixer(neighbour: bool) -> tuple[Mixer, dict[str, Any]]:
    torch.manual_seed(0)
    return Mixer(neighbour), {"hidden_states": seeded(0, 2, 10, 8), "table": seeded(1, 10)}


def test_tokens_that_see_no_other_are_exact_for_the_chosen_and_held_for_the_rest() -> None:
    model, call = mixer(neighbour=False)
    moved = {**call, "hidden_states": call["hidden_states"].clone()}
    moved["hidden_states"][:, [2, 5]] += 1.0
    # Computed: 0, 3, 6. Between 0 and 3 tokens 2 and 5 have moved, so that they run at 4 and 5.
    half = {**call, "hidden_states": (call["hidden_states"] + moved["hidden_states"]) / 2}
    inputs = [call, call, call, half, moved, moved]
    outputs, run = loop(model, tokens(0.2, rule=Every(interval=3)), lambda i: inputs[i], steps=6)
    assert partial(run) and set(partial(run)) == {0.2}
    with torch.no_grad():
        right = model(**moved)[0]
    torch.testing.assert_close(outputs[4], right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs[5], right, rtol=1e-5, atol=1e-6)


def test_a_part_of_the_tokens_is_lossless_on_identical_input() -> None:
    """What the chosen tokens lack of the others is known from the computed step."""
    model, call = small_wan().transformer, {
        "hidden_states": seeded(0, 1, 16, 2, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": seeded(1, 1, 5, 32),
    }
    with torch.no_grad():
        plain = model(**call, return_dict=False)[0]
    outputs, run = loop(model, tokens(0.4), lambda _: call)
    assert partial(run)
    for out in outputs:
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)


def test_tokens_that_see_their_neighbours_are_not_run_apart() -> None:
    """The proof finds what no look at the arguments could."""
    model, call = mixer(neighbour=True)
    _, run = loop(model, tokens(), lambda _: call)
    assert any("another order of its tokens changes the output" in note for note in run.trace.notes)
    assert not partial(run) and any(event.action == "reuse" for event in run.trace.events)


def test_wan_runs_the_share_that_was_asked_for() -> None:
    pipe = small_wan()
    with hasten.accelerate(pipe, tokens(0.25)) as run:
        for _ in range(2):
            pipe("a", **WAN_CALL, output_type="latent")
    assert set(partial(run)) == {0.25} and not any("cannot be run apart" in note for note in run.trace.notes)
    # 6 steps, every second with a quarter of its tokens, which run once more among themselves at the full steps.
    assert run.report().of(1).computed_fraction == pytest.approx((3 * 1.25 + 3 * 0.25) / 6)


def test_more_than_one_stream_is_refused_and_said() -> None:
    pipe = small_flux()
    with hasten.accelerate(pipe, tokens()) as run:
        pipe("a", **FLUX_CALL, output_type="latent")
    assert any("more than one stream" in note for note in run.trace.notes)
    assert any(event.action == "reuse" for event in run.trace.events) and not partial(run)


def test_compiled_blocks_are_refused_and_said() -> None:
    torch._dynamo.reset()
    pipe = small_wan()
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    with hasten.accelerate(pipe, tokens()) as run:
        pipe("a", **WAN_CALL, output_type="latent")
    assert any("its blocks are compiled" in note for note in run.trace.notes) and not partial(run)


def test_all_tokens_make_a_computed_step() -> None:
    model, call = mixer(neighbour=False)
    changing = [{**call, "hidden_states": seeded(i, 2, 10, 8)} for i in range(8)]
    outputs, _ = loop(model, tokens(1.0), lambda i: changing[i])
    for out, one in zip(outputs, changing, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(out, model(**one)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("reuse", "reason"),
    [
        (StackReuse(lead=2, rule=Every(interval=2)), "all of the first list are leading"),
        (StackReuse(lead=1, back=4, rule=Every(interval=2)), "leaves none of them out"),
        (StackReuse(lead=0, span=Chosen(blocks=(7, 9)), rule=Every(interval=2)), "leaves none of them out"),
    ],
)
def test_what_leaves_nothing_out_falls_back_with_its_reason(reuse: StackReuse, reason: str) -> None:
    pipe = small_flux()
    with hasten.accelerate(pipe, Recipe(reuse=reuse)) as run:
        pipe("a", **FLUX_CALL, output_type="latent")
    assert any(reason in note and "2 + 3 blocks" in note for note in run.trace.notes), run.trace.notes
    assert any(event.action == "reuse" and event.blocks is None for event in run.trace.events)


def test_back_blocks_run_at_every_step_and_reach_over_lists() -> None:
    pipe, ran = small_flux(), []
    for i, block in enumerate([*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    call = {**FLUX_CALL, "output_type": "latent", "num_inference_steps": 6}
    with hasten.accelerate(pipe, Recipe(reuse=StackReuse(lead=1, back=2, rule=Every(interval=2)))):
        pipe("a", **call)
        ran.clear()
        pipe("a", **call)
    assert [ran.count(i) for i in range(5)] == [6, 3, 3, 6, 6]


def test_a_span_that_moves_leaves_out_the_rear_then_the_front() -> None:
    pipe, ran = small_wan(), []
    for i, block in enumerate(pipe.transformer.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    call = {**WAN_CALL, "output_type": "latent", "num_inference_steps": 8, "guidance_scale": 1.0}
    with hasten.accelerate(pipe, hasten.recipe("delta-dit").replace({"reuse.span.share": 0.5})) as run:
        pipe("a", **call)
        ran.clear()
        pipe("a", **call)
    assert [ran.count(i) for i in range(4)] == [6, 6, 6, 6]
    left = {(e.step, e.blocks) for e in run.trace.events if e.action == "reuse"}
    assert left == {(1, (2, 4)), (3, (2, 4)), (5, (0, 2)), (7, (0, 2))}


def test_an_addition_that_is_none_is_learned_in_a_second_pass() -> None:
    """Where the network does more between two blocks than add, what it does is run again without the blocks."""

    class Seam(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(False) for _ in range(6))

        def forward(self, hidden_states: Tensor, table: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            for i, block in enumerate(self.blocks):
                hidden_states = block(hidden_states, table)
                if i == 4:
                    hidden_states = 1.5 * hidden_states * torch.sigmoid(hidden_states)
            return (hidden_states,)

    torch.manual_seed(0)
    model, call = Seam(), {"hidden_states": seeded(0, 2, 10, 8), "table": seeded(1, 10)}
    for chosen, simple in (((1, 2), True), ((1, 4, 5), False), ((4,), True)):
        reuse = StackReuse(lead=0, span=Chosen(blocks=chosen), rule=Every(interval=2))
        outputs, run = loop(model, Recipe(reuse=reuse), lambda _: call)
        assert any("run once more" in note for note in run.trace.notes) is not simple, (chosen, run.trace.notes)
        assert not any("refused" in note for note in run.trace.notes)
        assert {event.blocks for event in run.trace.events if event.action == "reuse"}
        for out in outputs:
            torch.testing.assert_close(out, outputs[0], rtol=1e-4, atol=1e-5)
