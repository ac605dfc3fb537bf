"""Reuse of attention and feed-forward outputs on real models: right, or refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, LatteTransformer3DModel
from torch import Tensor, nn

import hasten
from hasten.caching.modules import FAMILIES, ModuleReuse
from hasten.caching.rules import Every
from hasten.forecast import Polynomial
from hasten.pipelines.recipes.modules import (
    pyramid_attention_broadcast,
    taylor_seer,
    taylor_seer_differences,
)
from hasten.pipelines.seams.module_gate import ModuleGates
from hasten.recipe import Recipe
from tests.contract import seeded
from tests.hosts import WAN_CALL, flux_arguments, small_pixart, small_unet, small_wan, wan_arguments
from tests.pipelines.seam_contract import Case, Inputs, SeamContract, close, loop, plainly

pytestmark = pytest.mark.filterwarnings("ignore:hasten")

RECIPES = {
    "pyramid": pyramid_attention_broadcast(spatial=2, temporal=3, cross=4),
    "taylor": taylor_seer(interval=3, order=1, warmup=2),
    "quadratic": taylor_seer(interval=2, order=2, warmup=2),
    "differences": taylor_seer_differences(interval=3, order=2, warmup=2),
}


def wan() -> tuple[nn.Module, Inputs]:
    return small_wan().transformer, {**wan_arguments(), "return_dict": False}


def pixart() -> tuple[nn.Module, Inputs]:
    call = {
        "hidden_states": seeded(0, 2, 4, 8, 8),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": seeded(1, 2, 5, 32),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return small_pixart().transformer, {**call, "return_dict": False}


def flux() -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model.eval(), {**flux_arguments(joint=2), "return_dict": False}


def unet() -> tuple[nn.Module, Inputs]:
    call = {"sample": seeded(0, 1, 4, 16, 16), "timestep": torch.tensor(500), "encoder_hidden_states": seeded(1, 1, 5, 32)}
    return small_unet().unet, {**call, "return_dict": False}


def latte() -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    model = LatteTransformer3DModel(
        sample_size=4, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=16,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        video_length=3,
    )  # fmt: skip
    call = {
        "hidden_states": seeded(0, 1, 4, 3, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": seeded(1, 1, 5, 16),
        "enable_temporal_attentions": True,
    }
    return model.eval(), {**call, "return_dict": False}


BUILDS = {
    "wan": (wan, "blocks.0.attn1.to_out.0", {"hidden_states": seeded(5, 1, 16, 2, 4, 8)}),
    "pixart": (pixart, "transformer_blocks.0.attn1.to_out.0", {"hidden_states": seeded(5, 2, 4, 8, 4)}),
    "flux": (
        flux,
        "transformer_blocks.0.attn.to_out.0",
        {
            "hidden_states": seeded(5, 1, 24, 4),
            "img_ids": seeded(6, 24, 3),
            "controlnet_block_samples": [seeded(10 + i, 1, 24, 32) for i in range(2)],
        },
    ),
    "unet": (unet, "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", {"sample": seeded(5, 1, 4, 16, 8)}),
    "latte": (latte, "transformer_blocks.0.attn1.to_out.0", {"hidden_states": seeded(5, 1, 4, 3, 4, 8)}),
}


class TestModules(SeamContract):
    @pytest.fixture(params=["wan-pyramid", "wan-quadratic", "pixart-pyramid", "flux-taylor", "unet-differences", "latte-pyramid"])
    def case(self, request: pytest.FixtureRequest) -> Case:
        model, name = request.param.split("-")
        build, inside, other = BUILDS[model]
        return Case(build, RECIPES[name], inside, other=other)


@pytest.mark.parametrize(
    ("build", "counts"),
    [(wan, (4, 0, 4, 4)), (pixart, (4, 0, 4, 4)), (flux, (4, 0, 0, 4)), (unet, (4, 0, 4, 4)), (latte, (2, 2, 2, 4))],
)
def test_modules_are_told_apart(build: Any, counts: tuple[int, ...]) -> None:
    """Self-attention (joint attention counts), temporal, cross-attention and feed-forward."""
    model, call = build()
    _, run = loop(model, RECIPES["taylor"], lambda _: [call])
    site = type(model).__name__
    assert tuple(run.trace.structure.get(f"{site}.{family}", 0) for family in FAMILIES) == counts


def test_every_kind_keeps_its_own_pace() -> None:
    model, call = wan()
    ran: list[str] = []
    for name in ("attn1", "attn2", "ffn"):
        getattr(model.blocks[1], name).register_forward_hook(lambda *_, name=name: ran.append(name))
    policy = ModuleReuse(self_attention=Every(interval=2), cross_attention=Every(interval=4))
    loop(model, Recipe(reuse=policy), lambda _: [call])
    assert [ran.count(name) for name in ("attn1", "attn2", "ffn")] == [6, 3, 12 + 1], "the proof skips what has a rule and runs the rest"


def test_forecast_follows_the_model() -> None:
    """A module whose output is a polynomial of `Step.time` is forecast exactly on a grid that is not even."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attn(x)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k = nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.to_q(x) * x - self.to_k(x) + 3

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block()])

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.blocks[0](hidden_states)

    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    policy = ModuleReuse(self_attention=Every(interval=3, warmup=3), forecast=Polynomial(order=2))
    model = Model()
    with torch.no_grad(), hasten.accelerate(model, Recipe(reuse=policy), scheduler=scheduler) as run:
        scheduler.set_timesteps(12)
        scheduler.set_begin_index(0)
        for i, time in enumerate(scheduler.timesteps):
            x = torch.full((1, 4), float(scheduler.sigmas[i]))
            out = model(x)
            close(out, x + x * x - x + 3)
            scheduler.step(out, time, out)
    assert sum(event.action == "forecast" for event in run.trace.events) == 6


