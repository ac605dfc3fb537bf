"""Ranks that share a sample decide alike; without a group they decide each for itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

import hasten
from hasten.agree import across, is_sharded
from hasten.errors import UsageError

RECIPES = ("easycache:limit=0.2", "auto:latent_error=0.1", "first-block-cache:limit=0.08")


def work(rank: int, folder: str, port: int) -> None:
    """One rank: its own noise and prompt, so that on its own it would decide otherwise than the other."""
    from tests import hosts

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        pipe = hosts.small_wan()
        pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():  # one rank's values move much more than the other's, as parts of one video may
            pipe.transformer.proj_out.weight.mul_(1 + 4 * rank)
            pipe.transformer.patch_embedding.weight.mul_(1 + 4 * rank)
        call = {**hosts.WAN_CALL, "num_inference_steps": 24, "output_type": "latent"}
        found = {}
        for recipe in RECIPES:
            for name, group in (("together", torch.distributed.group.WORLD), ("alone", None)):
                with hasten.accelerate(pipe, recipe, group=group) as run:
                    pipe("a cat", generator=torch.Generator().manual_seed(rank), **call)
                found[f"{recipe} {name}"] = sorted(
                    {(event.step, event.site) for event in run.trace.events if event.action != "compute"}
                )
        values = torch.tensor([1.0, float(rank), float("nan") if rank else 2.0])
        found["mean"] = [str(v) for v in across(torch.distributed.group.WORLD)(values).tolist()]
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[object]]]:
    folder = tmp_path_factory.mktemp("ranks")
    port = 29500 + os.getpid() % 2000
    multiprocessing.spawn(work, (str(folder), port), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.long
def test_ranks_of_one_sample_decide_alike(ranks: list[dict[str, list[object]]], recipe: str) -> None:
    one, two = (found[f"{recipe} together"] for found in ranks)
    assert one == two
    assert ranks[0][f"{recipe} alone"] != ranks[1][f"{recipe} alone"], "else this test shows nothing"


def test_the_mean_keeps_flags_and_spreads_nan(ranks: list[dict[str, list[object]]]) -> None:
    assert ranks[0]["mean"] == ranks[1]["mean"] == ["1.0", "0.5", "nan"]


def test_spread_weights_need_a_group() -> None:
    from tests import hosts

    pipe = hosts.small_wan()
    sharded = type("FSDPWanTransformer3DModel", (type(pipe.transformer),), {})
    pipe.transformer.__class__ = sharded  # what torch's fully_shard does
    assert is_sharded(pipe.transformer)
    with pytest.raises(UsageError, match="group="):
        hasten.accelerate(pipe, "balanced")
