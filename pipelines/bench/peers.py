"""Other libraries' caches on the same pipeline: diffusers' own and cache-dit, each over a sweep of its settings.

Every peer is taken at its best: named as its own documentation names it, calibrated where it asks for that, with
float32 factors where its default is bfloat16, and with module patterns that match where the default ones match
nothing. What a library then does on a model is its own affair: a crash, a refusal or an unchanged output becomes a
row with the reason.
"""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Callable
from typing import Any

from hasten.errors import RefusedError, UsageError
from hasten.pipelines.bench.bars import SETTING
from hasten.pipelines.bench.candidates import Candidate
from hasten.pipelines.bench.foreign import because, cache_dit, diffusers_cache, unavailable

ATTENTION = r"^(single_)?(transformer_)?blocks\.\d+\.attn\d?$"
"""Attention modules by their real names; TaylorSeer's own default matches none where they are called attn1."""


def sweep(pipe: Any, call: dict[str, Any], thin: int = 1) -> list[Candidate]:
    """All peers at all settings, for runs of `call` on `pipe`. Runs MagCache's calibration once.

    thin: only every so many settings of each family; the last always, as the first is the most careful.

    A family that cannot be had (not in this version, not installed, not calibrated) is one candidate that says why
    when it is put on.
    """
    families: dict[str, Callable[[], list[Candidate]]] = {
        "diffusers FirstBlockCache": _first_block,
        "diffusers MagCache": lambda: _mag(pipe, call),
        "diffusers TaylorSeer": _taylor_seer,
        "diffusers SeaCache": _sea,
        "diffusers PAB": _pyramid,
        "diffusers FasterCache": lambda: _faster(pipe),
        "cache-dit DBCache": _cache_dit,
    }
    found: list[Candidate] = []
    for name, build in families.items():
        try:
            found += build()[::-thin][::-1]
        except Exception as error:  # noqa: BLE001 - whatever the library raises is the reason in the table
            found.append(unavailable(name, f"peer:{name.partition(' ')[0]}", because(error)))
    return found


def few() -> list[Candidate]:
    """A handful of settings around our presets' speed. cache-dit is refused, with a `UsageError`, if absent."""
    from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

    try:
        import cache_dit as _  # noqa: F401
    except ImportError:
        raise UsageError(
            "cache-dit is not installed; `pip install cache-dit`, or pass peers=False."
        ) from None
    lite = {"max_order": 1, "use_lite_mode": True}
    return [
        diffusers_cache("FirstBlockCache 0.1", lambda _: FirstBlockCacheConfig(threshold=0.1)),
        diffusers_cache(
            "TaylorSeer lite, interval 3", lambda _: TaylorSeerCacheConfig(cache_interval=3, **lite)
        ),
        diffusers_cache(
            "TaylorSeer lite, interval 5", lambda _: TaylorSeerCacheConfig(cache_interval=5, **lite)
        ),
        cache_dit("F1B0 0.08 + TaylorSeer 1", 0.08, 1),
        cache_dit("F1B0 0.15 + TaylorSeer 1", 0.15, 1),
        cache_dit("F1B0 0.5 + TaylorSeer 1", 0.5, 1),
    ]


# -- diffusers --------------------------------------------------------------------------------------------------
def _first_block() -> list[Candidate]:
    from diffusers import FirstBlockCacheConfig

    return [
        diffusers_cache(f"FirstBlockCache{SETTING}{t}", lambda _, t=t: FirstBlockCacheConfig(threshold=t))  # type: ignore[misc]
        for t in (0.02, 0.05, 0.1, 0.15, 0.25, 0.4)
    ]


def _mag(pipe: Any, call: dict[str, Any]) -> list[Candidate]:
    from diffusers import MagCacheConfig

    steps, ratios = call["num_inference_steps"], magnitude_ratios(pipe, call)
    settings = ((0.03, 3, 0.2), (0.06, 3, 0.2), (0.12, 4, 0.2), (0.24, 5, 0.1), (0.5, 6, 0.1), (1.0, 8, 0.1))
    return [
        diffusers_cache(
            f"MagCache{SETTING}{limit}, {skips} skips, {share} kept",
            lambda _, limit=limit, skips=skips, share=share: MagCacheConfig(  # type: ignore[misc]
                threshold=limit,
                max_skip_steps=skips,
                retention_ratio=share,
                num_inference_steps=steps,
                mag_ratios=list(ratios),
            ),
        )
        for limit, skips, share in settings
    ]


