"""Sparse attention where two ranks share a sequence, by Ulysses or on a ring: they give what one gives, and never wait for
each other in vain."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import multiprocessing, nn

CASES: dict[str, dict[str, Any]] = {
    "ulysses": {"config": {"ulysses_degree": 2}},
    "ring": {"config": {"ring_degree": 2}},
    "heads that do not divide": {"config": {"ring_degree": 2}, "heads": 3},
    "any number of tokens": {"config": {"ring_degree": 2, "ring_anything": True}},
    "joint": {"config": {"ring_degree": 2}, "joint": True},
    "one rank declines": {"config": {"ulysses_degree": 2}, "declines": True},
    "one rank is full": {"config": {"ring_degree": 2}, "room": 1},
}
"""config: of diffusers. heads: of the network. joint: FLUX, where the ranks' text stands between
parts of the image. declines: rank 1 says that nothing pays. room: bytes that it may hold."""

MIXED = {"config": {"ring_degree": 2, "ulysses_degree": 2}, "heads": 4}


def network(case: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A small network and the arguments of a call."""
    from diffusers import WanTransformer3DModel

    from tests import hosts
    from tests.contract import seeded

    if case.get("joint"):
        call = hosts.flux_arguments() | {"encoder_hidden_states": seeded(1, 1, 6, 32), "txt_ids": torch.zeros(6, 3)}
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        call["img_ids"] = torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], 1)
        return hosts.small_flux().transformer, call | {"guidance": torch.tensor([3.5]), "return_dict": False}
    torch.manual_seed(0)
    heads = case.get("heads", 2)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=12, text_dim=32, freq_dim=64, ffn_dim=48,
        num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    call = hosts.wan_arguments() | {"hidden_states": seeded(0, 1, 16, 2, 4, 6), "return_dict": False}
    return model.eval(), call


def sparse(model: nn.Module, recipe: Any, call: dict[str, Any], room: int | None = None) -> tuple[torch.Tensor, Any]:
    """The last of two steps with `recipe`, and the session."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    import hasten
    from hasten.limits import Limits

    scheduler = FlowMatchEulerDiscreteScheduler()
    with hasten.accelerate(model, recipe, scheduler=scheduler, limits=Limits(max_cache_bytes=room)) as run:
        scheduler.set_timesteps(2)
        scheduler.set_begin_index(0)
        for time in scheduler.timesteps:
            y = model(**call)[0]
            scheduler.step(y, time, y)
    return y, run


def compare(name: str, case: dict[str, Any], rank: int) -> dict[str, Any]:
    """One case on this rank: distances from what one process gives."""
    from diffusers import ContextParallelConfig

    from hasten.pipelines.attention import seam as attention_seam
    from tests.pipelines.attention_recipes import FULL, PART, STOOD_FOR

    model, call = network(case)
    found: dict[str, Any] = {}
    whole = {recipe.name: sparse(model, recipe, call)[0] for recipe in (FULL, PART, STOOD_FOR)}
    plain = model(**call)[0]
    model.enable_parallelism(config=ContextParallelConfig(**case["config"]))
    before = [module.processor for module in model.modules() if getattr(module, "processor", None) is not None]
    pays = attention_seam.declines
    if case.get("declines") and rank:
        attention_seam.declines = lambda found, *_: {}
    try:
        for recipe in (FULL, PART, STOOD_FOR):
            y, run = sparse(model, recipe, call, case.get("room") if rank else None)
            found[recipe.name] = float((y - whole[recipe.name]).abs().max())
            found[f"{recipe.name} plain"] = float((y - plain).abs().max())
            found["calls"] = [(at.tokens, at.action) for at in run.trace.attention]
            found["notes"] = list(run.trace.notes)
    finally:
        attention_seam.declines = pays
    after = [module.processor for module in model.modules() if getattr(module, "processor", None) is not None]
    found["restored"] = all(map(lambda one, two: one is two, before, after))
    if case["config"].get("ring_degree", 1) == 1:  # diffusers' own ring needs a GPU
        found["after"] = float((model(**call)[0] - plain).abs().max())
    return found


def work(rank: int, folder: str, port: int, size: int, cases: dict[str, dict[str, Any]]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "RANK": str(rank)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    torch.accelerator.device_count = lambda: size  # type: ignore[assignment]  # diffusers divides by it, on the CPU too
    try:
        with torch.no_grad():
            found = {name: compare(name, case, rank) for name, case in cases.items()}
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
    finally:
        torch.distributed.destroy_process_group()


def on_ranks(folder: Path, size: int, cases: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    multiprocessing.spawn(work, (str(folder), 27500 + os.getpid() % 2000, size, cases), nprocs=size)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(tmp_path_factory.mktemp("attention-ranks"), 2, CASES)


def agrees(found: dict[str, Any], name: str, tokens: int) -> None:
    """What one process gives, with its plan, to rounding; all tokens on every rank; nothing left behind."""
    assert found["full plain"] < 1e-5 and found["part plain"] > 1e-4 and found["stood-for plain"] > 1e-4
    if name != "joint":  # there the tokens stand in another order, and blocks are others
        assert max(found[recipe] for recipe in ("full", "part", "stood-for")) < 1e-5
    assert found["calls"] and all(call == [tokens, "sparse"] for call in found["calls"])
    assert found["restored"] and found.get("after", 0) < 1e-5
    assert any("trade heads for tokens" in note for note in found["notes"]) == (name != "ulysses")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.keys() & {"declines", "room"}])
@pytest.mark.long
def test_each_rank_reads_all_tokens_of_its_heads(ranks: list[dict[str, Any]], name: str) -> None:
    for each in ranks:
        agrees(each[name], name, 22 if name == "joint" else 12)


def test_a_site_is_dense_on_all_ranks_or_on_none(ranks: list[dict[str, Any]]) -> None:
    for found in (each["one rank declines"] for each in ranks):
        assert not found["calls"] and found["part plain"] < 1e-5
    assert any("because another rank leaves them so" in note for note in ranks[0]["one rank declines"]["notes"])


def test_a_rank_that_gives_up_exchanges_tokens_all_the_same(ranks: list[dict[str, Any]]) -> None:
    """Its heads are dense from the second step on; on diffusers' own ring the other would wait for it for ever."""
    one, two = (each["one rank is full"] for each in ranks)
    assert len(one["calls"]) == 4 and len(two["calls"]) == 2
    assert one["part"] == two["part"] and 1e-4 < one["part"] and 1e-4 < one["part plain"], "half of the heads are"


