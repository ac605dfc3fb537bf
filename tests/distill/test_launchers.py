"""The command lines of docs/training-machines.md for several processes, as they are typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

REPOSITORY = Path(__file__).parents[2]
BINARIES = Path(sys.executable).parent
SMALL = [
    "-m", "hasten", "train", "pairs", "--model", "tiny-flux", "--set", "data.count=2", "--set", "data.prompts=[a seven]",
    "--set", "data.call.num_inference_steps=2", "--train_batch_size", "2", "--rank=2", "--max_train_steps", "2",
]  # fmt: skip

pytestmark = [
    pytest.mark.timeout(1800),  # every process imports torch and diffusers
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
]


def _run(words: list[str], out: Path, *more: str) -> str:
    """Output of a launcher and its processes; they must end well."""
    ran = subprocess.run(
        [*words, *SMALL, "--out", str(out), *more], cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout + ran.stderr


def _whole(out: Path, told: str) -> None:
    """One log, one checkpoint, one student, said once."""
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [0, 1]
    assert json.loads((out / "latest" / "state.json").read_text())["step"] == 2
    assert (out / "student" / "pytorch_lora_weights.safetensors").is_file()
    assert told.count("Memory plan:") == 1 and told.count("The student is in") == 1, told


@pytest.mark.long
def test_torchrun_with_weights_in_parts(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [str(BINARIES / "torchrun"), "--nproc-per-node", "2", "--master-port", "29641"]
    _whole(out, _run(words, out, "--set", "train.shard=true", "--set", "train.samples_every=2"))
    assert (out / "samples" / "000002.png").is_file()


@pytest.mark.slow
def test_accelerate(tmp_path: Path) -> None:
    words = [str(BINARIES / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "29642"]
    _whole(tmp_path / "run", _run(words, tmp_path / "run", "--set", "train.shard=true"))  # one process would be refused
