"""Failures in words with remedies that can be submitted; models and LoRAs by id."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.errors import ModelError, RefusedError, UsageError
from hasten.ui.engine import Trouble, read
from hasten.ui.engine.models import REMOTE, Models, fit, is_offline
from hasten.ui.engine.place import Place
from tests.hosts import WAN_CALL, saved, small_wan

CLIP = {
    "kind": "generate", "model": "tiny-video", "prompt": "a", "width": 832, "height": 480, "frames": 81, "recipe": "balanced",
}  # fmt: skip


def raised_from() -> Exception:
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.1 GiB")
        except RuntimeError as error:
            raise UsageError("the decoder gave up") from error
    except UsageError as error:
        return error


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nsecond line"), MemoryError(),
    RuntimeError("CUDA error: out of memory"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"), raised_from(),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_memory_that_ran_out_is_known_under_all_its_names(error: Exception) -> None:
    found = Trouble.of(error, read(CLIP), "Decoding")
    assert found.kind == "memory" and "while decoding" in found.sentence and "second line" not in found.sentence
    labels = [remedy.label for remedy in found.remedies]
    assert labels[0] == "Without previews" and "41 frames instead of 81" not in labels and any("frames instead of 81" in each for each in labels)
    assert any("instead of 832 x 480" in label for label in labels)


def test_every_remedy_is_a_request_that_is_smaller() -> None:
    whole = read(CLIP)
    for remedy in Trouble.of(MemoryError(), whole).remedies:
        found = read(remedy.request)
        assert found != whole and found.model == whole.model
        size = (found.width or 1) * (found.height or 1) * (found.frames or 1)  # type: ignore[union-attr]
        assert size <= 832 * 480 * 81
    others: list[dict[str, Any]] = [
        {"kind": "text", "model": "tiny-dllm", "prompt": "a", "length": 512}, {"kind": "compare", "model": "tiny-image", "prompt": "a"},
        {"kind": "tune", "model": "tiny-image", "prompts": list("abcdefgh")}, {"kind": "train", "method": "pairs", "model": "tiny-image"},
    ]  # fmt: skip
    for asked in others:
        remedies = Trouble.of(MemoryError(), read(asked)).remedies
        assert remedies and all(read(each.request) != read(asked) for each in remedies)


def test_other_failures_keep_their_words() -> None:
    refused = Trouble.of(RefusedError("This cannot be right on it. Take another."), read(CLIP))
    assert (refused.kind, refused.sentence, refused.details) == ("refused", "This cannot be right on it. Take another.", "")
    broken = Trouble.of(RuntimeError("CUDA error: an illegal memory access was encountered"), read(CLIP))
    assert broken.kind == "broken device" and broken.remedies[0].request == json.loads(read(CLIP).model_dump_json())
    bug = Trouble.of(KeyError("x"), read(CLIP))
    assert bug.kind == "bug" and "KeyError" in bug.details and "report" in bug.sentence
    assert json.loads(json.dumps(bug.to_dict()))["remedies"][0]["label"] == "Try again"


# --- models -------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path) -> Models:
    folder = tmp_path / "models"
    saved(small_wan(), folder / "wan")
    (folder / "wan" / "hasten.json").write_text(json.dumps({"call": WAN_CALL, "licence": "MIT"}))
    (folder / "empty").mkdir()
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "style.safetensors").write_bytes(b"x")
    (tmp_path / "loras" / "evil.bin").write_bytes(b"x")
    (tmp_path / "outside").mkdir()
    return Models(Place(tmp_path / "home", folder, tmp_path / "loras"))


def test_cards_say_what_there_is(models: Models) -> None:
    cards = {card.id: card for card in models.cards()}
    assert cards["tiny-video"].kind == "video" and cards["tiny-video"].ready and cards["tiny-video"].call["num_frames"] == 17
    assert cards["tiny-dllm"].kind == "text" and cards["tiny-lm"].kind == "language" and cards["tiny-mask"].kind == "masked-image"
    assert cards["folder:wan"].where == "folder" and cards["folder:wan"].licence == "MIT" and cards["folder:wan"].bytes > 10_000
    assert "folder:empty" not in cards
    for name in REMOTE:
        card = cards[name]
        assert card.where == "remote" and card.bytes > 10**9 and card.licence and card.fit and not card.ready
    assert all(json.loads(json.dumps(card.to_dict())) for card in cards.values())


def test_sources_are_looked_up(models: Models) -> None:
    assert models.source("tiny-flux") == "tiny-flux" and Path(models.source("folder:wan")).name == "wan"
    for wrong in ("folder:../outside", "folder:", "folder:wan/..", "nobody/nothing", "/etc", "tiny-flu"):
        with pytest.raises(ModelError):
            models.source(wrong)
    with pytest.raises(ModelError, match="about 29 GB"):
        models.source("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")


def test_what_gets_a_process(models: Models) -> None:
    assert not models.apart("tiny-video") and models.apart("folder:wan") and models.apart("owner/name")


def test_loras_are_safetensors_by_name(models: Models) -> None:
    assert models.loras() == ["style"] and models.lora("style").name == "style.safetensors"
    for wrong in ("evil", "../loras/style", "style.safetensors"):
        with pytest.raises(ModelError, match="no LoRA"):
            models.lora(wrong)


def test_fit_is_estimated_in_words() -> None:
    assert fit(10**6)[0] is True and fit(10**15)[0] is False
    assert "will not fit" in fit(10**15)[1] and "GB" in fit(10**6)[1]


def test_offline_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert is_offline(Place(tmp_path, offline=True)) and not is_offline(Place(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert is_offline(Place(tmp_path))
