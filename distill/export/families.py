"""What the layers of a network are called in its authors' own code, for the families where that is known.

ComfyUI runs the authors' networks, so a file for it has to use their names; kohya's trainers do the same with the dots
joined. The facts are those of diffusers' conversions of whole checkpoints (its single-file loaders), which the tests use
as an oracle. `{}` stands for the number of a block.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """original: the authors' name of a layer. parts: diffusers' names of what it consists of, whose outputs follow one
    upon the other in it (q, k and v in one matrix)."""

    original: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """rows: layers whose names differ. rest: whether all other layers are called alike."""

    rows: tuple[Row, ...] = ()
    rest: bool = False


def _attention(original: str, parts: str, names: str) -> Row:
    return Row(original, tuple(f"{parts}.{name}" for name in names.split()))


def _rows(table: str) -> tuple[Row, ...]:
    """Rows of `original = part, part` lines."""
    pairs = (line.split(" = ") for line in table.strip().splitlines())
    return tuple(Row(original.strip(), tuple(parts.strip().split(", "))) for original, parts in pairs)


FLUX = Family(
    _rows("""
        img_in = x_embedder
        txt_in = context_embedder
        time_in.in_layer = time_text_embed.timestep_embedder.linear_1
        time_in.out_layer = time_text_embed.timestep_embedder.linear_2
        vector_in.in_layer = time_text_embed.text_embedder.linear_1
        vector_in.out_layer = time_text_embed.text_embedder.linear_2
        guidance_in.in_layer = time_text_embed.guidance_embedder.linear_1
        guidance_in.out_layer = time_text_embed.guidance_embedder.linear_2
        double_blocks.{}.img_mod.lin = transformer_blocks.{}.norm1.linear
        double_blocks.{}.txt_mod.lin = transformer_blocks.{}.norm1_context.linear
        double_blocks.{}.img_attn.proj = transformer_blocks.{}.attn.to_out.0
        double_blocks.{}.txt_attn.proj = transformer_blocks.{}.attn.to_add_out
        double_blocks.{}.img_mlp.0 = transformer_blocks.{}.ff.net.0.proj
        double_blocks.{}.img_mlp.2 = transformer_blocks.{}.ff.net.2
        double_blocks.{}.txt_mlp.0 = transformer_blocks.{}.ff_context.net.0.proj
        double_blocks.{}.txt_mlp.2 = transformer_blocks.{}.ff_context.net.2
        single_blocks.{}.modulation.lin = single_transformer_blocks.{}.norm.linear
        single_blocks.{}.linear2 = single_transformer_blocks.{}.proj_out
        final_layer.adaLN_modulation.1 = norm_out.linear
        final_layer.linear = proj_out
    """)
    + (
        _attention("double_blocks.{}.img_attn.qkv", "transformer_blocks.{}.attn", "to_q to_k to_v"),
        _attention("double_blocks.{}.txt_attn.qkv", "transformer_blocks.{}.attn", "add_q_proj add_k_proj add_v_proj"),
        _attention("single_blocks.{}.linear1", "single_transformer_blocks.{}", "attn.to_q attn.to_k attn.to_v proj_mlp"),
    )
)

SD3 = Family(
    _rows("""
        x_embedder.proj = pos_embed.proj
        context_embedder = context_embedder
        t_embedder.mlp.0 = time_text_embed.timestep_embedder.linear_1
        t_embedder.mlp.2 = time_text_embed.timestep_embedder.linear_2
        y_embedder.mlp.0 = time_text_embed.text_embedder.linear_1
        y_embedder.mlp.2 = time_text_embed.text_embedder.linear_2
        joint_blocks.{}.x_block.adaLN_modulation.1 = transformer_blocks.{}.norm1.linear
        joint_blocks.{}.context_block.adaLN_modulation.1 = transformer_blocks.{}.norm1_context.linear
        joint_blocks.{}.x_block.attn.proj = transformer_blocks.{}.attn.to_out.0
        joint_blocks.{}.x_block.attn2.proj = transformer_blocks.{}.attn2.to_out.0
        joint_blocks.{}.context_block.attn.proj = transformer_blocks.{}.attn.to_add_out
        joint_blocks.{}.x_block.mlp.fc1 = transformer_blocks.{}.ff.net.0.proj
        joint_blocks.{}.x_block.mlp.fc2 = transformer_blocks.{}.ff.net.2
        joint_blocks.{}.context_block.mlp.fc1 = transformer_blocks.{}.ff_context.net.0.proj
        joint_blocks.{}.context_block.mlp.fc2 = transformer_blocks.{}.ff_context.net.2
        final_layer.adaLN_modulation.1 = norm_out.linear
        final_layer.linear = proj_out
    """)
    + (
        _attention("joint_blocks.{}.x_block.attn.qkv", "transformer_blocks.{}.attn", "to_q to_k to_v"),
        _attention("joint_blocks.{}.x_block.attn2.qkv", "transformer_blocks.{}.attn2", "to_q to_k to_v"),
        _attention("joint_blocks.{}.context_block.attn.qkv", "transformer_blocks.{}.attn", "add_q_proj add_k_proj add_v_proj"),
    )
)

WAN = Family(
    _rows("""
        patch_embedding = patch_embedding
        text_embedding.0 = condition_embedder.text_embedder.linear_1
        text_embedding.2 = condition_embedder.text_embedder.linear_2
        time_embedding.0 = condition_embedder.time_embedder.linear_1
        time_embedding.2 = condition_embedder.time_embedder.linear_2
        time_projection.1 = condition_embedder.time_proj
        img_emb.proj.1 = condition_embedder.image_embedder.ff.net.0.proj
        img_emb.proj.3 = condition_embedder.image_embedder.ff.net.2
        blocks.{}.self_attn.q = blocks.{}.attn1.to_q
        blocks.{}.self_attn.k = blocks.{}.attn1.to_k
        blocks.{}.self_attn.v = blocks.{}.attn1.to_v
        blocks.{}.self_attn.o = blocks.{}.attn1.to_out.0
        blocks.{}.cross_attn.q = blocks.{}.attn2.to_q
        blocks.{}.cross_attn.k = blocks.{}.attn2.to_k
        blocks.{}.cross_attn.v = blocks.{}.attn2.to_v
        blocks.{}.cross_attn.o = blocks.{}.attn2.to_out.0
        blocks.{}.cross_attn.k_img = blocks.{}.attn2.add_k_proj
        blocks.{}.cross_attn.v_img = blocks.{}.attn2.add_v_proj
        blocks.{}.ffn.0 = blocks.{}.ffn.net.0.proj
        blocks.{}.ffn.2 = blocks.{}.ffn.net.2
        head.head = proj_out
    """)
)

LTX = Family(
    _rows("""
        patchify_proj = proj_in
        adaln_single.emb.timestep_embedder.linear_1 = time_embed.emb.timestep_embedder.linear_1
        adaln_single.emb.timestep_embedder.linear_2 = time_embed.emb.timestep_embedder.linear_2
        adaln_single.linear = time_embed.linear
    """),
    rest=True,
)

FAMILIES = {
    "FluxTransformer2DModel": FLUX,
    "SD3Transformer2DModel": SD3,
    "WanTransformer3DModel": WAN,
    "LTXVideoTransformer3DModel": LTX,
    "QwenImageTransformer2DModel": Family(rest=True),
}
"""Class of diffusers -> its authors' names."""
