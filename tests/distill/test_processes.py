"""Two processes with half of each batch train what one process trains."""

from __future__ import annotations

import json
import os
import socket
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hasten.distill.methods.pairs import Pairs
from hasten.distill.settings import TrainSettings
from hasten.distill.trainer import Trainer
from tests.distill.test_trainer import Critic, weights
from tests.distill.toys import WIDTH, roles, store, trainer

METHODS = {"pairs": Pairs, "critic": Critic}


def _train(rank: int, out: str, port: int, kind: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        method = METHODS[kind]()
        torch.manual_seed(0)
        cast = roles(method)
        if rank:  # another start than the first process's must not stay
            next(iter(cast["student"].parameters().values())).data.add_(1)
        settings = TrainSettings(steps=6, batch=8, lr=1e-2, warmup=2)
        Trainer(method, cast, store(), settings, Path(out), (WIDTH,), progress=False).fit()
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


@pytest.mark.timeout(900)  # each process imports torch
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize("kind", METHODS)
def test_two_processes_train_what_one_does(tmp_path: Path, kind: str) -> None:
    trainer(METHODS[kind](), tmp_path / "one").fit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mp.spawn(_train, (str(tmp_path / "two"), _free_port(), kind), nprocs=2)  # type: ignore[no-untyped-call]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=name)
    logs = [(tmp_path / side / "log.jsonl").read_text().splitlines() for side in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 6
    for ours, theirs in zip(*(map(json.loads, side) for side in logs), strict=True):
        losses = [name for name in ours if name.endswith("loss")]
        assert losses and all(theirs[name] == pytest.approx(ours[name], rel=1e-2) for name in losses)
