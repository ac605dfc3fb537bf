"""Weights in parts with blocks that are evaluated twice: two processes train what one does, and what the export holds then."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.method import Method
from hasten.distill.methods.dmd import DMDGAN
from hasten.distill.methods.lcm import LCM
from hasten.distill.methods.scm import SCM
from hasten.distill.network.roles import Adapter, Roles
from tests.distill.test_chunks import SHAPE, host, rows
from tests.distill.test_processes import alike, free_port, needs_gloo

CASES: dict[str, tuple[Method, bool]] = {
    "a tangent": (SCM(warmup=2, scale=(1.0, 3.0), told=True), False),
    "a critic with a judge": (DMDGAN(calls=2, ratio=1), False),
    "copies and an average": (LCM(scale=(1.0, 3.0), decay=0.9), True),
}


def made(name: str, out: Path, **more: bool) -> Trainer:
    """A training of a Wan network of two blocks."""
    method, full = CASES[name]
    torch.manual_seed(0)
    teacher = host()
    teacher = replace(teacher, fixed=teacher.fixed | {"encoder_hidden_states": torch.zeros(1, 5, 8)})  # a judge looks before a prompt is there
    roles = Roles.of_copies(teacher, method.trains) if full else Roles.on_one_base(teacher, method.trains, Adapter(rank=2))
    settings = TrainSettings(**{"steps": 2, "batch": 2, "lr": 1e-3, "warmup": 1, "checkpointing": True, **more})
    return Trainer(method, roles, rows(), settings, out / name, SHAPE, progress=False)


def counted(name: str, out: Path, **more: bool) -> dict[str, int]:
    """Train; bytes held at the end, and how often first blocks were evaluated."""
    trainer, calls = made(name, out, **more), list[int]()
    for network in {id(role.host.network): role.host.network for role in trainer.roles.values()}.values():
        network.get_submodule("blocks.0").register_forward_pre_hook(lambda *_: calls.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit()
    return trainer.held() | {"evaluated": len(calls)}


def _train(rank: int, out: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {name: counted(name, Path(out), shard=True) for name in CASES}
    (Path(out) / f"counted-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # as in `test_processes`


@needs_gloo
@pytest.mark.timeout(900)
@pytest.mark.long
def test_two_processes_with_recomputed_blocks_train_what_one_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = {name: counted(name, tmp_path / "one") for name in CASES}
    mp.spawn(_train, (str(tmp_path / "two"), free_port()), nprocs=2)  # type: ignore[no-untyped-call]
    parts = [json.loads((tmp_path / "two" / f"counted-{rank}.json").read_text()) for rank in (0, 1)]
    for name, whole in alone.items():
        alike(tmp_path / "one" / name, tmp_path / "two" / name)
        once = counted(name, tmp_path / "kept", checkpointing=False)["evaluated"]
        assert once < whole["evaluated"] == parts[0][name]["evaluated"] == parts[1][name]["evaluated"]
        exported = made(name, tmp_path / "two")
        exported.restore(to_train=False)
        told = exported.held()
        with capsys.disabled():
            print(f"\n{name}: bytes held alone {whole}, in two {parts[0][name]} and {parts[1][name]}, for the export {told}")
        for part in (each[name] for each in parts):
            assert all(part[kind] < 0.55 * whole[kind] for kind in ("base", "average", "optimizer"))
        assert told["optimizer"] == 0 and all(told[kind] == whole[kind] for kind in ("base", "weights", "average"))
