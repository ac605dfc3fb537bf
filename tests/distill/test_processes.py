"""Two processes with half of each batch train what one process trains, and where weights are cut each holds half of them."""

from __future__ import annotations

import json
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.methods.pairs import Pairs
from hasten.errors import UsageError
from tests.distill.test_trainer import Critic, weights
from tests.distill.toys import WIDTH, roles, store, trainer

METHODS = {"pairs": Pairs, "critic": Critic}

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


def _train(rank: int, out: str, port: int, kind: str, more: dict[str, Any]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    full, resume, stop = more.pop("full", False), more.pop("resume", False), more.pop("stop", None)
    try:
        method = METHODS[kind]()
        torch.manual_seed(0)
        cast = roles(method, full)
        if rank:  # another start than the first process's must not stay
            next(iter(cast["student"].parameters().values())).data.add_(1)
        settings = TrainSettings(steps=6, batch=8, lr=1e-2, warmup=2, **more)
        made = Trainer(method, cast, store(), settings, Path(out), (WIDTH,), progress=False)
        made.fit(resume, stop)
        (Path(out) / f"held-{rank}.json").write_text(json.dumps(made.held()))
        dist.barrier()
        os._exit(0)  # gloo's own threads sometimes abort a process that takes its groups down, all work being done
    finally:
        dist.destroy_process_group()


def _two(out: Path, kind: str, **more: Any) -> None:
    """Train in two processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mp.spawn(_train, (str(out), free_port(), kind, more), nprocs=2)  # type: ignore[no-untyped-call]


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def alike(one: Path, two: Path) -> None:
    """The same weights, averages and optimisers, up to the rounding of sums in another order."""
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4, msg=name)


@needs_gloo
@pytest.mark.timeout(900)  # each process imports torch
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.long
def test_two_processes_train_what_one_does(tmp_path: Path, kind: str) -> None:
    trainer(METHODS[kind](), tmp_path / "one").fit()
    _two(tmp_path / "two", kind)
    alike(tmp_path / "one", tmp_path / "two")
    logs = [(tmp_path / side / "log.jsonl").read_text().splitlines() for side in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 6
    for ours, theirs in zip(*(map(json.loads, side) for side in logs), strict=True):
        losses = [name for name in ours if name.endswith("loss")]
        assert losses and all(theirs[name] == pytest.approx(ours[name], rel=1e-2) for name in losses)


@needs_gloo
@pytest.mark.timeout(900)
@pytest.mark.parametrize("full", [False, True], ids=["adapters", "copies"])
def test_weights_in_parts_train_what_whole_ones_do(tmp_path: Path, full: bool, capsys: pytest.CaptureFixture[str]) -> None:
    whole = trainer(Critic(), tmp_path / "one", full=full)
    whole.fit()
    _two(tmp_path / "two", "critic", full=full, shard=True)
    alike(tmp_path / "one", tmp_path / "two")
    parts = [json.loads((tmp_path / "two" / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    alone = whole.held()
    with capsys.disabled():
        print(f"\n{'copies' if full else 'adapters'}: bytes held alone {alone}, in two {parts[0]} and {parts[1]}")
    for part in parts:  # a row of five cannot be halved
        for kind in ("base", "optimizer", "average", *(["weights"] if full else [])):
            assert 0.3 * alone[kind] < part[kind] < 0.65 * alone[kind], kind
    assert parts[0]["base"] + parts[1]["base"] == alone["base"]


@needs_gloo
@pytest.mark.timeout(900)
@pytest.mark.parametrize("full", [False, True], ids=["adapters", "copies"])
@pytest.mark.long
def test_a_checkpoint_of_parts_goes_on_whole_and_back(tmp_path: Path, full: bool) -> None:
    trainer(Critic(), tmp_path / "one", full=full).fit()
    _two(tmp_path / "mixed", "critic", full=full, shard=True, stop=2)
    assert trainer(Critic(), tmp_path / "mixed", full=full).fit(resume=True, stop_after=4) == 4
    _two(tmp_path / "mixed", "critic", full=full, shard=True, resume=True)
    alike(tmp_path / "one", tmp_path / "mixed")
    steps = [json.loads(line)["step"] for line in (tmp_path / "mixed" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(6))


def test_one_process_has_nothing_to_cut(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="train.shard cuts weights among processes, and there is one"):
        trainer(Pairs(), tmp_path / "a", shard=True)
