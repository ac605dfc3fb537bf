"""By what a host is known again: its weights, scheduler and size, and the machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
from typing import Any

import torch
from torch import nn

from hasten.pipelines.host import hardware

PACKAGES = ("hasten", "torch", "diffusers")
OF_TEXTS = ("hasten", "torch", "transformers")
SAMPLED = 256
"""Numbers of each weight that a fingerprint reads: first, last and evenly between. A changed LoRA changes some of them."""


def of_weights(models: dict[str, nn.Module]) -> str:
    """A digest of the networks' weights, 16 hexadecimal digits: the same for another copy, device or run. Reads `SAMPLED`
    numbers of each tensor, so that it takes milliseconds on a model of billions."""
    digest = hashlib.sha256()
    for site, model in sorted(models.items()):
        for name, value in sorted(model.state_dict().items()):
            digest.update(f"{site}.{name}{tuple(value.shape)}{value.dtype}".encode())
            if value.is_meta or not value.numel():
                continue
            flat = value.detach().reshape(-1)
            places = torch.linspace(0, flat.numel() - 1, min(SAMPLED, flat.numel()), device=flat.device).long()
            wide = flat[places].to(torch.float32 if value.dtype.is_floating_point else torch.int64)
            digest.update(wide.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def machine(device: Any) -> str:
    """The hardware in words."""
    found = hardware(device)
    threads = f", {found['threads']} threads" if "threads" in found else ""
    return f"{found['type']}: {found['device']}{threads}"


def of_tokenizer(tokenizer: Any) -> str:
    """A digest of its words and their numbers, 16 hexadecimal digits; "" where there are none to be had."""
    words = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    listed = "\n".join(f"{number} {word}" for word, number in sorted(words.items(), key=lambda pair: (pair[1], pair[0])))
    return hashlib.sha256(listed.encode("utf-8", "surrogatepass")).hexdigest()[:16] if words else ""


def versions(packages: tuple[str, ...] = PACKAGES) -> tuple[str, ...]:
    """Of the packages that numbers depend on, `name x.y.z` each."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


def of_text(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """What a stamp says of a masked language model, its tokenizer, and where they are."""
    return known_by({"model": model}, OF_TEXTS) | {"tokenizer": of_tokenizer(tokenizer)}


def known_by(models: dict[str, nn.Module], packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """What a stamp says of networks and of where they are."""
    device = next((parameter.device for model in models.values() for parameter in model.parameters()), torch.device("cpu"))
    return {"weights": of_weights(models), "hardware": machine(device), "versions": versions(packages)}
