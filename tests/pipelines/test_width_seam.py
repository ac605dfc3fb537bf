"""Running at part of the width on real models: cut as masking would, exact in full, or refused with the reason."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.caching.rules import Every
from hasten.caching.width import Shares, StraightWidth, Width, WidthReuse
from hasten.pipelines.seams.module_gate import find_sites
from hasten.pipelines.seams.width_gate import WidthGates
from hasten.pipelines.seams.width_twin import Narrowing, narrowing_of
from hasten.pipelines.work import watch
from hasten.recipe import Recipe
from hasten.step import Step
from tests.contract import seeded
from tests.hosts import PIXART_CALL, WAN_CALL, small_pixart, small_wan
from tests.pipelines.seam_contract import Case, Inputs, SeamContract, loop, plainly, state_of
from tests.pipelines.test_module_seam import flux, pixart, unet, wan

pytestmark = pytest.mark.filterwarnings("ignore:hasten")

HALF = StraightWidth(early=0.5, late=0.5)


def recipe(**changes: Any) -> Recipe:
    return Recipe(reuse=WidthReuse(**{"width": HALF, **changes}))


HELD = recipe(rule=Every(interval=3))
CASES = {
    "wan": Case(wan, HELD, "blocks.1.ffn", other={"hidden_states": seeded(5, 1, 16, 2, 8, 4)}),
    "pixart": Case(pixart, HELD, "transformer_blocks.1.attn1", other={"hidden_states": seeded(5, 2, 4, 8, 16)}),
    "flux": Case(
        flux, HELD, "transformer_blocks.1.ff",
        other={"hidden_states": seeded(5, 1, 25, 4), "img_ids": seeded(6, 25, 3), "controlnet_block_samples": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
class TestHeldRest(SeamContract):
    """With a rule the rest of each module is held between full steps; then this is a cache like any other."""

    @pytest.fixture
    def case(self, name: str) -> Case:
        return CASES[name]

    def test_lossless_on_identical_input(self, case: Case) -> None:
        model, call = case.build()
        expected = plainly(model, call)
        outputs, run = loop(model, case.recipe, lambda _: [call])
        assert not any("refused" in note for note in run.trace.notes), run.trace.notes
        assert run.report().bytes_held > 0
        shares = [event.share for event in run.trace.events]
        assert min(shares) < 0.95 and max(shares) == 1.0, "a full step in two parts costs as much as the whole"
        for (out,) in outputs:
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("num", [2, 3])
    def test_branches_are_isolated(self, case: Case, num: int) -> None:
        model, call = case.build()
        calls = [case.branch(call, number) for number in range(num)]
        expected = [plainly(model, one) for one in calls]
        outputs, _ = loop(model, case.recipe, lambda _: calls)
        for step in outputs:
            for found, wanted in zip(step, expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("when", [0, 1, 3])
    def test_not_a_number_does_not_come_back(self, case: Case, when: int) -> None:
        """In the evaluation that teaches, in a narrow one and in a full one."""
        model, call = case.build()
        now = [0]

        def bad(module: nn.Module, args: Any, output: Tensor) -> Any:
            broken = tuple(y * math.nan for y in output) if isinstance(output, tuple) else output * math.nan
            return broken if now[0] == when else None

        model.get_submodule(case.inside).register_forward_hook(bad)

        def calls(index: int) -> list[Inputs]:
            now[0] = index
            return [call]

        outputs, run = loop(model, case.recipe, calls)
        assert [bool(torch.isfinite(out).all()) for (out,) in outputs] == [index != when for index in range(12)]
        assert min(event.share for event in run.trace.events) < 0.95, "it goes on afterwards"


MODELS = {"wan": wan, "pixart": pixart, "flux": flux, "unet": unet}


@pytest.mark.parametrize("order", ["norm", "measured", "stored"])
@pytest.mark.parametrize("name", list(MODELS))
def test_in_full_it_is_bit_identical_and_leaves_no_trace(name: str, order: str) -> None:
    model, call = MODELS[name]()
    before, expected = state_of(model), plainly(model, call)
    outputs, run = loop(model, recipe(width=StraightWidth(early=1.0, late=1.0), order=order), lambda _: [call], steps=4)
    assert all(torch.equal(out, expected) for (out,) in outputs)
    assert run.report().computed_fraction == 1.0 and any("nothing" in note for note in run.report().warnings)
    assert state_of(model) == before and torch.equal(plainly(model, call), expected)


def test_cut_is_masked() -> None:
    """An independent check: the projections' own columns are set to zero in a copy of the model."""
    model, call = pixart()
    outputs, run = loop(model, recipe(), lambda _: [call], steps=3)
    gates = WidthGates(model)
    gates.learn(lambda: plainly(model, call), "norm")
    gates.detach()
    assert len(gates.sites) == 3 * len(model.transformer_blocks)
    with torch.no_grad():
        for site in gates.sites:
            size = site.cut.size
            off = site.order[(site.cut.num + 1) // 2 :]
            for name in site.cut.outs:
                for unit in off.tolist():
                    site.module.get_submodule(name).weight[:, unit * size : (unit + 1) * size] = 0
    for (out,) in outputs:
        torch.testing.assert_close(out, plainly(model, call), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0][0], plainly(pixart()[0], call), rtol=1e-2)
    assert run.report().computed_fraction < 0.75


