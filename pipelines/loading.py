"""Opening a pipeline by name: bundled, a local diffusers folder, or a hub id. safetensors only, no remote code."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any, Literal

import torch

from hasten.errors import ModelError, UsageError, nearest
from hasten.pipelines.quiet import quiet

OFFLOADS = ("none", "model", "group")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TO_FOLDER = (
    'Convert it once where you trust it: python -c "import sys, diffusers;'
    " diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], use_safetensors=False)"
    '.save_pretrained(sys.argv[2], safe_serialization=True)" OLD NEW'
)


def open_pipeline(
    name_or_path: str,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    offload: str = "none",
    lora: str | None = None,
    quiet: bool = False,
) -> Any:
    """The diffusers pipeline called `name_or_path`, on its device, ready to be called.

    name_or_path: a bundled model's name, a folder written by `save_pretrained`, or `owner/name` on the hub,
    the only case in which anything is fetched. device: as torch spells it; None takes the first
    accelerator, else the CPU. dtype: a key of `DTYPES`; None is bfloat16 on CUDA and float32 elsewhere.
    quiet: keep the libraries' own bars and hints off the terminal, for programs that show their own.
    Raises `ModelError` for a model that is unknown or unsafe to load, `UsageError` for the rest.
    """
    place = pick_device(device)
    precision = pick_dtype(dtype, place)
    if offload not in OFFLOADS:
        raise UsageError(f"Offload {offload!r} is unknown; allowed: {', '.join(OFFLOADS)}.")
    if offload != "none" and place.type == "cpu":
        raise UsageError(
            f"Offload {offload!r} needs an accelerator, and the device is the CPU. Leave it out."
        )
    if lora is not None:
        check_lora(Path(lora))
    if quiet:
        silence()
    pipe = _load(name_or_path, revision, precision)
    if lora is not None:
        add_lora(pipe, Path(lora))
    pipe.set_progress_bar_config(disable=True)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=place)
    elif offload == "group":
        pipe.enable_group_offload(place, offload_type="leaf_level", use_stream=place.type == "cuda")
    else:
        pipe.to(place)
    return pipe


def silence() -> None:
    """Keep the libraries' bars and hints off the terminal."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def check_name(name_or_path: str) -> Literal["bundled", "folder", "hub"]:
    """Which of the three `name_or_path` is, from its spelling and the disk alone; `ModelError` if none."""
    from hasten.pipelines import tiny_models

    path = Path(name_or_path).expanduser()
    if name_or_path in tiny_models.names():
        return "bundled"
    if path.is_file():
        raise ModelError(_about_file(path))
    if path.is_dir():
        check_folder(path)
        return "folder"
    if _HUB_ID.fullmatch(name_or_path) and not name_or_path.endswith((".safetensors", ".gguf", *_PICKLES)):
        return "hub"
    names = tiny_models.names()
    raise ModelError(
        f"There is no model {name_or_path!r}: it is no bundled model ({', '.join(names)}), no folder here, and no"
        f" hub id of the form owner/name.{nearest(name_or_path, names)}"
    )


def _what_instead(folder: Path) -> str:
    """One sentence about a folder that is no pipeline."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "Write one with pipe.save_pretrained(folder), or name a hub id."
    except (OSError, ValueError):
        config = {}
    classes = config.get("architectures") if isinstance(config, dict) else None
    if isinstance(classes, list) and any(str(name).endswith("ForCausalLM") for name in classes):
        return (
            f"It holds a language model ({classes[0]}). `hasten generate` writes with masked language models; a causal one is"
            " for Python: hasten.accelerate(AutoModelForCausalLM.from_pretrained(folder), RECIPE)."
        )
    return f"It looks like one component of a pipeline; name the folder above: {folder.absolute().parent}."


def check_folder(folder: Path) -> None:
    """Raise `ModelError` unless `folder` is a diffusers pipeline of safetensors files and no code."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(
            f"The folder {folder} has no model_index.json, so it is no diffusers pipeline. {_what_instead(folder)}"
        )
    try:
        names = json.loads(index.read_text(encoding="utf-8"))
        class_name = names["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(
            f"{index} cannot be read as a pipeline description. Write the folder again."
        ) from None
    if not isinstance(class_name, str):
        raise ModelError(
            f"{index} names pipeline code of its own ({class_name}); hasten runs only diffusers' classes."
        )
    for name, value in names.items():
        if not name.startswith("_") and isinstance(value, list) and value and value[0] is not None:
            _check_component(folder / name)


