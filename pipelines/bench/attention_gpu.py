"""The part of `hasten bench attention` that needs a GPU: its dense backends, and whole networks at published sizes.

A network is built with random weights and few blocks of each kind; the time of a step is that of the embedders plus
that of each kind of block times how many the real network has. Rows say so.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten.errors import HastenError
from hasten.pipelines.accelerate import accelerate
from hasten.pipelines.bench.model_shapes import MODELS, ModelShape
from hasten.recipe import Recipe
from hasten.sparse_attn.layouts.kmeans import KMeans
from hasten.sparse_attn.measure.calibrate import wait
from hasten.sparse_attn.measure.roofline import SHAPES, Machine, predict
from hasten.sparse_attn.measure.trial import Inputs
from hasten.sparse_attn.pattern import Pattern
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.scorers.pooled import Centroid
from hasten.sparse_attn.selectors.top import TopK
from hasten.sparse_attn.stand_ins.compensate import Compensate

Row = dict[str, Any]
Tell = Callable[[str], None]

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

SHARE = 0.2
"""Density at which whole networks run."""

MORE = 2
"""Blocks of one kind added to tell what one of them costs."""


def cuda_backends(inputs: Inputs) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Each dense backend of this machine that takes `inputs`; PyTorch's, FlashAttention 3, SageAttention."""
    for name, call in _candidates(inputs):
        try:
            call()
            torch.cuda.synchronize()
        except (RuntimeError, ImportError, AttributeError, TypeError, ValueError, AssertionError):
            continue  # not for this device, dtype or head dimension
        yield name, call


def _candidates(inputs: Inputs) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    q, k, v = inputs.q, inputs.k, inputs.v
    grouped = inputs.heads[1] != inputs.heads[2]

    def native(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

        return call

    for name, backend in KERNELS.items():
        yield name, native(backend)
    turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]  # these two want [B, S, H, D]; not timed
    with contextlib.suppress(ImportError):
        flash3 = importlib.import_module("flash_attn_interface")

        def third() -> Tensor:
            found = flash3.flash_attn_func(*turned)
            o: Tensor = found[0] if isinstance(found, tuple) else found
            return o.transpose(1, 2)

        yield "flash-attn 3", third
    with contextlib.suppress(ImportError):
        sage = importlib.import_module("sageattention")
        yield "sage", lambda: sage.sageattn(q, k, v, tensor_layout="HND")


# --- whole networks -------------------------------------------------------------------------------


def recipes() -> dict[str, Recipe]:
    """Clusters at `SHARE`, never dense: a new plan at every step, and one plan for all. The difference is planning."""
    pattern = Pattern(layout=KMeans(), score=Centroid(), select=TopK(share=SHARE, by="tokens"))
    policy = SparseAttention(patterns=(pattern,), compensate=Compensate(), warm=0.0, min_tokens=0)
    kept = policy.model_copy(update={"refresh": 1000})
    return {
        f"clusters at {SHARE:.0%}": Recipe(name="clusters", attention=policy),
        f"clusters at {SHARE:.0%}, one plan": Recipe(name="clusters-one-plan", attention=kept),
    }


def bench_models(
    device: torch.device, *, dtype: torch.dtype, machine: Machine, seconds: float,
    models: Iterable[ModelShape] | None = None, tell: Tell = lambda _: None,
) -> list[Row]:  # fmt: skip
    """All of `MODELS`; what cannot run has the reason in its row. seconds: no network is begun after so many."""
    began, rows = time.perf_counter(), []
    for model in MODELS.values() if models is None else models:
        if time.perf_counter() - began > seconds:
            rows.append({"model": model.name, "recipe": "left out", "note": f"{max(0.0, seconds):.0f} s had passed"})
            continue
        try:
            found = bench_model(model, recipes(), device, dtype=dtype, machine=machine, density=SHARE, tell=tell)
        except (HastenError, torch.OutOfMemoryError) as error:
            rows.append(
                {"model": model.name, "recipe": "clusters", "note": f"{type(error).__name__}: {str(error)[:200]}"}
            )
            continue
        plain, fresh, kept = (row["seconds"] for row in found)
        found[1]["planning_seconds"], found[1]["planning_fraction"] = fresh - kept, (fresh - kept) / plain
        rows += found
    return rows


