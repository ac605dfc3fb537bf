"""Contexts in files: the keys and values of a prompt, to continue from in another process.

A file is a safetensors file. "exact" has the tensors as they are held; compact has them rounded and entropy-coded
(after CacheGen, 2310.07240): per channel to few levels, more of them in the first third of the layers, coded with a
table per layer and head.

Shapes: see `hasten.caching.decode`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hasten.atomic import replacing
from hasten.caching.decode.wire import Coded, decode, encode, frequencies
from hasten.errors import OutputError, RefusedError, UsageError
from hasten.pipelines.decode_kv.cache import KVCache
from hasten.pipelines.decode_kv.session import KVSession
from hasten.pipelines.text_models.stamp import same, stamp

FORMAT = "hasten-context-1"


def save_context(cache: KVCache, path: str | Path, tokens: Tensor, *, levels: int | None = None) -> Path:
    """Write what `cache` holds of the texts tokens int64 [B, n] (padding included, as they were given to the model).

    levels: numbers that a key's or value's channel is rounded to, 4 to 128 (16: about 3 to 4 bits each; twice as many in
    the first third of the layers); None: exact, in the dtype of the model. Raises `UsageError` for a cache that holds
    nothing or has a draft open, for shared prefixes, and for `lazy`.
    """
    slots = [layer.slots for layer in cache.layers]
    if not cache.lengths or cache.layers[0].levels or slots[0].tail is not None:
        raise UsageError("save_context() needs a cache that holds something, without an open draft or shared prefixes.")
    if cache.state.lazy is not None:
        raise UsageError("save_context(): deeper layers of this cache lack tokens, and their hidden states are not saved. Leave `lazy` out.")
    if tokens.shape != (len(cache.lengths), cache.columns):
        raise UsageError(f"save_context(): the cache has read tokens of shape {(len(cache.lengths), cache.columns)}, got {tuple(tokens.shape)}.")
    if levels is not None and not 4 <= levels <= 128:
        raise UsageError(f"save_context(): levels are 4 to 128, got {levels}; None keeps everything exactly.")
    found: dict[str, Tensor] = {"tokens": tokens.cpu(), "stamp": stamp(cache.session.host)}
    for number, each in enumerate(slots):
        view = each.view()
        found[f"{number}.place"] = view.place.cpu()
        for name, x in (("k", view.k), ("v", view.v)):
            own = levels and min(256, 2 * levels if number < len(slots) / 3 else levels)
            parts = {"exact": x.cpu().contiguous()} if own is None else _compact(x, own)
            found |= {f"{number}.{name}.{part}": value for part, value in parts.items()}
    about = {"format": FORMAT, "model": type(cache.session.host).__name__, "lengths": cache.lengths, "columns": cache.columns}
    with replacing(path) as aside:
        save_file({name: value.contiguous() for name, value in found.items()}, aside, {"hasten": json.dumps(about)})
    return Path(path)


def load_context(run: KVSession, path: str | Path) -> tuple[KVCache, Tensor]:
    """A cache for the model of `run` that holds what was saved, and the tokens int64 [B, n] it stands for: pass both on,
    with more tokens behind, as `run.host.generate(ids, past_key_values=cache)`.

    Raises `RefusedError` where another model made it, `OutputError` where the file cannot be read or is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("hasten", "{}"))
            if about.get("format") != FORMAT:
                raise OutputError(f"{path} is not a saved context (format {about.get('format')!r}, expected {FORMAT!r}).")
            return _restored(run, file, about, str(path))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, RefusedError | OutputError):
            raise
        raise OutputError(f"Cannot read the saved context {path}: {error}. Save it again.") from None


def _restored(run: KVSession, file: Any, about: dict[str, Any], path: str) -> tuple[KVCache, Tensor]:
    if not same(file.get_tensor("stamp"), stamp(run.host)):
        raise RefusedError(
            f"{path} was made by another model ({about['model']}) or other weights, whose keys and values mean nothing to this"
            f" {type(run.host).__name__}. Compute the prompt again."
        )
    device = next(run.host.parameters()).device
    tokens, lengths, columns = file.get_tensor("tokens"), list(map(int, about["lengths"])), int(about["columns"])
    if tokens.shape != (len(lengths), columns) or not 0 < max(lengths) <= min(columns, run.limits.max_tokens):
        raise OutputError(f"{path} is damaged: {len(lengths)} texts of {lengths} tokens in {columns} columns.")
    cache = run.cache()
    for number, layer in enumerate(cache.layers):
        place = file.get_tensor(f"{number}.place").to(device)
        k, v = (_read(file, f"{number}.{name}", place.shape[-1]).to(device) for name in ("k", "v"))
        layer.slots.restore(k, v, place)
        layer.lazy_initialization(k, v)
    cache.lengths, cache.columns = lengths, columns
    return cache, tokens.to(device)


def _read(file: Any, name: str, slots: int) -> Tensor:
    found: Tensor
    if f"{name}.exact" in file.keys():  # noqa: SIM118 - not a dict
        found = file.get_tensor(f"{name}.exact")
    else:
        found = _expanded({part: file.get_tensor(f"{name}.{part}") for part in ("words", "states", "freq", "scale", "shape")})
    if found.dim() != 4 or found.shape[2] != slots:
        raise ValueError(f"{name} has shape {tuple(found.shape)} and {slots} places")
    return found


def _compact(x: Tensor, levels: int) -> dict[str, Tensor]:
    """x [B, Hk, S, D] rounded to an odd number of levels per channel and coded with a table per head."""
    half = (levels - 1) // 2
    scale = (x.float().abs().amax((0, 2), keepdim=True) / half).clamp_min(1e-12)
    symbols = ((x.float() / scale).round().clamp(-half, half) + half).to(torch.uint8).cpu().numpy()
    table = _tables(x.shape)
    freq = frequencies(symbols.ravel(), table, x.shape[1], 2 * half + 1)
    coded = encode(symbols.ravel(), table, freq)
    return {
        "words": torch.from_numpy(coded.words.view(np.int32)), "states": torch.from_numpy(coded.states.view(np.int64)),
        "freq": torch.from_numpy(freq.view(np.int16)), "scale": scale.to(x.dtype).cpu(), "shape": torch.tensor(x.shape),
    }  # fmt: skip


def _expanded(parts: dict[str, Tensor]) -> Tensor:
    shape, scale = parts["shape"].tolist(), parts["scale"]
    if len(shape) != 4 or scale.shape != (1, shape[1], 1, shape[3]) or not 0 < np.prod(shape) < 2**36:
        raise ValueError(f"a tensor of shape {shape} does not fit its scales")
    freq = parts["freq"].numpy().view(np.uint16)
    coded = Coded(parts["words"].numpy().view(np.uint32), parts["states"].numpy().view(np.uint64))
    symbols = decode(coded, _tables(shape), freq)
    numbers = torch.from_numpy(symbols).view(shape).to(torch.float32) - (freq.shape[1] - 1) // 2
    restored: Tensor = (numbers * scale.float()).to(scale.dtype)
    return restored


def _tables(shape: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The head of each number of a [B, Hk, S, D] tensor, flat."""
    heads = np.arange(shape[1])[None, :, None]
    found: np.ndarray[Any, np.dtype[np.int64]] = np.broadcast_to(heads, (shape[0], shape[1], shape[2] * shape[3])).ravel()
    return found
