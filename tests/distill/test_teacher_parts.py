"""The teacher's samples survive a kill: those that were made are read, the rest is made, and all are as without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.distill.data.parts import Parts
from hasten.distill.data.store import Store
from hasten.distill.data.teach import make_pairs
from hasten.pipelines import loading

CALL = {"num_inference_steps": 4, "guidance_scale": 1.0}
PROMPTS = ["a three", "a seven"]


class Killed(Exception):
    pass


def made(parts: Parts | None, stop: int | None = None) -> tuple[Store, int]:
    """Six samples in batches of two, and how often the network was asked."""
    pipe, asked = loading.open_pipeline("tiny-flux", quiet=True), []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: asked.append(1))

    def told(done: int) -> None:
        if stop is not None and done >= stop:
            raise Killed

    try:
        return make_pairs(pipe, PROMPTS, 6, batch=2, points=2, parts=parts, told=told, **CALL), len(asked)
    finally:
        hook.remove()


@pytest.mark.long
def test_a_killed_teacher_goes_on_and_gives_the_same(tmp_path: Path) -> None:
    whole, evaluations = made(None)
    parts = Parts(tmp_path / "parts", {"seed": 0})
    with pytest.raises(Killed):
        made(parts, stop=4)
    assert len(list(parts.folder.iterdir())) == 2
    found, later = made(parts)
    assert torch.equal(found.x0, whole.x0) and torch.equal(found.way, whole.way) and torch.equal(found.z, whole.z)
    learning = evaluations - 3 * CALL["num_inference_steps"]  # how the pipeline calls its network is learned each time
    assert later - learning == CALL["num_inference_steps"], "one batch of three was missing"
    again, none = made(parts)
    assert none == learning and torch.equal(again.x0, whole.x0)


def test_parts_of_another_run_and_torn_ones_are_made_anew(tmp_path: Path) -> None:
    mine, other = Parts(tmp_path, {"seed": 0}), Parts(tmp_path, {"seed": 1})
    mine.save(0, {"x0": torch.ones(2)})
    assert other.load(0) is None and mine.load(1) is None
    kept = mine.load(0)
    assert kept is not None and torch.equal(kept["x0"], torch.ones(2))
    (tmp_path / "000000.safetensors").write_bytes(b"torn")
    assert mine.load(0) is None
    mine.drop()
    assert not tmp_path.exists()
