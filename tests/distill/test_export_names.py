"""Adapters under ComfyUI's and kohya's names: lossless there and back, and what diffusers reads is what we wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import diffusers.loaders.single_file_utils as diffusers_files
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hasten.distill.export.names import Names, read_lora, write
from hasten.errors import UsageError
from hasten.pipelines.lora import FACTS, Lora, LowRank

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def flux(**more: Any) -> Any:
    small = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2, "in_channels": 4,
             "joint_attention_dim": 10, "pooled_projection_dim": 6, "axes_dims_rope": (4, 4, 4), "guidance_embeds": True}  # fmt: skip
    return diffusers.FluxTransformer2DModel(**small | more)


def wan(image: bool = True) -> Any:
    more = {"image_dim": 6, "added_kv_proj_dim": 24} if image else {}
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=10, freq_dim=8, ffn_dim=20,
        num_layers=2, **more,
    )  # fmt: skip


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=3, attention_head_dim=6, num_attention_heads=2,
        joint_attention_dim=10, caption_projection_dim=12, pooled_projection_dim=6, out_channels=4, pos_embed_max_size=8,
        dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip


def ltx() -> Any:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, num_layers=2,
        caption_channels=10,
    )  # fmt: skip


def pixart() -> Any:
    return diffusers.PixArtTransformer2DModel(
        sample_size=4, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=12,
        in_channels=4, cross_attention_dim=24, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip


KNOWN: dict[str, Callable[[], Any]] = {"flux": flux, "wan": wan, "sd3": sd3, "ltx": ltx}


def adapter(network: nn.Module, *, rank: int = 3, alpha: float = 2.0, bias: bool = False) -> Lora:
    """A random change of every layer. Numbers that float32 has exactly."""
    g = torch.Generator().manual_seed(1)
    layers = {}
    for name, module in network.named_modules():
        if isinstance(module, LAYERS):
            out, inputs = module.weight.shape[0], module.weight.shape[1:]
            ones = (1,) * (len(inputs) - 1)
            down, up = torch.randn(rank, *inputs, generator=g), torch.randn(out, rank, *ones, generator=g)
            layers[name] = LowRank(down, up, alpha, torch.randn(out, generator=g) if bias else None)
    return Lora("transformer", layers, {"network": type(network).__name__})


def same(one: Lora, two: Lora) -> None:
    """Bit for bit."""
    assert one.site == two.site
    assert one.facts == two.facts
    assert one.layers.keys() == two.layers.keys()
    for name, low in one.layers.items():
        other = two.layers[name]
        assert torch.equal(low.down, other.down), name
        assert torch.equal(low.up, other.up), name
        assert low.alpha == other.alpha, name
        assert (low.bias is None) == (other.bias is None), name
        assert low.bias is None or other.bias is None or torch.equal(low.bias, other.bias), name


@pytest.mark.parametrize("alpha", [3.0, 2.0, 0.1])
@pytest.mark.parametrize("which", KNOWN)
def test_diffusers_to_comfy_to_kohya_to_diffusers_is_lossless(which: str, alpha: float, tmp_path: Path) -> None:
    network = KNOWN[which]()
    lora = adapter(network, alpha=alpha, bias=alpha == 2.0)
    diffusers_file = lora.save(tmp_path / "d.safetensors")
    comfy = write(Lora.load(diffusers_file) if alpha != 2.0 else lora, network, tmp_path / "c.safetensors", "comfy")
    kohya = write(read_lora(comfy, network), network, tmp_path / "k.safetensors", "kohya")
    back = read_lora(kohya, network)
    same(lora, back)
    assert all(name.startswith("diffusion_model.") for name in load_file(comfy))
    assert all(name.count(".") <= 2 and name.startswith("lora_unet_") for name in load_file(kohya))
    if alpha != 2.0:
        same(Lora.load(back.save(tmp_path / "again.safetensors")), lora)


def original_checkpoint(network: nn.Module) -> dict[str, Tensor]:
    """The network's own weights as its authors would store them, by our map."""
    state = network.state_dict()
    found: dict[str, Tensor] = {}
    for name, fused in Names(network).fused.items():
        for end in ("weight", "bias"):
            parts = [state[f"{part}.{end}"] for part in fused.parts if f"{part}.{end}" in state]
            if parts:
                whole = torch.cat(parts)
                found[f"{name}.{end}"] = torch.cat(whole.chunk(2)[::-1]) if fused.swap else whole
    return found


