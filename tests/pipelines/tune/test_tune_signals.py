"""What a recorded run predicts is what happens, where the network does not look at its latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.caching.network import NetworkReuse
from hasten.forecast import Hold, Polynomial
from hasten.pipelines.bench.oracle import as_rule
from hasten.pipelines.tune.signals import predicted, recording
from hasten.recipe import Guidance, Recipe
from hasten.samplers.guidance import HeldGuidance, ListedGuidance
from tests.hosts import (
    FLUX_CALL,
    PIXART_CALL,
    UNET_CALL,
    WAN_CALL,
    small_flux,
    small_pixart,
    small_unet,
    small_wan,
)

STEPS = 12
COMPUTED = {0, 1, 4, 7, 11}
LISTED = ListedGuidance(at=(0.0, 4 / 11, 11 / 11), order=1)


def deaf(pipe: Any, embedding: torch.nn.Module) -> Any:
    """The same pipeline, whose outputs depend on the time and the prompt only."""
    with torch.no_grad():
        embedding.weight.zero_()
        if embedding.bias is not None:
            embedding.bias.zero_()
    return pipe


def deaf_wan() -> tuple[Any, dict[str, Any]]:
    pipe = small_wan(layers=2)
    return deaf(pipe, pipe.transformer.patch_embedding), {**WAN_CALL, "guidance_scale": 3.0, "output_type": "latent"}


def deaf_unet() -> tuple[Any, dict[str, Any]]:
    pipe = small_unet()
    return deaf(pipe, pipe.unet.conv_in), {**UNET_CALL, "guidance_scale": 3.0, "output_type": "latent"}


def deaf_flux() -> tuple[Any, dict[str, Any]]:
    pipe = small_flux()
    return deaf(pipe, pipe.transformer.x_embedder), {**FLUX_CALL, "output_type": "latent"}


def generate(pipe: Any, call: dict[str, Any]) -> Tensor:
    out = pipe("a seven", generator=torch.Generator().manual_seed(0), **call | {"num_inference_steps": STEPS, "return_dict": False})
    return out[0].double()


WAYS = {"both": None, "listed": LISTED, "held": HeldGuidance(after=0.2, every=2)}
COMPOSED = [
    *(pytest.param(host, way, id=f"{kind}-{name}") for kind, host in (("sequential", deaf_wan), ("batched", deaf_unet)) for name, way in WAYS.items()),
    pytest.param(deaf_flux, None, id="unguided"),
]  # fmt: skip


@pytest.mark.parametrize(("host", "guidance"), COMPOSED)
def test_the_predicted_end_is_the_real_one(host: Any, guidance: Guidance | None) -> None:
    (pipe, call), unguided = host(), host is deaf_flux
    with recording(pipe, guided=True) as recorder:
        plain = generate(pipe, call)
    signals = recorder.found
    assert signals is not None, recorder.why
    assert recorder.guided is not unguided and (signals.scale is None) is unguided and recorder.steps == STEPS
    for forecast, correct in ((Hold(), 0), (Polynomial(order=1), 2)):
        reuse = NetworkReuse(rule=as_rule(COMPUTED, STEPS), forecast=forecast, correct=correct)
        with hasten.accelerate(pipe, Recipe(reuse=reuse, guidance=guidance)) as run:
            found = generate(pipe, call)
        assert {event.step for event in run.trace.events if event.action == "compute"} == COMPUTED
        off = predicted(reuse, guidance, signals, COMPUTED)[-1] - signals.plain()[-1]
        distance = float((off @ signals.gram @ off).clamp_min(0).sqrt()) * _factor(pipe)
        real = float((found - plain).norm())
        assert real > 1e-2 * float(plain.norm()), "a composition that changes nothing would show nothing"
        assert abs(distance - real) < 1e-5 * float(plain.norm())


def _factor(pipe: Any) -> float:
    """From the coordinate in which a solver is linear, latents over alpha, to the latents at the end of the run."""
    scheduler = pipe.scheduler
    return float(scheduler.final_alpha_cumprod) ** 0.5 if hasattr(scheduler, "final_alpha_cumprod") else 1.0


def test_the_plain_run_is_at_no_distance_from_itself() -> None:
    pipe, call = deaf_unet()
    with recording(pipe, guided=True) as recorder:
        generate(pipe, call)
    assert recorder.found is not None
    everything = NetworkReuse(rule=as_rule(set(range(STEPS)), STEPS))
    assert recorder.found.error(predicted(everything, None, recorder.found, set(range(STEPS)))) < 1e-7
    assert recorder.found.error(torch.zeros_like(recorder.found.plain())) > 0.3


def test_a_recorded_run_is_the_plain_run_bit_for_bit() -> None:
    pipe, call = small_unet(), {**UNET_CALL, "output_type": "latent"}
    plain = generate(pipe, call)
    with recording(pipe, guided=True):
        assert torch.equal(generate(pipe, call), plain)


def test_a_solver_that_is_not_first_order_is_told() -> None:
    pipe, call = small_pixart(), {**PIXART_CALL, "output_type": "latent"}
    with recording(pipe, guided=True) as recorder:
        generate(pipe, call)
    assert recorder.found is None and recorder.guided and "DPMSolverMultistepScheduler is not first-order" in recorder.why
