"""What chunks on kept keys cost and how far they are from the teacher's clips.

    python benchmarks/causal_video.py PAIRS [--student DIR] [--rows 2] [--calls 4] [--chunk 3]

PAIRS: the data.safetensors of a training on tiny-video (`pairs`, `causal`): its last rows, which a training with fewer rows has
not seen, are made again of the same noise. --student: the student's folder of a `causal` or `self-forcing` training. A line of JSON
for each way: evaluations of the network (and how many frames they see in sum), 10^9 multiply-adds for a clip, and the distance of
the latents from the teacher's, relative to their size.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import hasten
from hasten.distill.data.store import Store
from hasten.distill.network.chunks import Chunks, ChunkSteps
from hasten.distill.network.few_steps import FewSteps, sample
from hasten.distill.network.host_call import learn
from hasten.distill.network.roles import Role
from hasten.pipelines.lora import Lora
from hasten.pipelines.seams.adapter import put_on
from hasten.pipelines.tiny_models import call_defaults
from hasten.session import Attachment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--student", type=Path)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--calls", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipe, store = hasten.load("tiny-video"), Store.load(given.pairs)
    host, _ = learn(pipe, ["a seven moving left"], **call_defaults(pipe))
    rows = torch.arange(len(store) - given.rows, len(store))
    condition, z, x0 = store.conditions.rows(store.prompt[rows]), store.z[rows].float(), store.x0[rows].float()  # type: ignore[index]
    role = Role("teacher", host, None, (), False)
    whole = FewSteps.even(given.calls, host.path, "ode", shift=3.0)
    steps = replace(ChunkSteps.even(given.calls, host.path, "ode", shift=3.0), chunk=given.chunk)
    print(json.dumps({"way": "whole clip, unguided", **made(role, whole, z, x0, condition)}), flush=True)
    print(json.dumps({"way": "chunks, untrained", **made(Chunks(role, steps), steps, z, x0, condition)}), flush=True)
    if given.student is not None:
        attachment = Attachment()
        put_on(attachment, host.network, Lora.load(given.student), 1.0)
        print(json.dumps({"way": str(given.student.name), **made(Chunks(role, steps), steps, z, x0, condition)}), flush=True)
        attachment.restore()


def made(who: Any, steps: FewSteps, z: Tensor, x0: Tensor, condition: Any) -> dict[str, Any]:
    """Make the rows' clips and look at them."""
    network = who.role.host.network if isinstance(who, Chunks) else who.host.network
    frames: list[int] = []
    hook = network.register_forward_hook(lambda _, __, kw, ___: frames.append(kw["hidden_states"].shape[2]), with_kwargs=True)
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        found = sample(who, z, condition, steps)
    hook.remove()
    gap = (found - x0).flatten(1).norm(dim=1) / x0.flatten(1).norm(dim=1)
    work = counted.get_total_flops() / 2e9 / len(z)
    return {"calls": len(frames), "frames": sum(frames), "gmacs": round(work, 3), "distance": round(float(gap.mean()), 4)}


if __name__ == "__main__":
    main()
