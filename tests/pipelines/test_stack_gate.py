"""Skipping blocks loses nothing on identical input, whatever the host adds between them; else it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    WanVACETransformer3DModel,
)
from torch import Tensor, nn

import hasten
from hasten.caching.rules import Every
from hasten.caching.stack import StackReuse
from hasten.pipelines.session import Session
from hasten.recipe import Recipe
from hasten.samplers.guidance import GuidanceInterval
from tests.contract import seeded
from tests.hosts import PIXART_CALL, WAN_CALL, flux_arguments, small_flux, small_pixart, small_wan

pytestmark = pytest.mark.filterwarnings("ignore:hasten")


def blocks(lead: int = 1) -> Recipe:
    return Recipe(reuse=StackReuse(lead=lead, rule=Every(interval=2)))


def constant_loop(model: nn.Module, recipe: Recipe, arguments: Callable[[int], dict[str, Any]]) -> tuple[list[Tensor], Session]:
    """Call `model` on each step with `arguments(step)`, the solver's result thrown away."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)  # the timestep that the network is given stands still, so it tells nothing
    outputs = []
    with torch.no_grad(), hasten.accelerate(model, recipe, scheduler=scheduler) as run:
        for i, time in enumerate(scheduler.timesteps):
            outputs.append(model(**arguments(i), return_dict=False)[0])
            scheduler.step(outputs[-1], time, outputs[-1])
    return outputs, run


def flux() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model.eval(), flux_arguments()


def flux_with_controls() -> tuple[nn.Module, dict[str, Any]]:
    model, _ = flux()
    return model, flux_arguments(joint=3, single=3)