@pytest.mark.slow
def test_a_ring_of_ulysses(tmp_path: Path) -> None:
    for found in (each["mixed"] for each in on_ranks(tmp_path, 4, {"mixed": MIXED})):
        agrees(found, "mixed", 12)


@pytest.mark.parametrize(
    ("ring", "ulysses", "heads", "trades"),
    [(2, 1, 4, "as they are"), (2, 1, 3, "padded"), (2, 2, 3, ""), (2, 2, 7, "padded"), (4, 1, 2, ""), (8, 2, 40, "")]
    + [(5, 1, 12, ""), (8, 1, 30, "padded"), (2, 1, None, "as they are"), (1, 8, 3, "as they are")],
)
def test_heads_are_padded_or_refused(ring: int, ulysses: int, heads: int | None, trades: str) -> None:
    """As diffusers pads: the last rank keeps a head of its own, else it has nothing to do and diffusers stops."""
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig

    from hasten.pipelines.attention.ranks import by_heads, reason_against

    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses))
    if not trades:
        assert f"{heads} heads cannot be spread over the {ring * ulysses} ranks" in reason_against(config, heads)
        return
    made = by_heads(config, heads)
    assert not reason_against(config, heads)
    inner = made.context_parallel_config
    assert (inner.ring_degree, inner.ulysses_degree) == (1, ring * ulysses) and not inner.ring_anything
    assert inner.ulysses_anything == (trades == "padded")
    assert (made is config) == (ring == 1) and config.context_parallel_config.ring_degree == ring, "the user's stays"


def test_what_is_set_on_a_followed_processor_stays_when_it_is_not() -> None:
    """As `enable_parallelism` does in the middle of a session."""
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    from hasten.pipelines.attention.processors import stand_in

    original, config = WanAttnProcessor(), ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))
    made = stand_in(original, SimpleNamespace(heads=3), torch.zeros(0))
    assert made._parallel_config is None and isinstance(made, WanAttnProcessor)
    made._parallel_config = config
    assert original._parallel_config is config and WanAttnProcessor._parallel_config is None
    inner = made._parallel_config.context_parallel_config
    assert inner.ulysses_degree == 2 and inner.ulysses_anything
    made._parallel_config = None
    assert original._parallel_config is None is made._parallel_config
