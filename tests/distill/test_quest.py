"""QuEST: only the layers that it names change, each group in its turn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hasten.distill.loop.draw import Draw
from hasten.distill.methods.quest import QuEST, QuESTState
from hasten.errors import RefusedError
from tests.distill.quantised_students import SHORT, training
from tests.distill.toys import trainer


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Layers whose weights are others."""
    ends = ".change.value"
    return {n.removeprefix("heads.").removesuffix(ends) for n in before if n.endswith(ends) and not torch.equal(before[n], after[n])}


def test_only_the_named_layers_change_and_each_in_its_turn(tmp_path: Path) -> None:
    done, _ = training("pixart", QuEST(turn=0.5, **SHORT), tmp_path, steps=4)
    state, player = done.state, done.players["student"]
    assert isinstance(state, QuESTState)
    block = "transformer_blocks.0"
    attention = {f"{block}.attn{n}.to_{part}" for n in (1, 2) for part in "qkv"}
    time = {f"adaln_single.{name}" for name in ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")}
    assert state.sensitive == attention | {f"{block}.ff.net.2"} and state.clocks == time
    first = {name: p.detach().clone() for name, p in player.parameters.items()}
    done.fit(stop_after=2)
    half = {name: p.detach().clone() for name, p in player.parameters.items()}
    assert moved(first, half) == state.sensitive
    done.fit(resume=True)
    assert time <= moved(half, player.parameters)
    assert not torch.equal(first["heads.proj_out.finer_inputs"], half["heads.proj_out.finer_inputs"])


def test_a_row_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    done, _ = training("pixart", QuEST(**SHORT), tmp_path)

    def losses(index: list[int]) -> Tensor:
        draw = Draw(0, 1, index)
        with torch.no_grad():
            return done.state.loss("student", done.data.batch(torch.tensor(index), draw), draw, 0, {}).rows

    torch.testing.assert_close(losses([1, 0]), torch.cat([losses([1]), losses([0])]), rtol=1e-4, atol=1e-5)


def test_networks_without_such_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no layer by the names that QuEST tunes"):
        trainer(QuEST(**SHORT), tmp_path)