def magnitude_ratios(pipe: Any, call: dict[str, Any]) -> list[float]:
    """MagCache's calibration as documented: one run in calibration mode, whose printed list is read back.

    The first list printed is that of the first branch. The prompt is a tuning prompt, not one of the samples.
    """
    from diffusers import MagCacheConfig

    config = MagCacheConfig(calibrate=True, num_inference_steps=call["num_inference_steps"])
    printed = io.StringIO()
    with (
        diffusers_cache("MagCache, calibration", lambda _: config).apply(pipe),
        contextlib.redirect_stdout(printed),
    ):
        pipe(prompt="a one", **call)
    lists = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    values = [ast.literal_eval(line) for line in lists if not line.startswith("[MagCache]")]
    if not values:
        raise RefusedError("MagCache printed no ratios at the end of its calibration run.")
    return [float(value) for value in values[0]]


def _taylor_seer() -> list[Candidate]:
    import torch
    from diffusers import TaylorSeerCacheConfig

    def one(label: str, **settings: Any) -> Candidate:
        return diffusers_cache(
            f"TaylorSeer {label}",
            lambda _: TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32, **settings),
        )

    lite = [
        one(
            f"lite, order {order}{SETTING}interval {n}", cache_interval=n, max_order=order, use_lite_mode=True
        )
        for order, n in ((1, 2), (1, 3), (1, 4), (1, 5), (1, 7), (1, 10), (2, 2), (2, 3))
    ]
    defaults = diffusers_cache(f"TaylorSeer{SETTING}defaults", lambda _: TaylorSeerCacheConfig())
    attention = one(f"attention{SETTING}interval 5", cache_interval=5, cache_identifiers=[ATTENTION])
    return [*lite, defaults, attention]


def _sea() -> list[Candidate]:
    from diffusers import SeaCacheConfig

    return [
        diffusers_cache(
            f"SeaCache{SETTING}{limit}, {skips} skips",
            lambda _, limit=limit, skips=skips: SeaCacheConfig(threshold=limit, max_consecutive_cached=skips),  # type: ignore[misc]
        )
        for limit, skips in ((0.1, 2), (0.25, 2), (0.5, 3), (1.0, 4), (2.0, 6))
    ]


def _pyramid() -> list[Candidate]:
    from diffusers import PyramidAttentionBroadcastConfig

    def config(now: Callable[[], float], skip: int, window: tuple[int, int]) -> Any:
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=skip,
            cross_attention_block_skip_range=skip + 1,
            spatial_attention_timestep_skip_range=window,
            cross_attention_timestep_skip_range=window,
            current_timestep_callback=now,
        )

    return [
        diffusers_cache(
            f"PAB{SETTING}{skip}, {window[0]} to {window[1]}",
            lambda now, skip=skip, window=window: config(now, skip, window),  # type: ignore[misc]
        )
        for window in ((100, 800), (0, 1000))
        for skip in (2, 5)
    ]


def _faster(pipe: Any) -> list[Candidate]:
    from diffusers import FasterCacheConfig

    batched = not hasattr(getattr(pipe, "transformer", None), "cache_context")
    layout = "BCFHW" if "Wan" in type(pipe).__name__ or "Video" in type(pipe).__name__ else "BCHW"

    def config(now: Callable[[], float], attention: int, branch: int, below: int) -> Any:
        return FasterCacheConfig(
            spatial_attention_block_skip_range=attention,
            spatial_attention_timestep_skip_range=(-1, below),
            unconditional_batch_skip_range=branch,
            unconditional_batch_timestep_skip_range=(-1, below),
            attention_weight_callback=lambda _: 0.3,
            tensor_format=layout,
            # Its branch skipping splits a batch in two; pipelines that call the branches one after the other have
            # none to split, and saying "distilled" is how its attention part alone is asked for.
            is_guidance_distilled=not batched,
            current_timestep_callback=now,
        )

    settings = [
        (a, b, below)
        for below in (681, 981)
        for a, b in (((2, 2), (2, 5), (4, 8)) if batched else ((2, 1), (4, 1)))
    ]
    return [
        diffusers_cache(
            f"FasterCache{SETTING}{a}, {f'branch {b}, ' if batched else ''}below {below}",
            lambda now, a=a, b=b, below=below: config(now, a, b, below),  # type: ignore[misc]
        )
        for a, b, below in settings
    ]


# -- cache-dit --------------------------------------------------------------------------------------------------
def _cache_dit() -> list[Candidate]:
    import cache_dit as _  # noqa: F401

    limits = (0.02, 0.05, 0.08, 0.12, 0.2, 0.35)
    plain = [cache_dit(f"DBCache F1B0{SETTING}{limit}", limit, None) for limit in limits]
    return plain + [cache_dit(f"DBCache F1B0 + TaylorSeer 1{SETTING}{limit}", limit, 1) for limit in limits]