@pytest.mark.parametrize("build", [wan, pixart, flux])
def test_computed_fraction_is_what_was_really_computed(build: Any) -> None:
    """Beside PyTorch's own count of floating point operations, of two more evaluations with the same width."""
    model, call = build()

    class Host:
        transformer = model

    def flops(steps: int) -> int:
        with watch(Host()) as work:
            loop(model, recipe(), lambda _: [call], steps=steps)
        return work.flops

    with watch(Host()) as plain:
        plainly(model, call)
    _, run = loop(model, recipe(), lambda _: [call], steps=4)
    assert run.report().computed_fraction == pytest.approx((flops(4) - flops(2)) / (2 * plain.flops), rel=1e-6)
    assert run.report().computed_fraction < 0.95


def test_a_users_router_is_asked_per_step_and_block() -> None:
    asked: list[tuple[int, int, int]] = []

    class Router(Width):
        kind = "router_of_a_test"

        def at(self, step: Step, block: int, num: int) -> Shares:
            asked.append((step.index, block, num))
            return Shares(heads=1.0, channels=0.25 if block == 1 else 1.0)

    model, call = pixart()
    ran: list[int] = []
    for block in model.transformer_blocks:
        block.ff.net[2].register_forward_hook(lambda module, args, out: ran.append(args[0].shape[-1]))
    loop(model, recipe(width=Router()), lambda _: [call], steps=2)
    num = len(model.transformer_blocks)
    full = model.transformer_blocks[0].ff.net[2].in_features
    assert set(asked) == {(step, block, num) for step in range(2) for block in range(num)}
    assert ran[-num:] == [full if block != 1 else full // 4 for block in range(num)], "hooks of the module still run"


def test_more_width_is_nearer_to_the_whole() -> None:
    model, call = pixart()
    expected, errors = plainly(model, call), []
    for share in (0.25, 0.5, 0.75):
        outputs, _ = loop(model, recipe(width=StraightWidth(early=share, late=share)), lambda _: [call], steps=2)
        errors.append(float((outputs[-1][0] - expected).norm()))
    assert errors[0] > errors[1] > errors[2] > 0


class Gated(nn.Module):
    """SwiGLU in one projection; `interleaved` keeps value and gate side by side, which no shape tells."""

    def __init__(self, interleaved: bool = False) -> None:
        super().__init__()
        self.inner, self.out, self.interleaved = nn.Linear(8, 24), nn.Linear(12, 8), interleaved

    def forward(self, x: Tensor) -> Tensor:
        both = self.inner(x)
        value, gate = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, dim=-1)
        return self.out(value * torch.sigmoid(gate))


