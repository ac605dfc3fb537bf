"""Models and LoRAs by id: bundled ones, folders below one models folder, and named remote ones. Nothing here fetches."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hasten.errors import ModelError, nearest
from hasten.ui.engine.place import Place

Kind = Literal["image", "video", "text", "masked-image", "image-tokens", "language"]
"""text: a masked language model; language: a causal one, which is drafted for; image-tokens: one of images."""

GB = 10**9


@dataclass(frozen=True, slots=True)
class Card:
    """What a picker shows. where: `bundled`, `folder` or `remote`. bytes: of its files, about where remote. memory: bytes of its
    weights when loaded, about. ready: it is on this disk. fits: whether the weights fit into this machine's memory, None where
    that is not known; fit: in words. call: how it is usually called. prompts: examples."""

    id: str
    kind: Kind
    where: Literal["bundled", "folder", "remote"]
    bytes: int
    memory: int
    licence: str
    ready: bool
    fits: bool | None = None
    fit: str = ""
    note: str = ""
    call: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Remote:
    """A model that may be fetched. size: GB of the files that are needed, about; memory: GB in bfloat16, about."""

    kind: Kind
    size: float
    memory: float
    licence: str
    note: str = ""


REMOTE = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Remote("video", 29, 15, "Apache-2.0"),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": Remote("video", 34, 24, "Apache-2.0"),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": Remote("video", 80, 40, "Apache-2.0"),
    "black-forest-labs/FLUX.1-schnell": Remote("image", 34, 34, "Apache-2.0", "The hub may ask you to accept its terms once."),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": Remote("image", 22, 11, "CreativeML Open RAIL++-M"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Remote("image", 5, 3, "CreativeML Open RAIL-M"),
}
"""Models that are known to run without code of their own. Sizes and licences are as known here, and said to be."""


class Models:
    """The models of a place. Ids are keys of what a look at the disk finds; no id is ever joined to a path."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def cards(self) -> list[Card]:
        """All of them: bundled, folders, remote."""
        return [*_bundled(), *(_folder_card(name, path) for name, path in self._folders().items()), *(self._remote(name) for name in REMOTE)]

    def card(self, model: str) -> Card:
        """Raises `ModelError` for an id that is none of them."""
        known = {card.id: card for card in self.cards()}
        if model not in known:
            raise ModelError(f"There is no model {model!r} here.{nearest(model, known)} There are {', '.join(known)}.")
        return known[model]

    def source(self, model: str) -> str:
        """What hasten opens: a bundled name or a folder. Raises `ModelError` where it is unknown, or remote and not here yet."""
        card = self.card(model)
        if card.where == "bundled":
            return model
        if card.where == "folder":
            return str(self._folders()[model])
        folder = fetched(model)
        if folder is None:
            raise ModelError(f"{model} is not on this disk (about {card.bytes / GB:.0f} GB). Download it first, by its button.")
        return str(folder)

    def apart(self, model: str) -> bool:
        """Is it one that gets a process of its own: everything but the bundled ones?"""
        return ":" in model or "/" in model

    def drafting(self) -> dict[str, Path]:
        """Id -> folder of the causal language models below the models folder, which may draft for others."""
        return {name: folder for name, folder in self._folders().items() if _kind(folder) == "language"}

    # --- LoRAs ------------------------------------------------------------------------------------

    def loras(self) -> list[str]:
        """Ids: names of .safetensors files in the LoRA folder, without the ending."""
        return sorted(self._loras())

    def lora(self, name: str) -> Path:
        """Its file. Raises `ModelError` for an id that is none."""
        known = self._loras()
        if name not in known:
            raise ModelError(f"There is no LoRA {name!r} here.{nearest(name, known)} Put its .safetensors file into the LoRA folder.")
        return known[name]

    def _loras(self) -> dict[str, Path]:
        folder = self.place.loras
        return {file.stem: file for file in folder.glob("*.safetensors") if file.is_file()} if folder is not None and folder.is_dir() else {}

    # --- where they are ---------------------------------------------------------------------------

    def _folders(self) -> dict[str, Path]:
        """Id -> folder: models directly below the models folder, or one level deeper."""
        root = self.place.models
        if root is None or not root.is_dir():
            return {}
        found: dict[str, Path] = {}
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            inner = [folder] if _is_model(folder) else sorted(path for path in folder.iterdir() if path.is_dir() and _is_model(path))
            found |= {f"folder:{path.relative_to(root).as_posix()}": path for path in inner}
        return found

    def _remote(self, name: str) -> Card:
        about, ready = REMOTE[name], fetched(name) is not None
        fits, words = fit(int(about.memory * GB))
        note = " ".join(part for part in (about.note, "" if ready else "Sizes and licence are as we know them; the button asks the hub for the true size.") if part)
        return Card(name, about.kind, "remote", int(about.size * GB), int(about.memory * GB), about.licence, ready, fits, words, note)