def test_caller_may_change_what_it_got_in_place() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.Module()
            self.attn.to_q, self.attn.to_k = nn.Linear(4, 4), nn.Linear(4, 4)
            self.attn.forward = lambda x: self.attn.to_q(x) + self.attn.to_k(x)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attn(x).mul_(2).add_(1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, hidden_states: Tensor) -> Tensor:
            for block in self.blocks:
                hidden_states = block(hidden_states)
            return hidden_states

    torch.manual_seed(0)
    model, call = Model(), {"hidden_states": seeded(0, 2, 4)}
    expected = plainly(model, call)
    outputs, run = loop(model, Recipe(reuse=ModuleReuse()), lambda _: [call])
    assert any(event.action == "reuse" for event in run.trace.events)
    for (out,) in outputs:
        close(out, expected)


def test_module_that_is_called_twice_is_always_computed() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Module()
            self.one.attn = nn.Module()
            self.one.attn.to_q, self.one.attn.to_k = nn.Linear(4, 4), nn.Linear(4, 4)
            self.one.attn.forward = lambda x: self.one.attn.to_q(x) * self.one.attn.to_k(x)

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.one.attn(self.one.attn(hidden_states))

    torch.manual_seed(0)
    model, call = Model(), {"hidden_states": seeded(0, 2, 4)}
    outputs, run = loop(model, Recipe(reuse=ModuleReuse()), lambda _: [call])
    assert any("refused" in note and "more than once" in note for note in run.trace.notes)
    assert any(event.action == "reuse" for event in run.trace.events), "the whole network is cached instead"
    for (out,) in outputs:
        close(out, plainly(model, call))


def test_hidden_state_inside_a_module_is_found_out() -> None:
    """A module that leaves something behind for the rest of the network cannot be left out."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Module()
            self.block.attn = nn.Module()
            self.block.attn.to_q, self.block.attn.to_k = nn.Linear(4, 4), nn.Linear(4, 4)
            self.block.attn.forward = self.attend
            self.left = torch.zeros(())

        def attend(self, x: Tensor) -> Tensor:
            self.left = self.left + 1
            return self.block.attn.to_q(x) + self.block.attn.to_k(x)

        def forward(self, hidden_states: Tensor) -> Tensor:
            self.left = torch.zeros(())
            return self.block.attn(hidden_states) * self.left

    torch.manual_seed(0)
    model, call = Model(), {"hidden_states": seeded(0, 2, 4)}
    expected = plainly(model, call)
    outputs, run = loop(model, Recipe(reuse=ModuleReuse()), lambda _: [call])
    assert any("refused" in note and "identical input" in note for note in run.trace.notes)
    for (out,) in outputs:
        close(out, expected)


def test_network_without_attention_falls_back() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](hidden_states))

    model, call = Model(), {"hidden_states": seeded(0, 2, 4)}
    _, run = loop(model, pyramid_attention_broadcast(), lambda _: [call])
    assert any("refused" in note and "no self_attention" in note for note in run.trace.notes)
    assert any(event.action == "reuse" and event.blocks is None for event in run.trace.events)


@pytest.mark.parametrize("when", ["before", "inside"])
def test_compiled_blocks_are_refused(when: str) -> None:
    torch._dynamo.reset()
    pipe = small_wan()
    call = {**WAN_CALL, "num_inference_steps": 8, "output_type": "latent"}
    if when == "before":
        pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    with hasten.accelerate(pipe, RECIPES["pyramid"]) as run:
        if when == "inside":
            pipe("a", **call)
            pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        pipe("a", **call)
    assert any("refused" in note and "compiled" in note for note in run.trace.notes)
    assert any(event.action == "reuse" and event.blocks is None for event in run.trace.events)
    assert all("attn1" not in vars(block) for block in pipe.transformer.blocks)


def test_lora_loaded_inside_the_session() -> None:
    from peft import LoraConfig

    def generate() -> Tensor:
        return pipe("a", generator=torch.Generator().manual_seed(0), output_type="latent", **WAN_CALL)[0]

    pipe = small_wan()
    plain = generate()
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with hasten.accelerate(pipe, RECIPES["pyramid"]):
        generate()
        pipe.transformer.add_adapter(config, "test")
        changed = generate()
        assert not torch.allclose(changed, plain, rtol=1e-3)
        pipe.transformer.delete_adapters("test")
    assert torch.equal(generate(), plain)


def test_a_gate_is_read_and_written_like_its_module() -> None:
    model, _ = wan()
    gates = ModuleGates(model)
    gate, attention = model.blocks[0].attn1, model.blocks[0]._modules["attn1"]
    assert gate is not attention and gate.to_q is attention.to_q and gate.heads == attention.heads
    gate.processor = "other"
    assert attention.processor == "other"
    assert model.get_submodule("blocks.0.attn1.to_q") is attention.to_q
    assert "blocks.0.attn1.to_q.weight" in model.state_dict()
    gates.detach()
    assert model.blocks[0].attn1 is attention


def test_sequential_guidance_is_not_deleted() -> None:
    """diffusers' own PAB shares one state between both branches, which makes them equal (its skip range 2)."""
    model, call = wan()
    case = Case(wan, RECIPES["pyramid"], "")
    calls = [call, case.branch(call, 1)]
    truth = [plainly(model, one) for one in calls]
    outputs, _ = loop(model, Recipe(reuse=ModuleReuse(self_attention=Every(interval=2), cross_attention=Every(interval=2))), lambda _: calls)
    wanted = float((truth[0] - truth[1]).norm())
    for first, second in outputs:
        assert abs(float((first - second).norm()) / wanted - 1) < 1e-3
