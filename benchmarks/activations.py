"""How far the memory plan's estimate of activations is from what autograd keeps, on the bundled models.

python benchmarks/activations.py
"""

from __future__ import annotations

import torch

from hasten.distill.loop.memory_plan import plan
from hasten.distill.network.host_call import learn
from hasten.distill.network.roles import Adapter, Roles
from hasten.distill.train_config import load_config
from hasten.pipelines import loading, tiny_models

ROWS = 4


def kept(model: str, full: bool) -> int:
    """Bytes of distinct memory that one evaluation of the student keeps for its gradient, weights aside."""
    pipe = loading.open_pipeline(model, device="cpu", dtype="float32", quiet=True)
    host, conditions = learn(pipe, ["a seven"], **tiny_models.call_defaults(pipe))
    roles = Roles.of_copies(host, ["student"]) if full else Roles.on_one_base(host, ["student"], Adapter(8, 8.0))
    own = {p.untyped_storage().data_ptr() for role in roles.values() for p in role.host.network.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []  # what is freed while it runs may give its address to another
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t), pack(t))[1], lambda t: t):
        x = torch.randn(ROWS, *host.shape)
        roles["student"].velocity(x, torch.full((ROWS,), 0.7, dtype=torch.float64), conditions.rows(torch.zeros(ROWS, dtype=torch.int64)))
    return sum(seen.values())


if __name__ == "__main__":
    for model in ("tiny-flux", "tiny-image", "tiny-video"):
        for full in (False, True):
            config = load_config("pairs", None, {"model": model, "train.batch": ROWS, "rank": 8, "full": full})
            found = plan(config)
            assert found is not None
            real = kept(model, full)
            print(f"{model:11s} {'copy   ' if full else 'adapter'} estimate {found.activations / 2**20:7.2f} MiB, kept {real / 2**20:7.2f} MiB,"
                  f" ratio {found.activations / real:.2f}")  # fmt: skip
