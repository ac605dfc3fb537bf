"""Deep-feature reuse on real U-Nets: only the shallow end runs, and nothing is lost on identical input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
)
from torch import Tensor, nn

import hasten
from hasten.caching.deep import DeepReuse
from hasten.caching.rules import Every, Spread
from hasten.drift import Drift
from hasten.forecast import Polynomial
from hasten.pipelines.recipes.modules import deep_cache
from hasten.pipelines.seams.unet_layers import Cut, cut
from hasten.recipe import Recipe
from tests.contract import seeded
from tests.hosts import UNET_CALL, small_unet, small_wan
from tests.pipelines.seam_contract import Case, Inputs, SeamContract, close, loop, plainly, tensor

pytestmark = pytest.mark.filterwarnings("ignore:hasten")


def deep(branch: int, forecast: Any = None) -> Recipe:
    extra = {} if forecast is None else {"forecast": forecast}
    return Recipe(reuse=DeepReuse(branch=branch, rule=Every(interval=3), **extra))


def stable_diffusion() -> tuple[nn.Module, Inputs]:
    """Two layers per block and three blocks, as Stable Diffusion has them, so that a block is cut in the middle."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(8, 16, 16), layers_per_block=2, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    call = {"sample": seeded(0, 1, 4, 16, 16), "timestep": torch.tensor(500), "encoder_hidden_states": 9 * seeded(1, 1, 5, 32)}
    return model.eval(), {**call, "return_dict": False}


def with_control() -> tuple[nn.Module, Inputs]:
    """Residuals of a ControlNet on every connection and on the mid block."""
    model, call = stable_diffusion()
    return model, {**call, **residuals(1)}


def residuals(wide: float) -> Inputs:
    """What a ControlNet adds, for images `wide` times as wide as high."""
    sizes = [(8, 16)] * 3 + [(8, 8)] + [(16, 8)] * 2 + [(16, 4)] * 3
    down = [seeded(20 + i, 1, channels, side, int(side * wide)) for i, (channels, side) in enumerate(sizes)]
    middle = seeded(40, 1, 16, 4, int(4 * wide))
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}


def xl() -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=2, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=80,
        cross_attention_dim=32, norm_num_groups=4,
    )  # fmt: skip
    extra = {"text_embeds": seeded(3, 1, 32), "time_ids": torch.ones(1, 6)}
    call = {"sample": seeded(0, 1, 4, 16, 16), "timestep": torch.tensor(500), "encoder_hidden_states": 9 * seeded(1, 1, 5, 32)}
    return model.eval(), {**call, "added_cond_kwargs": extra, "return_dict": False}


def video() -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    model = UNet3DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    call = {"sample": seeded(0, 1, 4, 3, 8, 8), "timestep": torch.tensor(500), "encoder_hidden_states": 9 * seeded(1, 1, 5, 32)}
    return _loud(model), {**call, "return_dict": False}


def motion() -> tuple[nn.Module, Inputs]:
    base, call = stable_diffusion()
    adapter = MotionAdapter(
        block_out_channels=(8, 16, 16), motion_layers_per_block=2, motion_norm_num_groups=2, motion_num_attention_heads=2
    )
    model = UNetMotionModel.from_unet2d(base, adapter)
    extra = {"sample": seeded(0, 1, 4, 3, 16, 16), "encoder_hidden_states": 9 * seeded(1, 3, 5, 32)}
    return _loud(model), {**call, **extra}


def _loud(model: nn.Module) -> nn.Module:
    """Temporal layers begin as zeros; give them something to do."""
    for i, parameter in enumerate(model.parameters()):
        if not parameter.any():
            parameter.data.copy_(0.1 * seeded(i, *parameter.shape))
    return model.eval()


