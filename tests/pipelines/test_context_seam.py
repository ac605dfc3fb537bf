"""Context reuse on aMUSEd's network: exact where the context stands still, refused elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AmusedScheduler, UVit2DModel
from torch import Tensor, nn

import hasten
from hasten.caching.context import ContextReuse, pooled
from hasten.caching.rules import Every
from hasten.pipelines.recipes.modules import recap, token_change_cache
from hasten.pipelines.session import Session
from hasten.recipe import Recipe
from tests.contract import seeded
from tests.hosts import WAN_CALL, small_wan
from tests.pipelines.seam_contract import close, state_of

pytestmark = pytest.mark.filterwarnings("ignore:hasten")
MASK, VOCABULARY, SIDE = 32, 33, 8


def uvit(*, downsample: bool = False) -> UVit2DModel:
    torch.manual_seed(0)
    model = UVit2DModel(
        hidden_size=16, use_bias=False, hidden_dropout=0.0, cond_embed_dim=16, micro_cond_encode_dim=2,
        micro_cond_embed_dim=10, encoder_hidden_size=16, vocab_size=VOCABULARY, codebook_size=32, in_channels=16,
        block_out_channels=16, num_res_blocks=1, downsample=downsample, upsample=downsample, block_num_heads=2,
        num_hidden_layers=3, num_attention_heads=2, attention_dropout=0.0, intermediate_size=32, layer_norm_eps=1e-6,
        ln_elementwise_affine=True,
    )  # fmt: skip
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.2 * seeded(i, *parameter.shape))
    return model.eval()


def conditions(number: int = 0, batch: int = 1) -> dict[str, Any]:
    return {
        "encoder_hidden_states": seeded(90 + number, batch, 5, 16),
        "pooled_text_emb": seeded(70 + number, batch, 16),
        "micro_conds": torch.ones(batch, 5),
    }


def masked(share: float, batch: int = 1) -> Tensor:
    """Ids of which about `share` are masks."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 32, (batch, SIDE, SIDE), generator=generator)
    return torch.where(torch.rand(ids.shape, generator=generator) < share, MASK, ids)


def loop(model: nn.Module, recipe: Recipe, calls: Any, steps: int = 8) -> tuple[list[list[Tensor]], Session]:
    scheduler = AmusedScheduler(mask_token_id=MASK)
    outputs = []
    with torch.no_grad(), hasten.accelerate(model, recipe, scheduler=scheduler) as run:
        scheduler.set_timesteps(steps)
        for i, time in enumerate(scheduler.timesteps):
            outputs.append([model(**call) for call in calls(i)])
            scheduler.step(torch.zeros(1, 32, SIDE, SIDE), time, masked(0.9))  # its result is thrown away
    return outputs, run


def plainly(model: nn.Module, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**call)
    return out


@pytest.mark.parametrize("downsample", [False, True])
def test_lossless_and_isolated_on_identical_input(downsample: bool) -> None:
    model = uvit(downsample=downsample)
    calls = [{"input_ids": masked(0.3 if not downsample else 0.05), **conditions(number)} for number in range(2)]
    expected, before = [plainly(model, call) for call in calls], state_of(model)
    assert not torch.allclose(expected[0], expected[1], rtol=1e-2)
    outputs, run = loop(model, recap(), lambda _: calls)
    assert not any("refused" in note for note in run.trace.notes), run.trace.notes
    reused = [e for e in run.trace.events if e.action == "reuse"]
    assert {e.branch for e in reused} == {0, 1} and {e.step for e in reused} == {1, 3, 5, 7}
    for step in outputs:
        for found, wanted in zip(step, expected, strict=True):
            close(found, wanted)
    assert state_of(model) == before


