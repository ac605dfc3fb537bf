"""How much faster a shared prefix is read at once than by each row for itself: attention alone, and whole generations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hasten.caching.decode.kept import KeptCache, Shared
from hasten.caching.decode.slots import Slots
from hasten.pipelines.decode_kv.attention import attend_levels
from hasten.pipelines.decode_kv.session import attach


def attention(
    *, batch: int = 16, prefix: int = 4096, suffix: int = 64, heads: int = 8, key_heads: int = 8, dim: int = 64, rounds: int = 7,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """One new token for each of `batch` rows that share `prefix` tokens and have `suffix` of their own: seconds (median) of
    PyTorch's attention on each row's whole cache, of ours, and the largest difference of their outputs."""
    dice = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice, device=device, dtype=dtype)

    q = noise(batch, heads, 1, dim)
    common = [noise(1, key_heads, prefix, dim) for _ in range(2)]
    own = [noise(batch, key_heads, suffix, dim) for _ in range(2)]
    level, rest = Slots(), Slots()
    level.append(common[0], common[1], torch.arange(prefix, device=device)[None])
    rest.append(own[0], own[1], torch.arange(prefix, prefix + suffix, device=device).expand(batch, -1))
    k, v = (torch.cat([x.expand(batch, -1, -1, -1), y], 2) for x, y in zip(common, own, strict=True))
    at = torch.full((batch, 1), prefix + suffix, device=device)
    scale, grouped = dim**-0.5, heads != key_heads

    def separate() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)

    def together() -> Tensor:
        return attend_levels(q, [level.view()], rest.view(), at, scale).transpose(1, 2)

    seconds = {name: _median(call, rounds, device) for name, call in (("separate", separate), ("shared", together))}
    return {
        "batch": batch, "prefix": prefix, "suffix": suffix, "heads": heads, "key_heads": key_heads, "dim": dim,
        "dtype": str(dtype).removeprefix("torch."), "seconds_separate": seconds["separate"], "seconds_shared": seconds["shared"],
        "speedup": seconds["separate"] / seconds["shared"], "largest_difference": float((separate() - together()).abs().max()),
        "bytes_separate": 2 * k.numel() * k.element_size(), "bytes_shared": level.bytes + rest.bytes,
    }  # fmt: skip


def generation(model: Any, prompt: Tensor, samples: int = 16, new: int = 16, rounds: int = 3) -> dict[str, Any]:
    """`samples` continuations of one prompt int64 [1, n], drawn with one seed: seconds plain and shared; are they the same?"""
    call = {"num_return_sequences": samples, "do_sample": True, "max_new_tokens": new, "attention_mask": torch.ones_like(prompt)}

    def drawn() -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return model.generate(prompt, **call)  # type: ignore[no-any-return]

    plain, seconds = drawn(), _median(drawn, rounds, "cpu")
    with attach(model, KeptCache(shared=Shared(least=16))) as run:
        same, ours = torch.equal(plain, drawn()), _median(drawn, rounds, "cpu")
        held = run.last.bytes if run.last is not None else 0
    return {"samples": samples, "prompt": prompt.shape[1], "new": new, "seconds": seconds, "seconds_shared": ours,
            "speedup": seconds / ours, "same": same, "bytes_held": held}  # fmt: skip


def _median(call: Callable[[], Any], rounds: int, device: str) -> float:
    """Median seconds of a call: of the processor on a CPU, which other processes do not lengthen; else of the clock."""
    clock, taken = time.process_time if device == "cpu" else time.perf_counter, []
    for number in range(rounds + 1):
        started = clock()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        if number:  # the first one warms up
            taken.append(clock() - started)
    return statistics.median(taken)
