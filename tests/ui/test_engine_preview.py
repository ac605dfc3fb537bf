"""Pictures of latents: the map is least squares, it shows what will come, and it changes nothing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hasten.ui.engine import Snapshot, read
from hasten.ui.engine import preview as module
from hasten.ui.engine.desk import Desk
from hasten.ui.engine.linear_map import LARGEST, LinearMap
from hasten.ui.engine.place import Place
from tests.ui.engines import IMAGE


@pytest.fixture
def place(tmp_path: Path) -> Place:
    found = Place(tmp_path)
    found.make()
    return found


def linear(latents: torch.Tensor, patch: int, seed: int = 5) -> np.ndarray[Any, Any]:
    """Frames that are a linear map of latents [f, C, h, w], in [0, 1]."""
    draw = torch.Generator().manual_seed(seed)
    weights = 0.05 * torch.randn(latents.shape[1], 3 * patch * patch, generator=draw)
    flat = (latents.movedim(1, -1) @ weights + 0.5).clamp(0, 1)
    return torch.nn.functional.pixel_shuffle(flat.movedim(-1, 1), patch).movedim(1, -1).numpy()


def test_a_linear_autoencoder_is_found_exactly() -> None:
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    made = LinearMap("x", 4, 4)
    made.learn(latents, linear(latents, 4))
    fresh = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert np.abs(made.picture(fresh[0]) / 255 - linear(fresh, 4)[0]).max() < 0.01


def test_maps_are_kept_and_read_back(place: Place) -> None:
    latents = torch.randn(2, 4, 8, 8)
    made = LinearMap("0123456789abcdef", 4, 2)
    made.learn(latents, linear(latents, 2))
    made.save(place)
    found = LinearMap.load(place, "0123456789abcdef")
    assert found is not None and torch.equal(found.weights, made.weights)
    (place.previews / "map-0123456789abcdef.json").write_text("{broken")
    assert LinearMap.load(place, "0123456789abcdef") is None


def test_pictures_are_no_larger_than_a_page_needs() -> None:
    made = LinearMap("x", 4, 8)
    made.learn(torch.randn(1, 4, 8, 8), np.random.default_rng(0).random((1, 64, 64, 3), dtype=np.float32))
    assert max(made.picture(torch.randn(4, 600, 90)).shape) == LARGEST
    z = torch.randn(4, 128, 64)
    small, whole = made.picture(z), LinearMap("y", 4, 8)
    whole.square, whole.cross = made.square, made.cross
    parts = torch.from_numpy(np.concatenate([whole.picture(z[:, start : start + 64]) for start in (0, 64)]).astype(np.float32))
    assert small.shape == (512, 256, 3)
    mean = torch.nn.functional.avg_pool2d(parts.movedim(-1, 0)[None], 2)[0].movedim(0, -1).numpy()
    assert np.abs(mean - small).mean() < 2  # clamped before the mean on one side, behind it on the other


def run(desk: Desk, asked: dict[str, Any], number: int) -> tuple[dict[str, Any], list[Snapshot], list[bytes]]:
    """A run's result, its snapshots, and the pictures that were shown."""
    seen: list[Snapshot] = []
    shown: list[bytes] = []

    def tell(snapshot: Snapshot) -> None:
        if snapshot.preview and (not seen or seen[-1].preview != snapshot.preview):
            shown.append(module.read(desk.place, snapshot.preview) or b"")
        seen.append(snapshot)

    return desk.perform(f"{number:016x}", read(asked), tell, lambda: False), seen, shown


@pytest.mark.parametrize(("model", "recipe"), [("tiny-image", "plain"), ("tiny-flux", "balanced")])
def test_previews_show_what_comes_and_change_nothing(place: Place, model: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(place)
    asked = IMAGE | {"model": model, "steps": 10, "seed": 4, "recipe": recipe}
    plain, seen, shown = run(desk, asked, 1)
    assert not shown and not any(snapshot.preview for snapshot in seen)
    monkeypatch.setattr(module, "EVERY", 0.0)
    run(desk, asked | {"preview": True, "seed": 1}, 2)  # a finished run makes the map a real one
    with_previews, _, shown = run(desk, asked | {"preview": True}, 3)
    file = [desk.outputs.file(result["output"], "result.png") for result in (plain, with_previews)]
    last, final = (np.asarray(Image.open(each).convert("RGB"), dtype=float) for each in (io.BytesIO(shown[-1]), file[1]))
    assert np.array_equal(np.asarray(Image.open(file[0])), np.asarray(Image.open(file[1])))
    assert len(shown) == 10 and max(last.shape) <= LARGEST
    small = np.asarray(Image.fromarray(final.astype(np.uint8)).resize(last.shape[1::-1], Image.Resampling.BOX), dtype=float)
    assert np.corrcoef(last.ravel(), small.ravel())[0, 1] > 0.6
    first = np.asarray(Image.open(io.BytesIO(shown[0])).convert("RGB"), dtype=float)
    assert np.abs(last - small).mean() <= np.abs(first - small).mean() + 2


def test_at_most_two_a_second(place: Place) -> None:
    _, seen, shown = run(Desk(place), IMAGE | {"steps": 30, "preview": True}, 1)
    seconds = seen[-1].seconds - next(snapshot.seconds for snapshot in seen if snapshot.phase == "Denoising")
    assert len(shown) <= 2 * seconds + 1


def test_only_ids_of_previews_are_read(place: Place) -> None:
    (place.previews / f"{'a' * 16}.png").write_bytes(b"picture")
    assert module.read(place, f"{'a' * 16}.3") == b"picture"
    for wrong in ("../jobs.sqlite", "a" * 16, "../" + "a" * 16 + ".1", f"{'b' * 16}.1", ""):
        assert module.read(place, wrong) is None
    module.remove(place, "a" * 16)
    assert module.read(place, f"{'a' * 16}.3") is None
