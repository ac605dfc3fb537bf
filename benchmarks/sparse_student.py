"""A one-call student that reads a part of the keys, trained so or made so afterwards: how far from the teacher's pictures?

    python benchmarks/sparse_student.py data.safetensors --model tiny-image --steps 250 --share 0.25

data.safetensors: pairs of `hasten train pairs` on this model; the last 256 are kept for the measurement. --start: a finished
training whose student both begin with (its rank must be the same). Prints for each student the mean square between its
latents and the teacher's, over the variance of the latter.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from hasten.distill.data.store import Store
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.methods.pairs import Pairs
from hasten.distill.network.host_call import HostCall, learn
from hasten.distill.network.role_attention import read_less
from hasten.distill.network.roles import Adapter, Roles
from hasten.distill.training import begin_with
from hasten.pipelines import loading, tiny_models
from hasten.sparse_attn.layouts.layout import Identity
from hasten.sparse_attn.pattern import Pattern
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.scorers.pooled import Pooled
from hasten.sparse_attn.selectors.top import TopK

KEPT = 256


def reading(share: float, block: int) -> SparseAttention:
    """The blocks of keys whose means agree best with the mean of the queries' (VSA's coarse stage)."""
    pattern = Pattern(layout=Identity(block=block), score=Pooled(), select=TopK(share=share))
    return SparseAttention(patterns=(pattern,), block_m=16, block_n=16)


@torch.no_grad()
def apart(trainer: Trainer, host: HostCall, store: Store) -> float:
    """Of the averaged student on the rows that were kept."""
    player, total = trainer.players["student"], 0.0
    own = {name: value.detach().clone() for name, value in player.parameters.items()}
    for name, value in player.average.items():
        player.parameters[name].copy_(value)
    assert store.x0 is not None and store.z is not None
    tau = torch.full((32,), host.path.start, dtype=torch.float64)
    rows = torch.arange(len(store) - KEPT, len(store))
    for part in rows.split(32):
        made = trainer.roles["student"].data(store.z[part].float(), tau, store.conditions.rows(store.prompt[part]))
        total += float((made - store.x0[part].float()).square().mean()) * len(part) / KEPT
    for name, value in own.items():
        player.parameters[name].copy_(value)
    return total / float(store.x0[rows].float().var())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="tiny-image")
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    store = Store.load(given.data)
    seen = slice(0, len(store) - KEPT)
    assert store.x0 is not None and store.z is not None
    data = replace(store, prompt=store.prompt[seen], x0=store.x0[seen], z=store.z[seen])
    settings = TrainSettings(steps=given.steps, batch=given.batch, lr=given.lr, seed=given.seed)
    for sparse in (False, True):
        pipe = loading.open_pipeline(given.model, device="cpu", quiet=True)
        host, _ = learn(pipe, ["a seven"], **tiny_models.call_defaults(pipe))
        torch.manual_seed(given.seed)
        roles = Roles.on_one_base(host, ["student"], Adapter(given.rank, given.rank))
        if given.start is not None:
            begin_with(given.start, roles)
        policy = reading(given.share, given.block)
        if sparse:
            read_less(roles, ["student"], policy, store.conditions)
        with tempfile.TemporaryDirectory() as out:
            trainer = Trainer(Pairs(), roles, data, settings, Path(out), host.shape, progress=False)
            if given.start is not None:
                print(f"before, read {'sparse' if sparse else 'dense'}: {apart(trainer, host, store):.4f}", flush=True)
            trainer.fit()
        name = "sparse" if sparse else "dense"
        print(f"trained {name}, read {name}: {apart(trainer, host, store):.4f}", flush=True)
        if sparse:
            roles["student"].sparse = False
        else:
            read_less(roles, ["student"], policy, store.conditions)
        print(f"trained {name}, read {'dense' if sparse else 'sparse'}: {apart(trainer, host, store):.4f}", flush=True)


if __name__ == "__main__":
    main()
