"""The bundled tiny models: real, trained and small, in ordinary diffusers and transformers folders.

`load("tiny-video")` is `DiffusionPipeline.from_pretrained(path("tiny-video"))` with a clear error for a wrong name,
`text("tiny-lm")` is `AutoModelForCausalLM` and `AutoTokenizer`; moving on to a real model changes only the name. Each
folder carries a `hasten.json` (default call, licence, data, training, sha256 of the weights) and the training's loss
curve in `loss.json`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from hasten.errors import ModelError, nearest
from hasten.pipelines.quiet import no_bars, quiet

_BUNDLED = Path(__file__).parent / "bundled"


def names() -> list[str]:
    """The bundled models, in alphabetical order."""
    return sorted(p.parent.name for p in _BUNDLED.glob("*/hasten.json"))


def path(name: str) -> Path:
    """The folder of a bundled model."""
    known = names()
    if name not in known:
        raise ModelError(
            f"There is no bundled model {name!r}. Available: {', '.join(known) or 'none'}.{nearest(name, known)}"
        )
    return _BUNDLED / name


def card(name: str) -> dict[str, Any]:
    """The contents of `hasten.json`: default call, licence, data, training and checksums."""
    content: dict[str, Any] = json.loads((path(name) / "hasten.json").read_text())
    return content


def load(name: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Any:
    """The pipeline of a bundled model, from package data alone (no network): a diffusers pipeline, a
    `TextDiffusionPipeline`, a `MaskedImagePipeline`, a `TokenImagePipeline`, or for a causal language model transformers' own
    `TextGenerationPipeline`, with `model` and `tokenizer` in it. `text` opens any text model as these two.

    name: also a folder that `save_pretrained` wrote, of a diffusers pipeline or of a text diffusion model. dtype: None is
    float32; device: None is the CPU. Progress bars of other libraries are left out."""
    if str(name) not in names() and Path(name).is_dir():
        return _folder(Path(name), dtype or torch.float32, device or "cpu")
    name = str(name)
    folder = path(name)
    if card(name)["kind"] == "text":
        return _text_pipeline(name, dtype, device)
    if card(name)["kind"] == "masked-image":
        from hasten.pipelines.masked_images import MaskedImagePipeline

        return MaskedImagePipeline.from_pretrained(folder, device=device, dtype=dtype)
    if card(name)["kind"] == "image-tokens":
        from hasten.pipelines.decode_own.token_images import TokenImagePipeline

        return TokenImagePipeline.from_pretrained(folder, device=device, dtype=dtype)
    import diffusers

    library: Any = diffusers
    # The files are float32. `torch_dtype` is the spelling that all versions since our floor take; 0.42 says it is old.
    chosen = {} if dtype in (None, torch.float32) else {"torch_dtype": dtype}
    # FluxPipeline names an image processor that nothing here uses; transformers warns where torchvision is absent.
    with warnings.catch_warnings(), quiet("transformers.utils.import_utils"), no_bars():
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        pipe = library.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **chosen)
    return pipe if device is None else pipe.to(device)


def _folder(folder: Path, dtype: torch.dtype, device: str | torch.device) -> Any:
    """The pipeline of somebody's own folder."""
    import diffusers.utils.logging  # noqa: F401  both here, so that there are switches for their bars
    import transformers.utils.logging  # noqa: F401

    from hasten.pipelines.loading import open_pipeline
    from hasten.pipelines.text.diffusion import TextDiffusionPipeline
    from hasten.pipelines.text_models.loading import is_text_folder

    place, precision = str(device), str(dtype).removeprefix("torch.")
    with no_bars():
        if is_text_folder(folder):
            return TextDiffusionPipeline.from_pretrained(folder, device=place, dtype=precision)
        return open_pipeline(str(folder), device=place, dtype=precision)


def _text_pipeline(name: str, dtype: torch.dtype | None, device: str | torch.device | None) -> Any:
    model, tokenizer = text(name, dtype, device)
    if model.config.hasten_diffusion["kind"] == "causal":
        from transformers import TextGenerationPipeline

        return TextGenerationPipeline(model=model, tokenizer=tokenizer, device=model.device)
    from hasten.pipelines.text.diffusion import TextDiffusionPipeline

    return TextDiffusionPipeline(model, tokenizer, probe=False)  # tests ask the bundled ones


def text(
    name_or_path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer) of a bundled text model, or of a folder that `hasten train pretrain` wrote; no network.

    The model is a `LlamaForCausalLM` in evaluation mode, float32 unless `dtype` says otherwise. The 4-D attention mask
    that it was trained under is named in `config.hasten_diffusion`; called without a mask it is causal.
    """
    known = [name for name in names() if card(name)["kind"] == "text"]
    folder = Path(name_or_path)
    if not (folder / "config.json").is_file():
        if name_or_path not in known:
            raise ModelError(
                f"There is no bundled text model {str(name_or_path)!r}, and no such folder with a config.json."
                f" Available: {', '.join(known) or 'none'}.{nearest(str(name_or_path), known)}"
            )
        folder = path(str(name_or_path))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet("transformers.utils.import_utils"), no_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval().to(device or "cpu"), tokenizer


def call_defaults(name_or_pipe: Any) -> dict[str, Any]:
    """Keyword arguments for an ordinary call; {} for a pipeline that is not a bundled model.

    A pipeline is recognised by the folder it was loaded from (`pipe.config._name_or_path`).
    """
    if isinstance(name_or_pipe, str):
        return dict(card(name_or_pipe)["call"])
    origin = str(getattr(getattr(name_or_pipe, "config", None), "_name_or_path", "") or "")
    file = Path(origin) / "hasten.json"
    if not origin or not file.is_file():
        return {}
    return dict(json.loads(file.read_text()).get("call", {}))


def verify(name: str) -> dict[str, bool]:
    """Compare each weight file with the sha256 recorded in `hasten.json`."""
    folder = path(name)
    return {
        file: (folder / file).is_file() and sha256(folder / file) == digest
        for file, digest in card(name)["sha256"].items()
    }


def sha256(file: Path) -> str:
    """Checksum of a file in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
