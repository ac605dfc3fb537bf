"""Fetching through huggingface_hub from a hub on this machine: progress, stopping, going on, damage, no room, and words for each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hasten.errors import ModelError, OutputError
from hasten.ui.engine import Snapshot, read
from hasten.ui.engine.cancel import Cancelled
from hasten.ui.engine.desk import Desk
from hasten.ui.engine.models import Models, cache
from hasten.ui.engine.place import Place
from tests.hosts import saved, small_unet
from tests.ui.hubs import Hub, of_folder, served

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
ASKED = read({"kind": "download", "model": MODEL})
LARGE = "unet/diffusion_pytorch_model.safetensors"
JOB = "0123456789abcdef"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(small_unet(), tmp_path_factory.mktemp("model") / "sd")


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """With a pickle and a second copy of weights, which nobody wants; and nothing fetched yet."""
    found = of_folder(MODEL, folder)
    found.files |= {"unet/diffusion_pytorch_model.bin": b"\x80\x04.", "unet/diffusion_pytorch_model.fp16.safetensors": b"half", "run.py": b"1/0"}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with served(found) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield found


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    place = Place(tmp_path / "home")
    place.make()
    return Desk(place)


def left_half() -> list[Path]:
    return [path for path in cache().rglob("*") if path.name.endswith(".incomplete")]


def test_nobody_is_asked_before_the_button(hub: Hub, desk: Desk) -> None:
    card = Models(desk.place).card(MODEL)
    assert not card.ready and card.bytes > 10**9 and "asks the hub for the true size" in card.note
    assert hub.asked == []


def test_what_is_needed_comes_with_its_true_size_and_runs(hub: Hub, desk: Desk) -> None:
    told: list[Snapshot] = []
    found = desk.perform(JOB, ASKED, told.append, lambda: False)
    wanted = {name for name in hub.files if not name.endswith((".bin", ".py")) and ".fp16." not in name}
    assert set(hub.asked) == wanted and hub.asked[-1] == "model_index.json"
    assert found == {"model": MODEL, "bytes": sum(len(hub.files[name]) for name in wanted), "files": len(wanted)}
    phases = list(dict.fromkeys(snapshot.phase for snapshot in told))
    assert phases[1].startswith("Asking") and f"{found['bytes'] / 1e6:.3g} MB" in phases[2]
    assert told[-1].step == told[-1].steps and left_half() == []
    assert Models(desk.place).card(MODEL).ready
    made = desk.perform(JOB, read({"kind": "generate", "model": MODEL, "prompt": "a", "width": 32, "height": 32, "steps": 2, "recipe": "plain"}), told.append, lambda: False)
    assert made["row"]["nfe"] > 0


def test_one_that_is_stopped_leaves_nothing_half_and_goes_on(hub: Hub, desk: Desk) -> None:
    hub.files[LARGE] += b"\0" * (24 * 2**20)  # more than is read from the hub at once
    hub.slow = LARGE
    steps: list[int] = []

    def seen(snapshot: Snapshot) -> None:
        steps.append(snapshot.step)
        if snapshot.step >= 10:
            hub.go.set()

    with pytest.raises(Cancelled):
        desk.perform(JOB, ASKED, seen, lambda: bool(steps) and steps[-1] >= 10)
    assert LARGE in hub.asked and left_half() == [] and not Models(desk.place).card(MODEL).ready
    come, hub.slow = set(hub.asked) - {LARGE}, ""
    hub.asked.clear()
    desk.perform(JOB, ASKED, lambda snapshot: None, lambda: False)
    assert come and not come & set(hub.asked) and LARGE in hub.asked, "what had come whole is not fetched again"
    assert Models(desk.place).card(MODEL).ready


def test_what_came_damaged_is_removed_and_told(hub: Hub, desk: Desk) -> None:
    hub.lies[LARGE] = "0" * 64
    with pytest.raises(ModelError, match=f"{LARGE} came damaged.*removed"):
        desk.perform(JOB, ASKED, lambda snapshot: None, lambda: False)
    assert not Models(desk.place).card(MODEL).ready
    assert not any(path.name == Path(LARGE).name for path in cache().rglob("*.safetensors") if "unet" in path.parts)
    del hub.lies[LARGE]
    desk.perform(JOB, ASKED, lambda snapshot: None, lambda: False)
    assert hub.asked.count(LARGE) == 2 and Models(desk.place).card(MODEL).ready


def test_no_room_is_told_before_anything_is_fetched(hub: Hub, desk: Desk) -> None:
    hub.sizes[LARGE] = 10**16
    with pytest.raises(OutputError, match="10,000,000.0 GB more"):
        desk.perform(JOB, ASKED, lambda snapshot: None, lambda: False)
    assert hub.asked == [] and left_half() == []


def test_what_is_no_model_or_not_there_is_told(hub: Hub, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    index = hub.files.pop("model_index.json")
    with pytest.raises(ModelError, match="no pipeline"):
        desk.perform(JOB, ASKED, lambda snapshot: None, lambda: False)
    hub.files["model_index.json"] = index
    hub.model = "somebody/else"
    with pytest.raises(ModelError, match="Fetching .* failed"):
        desk.perform(JOB, ASKED, lambda snapshot: None, lambda: False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(ModelError, match="Check the network"):
        desk.perform(JOB, ASKED, lambda snapshot: None, lambda: False)
    assert time.monotonic() - began < 120
