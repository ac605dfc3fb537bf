"""Own files: what is read, what is skipped and why, and latents that the pipeline turns back into the pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hasten.distill.data import encode as encoding
from hasten.distill.data import store
from hasten.distill.data.encode import autoencoder, decode, latents, size_of
from hasten.distill.data.own_files import Size, Unusable, find, pixels
from hasten.distill.data.prepare import prepare
from hasten.distill.network.host_call import learn
from hasten.distill.train_config import load_config
from hasten.distill.training import train
from hasten.errors import HastenError, ModelError, ResumeError, UsageError
from hasten.pipelines import loading, media, tiny_models

STILL = Size(1, 8, 6)


def picture(height: int = 8, width: int = 6, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def clip(frames: int, height: int = 8, width: int = 6) -> list[Image.Image]:
    """Frames of one grey each, so that their order can be seen after any coder."""
    return [Image.new("RGB", (width, height), (20 * k, 20 * k, 20 * k)) for k in range(frames)]


# --- what lies in a folder ------------------------------------------------------------------------


def test_captions_beside_files_and_what_is_skipped(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "c.webp", "d.png", "E.PNG"):
        picture().save(tmp_path / name)
    for name in ("a", "b", "c", "E"):
        (tmp_path / f"{name}.txt").write_text(f"\ufeff a caption of {name}\n", encoding="utf-8")
    (tmp_path / "f.png").write_bytes(b"")
    (tmp_path / "f.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "notes.doc").write_text("x")
    (tmp_path / "more").mkdir()
    found = find(tmp_path)
    assert {file.name: caption for file, caption in found.captions.items()} == {
        "E.PNG": "a caption of E", "a.png": "a caption of a", "b.jpg": "a caption of b", "c.webp": "a caption of c"
    }  # fmt: skip
    assert found.skipped == {
        "d.png": "no caption", "f.png": "its caption is not UTF-8 text", "notes.doc": "not a format that is read",
        "more": "a folder",
    }  # fmt: skip
    assert "4 file(s) are used, 4 skipped: " in found.told() and "d.png (no caption)" in found.told()
    assert find(tmp_path, uncaptioned=True).captions[tmp_path / "d.png"] == ""


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.csv"])
def test_captions_of_a_table(tmp_path: Path, name: str) -> None:
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("beside")
    rows = [{"file_name": "a.png", "text": "one, two"}, {"file_name": "gone.png", "text": "three"}]
    jsonl = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(jsonl if name.endswith("jsonl") else 'file_name,text\na.png,"one, two"\ngone.png,three\n')
    found = find(tmp_path)
    assert list(found.captions.values()) == ["one, two", "beside"]
    assert found.skipped == {"gone.png": "named in the table, and not there"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "Nothing in .* can be trained on"),
        ({"a.png": b"", "metadata.jsonl": b"{broken"}, "cannot be read"),
        ({"a.png": b"", "metadata.jsonl": b"[1]"}, "must be a JSON object"),
        ({"a.png": b"", "metadata.csv": b"name,words\na.png,x\n"}, "line 2: no file_name or"),
        ({"metadata.csv": b"", "metadata.jsonl": b""}, "Keep one of them"),
        ({"a.png": b""}, r"1 skipped: a.png \(no caption\)"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=words):
        find(tmp_path)
    with pytest.raises(UsageError, match="There is no folder"):
        find(tmp_path / "none")


def test_the_digest_knows_content_and_caption(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    first = find(tmp_path).digest()
    assert find(tmp_path).digest() == first
    (tmp_path / "a.txt").write_text("two")
    second = find(tmp_path).digest()
    picture(seed=1).save(tmp_path / "a.png")
    assert len({first, second, find(tmp_path).digest()}) == 3


# --- pixels ---------------------------------------------------------------------------------------


def test_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    seen = pixels(tmp_path / "a.png", STILL)
    wanted = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[:, None].float() / 127.5 - 1
    assert seen.shape == (3, 1, 8, 6) and torch.equal(seen, wanted)


def test_other_sizes_are_cut_in_the_middle_or_skipped(tmp_path: Path) -> None:
    wide = Image.new("RGB", (20, 8), "black")
    wide.paste("white", (7, 0, 13, 8))
    wide.save(tmp_path / "a.png")
    assert torch.equal(pixels(tmp_path / "a.png", STILL), torch.ones(3, 1, 8, 6))
    with pytest.raises(Unusable, match="20 x 8 pixels, not 6 x 8"):
        pixels(tmp_path / "a.png", Size(1, 8, 6, resize=False))


def test_what_is_transparent_is_white_and_cameras_are_turned(tmp_path: Path) -> None:
    Image.new("RGBA", (6, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert torch.equal(pixels(tmp_path / "a.png", STILL), torch.ones(3, 1, 8, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (8, 6), "white").save(tmp_path / "b.png", exif=exif)
    assert pixels(tmp_path / "b.png", Size(1, 8, 6, resize=False)).shape == (3, 1, 8, 6)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_clips_are_their_first_frames(tmp_path: Path, suffix: str) -> None:
    frames, file = clip(7), tmp_path / f"a{suffix}"
    if suffix == ".webp":
        frames[0].save(file, save_all=True, append_images=frames[1:], lossless=True)
    else:
        media.save(frames, file, crf=1) if suffix == ".mp4" else media.save(frames, file)
    seen = pixels(file, Size(5, 8, 6))
    assert seen.shape == (3, 5, 8, 6)
    grey = (seen.mean((0, 2, 3)) + 1) * 127.5
    torch.testing.assert_close(grey, 20.0 * torch.arange(5), rtol=0, atol=3)
    with pytest.raises(Unusable, match="7 frames of 9"):
        pixels(file, Size(9, 8, 6))
    with pytest.raises(Unusable, match="it moves"):
        pixels(file, STILL)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.mp4", "a.webp"])
@pytest.mark.parametrize("whole", [0, 5, 40])
def test_broken_files_are_said_to_be(tmp_path: Path, name: str, whole: int) -> None:
    """Empty ones, and ones that were cut off."""
    file = tmp_path / f"whole{Path(name).suffix}"
    (media.save(clip(3), file) if name.endswith("mp4") else picture(64, 64).save(file))
    (tmp_path / name).write_bytes(file.read_bytes()[:whole])
    with pytest.raises(Unusable, match="cannot be read|no pictures in it"):
        pixels(tmp_path / name, Size(1, 64, 64))


# --- latents --------------------------------------------------------------------------------------


def steps(pipe: Any, call: dict[str, Any]) -> Tensor:
    """What the pipeline itself makes of noise, as latents in its network's scale."""
    few = call | {"num_inference_steps": 8}
    torch.manual_seed(0)
    with torch.no_grad():
        made: Tensor = torch.as_tensor(pipe(prompt=["a seven", "a three"], **_rows(few, 2), output_type="latent")[0])
    return made


