"""A training that is killed at any moment goes on as if nothing had been."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hasten.distill.methods.pairs import Pairs
from tests.distill.test_trainer import Critic, same, weights
from tests.distill.toys import trainer

STEPS = 60
REPOSITORY = Path(__file__).parents[2]
CHILD = f"""
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.distill.test_trainer import Critic
from tests.distill.toys import trainer
made = trainer(Critic(), Path(sys.argv[1]), steps={STEPS})
made.checkpoint_seconds = 0.0
made.fit(resume=sys.argv[2] == "resume")
"""


def _killed(out: Path, how: str, after: int) -> None:
    """Run the training until it has a checkpoint of `after` steps, and kill it, whatever it is doing."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(out), how], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    try:
        while child.poll() is None and _step(out) < after:
            time.sleep(0.003)
    finally:
        child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "it ended before it was killed"


def _step(out: Path) -> int:
    try:
        return int(json.loads((out / "latest" / "state.json").read_text())["step"])
    except (OSError, ValueError):  # between two renames
        return -1


@pytest.mark.timeout(900)  # imports torch twice, which takes minutes on a busy machine
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    trainer(Critic(), tmp_path / "whole", steps=STEPS).fit()
    out = tmp_path / "killed"
    _killed(out, "start", 7)
    first = _step(out)
    _killed(out, "resume", first + 9)
    assert trainer(Critic(), out, steps=STEPS).fit(resume=True) == STEPS
    assert same(weights(tmp_path / "whole"), weights(out))
    lines = [[json.loads(line) for line in (side / "log.jsonl").read_text().splitlines()] for side in (tmp_path / "whole", out)]
    for ours, theirs in zip(*lines, strict=True):
        assert ours | {"time": 0} == theirs | {"time": 0}


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    """The moment at which the old checkpoint is aside and the new one not yet in its place."""
    trainer(Pairs(), tmp_path / "whole").fit()
    trainer(Pairs(), tmp_path / "a").fit(stop_after=3)
    (tmp_path / "a" / "latest").rename(tmp_path / "a" / "latest.old")
    (tmp_path / "a" / "latest.part").mkdir()
    (tmp_path / "a" / "latest.part" / "half").write_text("a checkpoint that was being written")
    assert trainer(Pairs(), tmp_path / "a").fit(resume=True) == 6
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "a"))
    assert {folder.name for folder in (tmp_path / "a").iterdir()} == {"latest", "log.jsonl"}


def test_weights_that_no_loss_reaches_do_not_keep_a_training_from_going_on(tmp_path: Path) -> None:
    made = trainer(Pairs(), tmp_path / "a", full=True, weight_decay=0.1)
    made.roles["student"].host.network.first.bias.requires_grad_(False)  # type: ignore[union-attr]
    made.fit(stop_after=2)
    saved = load_file(tmp_path / "a" / "latest" / "student" / "optimizer.safetensors")
    assert len({name.split(".")[0] for name in saved}) == 3
    assert trainer(Pairs(), tmp_path / "a", full=True, weight_decay=0.1).fit(resume=True) == 6