INSIDE = "mid_block.resnets.0"
CASES = {
    "sd-0": Case(stable_diffusion, deep(0), INSIDE, other={"sample": seeded(5, 1, 4, 16, 24)}),
    "control-1-linear": Case(
        with_control, deep(1, Polynomial(order=1)), INSIDE, other={"sample": seeded(5, 1, 4, 16, 24), **residuals(1.5)}
    ),
    "motion-0": Case(motion, deep(0), INSIDE, other={"sample": seeded(5, 1, 4, 3, 8, 16)}),
}


class TestDeep(SeamContract):
    @pytest.fixture(params=CASES)
    def case(self, request: pytest.FixtureRequest) -> Case:
        return CASES[request.param]


@pytest.mark.parametrize("build", [with_control, xl, video])
def test_every_branch_is_lossless(build: Callable[[], tuple[nn.Module, Inputs]]) -> None:
    model, call = build()
    expected = plainly(model, call)
    for branch in range(12):
        if isinstance(cut(model, branch), str):
            break
        outputs, run = loop(model, deep(branch), lambda _: [call], steps=4)
        assert not any("refused" in note for note in run.trace.notes), (branch, run.trace.notes)
        for (out,) in outputs:
            close(out, expected)
    assert branch >= 3


def test_only_the_shallow_layers_run() -> None:
    model, call = stable_diffusion()
    ran: set[str] = set()
    for name, module in model.named_modules():
        if name.startswith(("down", "up")) and (".resnets." in name and name.count(".") == 3 or name.endswith("samplers.0")):
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
    seen = []

    def calls(step: int) -> list[Inputs]:
        seen.append(set(ran))
        ran.clear()
        return [call]

    _, run = loop(model, deep(1), calls, steps=6)
    shallow = {"down_blocks.0.resnets.0", "down_blocks.0.resnets.1"} | {f"up_blocks.2.resnets.{i}" for i in range(3)}
    assert seen[2] == shallow and len(seen[4]) == 9 + 6 + 2 + 4 - 2
    skipped = next(e for e in run.trace.events if e.action == "reuse")
    assert skipped.blocks == (2, 15) and run.trace.structure == {"UNet2DConditionModel.layers": 18}


def test_layers_are_counted_from_the_outside() -> None:
    model, _ = stable_diffusion()
    assert cut(model, 0) == Cut((0, 0), (2, 1), 3, 18)
    assert cut(model, 1) == Cut((0, 1), (2, 0), 5, 18)
    assert cut(model, 2) == Cut((0, 2), (1, 2), 7, 18)
    assert cut(model, 7) == Cut((2, 1), (0, 0), 17, 18)
    assert cut(model, 8) == "branch 8 is too deep: 0 to 7 are possible on this network"


def test_present_control_applies_to_what_runs() -> None:
    """Residuals that change on a skipped step change its output: those of the shallow connections are used."""
    model, call = with_control()
    down = call["down_block_additional_residuals"]
    shallow = {**call, "down_block_additional_residuals": (down[0] + 1, *down[1:])}
    outputs, run = loop(model, deep(0), lambda i: [shallow if i == 4 else call])
    assert {4} <= {e.step for e in run.trace.events if e.action == "reuse"}
    close(outputs[4][0], plainly(model, shallow))


def test_control_that_is_switched_off_computes_the_step() -> None:
    model, call = with_control()
    bare = {k: v for k, v in call.items() if "additional" not in k}
    outputs, _ = loop(model, deep(0), lambda i: [call if i < 4 else bare])
    for i, (out,) in enumerate(outputs):
        close(out, plainly(model, call if i < 4 else bare))


