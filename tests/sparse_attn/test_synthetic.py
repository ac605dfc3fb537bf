"""Synthetic heads are what their names say, at any grid, and the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from hasten.errors import UsageError
from hasten.sparse_attn.measure.synthetic import HEADS, heads, positions, rotary_angles, rotate

GRID = (5, 8, 7)


def attention(kind: str, grid: tuple[int, int, int] = GRID, seed: int = 0) -> torch.Tensor:
    q, k, _ = heads(grid, 32, (kind,), seed=seed)
    return (q @ k.mT / 32**0.5).softmax(-1)[0, 0].double()


def offsets(kind: str) -> tuple[float, float, float]:
    """Mean distance in frames, rows and columns that a head looks, relative to looking everywhere alike."""
    place = positions(GRID).double()
    distance = (place[:, None] - place[None]).abs()
    seen = (attention(kind)[..., None] * distance).sum(1).mean(0)
    return tuple((seen / distance.mean((0, 1))).tolist())  # type: ignore[return-value]


def kept(kind: str, share: float) -> float:
    """Mean mass of each query's best `share` of the keys."""
    best = attention(kind).sort(-1, descending=True).values
    return float(best[:, : int(share * best.shape[1])].sum(-1).mean())


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 5, 9), (7, 1, 3)])
@pytest.mark.parametrize("head_dim", [6, 40, 64])
def test_any_grid_and_dimension(grid: tuple[int, int, int], head_dim: int) -> None:
    made = heads(grid, head_dim)
    assert all(x.shape == (1, len(HEADS), grid[0] * grid[1] * grid[2], head_dim) for x in made)
    assert all(x.isfinite().all() and x.dtype == torch.float32 for x in made)


def test_the_seed_decides_and_nothing_else() -> None:
    first, again, other = heads(GRID, 32, seed=3), heads(GRID, 32, seed=3), heads(GRID, 32, seed=4)
    torch.randn(3)  # the global generator has no say
    alone = heads(GRID, 32, ("temporal",), seed=3)
    for x, y, z, one in zip(first, again, other, alone, strict=True):
        assert torch.equal(x, y) and not torch.equal(x, z)
        assert torch.equal(x[:, list(HEADS).index("temporal")], one[:, 0])


def test_heads_look_where_their_names_say() -> None:
    frames, rows, columns = offsets("temporal")
    assert frames > 0.8 and rows < 0.6 and columns < 0.6, "the same place in all frames"
    frames, rows, columns = offsets("spatial")
    assert frames < 0.3 and min(rows, columns) > 2 * frames, "all over the same frame"
    assert max(offsets("local3d")) < 0.6, "near in space and time"
    frames, rows, columns = offsets("semantic")
    assert frames > 0.8, "the same things, whenever"


def test_sharp_and_diffuse() -> None:
    assert kept("semantic", 0.3) > 0.9
    assert kept("diffuse", 0.3) < 0.8
    assert kept("semantic", 0.1) > kept("diffuse", 0.1) + 0.2


def test_rotation_keeps_norms_and_depends_on_the_difference_of_places() -> None:
    angles = rotary_angles((1, 1, 6), 12).double()
    x, y = torch.randn(2, 12, generator=torch.Generator().manual_seed(0)).double()
    a, b = rotate(x.expand(6, 12), angles), rotate(y.expand(6, 12), angles)
    assert torch.allclose(a.norm(dim=-1), x.norm().expand(6))
    dots = a @ b.T
    assert torch.allclose(dots[:-1, :-1], dots[1:, 1:])
    assert not torch.allclose(dots[0, 0], dots[0, 1])


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match="no head 'semantc'.*Did you mean 'semantic'"):
        heads(GRID, 32, ("semantc",))
    with pytest.raises(UsageError, match="Head dimension 33"):
        heads(GRID, 33)
    with pytest.raises(UsageError, match="at least one token along each axis"):
        heads((0, 2, 2), 32)