def _rows(call: dict[str, Any], rows: int) -> dict[str, Any]:
    return {k: [v] * rows if k == "negative_prompt" else v for k, v in call.items()}


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-image", "tiny-video"])
def test_there_and_back_by_the_pipelines_own_tail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents -> pixels by the pipeline -> latents by us -> pixels by the pipeline: the same pictures."""
    pipe = loading.open_pipeline(name, device="cpu", quiet=True)
    call = tiny_models.call_defaults(pipe)
    host, _ = learn(pipe, ["a seven"], **call)
    made = steps(pipe, call)
    seen = _pixels(decode(pipe, made, call))
    ours = latents(pipe, host, seen)
    again = _pixels(decode(pipe, ours, call))
    size = size_of(pipe, call)
    assert tuple(ours.shape[1:]) == host.shape and seen.shape[1:] == (3, size.frames, size.height, size.width)
    pixel = float((again - seen).square().mean().sqrt() / seen.std())
    latent = float((ours - made).norm() / made.norm())
    print(f"{name}: relative error of pixels {pixel:.4f}, of latents {latent:.4f}")
    assert pixel < 0.15 and latent < 0.15
    # An autoencoder's latents are not yet the network's.
    monkeypatch.setattr(encoding, "_scaled", lambda vae, found: found)
    assert float((latents(pipe, host, seen) - made).norm() / made.norm()) > 0.15


def _pixels(made: Any) -> Tensor:
    """np [B, (T,) H, W, 3] in [0, 1] -> [B, 3, T, H, W] in [-1, 1]."""
    seen = torch.from_numpy(np.asarray(made)).float()
    seen = seen[:, None] if seen.ndim == 4 else seen
    return seen.permute(0, 4, 1, 2, 3) * 2 - 1


def test_other_autoencoders_and_other_sizes_are_refused() -> None:
    pipe = loading.open_pipeline("tiny-flux", device="cpu", quiet=True)
    call = tiny_models.call_defaults(pipe)
    host, _ = learn(pipe, ["a seven"], **call)
    with pytest.raises(ModelError, match=r"latents \(16, 16\), its network reads \(64, 16\)"):
        latents(pipe, host, torch.zeros(1, 3, 1, 16, 16))
    with pytest.raises(ModelError, match="reads pictures, and these are 2 frames"):
        latents(pipe, host, torch.zeros(1, 3, 2, 32, 32))
    with pytest.raises(ModelError, match="has the autoencoder int; own files can be encoded by AutoencoderKL"):
        autoencoder(type("OddPipeline", (), {"vae": 3})())
    with pytest.raises(UsageError, match="Say data.call.height, data.call.width"):
        size_of(pipe, {})


# --- from a folder to a trained adapter -----------------------------------------------------------


def _folder(folder: Path) -> Path:
    folder.mkdir()
    for k, digit in enumerate(("seven", "three", "seven")):
        picture(40, 32, seed=k).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"a {digit}")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("a two")
    return folder


def test_a_folder_is_trained_on(tmp_path: Path) -> None:
    folder, out, said = _folder(tmp_path / "own"), tmp_path / "out", []
    given = {"model": "tiny-flux", "train_data_dir": str(folder), "train.steps": 3, "train.batch": 2, "rank": 2, "train.warmup": 0}
    config = load_config("lora", None, given)
    done = train(config, out, stop_after=1, progress=False, say=said.append)
    assert len(done.data) == 3
    assert any("3 file(s) are used, 1 skipped: broken.png (cannot be read" in line for line in said)
    made = store.Store.load(out / "data.safetensors")
    assert [made.prompts[k] for k in made.prompt] == ["a seven", "a three", "a seven"]
    changed = done.data.x0.mean()  # type: ignore[attr-defined]
    assert train(config, out, resume=True, progress=False).data.x0.mean() == changed  # type: ignore[attr-defined]
    (folder / "0.txt").write_text("a nine")
    with pytest.raises(ResumeError, match="The data have changed"):
        train(config, out, resume=True, progress=False)


def test_a_training_that_was_killed_before_its_first_checkpoint_starts_anew(tmp_path: Path) -> None:
    given = {"model": "tiny-flux", "train_data_dir": str(_folder(tmp_path / "own")), "train.steps": 2, "train.batch": 2, "rank": 2}
    config, out, said = load_config("lora", None, given), tmp_path / "out", []
    train(config, out, progress=False)
    whole = (out / "latest" / "student" / "weights.safetensors").read_bytes()
    for file in (out / "latest").rglob("*.*"):
        file.unlink()
    (out / "latest" / "student").rmdir()
    (out / "latest").rmdir()
    train(config, out, resume=True, progress=False, say=said.append)
    assert "It was stopped before its first checkpoint: it starts from the first step." in said
    assert (out / "latest" / "student" / "weights.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("lora", {}, "lora learns from data of your own. Say --train_data_dir"),
        ("pairs", {"train_data_dir": "own"}, "lets the teacher make its data, and reads no folder"),
        ("lora", {"train_data_dir": "own", "data.prompts": ["a"]}, "contradict each other"),
    ],
)
def test_data_that_a_method_cannot_use(tmp_path: Path, method: str, given: dict[str, Any], words: str) -> None:
    config = load_config(method, None, {"model": "tiny-flux", **given})
    with pytest.raises(HastenError, match=words):
        prepare(config, object(), tmp_path, print)