def test_local_steps_compute_masked_and_newly_decided_tokens() -> None:
    model, first = uvit(), masked(0.5)
    second = first.clone()
    undecided = (first == MASK).nonzero()
    for _, row, column in undecided[:7]:
        second[0, row, column] = 3
    sizes: list[int] = []
    model.transformer_layers[1].register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    ids = [first, second, second, second]
    policy = ContextReuse(rule=Every(interval=4))
    outputs, run = loop(model, Recipe(reuse=policy), lambda i: [{"input_ids": ids[i], **conditions()}], steps=4)
    num = len(undecided)
    assert sizes == [64, 32, num, num - 7, num - 7], "all, the proof, then masked and changed, then masked only"
    assert not torch.allclose(outputs[1][0], outputs[0][0]), "the decided tokens reach the masked ones"
    spans = [e.blocks for e in run.trace.events if e.action == "reuse"]
    assert spans == [(num, 64), (num - 7, 64), (num - 7, 64)]
    assert run.trace.structure == {"UVit2DModel.tokens": 64}


def test_local_steps_are_near_full_ones() -> None:
    """A few decided tokens move the logits of the masked ones by more than reuse of their features is off."""
    model, first = uvit(), masked(0.5)
    second = torch.where((first == MASK) & (torch.arange(64).view(1, 8, 8) % 9 == 0), 3, first)
    outputs, _ = loop(
        model, Recipe(reuse=ContextReuse()), lambda i: [{"input_ids": second if i else first, **conditions()}], steps=2
    )
    truth, held = plainly(model, {"input_ids": second, **conditions()}), outputs[0][0]
    where = (second == MASK)[:, None].expand_as(truth)
    assert float((outputs[1][0] - truth)[where].norm()) < 0.7 * float((held - truth)[where].norm())


def test_another_grid_and_rows_of_unequal_masks() -> None:
    model = uvit()
    both = torch.cat([masked(0.2), masked(0.7)])
    calls = {False: {"input_ids": both, **conditions(batch=2)}, True: {"input_ids": both[:, :4], **conditions(batch=2)}}
    outputs, _ = loop(model, recap(), lambda i: [calls[i >= 4]])
    for i, (out,) in enumerate(outputs):
        close(out, plainly(model, calls[i >= 4]))


def test_not_a_number_does_not_come_back() -> None:
    model, seen = uvit(), [0]

    def bad(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        seen[0] += 1
        return output * float("nan") if seen[0] == 3 else None

    model.transformer_layers[0].attn1.to_out[0].register_forward_hook(bad)
    call = {"input_ids": masked(0.3), **conditions()}
    outputs, _ = loop(model, recap(), lambda _: [call])
    assert sum(not bool(torch.isfinite(out).all()) for (out,) in outputs) == 1


def test_logits_are_held_while_few_tokens_change() -> None:
    model = uvit()
    ids = [torch.where(torch.arange(64).view(1, 8, 8) < 2 * i, 1, MASK) for i in range(8)]
    _, run = loop(model, token_change_cache(limit=0.1), lambda i: [{"input_ids": ids[i], **conditions()}])
    actions = [e.action for e in run.trace.events]
    assert actions == ["compute", *["reuse"] * 3, "compute", "reuse", "reuse", "compute"]


def test_what_has_no_token_ids_falls_back() -> None:
    pipe = small_wan()
    with hasten.accelerate(pipe, recap()) as run:
        pipe("a", **{**WAN_CALL, "output_type": "latent"})
    assert any("refused" in note and "masked image models" in note for note in run.trace.notes)
    assert any(e.action == "reuse" and e.blocks is None for e in run.trace.events)


def test_flags_of_ids_become_flags_of_tokens() -> None:
    flags = torch.zeros(1, 4, 6, dtype=torch.bool)
    flags[0, 1, 3] = True
    assert pooled(flags, 24) is not None and pooled(flags, 24)[0].nonzero().flatten().tolist() == [9]  # type: ignore[index]
    assert pooled(flags, 6)[0].tolist() == [False, True, False, False, False, False]  # type: ignore[index]
    assert pooled(flags, 5) is None