INDEX = ("model_index.json", "config.json")
"""Files that make a folder a model. They are fetched last."""


def endpoint() -> str | None:
    """The hub's address as `HF_ENDPOINT` says it now; None for the usual one."""
    return os.environ.get("HF_ENDPOINT") or None


def cache() -> Path:
    """Where fetched models lie, as `HF_HUB_CACHE` or `HF_HOME` say it now, else the usual folder."""
    from huggingface_hub import constants

    if named := os.environ.get("HF_HUB_CACHE"):
        return Path(named).expanduser().absolute()
    home = os.environ.get("HF_HOME")
    return Path(home).expanduser().absolute() / "hub" if home else Path(constants.HF_HUB_CACHE)


def fetched(name: str) -> Path | None:
    """The folder of a remote model that is on this disk; None where it is not, or not as a whole. Asks nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True, cache_dir=cache()))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    return folder if any((folder / index).is_file() for index in INDEX) else None


def is_offline(place: Place) -> bool:
    """Was it said that nothing may be fetched?"""
    return place.offline or any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def fit(needed: int) -> tuple[bool | None, str]:
    """Whether weights of so many bytes fit, with a fifth more for what is computed; and in words."""
    there, what = _memory()
    if there is None:
        return None, "How much memory there is, is not known."
    share = needed * 1.2
    sentence = f"Its weights take about {needed / GB:.1f} GB; this machine has {there / GB:.0f} GB {what}."
    return share <= there, sentence if share <= there else f"{sentence} It will not fit without offload or smaller weights."


def _memory() -> tuple[int | None, str]:
    """Bytes of the accelerator, or of the machine where there is none."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory), "on its GPU"
    return int(psutil.virtual_memory().total), "of memory and no GPU"


def _bundled() -> Iterator[Card]:
    from hasten.pipelines import tiny_models

    for name in tiny_models.names():
        found, folder = tiny_models.card(name), tiny_models.path(name)
        size = _size(folder)
        kind: Kind = "language" if found["kind"] == "text" and _causal(_json(folder / "config.json")) else found["kind"]
        call, prompts = dict(found.get("call", {})), tuple(found.get("prompts", ()))
        yield Card(name, kind, "bundled", size, size, found["licence"], True, True, "It runs anywhere.", "Comes with hasten.", call, prompts)


def _folder_card(name: str, folder: Path) -> Card:
    facts, size = _json(folder / "hasten.json"), _size(folder)
    fits, words = fit(size)
    call, prompts = facts.get("call", {}), tuple(facts.get("prompts", ()))
    return Card(name, _kind(folder), "folder", size, size, str(facts.get("licence", "")), True, fits, words, "", call, prompts)


def _is_model(folder: Path) -> bool:
    return (folder / "model_index.json").is_file() or bool(_json(folder / "config.json").get("architectures"))


def _kind(folder: Path) -> Kind:
    """Of a pipeline by its class's name, of a transformers model by its own."""
    index = _json(folder / "model_index.json")
    if not index:
        return "language" if _causal(_json(folder / "config.json")) else "text"
    name = str(index.get("_class_name", ""))
    return "video" if any(word in name for word in ("Wan", "Video", "Mochi", "LTX", "CogVideo", "Allegro", "Latte")) else "image"


def _causal(config: dict[str, Any]) -> bool:
    """A class of transformers' own that writes from left to right: masked language models have code of their own, or say so."""
    says, classes = config.get("hasten_diffusion"), config.get("architectures")
    if isinstance(says, dict):
        return says.get("kind") == "causal"
    return isinstance(classes, list) and "auto_map" not in config and str(classes[:1]).endswith("ForCausalLM']")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