def test_adapter_residuals_that_are_added_in_place() -> None:
    model, call = stable_diffusion()
    sizes = [(8, 8), (16, 4), (16, 4)]

    def now() -> Inputs:
        extra = [seeded(50 + i, 1, channels, side, side) for i, (channels, side) in enumerate(sizes)]
        extra[0], extra[1] = seeded(50, 1, 8, 16, 16), seeded(51, 1, 16, 8, 8)
        return {**call, "down_intrablock_additional_residuals": extra}

    expected = plainly(model, now())
    outputs, run = loop(model, deep(0), lambda _: [now()])
    reused = any(e.action == "reuse" for e in run.trace.events)
    assert reused
    for (out,) in outputs:
        close(out, expected)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_pipeline_with_batched_guidance(scale: float) -> None:
    pipe = small_unet()
    call = {**UNET_CALL, "num_inference_steps": 12, "guidance_scale": scale, "output_type": "latent"}

    def generate() -> Tensor:
        return pipe("a seven", generator=torch.Generator().manual_seed(0), **call)[0]

    plain = generate()
    with hasten.accelerate(pipe, deep_cache()) as run:
        found, again = generate(), generate()
    assert torch.equal(found, again) and torch.equal(generate(), plain)
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.2
    assert 0.3 < run.report().computed_fraction < 0.8


def test_free_u_still_applies() -> None:
    model, call = stable_diffusion()
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    expected = plainly(model, call)
    outputs, run = loop(model, deep(1), lambda _: [call])
    assert any(e.action == "reuse" for e in run.trace.events)
    for (out,) in outputs:
        close(out, expected)


def test_unconditional_unet() -> None:
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    call = {"sample": seeded(0, 1, 3, 16, 16), "timestep": torch.tensor(500), "return_dict": False}
    outputs, run = loop(model, deep(0), lambda _: [call])
    assert not any("refused" in note for note in run.trace.notes)
    for (out,) in outputs:
        close(out, plainly(model, call))


def test_what_is_no_unet_falls_back() -> None:
    pipe = small_wan()
    with hasten.accelerate(pipe, deep_cache()) as run:
        pipe("a", height=32, width=32, num_frames=5, num_inference_steps=6, output_type="latent")
    assert any("refused" in note and "no U-Net" in note for note in run.trace.notes)
    assert any(e.action == "reuse" and e.blocks is None for e in run.trace.events)


@pytest.mark.parametrize(("branch", "reason"), [(99, "0 to 7 are possible"), (0, "compiled function")])
def test_what_cannot_be_cut_falls_back(branch: int, reason: str) -> None:
    model, call = stable_diffusion()
    if branch == 0:
        torch._dynamo.reset()
        model.up_blocks[-1].compile(backend="eager")
    _, run = loop(model, deep(branch), lambda _: [call])
    assert any("refused" in note and reason in note for note in run.trace.notes)
    assert any(e.action == "reuse" for e in run.trace.events)
    assert "up_blocks" not in vars(model)


def test_lora_loaded_inside_the_session() -> None:
    from peft import LoraConfig

    pipe = small_unet()
    call = {**UNET_CALL, "output_type": "latent"}

    def generate() -> Tensor:
        return pipe("a", generator=torch.Generator().manual_seed(0), **call)[0]

    plain = generate()
    with hasten.accelerate(pipe, deep_cache()):
        generate()
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "test")
        assert not torch.allclose(generate(), plain, rtol=1e-3)
        pipe.unet.delete_adapters("test")
    assert torch.equal(generate(), plain)


def test_rules_that_need_a_signal_are_refused() -> None:
    with pytest.raises(ValueError, match="compares a signal"):
        DeepReuse(rule=Drift())
    assert DeepReuse(rule=Spread()).rule == Spread()


def test_in_place_scheduler_does_not_matter() -> None:
    """A solver that writes into the network's output must not change what is held."""
    model, call = stable_diffusion()
    scheduler = DDIMScheduler()
    expected = plainly(model, call)
    with torch.no_grad(), hasten.accelerate(model, deep(0), scheduler=scheduler):
        scheduler.set_timesteps(9)
        for time in scheduler.timesteps:
            out = tensor(model(**{**call, "timestep": time}))
            scheduler.step(out, time, out)
            out.zero_()
    assert torch.equal(plainly(model, call), expected)