def test_gates_are_cut_with_their_values() -> None:
    torch.manual_seed(0)
    module = Gated()
    cut = narrowing_of(module, attention=False)
    assert isinstance(cut, Narrowing) and (cut.num, cut.unit) == (12, "channels")
    index, x = torch.tensor([0, 3, 7]), seeded(0, 2, 8)
    torch.testing.assert_close(cut.twin(module, index)(x), cut.masked(module, index)(x))
    rest = torch.tensor([1, 2, 4, 5, 6, 8, 9, 10, 11])
    torch.testing.assert_close(cut.twin(module, index)(x) + cut.twin(module, rest, bias=False)(x), module(x))


class Strange(nn.Module):
    """Blocks whose feed-forward looks usual."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(StrangeBlock(make()) for _ in range(3))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return (hidden_states,)


class StrangeBlock(nn.Module):
    def __init__(self, ff: nn.Module) -> None:
        super().__init__()
        self.attn, self.ff = OneHead(), ff

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.ff(x)


class OneHead(nn.Module):
    heads = 1

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x)))


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 8))


@pytest.mark.parametrize("make", [lambda: Gated(interleaved=True), Normed])
def test_what_cannot_be_cut_is_found_out_and_falls_back(make: Any) -> None:
    torch.manual_seed(0)
    model, call = Strange(make), {"hidden_states": seeded(0, 1, 4, 8), "encoder_hidden_states": seeded(1, 1, 2, 8)}
    before = state_of(model)
    _, run = loop(model, recipe(rule=Every(interval=2)), lambda _: [call])
    notes = [note for note in run.trace.notes if "is refused" in note]
    assert len(notes) == 1 and "one head only" in notes[0] and "whole network is cached instead" in notes[0]
    assert any(event.action == "reuse" for event in run.trace.events) and state_of(model) == before


def test_what_is_wrapped_runs_in_full() -> None:
    """An offloading hook replaces a module's forward; a copy would run the original's."""
    model, call = pixart()
    for block in model.transformer_blocks:
        block.ff.forward = block.ff.forward
    _, run = loop(model, recipe(), lambda _: [call], steps=3)
    assert any("modules (transformer_blocks.0.ff" in note and "is wrapped" in note for note in run.trace.notes)
    assert run.report().computed_fraction < 1.0, "attention is still cut"


def test_an_adapter_that_is_loaded_later_runs_in_full() -> None:
    """Cutting its weights would lose what it adds; the rest of the network stays narrow."""

    class Adapter(nn.Linear):
        pass

    model, call = pixart()
    feed_forward = model.transformer_blocks[0].ff.net

    def calls(index: int) -> list[Inputs]:
        if index == 2:
            adapter = Adapter(feed_forward[2].in_features, feed_forward[2].out_features)
            adapter.load_state_dict(feed_forward[2].state_dict())
            feed_forward[2] = adapter.requires_grad_(False)
        return [call]

    _, run = loop(model, recipe(), calls, steps=4)
    shares = [event.share for event in run.trace.events]
    assert shares[0] == shares[1] < shares[2] == shares[3] < 1.0


@pytest.mark.parametrize(("host", "call"), [(small_wan, WAN_CALL), (small_pixart, PIXART_CALL)])
def test_two_runs_of_a_pipeline_are_alike(host: Any, call: dict[str, Any]) -> None:
    pipe = host()
    with hasten.accelerate(pipe, recipe(width=StraightWidth(early=0.25, late=1.0), rule=Every(interval=2))) as run:
        first, second = (
            pipe("a", **call, output_type="latent", generator=torch.Generator().manual_seed(0))[0] for _ in range(2)
        )
    assert torch.equal(torch.as_tensor(first), torch.as_tensor(second))
    assert run.report().of(0).computed_fraction == run.report().of(1).computed_fraction


def test_every_part_has_the_sites_one_expects() -> None:
    found = {site.name: narrowing_of(site.module, attention=site.family != "feed_forward") for site in find_sites(wan()[0])}
    assert isinstance(found["blocks.0.ffn"], Narrowing)
    assert isinstance(found["blocks.0.attn1"], Narrowing), "refused later, by trial: its norm goes over all heads"
