"""Media files come back with their pixels, sizes and metadata, or are refused with the fix."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from PIL.PngImagePlugin import PngInfo

from hasten.errors import OutputError, UsageError
from hasten.metrics import psnr
from hasten.pipelines.media import SUFFIXES, read_metadata, save
from hasten.recipe import Recipe, from_yaml

RECIPE = Recipe(name="tried \u00e9", paper="none")
FACTS: dict[str, Any] = {
    "prompt": 'a "seven" <b>moving</b> left\nSteps: 3, Seed: 9 \u00e9\u4e03',
    "negative_prompt": "blur",
    "seed": 7,
    "model": "tiny-video",
    "steps": 20,
    "guidance_scale": 3.0,
    "recipe": RECIPE.to_yaml(),
    "versions": {"hasten": "0.1.0", "torch": "2.13"},
}


def video(frames: int = 5, height: int = 32, width: int = 48, channels: int = 3) -> np.ndarray:
    """A smooth pattern that moves: (F, H, W, C) floating point in [0, 1]."""
    t, y, x, c = np.meshgrid(*(np.arange(n) for n in (frames, height, width, channels)), indexing="ij")
    return 0.5 + 0.5 * np.sin(0.1 * x + 0.07 * y + 0.2 * t + c)


def decoded(path: Path) -> np.ndarray:
    with path.open("rb") as stream, av.open(stream, format="mp4") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("frames", [1, 4])
def test_metadata_round_trip(tmp_path: Path, suffix: str, frames: int) -> None:
    paths = save(video(frames), tmp_path / f"x{suffix}", metadata=FACTS | {"recipe": RECIPE}, fps=12)
    facts = read_metadata(paths[0])
    size = {"width": 48, "height": 32, "frames": frames} | ({} if suffix == ".png" else {"fps": 12})
    assert facts == FACTS | size
    assert from_yaml(facts["recipe"]) == RECIPE
    assert names(tmp_path) == sorted(path.name for path in paths)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_metadata_when_none_is_asked_for(tmp_path: Path, suffix: str) -> None:
    (path,) = save(video(1), tmp_path / f"x{suffix}")
    assert read_metadata(path) == {}
    assert b"parameters" not in path.read_bytes() and b"hasten" not in path.read_bytes()


def test_png_is_exact_for_all_kinds_of_frames(tmp_path: Path) -> None:
    pixels = np.rint(video(1)[0] * 255).astype(np.uint8)
    kinds = [
        pixels,
        pixels[None],
        Image.fromarray(pixels),
        [Image.fromarray(pixels)],
        torch.from_numpy(pixels),
    ]
    kinds += [video(1), torch.from_numpy(video(1)), torch.from_numpy(pixels / 255.0).float()]
    for kind in kinds:
        (path,) = save(kind, tmp_path / "x.PNG")
        assert np.array_equal(np.asarray(Image.open(path)), pixels)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_png_modes(tmp_path: Path, channels: int, mode: str) -> None:
    (path,) = save(video(1, 31, 33, channels), tmp_path / "x.png")
    image = Image.open(path)
    assert (image.mode, image.size) == (mode, (33, 31))


def test_png_series(tmp_path: Path) -> None:
    paths = save(video(3), tmp_path / "out.put.png", metadata={"seed": 1})
    assert [path.name for path in paths] == ["out.put-000.png", "out.put-001.png", "out.put-002.png"]
    assert all(read_metadata(path)["seed"] == 1 for path in paths)


def test_png_text_is_what_other_tools_read(tmp_path: Path) -> None:
    (path,) = save(video(1), tmp_path / "x.png", metadata=FACTS | {"prompt": "a seven", "model": "a, b"})
    text = Image.open(path).info["parameters"]
    assert text == (
        'a seven\nNegative prompt: blur\nSteps: 20, CFG scale: 3.0, Seed: 7, Model: "a, b", Size: 48x32,'
        " Version: hasten 0.1.0"
    )


def test_png_of_another_tool(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", "a cat\nSteps: 4")
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=info)
    assert read_metadata(tmp_path / "x.png") == {"parameters": "a cat\nSteps: 4"}


def test_mp4_is_plain_h264_and_close_to_the_frames(tmp_path: Path) -> None:
    source = video(8, 64, 96)
    (path,) = save(source, tmp_path / "x.mp4", fps=24)
    with path.open("rb") as stream, av.open(stream, format="mp4") as container:
        track = container.streams.video[0]
        context = track.codec_context
        assert (context.name, context.pix_fmt, context.width, context.height) == ("h264", "yuv420p", 96, 64)
        assert track.average_rate == 24 and (int(context.colorspace), int(context.color_range)) == (1, 1)
    assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat")
    assert psnr(decoded(path), np.rint(source * 255).astype(np.uint8)) > 30


@pytest.mark.long
def test_mp4_keeps_colours(tmp_path: Path) -> None:
    """A wrong matrix or range shifts plain colours by 10 levels and more."""
    for colour in ([200, 40, 40], [40, 200, 40], [40, 40, 200], [0, 0, 0], [255, 255, 255]):
        (path,) = save(np.full((2, 32, 32, 3), colour, np.uint8), tmp_path / "x.mp4")
        assert np.abs(decoded(path).astype(int) - colour).max() <= 3


@pytest.mark.parametrize("fps", [16, 12.5, 23.976, 0.5])
def test_mp4_frame_rates(tmp_path: Path, fps: float) -> None:
    (path,) = save(video(3), tmp_path / "x.mp4", fps=fps)
    with path.open("rb") as stream, av.open(stream, format="mp4") as container:
        assert float(container.streams.video[0].average_rate or 0) == pytest.approx(fps, rel=1e-4)


@pytest.mark.parametrize(("height", "width"), [(31, 33), (1, 1), (32, 33), (2, 2), (17, 400)])
def test_mp4_pads_odd_sizes_and_says_so(tmp_path: Path, height: int, width: int) -> None:
    source = np.rint(video(3, height, width) * 255).astype(np.uint8)
    if height % 2 or width % 2:
        with pytest.warns(UserWarning, match=f"{width} x {height} is padded to"):
            (path,) = save(source, tmp_path / "x.mp4", metadata={})
    else:
        (path,) = save(source, tmp_path / "x.mp4", metadata={})
    back = decoded(path)
    assert back.shape == (3, height + height % 2, width + width % 2, 3)
    facts = read_metadata(path)
    assert (facts["width"], facts["height"]) == (width, height)
    assert facts.get("padding", [0, 0]) == [width % 2, height % 2]
    if min(height, width) > 10:
        assert psnr(back[:, :height, :width], source) > 30


def test_mp4_of_grey_frames(tmp_path: Path) -> None:
    (path,) = save(video(2, channels=1), tmp_path / "x.mp4")
    back = decoded(path).astype(int)
    assert back.shape == (2, 32, 48, 3) and np.ptp(back, axis=-1).max() <= 4


def test_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        first, second = (save(video(1), tmp_path / f"{n}{suffix}", metadata=FACTS)[0] for n in "ab")
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("fps", [16, 24, 50, 7.5])
def test_gif_size_and_total_time(tmp_path: Path, fps: float) -> None:
    (path,) = save(video(12, 31, 33), tmp_path / "x.gif", fps=fps)
    image = Image.open(path)
    lengths = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
    assert image.size == (33, 31) and len(lengths) == 12 and min(lengths) >= 20 and image.info["loop"] == 0
    assert sum(lengths) == pytest.approx(12 / fps * 1000, abs=10)


def test_gif_of_equal_frames_keeps_the_total_time(tmp_path: Path) -> None:
    """Pillow joins equal neighbours into one longer frame."""
    (path,) = save(np.zeros((8, 6, 6, 3)), tmp_path / "x.gif", fps=8)
    lengths = [frame.info.get("duration", 0) for frame in ImageSequence.Iterator(Image.open(path))]
    assert sum(lengths) == 1000


REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("x.webp", video(1), {}, r"\.webp.*allowed: \.png, \.mp4, \.gif"),
    ("x.mp5", video(1), {}, r"Did you mean '\.mp4'"),
    ("x", video(1), {}, "allowed"),
    ("x.mp4", video(2, channels=4), {}, "transparency"),
    ("x.gif", video(2, channels=4), {}, "transparency"),
    ("x.png", np.moveaxis(video(2), -1, 1), {}, "channel-first"),
    ("x.png", 2 * video(1), {}, r"in \[0, 1\]"),
    ("x.mp4", video(1), {"fps": 0}, "fps"),
    ("x.mp4", video(1), {"fps": float("nan")}, "fps"),
    ("x.gif", video(1), {"fps": 60}, "between 0.1 and 50"),
    ("x.png", video(1), {"metadata": {"a": float("nan")}}, "JSON"),
    ("x.png", video(1), {"metadata": {"a": object()}}, "JSON"),
    ("x.png", video(1), {"metadata": {"a": "x" * 2**20}}, "at most"),
]


@pytest.mark.parametrize(("name", "frames", "options", "message"), REFUSED)
def test_refusals(tmp_path: Path, name: str, frames: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        save(frames, tmp_path / name, **options)
    assert names(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_folder(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(OutputError, match="does not exist. Create the folder"):
        save(video(2), tmp_path / "no" / f"x{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("number", "word"), [(errno.EACCES, "not writable"), (errno.ENOSPC, "full")])
def test_disk_errors_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, number: int, word: str
) -> None:
    def fail(source: Any, *rest: Any) -> None:
        raise OSError(number, os.strerror(number), str(source))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match=word):
        save(video(2), tmp_path / f"x{suffix}")
    assert names(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_room_while_encoding(tmp_path: Path, suffix: str) -> None:
    """A real refusal of the system in the middle of a file: the largest allowed file is 16 KiB."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 96, 96, 3), dtype=np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, hard))
    try:
        with pytest.raises(OutputError, match="full"):
            save(noise, tmp_path / f"x{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "none of"), (b"GIF89a", "Cannot read"), (b"\x89PNG\r\n\x1a\nxxxx", "Cannot read")]
    + [(b"\0\0\0\x18ftypisom" + b"\xff" * 40, "Cannot read"), (b"#EXTM3U\nhttp://x/y.ts\n", "none of")],
)
def test_unreadable_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.mp4").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_metadata(tmp_path / "x.mp4")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_metadata(tmp_path / "x.png")


@pytest.mark.parametrize("comment", ["hello", "[1]", '{"a": 1}', "[" * 100_000, json.dumps({"hasten": 9})])
def test_strange_comments_are_given_as_they_stand(tmp_path: Path, comment: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.gif", comment=comment)
    assert read_metadata(tmp_path / "x.gif") == {"comment": comment}