def vace() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = WanVACETransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=4, rope_max_seq_len=32, vace_layers=[0, 1, 3], vace_in_channels=24,
    )  # fmt: skip
    call = {
        "hidden_states": seeded(0, 1, 4, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": seeded(1, 1, 5, 16),
        "control_hidden_states": seeded(2, 1, 24, 2, 8, 8),
        "control_hidden_states_scale": torch.tensor([1.0, 0.7, 0.4]),
    }
    return model.eval(), call


def wan() -> tuple[nn.Module, dict[str, Any]]:
    call = {
        "hidden_states": seeded(0, 1, 16, 2, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": seeded(1, 1, 5, 32),
    }
    return small_wan().transformer, call


@pytest.mark.parametrize("build", [flux, flux_with_controls, wan])
@pytest.mark.parametrize("lead", [0, 1])
def test_lossless_on_identical_input(build: Callable[[], tuple[nn.Module, dict[str, Any]]], lead: int) -> None:
    model, call = build()
    with torch.no_grad():
        plain = model(**call, return_dict=False)[0]
    outputs, run = constant_loop(model, blocks(lead), lambda _: call)
    assert not any("refused" in note for note in run.trace.notes)
    assert sum(e.action == "reuse" for e in run.trace.events) >= 2
    for out in outputs:
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lead", [0, 1])
def test_vace_is_exact_or_refused(lead: int) -> None:
    model, call = vace()
    outputs, run = constant_loop(model, blocks(lead), lambda _: call)
    assert any(e.action == "reuse" for e in run.trace.events)
    for out in outputs[1:]:
        torch.testing.assert_close(out, outputs[0], rtol=1e-4, atol=1e-5)


def test_vace_keeps_its_main_blocks_skippable() -> None:
    model, call = vace()
    _, run = constant_loop(model, blocks(), lambda _: call)
    assert not any("refused" in note for note in run.trace.notes)


def test_present_controls_apply_on_a_skipped_step() -> None:
    """Controls that change on a skipped step must change its output; the blocks' own residual is all that is held."""
    model, call = flux_with_controls()
    changed = {**call, "controlnet_single_block_samples": [seeded(30 + i, 1, 16, 32) for i in range(3)]}
    outputs, run = constant_loop(model, blocks(), lambda i: changed if i == 3 else call)
    assert {e.step for e in run.trace.events if e.action == "reuse"} >= {3, 5}
    assert float((outputs[3] - outputs[5]).norm()) > 0.01 * float(outputs[5].norm())


def test_not_additive_between_blocks_is_learned_in_a_second_pass() -> None:
    """Whatever is done between blocks, a skipped step on identical input may not differ from the computed one."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, hidden_states: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            for block in self.blocks:
                hidden_states = 1.7 * torch.tanh(block(hidden_states))
            return (hidden_states,)

    torch.manual_seed(0)
    model, call = Chain(), {"hidden_states": seeded(0, 2, 8)}
    plain = model(**call)[0].detach()
    outputs, run = constant_loop(model, blocks(), lambda _: call)
    assert any("run once more without the blocks" in note for note in run.trace.notes)
    assert any(event.action == "reuse" for event in run.trace.events), "falls back to the whole network"
    assert all(torch.allclose(out, plain, rtol=1e-4) for out in outputs)
    assert "blocks" not in vars(model) and "forward" not in vars(model)


def test_blocks_are_left_out_and_put_back() -> None:
    pipe = small_flux()
    ran: list[int] = []
    for i, block in enumerate([*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    call = {"height": 32, "width": 32, "num_inference_steps": 6, "max_sequence_length": 16, "output_type": "latent"}
    with hasten.accelerate(pipe, blocks()) as run:
        pipe("a", **call)
        assert not isinstance(pipe.transformer.transformer_blocks, nn.ModuleList)
        ran.clear()
        pipe("a", **call)
    assert isinstance(pipe.transformer.transformer_blocks, nn.ModuleList)
    assert [ran.count(i) for i in range(5)] == [6, 3, 3, 3, 3]
    assert run.trace.structure == {"transformer.transformer_blocks": 2, "transformer.single_transformer_blocks": 3}


def poison(pipe: Any, call_number: int) -> dict[str, Any]:
    """NaN comes out of the last block in one call; the callback mends the latents, as a watchful host would."""
    count, good = [0], []

    def bad(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        count[0] += 1
        return output * float("nan") if count[0] == call_number else None

    def mend(_: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if not bool(torch.isfinite(values["latents"]).all()):
            values["latents"] = good[-1]
        good.append(values["latents"])
        return values

    pipe.transformer.blocks[-1].register_forward_hook(bad)
    return {**WAN_CALL, "num_inference_steps": 10, "output_type": "latent", "callback_on_step_end": mend}


@pytest.mark.parametrize(
    ("kind", "call_number"),
    [
        *[("network", number) for number in (5, 6, 7, 8)],
        *[("blocks", number) for number in (6, 8)],
        *[pytest.param("blocks", number) for number in (5, 7, 9)],
    ],
)
def test_not_a_number_does_not_come_back_from_history(kind: str, call_number: int) -> None:
    pipe = small_wan()
    call = poison(pipe, call_number)
    recipe = blocks(lead=0) if kind == "blocks" else hasten.recipe("every-other")
    broken = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        broken.append(not bool(torch.isfinite(output[0]).all()))

    pipe.transformer.register_forward_hook(look)
    with hasten.accelerate(pipe, recipe):
        pipe("a", generator=torch.Generator().manual_seed(0), **call)
    assert sum(broken) == 1, "the one that was computed wrong, and no stand-in made of it"


def test_half_a_batch_meets_no_history_of_a_whole_one() -> None:
    pipe = small_pixart()
    both = blocks(lead=0) | Recipe(guidance=GuidanceInterval(low=0.5, high=1.0))
    call = {**PIXART_CALL, "num_inference_steps": 9, "output_type": "latent"}
    with hasten.accelerate(pipe, both) as run:
        out = pipe("a", generator=torch.Generator().manual_seed(0), **call)[0]
    assert out.shape == (1, 4, 4, 4) and bool(torch.isfinite(out).all())
    assert not any(e.action == "reuse" and e.step == first_half(run) for e in run.trace.events)


def first_half(run: Session) -> int:
    return next(i for i, time in enumerate(run.trace.runs[0].times) if time < 0.5)


def test_lora_loaded_inside_the_session() -> None:
    from peft import LoraConfig

    def generate() -> Tensor:
        return pipe("a", generator=torch.Generator().manual_seed(0), output_type="latent", **WAN_CALL)[0]

    pipe = small_wan()
    plain = generate()
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with hasten.accelerate(pipe, blocks()):
        generate()
        pipe.transformer.add_adapter(config, "test")
        changed = generate()
        assert not torch.allclose(changed, plain, rtol=1e-3)
        pipe.transformer.delete_adapters("test")
    assert torch.equal(generate(), plain)


def graphs(recipe: Recipe | None) -> int:
    """Graphs captured when the blocks of Wan are compiled, with and without us."""
    torch._dynamo.reset()
    count = [0]

    def backend(graph: Any, inputs: Any) -> Any:
        count[0] += 1
        return graph.forward

    pipe = small_wan()
    pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    call = {**WAN_CALL, "output_type": "latent"}
    if recipe is None:
        pipe("a", **call)
    else:
        with hasten.accelerate(pipe, recipe) as run:
            pipe("a", **call)
        assert any(event.action == "reuse" for event in run.trace.events)
    return count[0]


def test_compiled_blocks_keep_their_graphs() -> None:
    plain = graphs(None)
    assert plain >= 1 and graphs(blocks()) == plain


def test_whole_compiled_network_falls_back() -> None:
    torch._dynamo.reset()
    pipe = small_wan()
    pipe.transformer.compile(backend="eager")
    call = {**WAN_CALL, "output_type": "latent", "num_inference_steps": 4}
    plain = pipe("a", generator=torch.Generator().manual_seed(0), **call)[0]
    with hasten.accelerate(pipe, blocks()) as run:
        pipe("a", **call)
    assert any("one compiled function" in note for note in run.trace.notes)
    assert any(event.action == "reuse" and event.blocks is None for event in run.trace.events)
    assert torch.equal(pipe("a", generator=torch.Generator().manual_seed(0), **call)[0], plain)