def _check_component(folder: Path) -> None:
    """Refuse a component whose weights are there as pickles only."""
    files = [file for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
    pickles = [file.name for file in files if file.suffix in _PICKLES and file.name != "training_args.bin"]
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise ModelError(
            f"{folder / pickles[0]} is a pickle, which can run any code when loaded; hasten reads safetensors only."
            f" {_TO_FOLDER}"
        )


def _about_file(path: Path) -> str:
    """Why a single file is not accepted, and what to do."""
    if path.suffix in _PICKLES:
        return f"{path} is a pickle, which can run any code when loaded; hasten reads safetensors only. {_TO_FOLDER}"
    if path.suffix == ".gguf":
        return (
            f"{path} holds the quantised weights of one network, not a pipeline. In Python, load it with the network's"
            " from_single_file(path, quantization_config=GGUFQuantizationConfig()), put it into its pipeline, and use"
            " hasten.accelerate on that."
        )
    if path.suffix == ".safetensors":
        return (
            f"{path} is a single-file checkpoint; hasten opens diffusers folders. Convert it once with the pipeline's"
            " class: DiffusionPipeline.from_single_file(path).save_pretrained(folder), then name the folder."
        )
    return f"{path} is a file; a model is a bundled name, a diffusers folder or a hub id."


def _load(name_or_path: str, revision: str | None, dtype: torch.dtype) -> Any:
    kind = check_name(name_or_path)
    if kind == "bundled":
        from hasten.pipelines import tiny_models

        if tiny_models.card(name_or_path)["kind"] == "text":
            raise ModelError(
                f"{name_or_path} is a language model, and no diffusers pipeline. Write with `hasten generate {name_or_path}`, measure"
                " with `hasten bench dllm`, or open it in Python with hasten.load."
            )
        images = {"masked-image": "a masked image model", "image-tokens": "a language model of image tokens"}
        if (made := tiny_models.card(name_or_path)["kind"]) in images:
            raise ModelError(
                f"{name_or_path} is {images[made]}, and no diffusers pipeline. Draw with `hasten generate {name_or_path}`, or"
                " open it in Python with hasten.load."
            )
        return tiny_models.load(name_or_path, dtype=dtype)
    from diffusers import DiffusionPipeline

    source = str(Path(name_or_path).expanduser()) if kind == "folder" else name_or_path
    try:
        with warnings.catch_warnings(), quiet("diffusers"):  # about a failed download, what counts stands in the error
            # `torch_dtype` is the one spelling that all versions since our floor take; 0.42 says it is old.
            warnings.simplefilter("ignore", FutureWarning)
            # trust_remote_code is not even passed: diffusers' default is False, and nothing here can change it.
            return DiffusionPipeline.from_pretrained(
                source,
                revision=revision,
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=kind == "folder",
            )
    except Exception as error:
        raise ModelError(_why_not(name_or_path, kind, revision, error)) from error


def _why_not(name: str, kind: str, revision: str | None, error: Exception) -> str:
    """One sentence for what diffusers or the hub said."""
    said = " ".join(str(error).split())
    said = said if len(said) <= 240 else said[:240].rsplit(" ", 1)[0] + " ..."
    if kind == "folder":
        return f"The folder {name} cannot be loaded: {said or type(error).__name__}. Write it again, or check it is complete."
    at = f" at revision {revision!r}" if revision else ""
    if "safetensors" in said:
        return f"{name!r}{at} on the hub has no safetensors for a part of it, and pickles are refused. {_TO_FOLDER}"
    return (
        f"There is no folder {name!r} here, and fetching {name!r}{at} from the hub failed"
        f" ({type(error).__name__}: {said}). Check the spelling, the network, and access rights."
    )


def check_lora(path: Path) -> None:
    """Raise `ModelError` unless `path` is LoRA weights as safetensors: a file, or a folder with one."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        raise ModelError(f"There is no LoRA at {path}. Name a .safetensors file, or a folder that has one.")
    if files[0].suffix != ".safetensors":
        raise ModelError(
            f"{path} is not safetensors, and pickles can run any code when loaded. Ask for a .safetensors file."
        )


def add_lora(pipe: Any, path: Path, name: str | None = None) -> None:
    """Load the LoRA at `path` (a file, or a folder with one) onto `pipe`, as the adapter `name`. Raises `ModelError` where it
    does not fit."""
    if not hasattr(pipe, "load_lora_weights"):
        _add_by_hand(pipe, path, name or "lora")
        return
    try:
        pipe.load_lora_weights(str(path), use_safetensors=True, adapter_name=name)
    except Exception as error:
        said = " ".join(str(error).split())[:240]
        raise ModelError(f"The LoRA {path} does not fit {type(pipe).__name__}: {said}.") from error


def _add_by_hand(pipe: Any, path: Path, name: str) -> None:
    """For the pipelines of diffusers that cannot load a LoRA themselves (PixArt)."""
    from hasten.pipelines.host import denoisers
    from hasten.pipelines.lora import Lora
    from hasten.pipelines.seams.adapter import add

    lora, networks = Lora.load(path), denoisers(pipe)
    if lora.site not in networks:
        raise ModelError(f"The LoRA {path} is for a pipeline's {lora.site}; {type(pipe).__name__} has {', '.join(networks)}.")
    add(networks[lora.site], lora, name)


def pick_device(name: str | None) -> torch.device:
    """The device called `name`; None is the first accelerator, else the CPU. `UsageError` if it is absent."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        raise UsageError(
            f"The device {name!r} is not available here; there are: {', '.join(there)}."
        ) from None
    if device.type == "meta":
        raise UsageError("The device 'meta' holds no numbers. Use cpu or cuda.")
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype called `name`; None is bfloat16 on CUDA, where it is the models' own, and float32 elsewhere."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UsageError(
            f"The dtype {name!r} is unknown; allowed: {', '.join(DTYPES)}.{nearest(name, DTYPES)}"
        )
    return DTYPES[name]