@pytest.mark.parametrize("which", ["wan", "ltx", "sd3", "flux"])
def test_diffusers_own_conversion_of_whole_checkpoints_agrees(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = KNOWN[which]()
    checkpoint = original_checkpoint(network)
    if which == "flux":  # diffusers' conversion has the widths of the real model written in it
        plain = torch.split
        monkeypatch.setattr(torch, "split", lambda t, sizes, dim=0: plain(t, [24, 24, 24, 96], dim))
    rest = {name: value for name, value in network.state_dict().items() if "norm" in name or "pos_embed.pos" in name}
    checkpoint = dict(checkpoint) | _norms(which, rest)
    convert = {
        "wan": diffusers_files.convert_wan_transformer_to_diffusers, "ltx": diffusers_files.convert_ltx_transformer_checkpoint_to_diffusers,
        "sd3": diffusers_files.convert_sd3_transformer_checkpoint_to_diffusers, "flux": diffusers_files.convert_flux_transformer_checkpoint_to_diffusers,
    }[which]  # fmt: skip
    made = convert(checkpoint)
    layers = [name for name, module in network.named_modules() if isinstance(module, LAYERS)]
    assert len(layers) > 20
    for name in layers:
        own = network.get_submodule(name)
        assert torch.equal(made[f"{name}.weight"], own.weight), name  # type: ignore[arg-type]
        assert own.bias is None or torch.equal(made[f"{name}.bias"], own.bias), name  # type: ignore[arg-type]


def _norms(which: str, rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers' conversions of FLUX and SD3 insist on beside the layers."""
    here = {"pos_embed": rest["pos_embed.pos_embed"]} if which == "sd3" else {}
    if which == "flux":
        for kind, count in (("double", 2), ("single", 2)):
            for i in range(count):
                for where in ("img_attn.norm", "txt_attn.norm") if kind == "double" else ("norm",):
                    here |= {f"{kind}_blocks.{i}.{where}.{n}_norm.scale": torch.ones(12) for n in ("query", "key")}
    if which == "sd3":
        for i in range(3):
            for where in ("x_block.attn", "context_block.attn", *(["x_block.attn2"] if i < 2 else [])):
                here |= {f"joint_blocks.{i}.{where}.ln_{n}.weight": torch.ones(6) for n in "qk"}
    return here


def effect(down: Tensor, up: Tensor) -> Tensor:
    """What a change does to two vectors: enough to know it by, and small."""
    x = torch.randn(down[0].numel(), 2, generator=torch.Generator().manual_seed(7))
    return up.flatten(1) @ (down.flatten(1) @ x)


def effects(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer -> effect, from a state dict of diffusers."""
    ups = {name.removesuffix(".lora_B.weight"): value for name, value in tensors.items() if name.endswith(".lora_B.weight")}
    return {name: effect(tensors[f"{name}.lora_A.weight"], up) for name, up in ups.items()}


def held(made: dict[str, Tensor], lora: Lora) -> None:
    """What diffusers made of our file changes the layers as our adapter does."""
    got = effects(made)
    assert got.keys() == {f"transformer.{name}" for name in lora.layers}
    for name, low in lora.layers.items():
        want = low.scale * effect(low.down, low.up)
        torch.testing.assert_close(got[f"transformer.{name}"], want, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("style", ["comfy", "kohya"])
def test_diffusers_reads_our_wan_files(style: Any, tmp_path: Path) -> None:
    network = wan()
    # diffusers' reader of kohya's Wan files knows the layers of blocks alone, and its other one no alpha outside of them.
    lora = Lora("transformer", {name: low for name, low in adapter(network).layers.items() if name.startswith("blocks.")})
    made = diffusers.WanPipeline.lora_state_dict(write(lora, network, tmp_path / "w.safetensors", style))
    held(made, lora)


@pytest.mark.parametrize("style", ["comfy", "kohya"])
def test_diffusers_reads_our_flux_files(style: Any, tmp_path: Path) -> None:
    with torch.device("meta"):  # the real widths, which its reader has written in it
        network = flux(num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=24, in_channels=64)
    lora = Lora("transformer", {name: low for name, low in adapter(network, rank=2).layers.items() if "blocks." in name})
    file = write(lora, network, tmp_path / "f.safetensors", style)
    made = diffusers.FluxPipeline.lora_state_dict(file)
    held(made, lora)
    assert made["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"].shape[0] == 2  # not three times as many


@pytest.mark.parametrize("style", ["comfy", "kohya"])
def test_scales_of_their_own_and_missing_parts_stay_the_same_change(style: Any, tmp_path: Path) -> None:
    network = flux()
    lora = adapter(network)
    name = "transformer_blocks.0.attn.to_k"
    layers = dict(lora.layers)
    del layers["transformer_blocks.1.attn.to_q"]
    layers[name] = LowRank(torch.randn(5, 24), torch.randn(24, 5), 7.0)
    lora = Lora("transformer", layers)
    back = read_lora(write(lora, network, tmp_path / "f.safetensors", style), network)
    assert back.layers.keys() == layers.keys()
    assert back.layers[name].rank == 5
    for key, low in layers.items():
        torch.testing.assert_close(back.layers[key].change(), low.change(), rtol=1e-5, atol=1e-5, msg=key)


def test_a_fused_layer_without_our_header_is_taken_apart(tmp_path: Path) -> None:
    network = flux()
    lora = adapter(network)
    plain = load_file(write(lora, network, tmp_path / "f.safetensors", "comfy"))
    save_file(plain, tmp_path / "plain.safetensors")
    back = read_lora(tmp_path / "plain.safetensors", network)
    assert back.layers["transformer_blocks.0.attn.to_v"].rank == 3
    shared = plain | {"diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight": torch.randn(72, 9)}
    save_file(shared, tmp_path / "shared.safetensors")
    other = read_lora(tmp_path / "shared.safetensors", network)
    assert other.layers["transformer_blocks.0.attn.to_v"].rank == 9
    whole = shared["diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight"] @ plain[
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight"
    ]  # fmt: skip
    got = [other.layers[f"transformer_blocks.0.attn.{n}"].change() for n in ("to_q", "to_k", "to_v")]
    torch.testing.assert_close(torch.cat(got), whole * 2 / 3, rtol=1e-5, atol=1e-5)


def test_whole_changes_of_lightx2v_are_read(tmp_path: Path) -> None:
    network = wan(image=False)
    g = torch.Generator().manual_seed(0)
    tensors = {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.randn(2, 24, generator=g),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.randn(24, 2, generator=g),
        "diffusion_model.blocks.0.self_attn.q.diff_b": torch.randn(24, generator=g),
        "diffusion_model.blocks.0.ffn.0.diff": torch.randn(20, 24, generator=g),
        "diffusion_model.patch_embedding.diff": torch.randn(24, 4, 1, 2, 2, generator=g),
        "diffusion_model.head.head.diff": torch.randn(16, 24, generator=g),
        "diffusion_model.time_projection.1.diff_b": torch.randn(144, generator=g),
        "diffusion_model.blocks.0.norm3.diff": torch.zeros(24),
        "diffusion_model.blocks.0.self_attn.norm_q.diff": torch.zeros(24),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors", network)
    assert lora.layers["blocks.0.attn1.to_q"].scale == 1.0
    for name, original in (("blocks.0.ffn.net.0.proj", "blocks.0.ffn.0"), ("patch_embedding", "patch_embedding"), ("proj_out", "head.head")):
        assert torch.equal(lora.layers[name].change(), tensors[f"diffusion_model.{original}.diff"]), name
    for name, original in (("blocks.0.attn1.to_q", "blocks.0.self_attn.q"), ("condition_embedder.time_proj", "time_projection.1")):
        bias = lora.layers[name].bias
        assert bias is not None
        assert torch.equal(bias, tensors[f"diffusion_model.{original}.diff_b"])
    tensors["diffusion_model.blocks.0.norm3.diff"] += 1
    save_file(tensors, tmp_path / "y.safetensors")
    with pytest.raises(UsageError, match=r"changes 'diffusion_model.blocks.0.norm3.diff', which is no layer"):
        read_lora(tmp_path / "y.safetensors", network)


def test_unknown_families_are_refused_for_comfy_and_keep_their_names_for_kohya(tmp_path: Path) -> None:
    network = pixart()
    lora = adapter(network)
    with pytest.raises(UsageError, match="names that ComfyUI has for the layers of PixArtTransformer2DModel are not known"):
        write(lora, network, tmp_path / "c.safetensors", "comfy")
    file = write(lora, network, tmp_path / "k.safetensors", "kohya")
    assert "lora_unet_transformer_blocks_0_attn1_to_out_0.lora_down.weight" in load_file(file)
    same(lora, read_lora(file, network))


def test_a_layer_without_a_known_name_is_refused(tmp_path: Path) -> None:
    network = wan()
    network.extra = nn.Linear(3, 3)
    lora = adapter(network)
    with pytest.raises(UsageError, match="1 layers of the adapter have no known name .* the first: extra"):
        write(lora, network, tmp_path / "c.safetensors", "comfy")


def test_names_that_become_one_when_joined_are_refused() -> None:
    network = nn.ModuleDict({"a_b": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2)})})
    with pytest.raises(UsageError, match="one name when dots are joined"):
        Names(network)


def test_half_a_layer_is_refused(tmp_path: Path) -> None:
    save_file({"diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.ones(2, 24)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="one half of 'blocks.0.self_attn.q' only"):
        read_lora(tmp_path / "x.safetensors", wan())


def test_halves_are_exchanged_where_the_authors_have_them_the_other_way(tmp_path: Path) -> None:
    for network, layer, original in (
        (flux(), "norm_out.linear", "final_layer.adaLN_modulation.1"),
        (sd3(), "transformer_blocks.2.norm1_context.linear", "joint_blocks.2.context_block.adaLN_modulation.1"),
    ):
        lora = adapter(network)
        file = load_file(write(lora, network, tmp_path / "f.safetensors", "comfy"))
        first, second = lora.layers[layer].up.chunk(2)
        assert torch.equal(file[f"diffusion_model.{original}.lora_up.weight"], torch.cat([second, first]))
    kept = lora.layers["transformer_blocks.0.norm1_context.linear"].up
    assert torch.equal(file["diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.lora_up.weight"], kept)


def test_the_header_says_what_was_fused(tmp_path: Path) -> None:
    from safetensors import safe_open

    network = flux()
    with safe_open(write(adapter(network), network, tmp_path / "f.safetensors", "comfy"), "pt") as file:
        facts = json.loads(file.metadata()[FACTS])
    assert facts["fused"]["single_blocks.1.linear1"] == [[3, 2.0]] * 4