def bench_model(
    model: ModelShape,
    recipes: dict[str, Recipe],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    steps: int = 4,
    machine: Machine | None = None,
    density: float | None = None,
    tell: Tell = lambda _: None,
) -> list[Row]:
    """One row for the plain network, one for each recipe: seconds of a step with all its evaluations, and memory.

    The recipes should have no dense steps, for a step is what is timed; planning is inside their seconds.
    machine, density: for the predicted column. Raises what `accelerate` raises.
    """
    plain, held = scaled_step(model, None, device, dtype, steps)
    tell(f"{model.name}, plain: {plain:.2f} s a step")
    blocks = " + ".join(str(number) for number in model.full.values())
    note = f"scaled to {blocks} blocks from 1 and {1 + MORE} of each kind; random weights"
    common = {"model": model.name, "n": steps - 1, "note": note}
    rows = [common | {"recipe": "plain", "seconds": plain, "speedup": 1.0, "bytes_held": held}]
    shape = SHAPES.get(model.shape)
    for name, recipe in recipes.items():
        seconds, held = scaled_step(model, recipe, device, dtype, steps)
        row = common | {"recipe": name, "seconds": seconds, "speedup": plain / seconds, "bytes_held": held}
        if machine is not None and density is not None and shape is not None:
            row["predicted"] = predict(shape, density, machine).speedup
        rows.append(row)
        tell(f"{model.name}, {name}: {seconds:.2f} s a step, {plain / seconds:.2f}x")
    return rows


def scaled_step(
    model: ModelShape, recipe: Recipe | None, device: torch.device, dtype: torch.dtype, steps: int
) -> tuple[float, int]:
    """Seconds of one step of the whole network, and bytes at the peak of the largest one that ran.

    t(1, 1, ..) + sum over the kinds of (blocks - 1) * (t(.., 1 + MORE, ..) - t(1, 1, ..)) / MORE, times the
    evaluations.
    """
    ones = dict.fromkeys(model.blocks, 1)
    base, peak = step_seconds(model, ones, recipe, device, dtype, steps)
    total = base
    for kind in model.blocks:
        more, held = step_seconds(model, ones | {kind: 1 + MORE}, recipe, device, dtype, steps)
        total += (model.full[kind] - 1) * max(0.0, more - base) / MORE
        peak = max(peak, held)
    return total * model.evaluations, peak


def step_seconds(
    model: ModelShape,
    counts: dict[str, int],
    recipe: Recipe | None,
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
) -> tuple[float, int]:
    """Median seconds of one evaluation with `counts` blocks over `steps` steps but the first, and peak bytes."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    network = model.build(counts, device, dtype)
    scheduler = FlowMatchEulerDiscreteScheduler()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    session = accelerate(network, recipe, scheduler=scheduler) if recipe is not None else contextlib.nullcontext()
    with session, torch.no_grad():
        taken = _run(network, scheduler, model.inputs(device, dtype), device, steps)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return statistics.median(taken[1:] or taken), peak


def _run(
    network: nn.Module, scheduler: Any, inputs: dict[str, Tensor], device: torch.device, steps: int
) -> list[float]:
    """Seconds of each evaluation of a short run of the solver."""
    scheduler.set_timesteps(steps, device=device)
    latents, taken = inputs["hidden_states"], []
    for time_now in scheduler.timesteps:
        wait(device)
        began = time.perf_counter()
        found = network(**inputs | {"hidden_states": latents}, timestep=time_now.expand(1), return_dict=False)[0]
        wait(device)
        taken.append(time.perf_counter() - began)
        latents = scheduler.step(found, time_now, latents, return_dict=False)[0]
    return taken
