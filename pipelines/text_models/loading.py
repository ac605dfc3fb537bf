"""Opening a language model with its tokenizer: bundled, a transformers folder, or a hub id. safetensors only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from hasten.errors import ModelError, nearest
from hasten.pipelines import tiny_models
from hasten.pipelines.loading import pick_device, pick_dtype
from hasten.pipelines.quiet import quiet


def open_text(
    name_or_path: str | Path, revision: str | None = None, device: str | None = None, dtype: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """(model, tokenizer), in evaluation mode on its device. See `TextDiffusionPipeline.from_pretrained`."""
    place = pick_device(device)
    precision = pick_dtype(dtype, place)
    kind = kind_of(name_or_path)
    if kind == "bundled":
        return tiny_models.text(str(name_or_path), precision, place)
    source = str(Path(name_or_path).expanduser()) if kind == "folder" else str(name_or_path)
    common = {"revision": revision, "local_files_only": kind == "folder", "trust_remote_code": trust_remote_code}
    try:
        return _loaded(source, common, precision, place)
    except Exception as error:
        raise ModelError(_why_not(source, kind, error, trust_remote_code)) from error


def _loaded(source: str, common: dict[str, Any], dtype: Any, device: Any) -> tuple[Any, Any]:
    import transformers

    library: Any = transformers
    with quiet("transformers.utils.import_utils"):
        config = library.AutoConfig.from_pretrained(source, **common)
        named = getattr(config, "auto_map", None) or {}
        classes = getattr(config, "architectures", None) or [""]
        causal = "AutoModelForCausalLM" in named or classes[0].endswith("ForCausalLM")
        masked = not causal and "AutoModelForMaskedLM" in named  # MDLM and BD3-LM name no other
        loader = library.AutoModelForCausalLM if causal else library.AutoModelForMaskedLM if masked else library.AutoModel
        if getattr(config, "model_type", None) == "diffusion_gemma":  # AutoModel would leave its head out
            loader = library.DiffusionGemmaForBlockDiffusion
        model = loader.from_pretrained(source, config=config, dtype=dtype, use_safetensors=True, **common)
        tokenizer = library.AutoTokenizer.from_pretrained(source, **common)
    return model.eval().to(device), tokenizer


def kind_of(name_or_path: str | Path) -> Literal["bundled", "folder", "hub"]:
    """Which of the three it is, from its spelling and the disk alone; `ModelError` if none."""
    known = [name for name in tiny_models.names() if tiny_models.card(name).get("kind") == "text"]
    path = Path(name_or_path).expanduser()
    if str(name_or_path) in known:
        return "bundled"
    if path.is_dir():
        if is_text_folder(path):
            return "folder"
        raise ModelError(f"The folder {path} holds no language model: its config.json is missing or names no architecture.")
    if path.exists() or str(name_or_path).count("/") != 1:
        raise ModelError(
            f"There is no language model {str(name_or_path)!r}: it is no bundled one ({', '.join(known) or 'there are none'}), no"
            f" folder here, and no hub id of the form owner/name.{nearest(str(name_or_path), known)}"
        )
    return "hub"


def writes_text(name_or_path: str, revision: str | None = None) -> bool:
    """Is it a language model, as far as a look at its files tells? A hub id is asked whether it has a `model_index.json`."""
    known = [name for name in tiny_models.names() if tiny_models.card(name).get("kind") == "text"]
    path = Path(name_or_path).expanduser()
    if name_or_path in known or path.is_dir():
        return name_or_path in known or is_text_folder(path)
    if path.exists() or name_or_path.count("/") != 1:
        return False
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(name_or_path, "model_index.json", revision=revision)
    except LocalEntryNotFoundError:
        return False
    except EntryNotFoundError:
        return True
    except Exception:  # noqa: BLE001 - whoever opens it next says what is wrong
        return False
    return False


def is_text_folder(folder: Path) -> bool:
    """Does it look like a transformers model, and not like a component of a diffusers pipeline?"""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(config, dict) or (folder / "model_index.json").exists():
        return False
    return bool(config.get("architectures") or config.get("auto_map")) and "_class_name" not in config


def _why_not(source: str, kind: str, error: Exception, trusted: bool) -> str:
    """One sentence for what transformers or the hub said."""
    said = " ".join(str(error).split())
    said = said if len(said) <= 240 else said[:240].rsplit(" ", 1)[0] + " ..."
    if "trust_remote_code" in str(error) and not trusted:
        return (
            f"{source} brings Python code of its own, which hasten does not run unless you say so: read it, then pass"
            " trust_remote_code=True (and a revision=) to TextDiffusionPipeline.from_pretrained in Python."
        )
    if "safetensors" in str(error):
        return (
            f"{source} has no weights as safetensors, and pickles, which can run any code when loaded, are refused. Convert them"
            " once where you trust them: model.save_pretrained(folder, safe_serialization=True)."
        )
    if kind == "folder":
        return f"The folder {source} cannot be loaded: {said or type(error).__name__}. Write it again, or check it is complete."
    return (
        f"There is no folder {source!r} here, and fetching {source!r} from the hub failed ({type(error).__name__}: {said}). Check"
        " the spelling, the network, and access rights."
    )
