"""Sparse attention where two ranks share a sequence (Ulysses): each plans its own heads, and all evaluate equally often."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing


def work(rank: int, folder: str, port: int) -> None:
    from diffusers import ContextParallelConfig, FlowMatchEulerDiscreteScheduler

    import hasten
    from tests import hosts
    from tests.pipelines.attention_recipes import FULL, PART

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model = hosts.small_wan(layers=2).transformer
        call = hosts.wan_arguments() | {"return_dict": False}
        found: dict[str, Any] = {}
        with torch.no_grad():
            alone = model(**call)[0]
            torch.accelerator.device_count = lambda: 2  # type: ignore[assignment]  # diffusers divides by it, on the CPU too
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
            shared = model(**call)[0]
            for recipe in (FULL, PART):
                scheduler = FlowMatchEulerDiscreteScheduler()
                with hasten.accelerate(model, recipe, scheduler=scheduler) as run:
                    scheduler.set_timesteps(2)
                    scheduler.set_begin_index(0)
                    for time in scheduler.timesteps:
                        y = model(**call)[0]
                        scheduler.step(y, time, y)
                found[recipe.name] = float((y - shared).abs().max())
                found[f"{recipe.name} calls"] = [(at.tokens, at.action) for at in run.trace.attention]
            found["before"] = float((shared - alone).abs().max())
            found["after"] = torch.equal(model(**call)[0], shared)
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:hasten")
def test_each_rank_reads_its_own_heads(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (str(tmp_path), 27500 + os.getpid() % 2000), nprocs=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["before"] < 1e-5 and found["full"] < 1e-5 and found["part"] > 1e-4
        assert found["full calls"] == found["part calls"] == [[8, "sparse"]] * 4, "all tokens, although each rank holds half"
        assert found["after"]
