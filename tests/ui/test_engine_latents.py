"""A run that fails behind its loop costs the decoding only: what was denoised is kept, and decoded again without the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.testing import assert_array_equal

from hasten.errors import UsageError
from hasten.pipelines.generate import frames_of
from hasten.ui.engine import Engine, RequestError, read
from hasten.ui.engine import latents as kept_latents
from hasten.ui.engine.latents import MOST, Kept, keeping, tiled
from hasten.ui.engine.place import Place
from hasten.ui.engine.restore import restore
from hasten.ui.page.results import failure
from tests.hosts import (
    FLUX_CALL,
    PIXART_CALL,
    UNET_CALL,
    WAN_CALL,
    small_flux,
    small_pixart,
    small_unet,
    small_wan,
)
from tests.ui.engines import IMAGE, done

JOB = "0123456789abcdef"
HOSTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "wan": (small_wan, WAN_CALL), "pixart": (small_pixart, PIXART_CALL), "flux": (small_flux, FLUX_CALL), "unet": (small_unet, UNET_CALL),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Place:
    found = Place(tmp_path)
    found.make()
    return found


class Evaluations:
    """How often a pipeline's denoiser is called."""

    def __init__(self, pipe: Any) -> None:
        self.number = 0
        (getattr(pipe, "transformer", None) or pipe.unet).register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.number += 1


def failing(pipe: Any, error: Exception) -> None:
    """Its decoder fails once, at work."""

    class Full(type(pipe.vae)):  # type: ignore[misc]
        failed = False

        def decode(self, *args: Any, **kwargs: Any) -> Any:
            if not Full.failed:
                Full.failed = True
                raise error
            return super().decode(*args, **kwargs)

    pipe.vae.__class__ = Full


@pytest.mark.parametrize("name", list(HOSTS))
def test_what_is_decoded_again_is_what_the_pipeline_makes(place: Place, name: str) -> None:
    make, call = HOSTS[name]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    counted = Evaluations(pipe)
    with keeping(pipe, place, JOB, lambda: {"row": {"nfe": 6}}):
        output = pipe(prompt="a seven", generator=torch.Generator().manual_seed(0), **(call | {"num_inference_steps": 2, "output_type": "np"}))
    before = counted.number
    found = Kept.read(place, JOB)
    assert_array_equal(found.decoded(pipe), frames_of(output))
    assert counted.number == before > 0 and found.facts == {"row": {"nfe": 6}}
    kept_latents.remove(place, JOB)
    with pytest.raises(UsageError, match="not kept any more"):
        Kept.read(place, JOB)


def test_a_safety_checker_is_not_gone_round(place: Place) -> None:
    pipe = small_unet()
    pipe.register_modules(safety_checker=torch.nn.Identity())
    with keeping(pipe, place, JOB, dict):
        pipe.vae.decode(torch.zeros(1, pipe.vae.config.latent_channels, 4, 4))
    assert not kept_latents.has(place, JOB)


def test_pieces_are_not_taken_for_the_whole_and_few_are_kept(place: Place) -> None:
    pipe = small_unet()
    z = torch.zeros(1, pipe.vae.config.latent_channels, 4, 4)
    with keeping(pipe, place, JOB, dict):
        pipe.vae.decode(z)
        pipe.vae.decode(z)
    assert not kept_latents.has(place, JOB)
    for number in range(MOST + 3):
        with keeping(pipe, place, f"{number:016x}", dict):
            pipe.vae.decode(z)
    assert len(list(place.latents.iterdir())) == MOST and not kept_latents.has(place, f"{0:016x}")
    for wrong in ("../jobs", "..", "", "0" * 15):
        assert not kept_latents.has(place, wrong)
        kept_latents.remove(place, wrong)
    assert place.latents.is_dir()


def test_tiles_are_for_one_run_only() -> None:
    pipe = small_unet()
    with tiled(pipe, True):
        assert pipe.vae.use_tiling and pipe.vae.use_slicing
    assert not pipe.vae.use_tiling and not pipe.vae.use_slicing
    pipe.vae = torch.nn.Identity()
    with pytest.raises(UsageError, match="has no tiles"), tiled(pipe, True):
        pass


# --- jobs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tmp_path_factory.mktemp("home")) as found:
        yield found


@pytest.fixture(scope="module")
def warm(engine: Engine) -> Any:
    """The pipeline that the engine keeps warm."""
    done(engine, IMAGE)
    return engine._worker._desk._warm["tiny-image", None]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), RuntimeError("a driver is ill")], ids=["memory", "bug"])
def test_a_decoder_that_fails_once_costs_no_second_denoising(engine: Engine, warm: Any, error: Exception) -> None:
    whole = done(engine, IMAGE | {"recipe": "balanced", "seed": 3})
    counted = Evaluations(warm)
    failing(warm, error)
    lost = engine.wait(engine.submit(IMAGE | {"recipe": "balanced", "seed": 3}).id)
    assert lost.state == "failed"
    first, *others = engine.remedies(lost)
    tiles = isinstance(error, torch.OutOfMemoryError)
    assert first["label"] == ("Decode it again, in tiles" if tiles else "Decode it again") and others
    before = counted.number
    again = done(engine, first["request"])
    assert counted.number == before, "nothing is denoised a second time"
    kept, found = (job.result["row"] for job in (whole, again))
    assert {key: value for key, value in found.items() if key != "seconds"} == {key: value for key, value in kept.items() if key != "seconds"}
    assert found["nfe"] == kept["nfe"] > 0 and not kept_latents.has(engine.place, lost.id)
    output = engine.outputs.file(again.result["output"], again.result["media"]).read_bytes()
    if not tiles:
        same = engine.outputs.file(whole.result["output"], whole.result["media"])
        assert pixels(output) == pixels(same.read_bytes())
    restored = restore(output, engine.limits, engine.place.folder)
    assert restored.latents is None and restored.decoding == ("tiles" if tiles else "whole"), "its settings make it from the beginning"  # type: ignore[union-attr]


def test_another_request_does_not_get_them(engine: Engine, warm: Any) -> None:
    failing(warm, MemoryError())
    lost = engine.wait(engine.submit(IMAGE).id)
    asked = engine.remedies(lost)[0]["request"]
    other = engine.wait(engine.submit({**asked, "prompt": "a nine"}).id)
    assert other.state == "failed" and "something else" in other.error["sentence"]
    with engine._database.transaction() as table:  # as after kill -9
        table.execute("UPDATE jobs SET state = 'interrupted', error = NULL WHERE id = ?", (lost.id,))
    remedies = engine.remedies(engine.job(lost.id))
    assert [each["label"] for each in remedies] == ["Decode it again, in tiles", "Decode it again", "Try again"]
    assert "What it had denoised is kept" in failure(engine.job(lost.id), remedies)
    engine.remove(lost.id)
    gone = engine.wait(engine.submit(asked).id)
    assert gone.state == "failed" and "not kept any more" in gone.error["sentence"] and engine.remedies(gone) == []
    with pytest.raises(RequestError, match="latents"):
        read(IMAGE | {"latents": "../../etc/passwd"})


def pixels(png: bytes) -> bytes:
    """Without what the file says of itself."""
    import io

    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB").tobytes()
