"""What every reader of a cache does, whatever it reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hasten.sparse_attn.text.delta
import hasten.sparse_attn.text.hierarchical
import hasten.sparse_attn.text.lookup
import hasten.sparse_attn.text.pages
import hasten.sparse_attn.text.votes  # noqa: F401  the readers
from hasten.part import Part
from hasten.sparse_attn.text.reader import Everything, Reader, ReaderState
from tests.contract import PartContract

SMALL = {
    "recent": {"window": 16, "sinks": 2},
    "votes": {"top": 12, "sinks": 3, "window": 9},
    "lookup": {"share": 0.2, "cluster": 5},
    "tree": {"top": 3, "block": 4, "sinks": 5, "window": 10},
    "delta": {"window": 12, "sinks": 2, "share": 0.3},
    "pages": {"page": 4, "top": 5, "by": "means", "outliers": 2},
}
"""Arguments for which each reads part of 100 keys."""

LARGE = {
    "recent": {"window": 100},
    "votes": {"top": 100},
    "lookup": {"share": 1.0},
    "tree": {"top": 50, "block": 2},
    "delta": {"window": 100},
    "pages": {"page": 4, "top": 100},
}
"""Arguments for which each reads everything."""

PROMPT, KEYS, SCALE = 90, 100, 8**-0.5


@pytest.fixture(params=sorted(Reader.members()))
def part(request: pytest.FixtureRequest) -> Part:
    return Reader.members()[request.param](**SMALL.get(request.param, {}))


def draw(n: int, dtype: torch.dtype = torch.float32, seed: int = 0, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, 4, PROMPT + n, 8), (batch, 2, KEYS, 8), (batch, 2, KEYS, 6)
    q, k, v = (torch.randn(*shape, generator=g).to(dtype) for shape in shapes)
    return q, k, v


def started(part: Part, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> ReaderState:
    """A state that has been told about the prompt."""
    state: ReaderState = part.start()  # type: ignore[attr-defined]
    state.prepare(q[:, :, :PROMPT], k[:, :, :PROMPT], v[:, :, :PROMPT], first, SCALE)
    return state


class TestContract(PartContract):
    """What every reader does."""

    family = Reader

    @pytest.mark.parametrize("n", [1, 3])
    def test_padding_and_the_future_are_not_read(self, part: Part, n: int) -> None:
        first = torch.tensor([0, 17, 60])
        q, k, v = draw(n)
        padding = (torch.arange(KEYS) < first[:, None])[:, None, :, None]
        clean = started(part, q, k, v, first).attend(q[:, :, PROMPT:], k, v, first, SCALE)
        poisoned = [x.masked_fill(padding, 1e4) for x in (k, v)]
        out = started(part, q, *poisoned, first).attend(q[:, :, PROMPT:], *poisoned, first, SCALE)
        torch.testing.assert_close(out.o, clean.o)
        assert torch.isfinite(out.o).all() and torch.isfinite(out.lse).all()
        if n > 1:
            k[:, :, -1], v[:, :, -1] = 9.0, 9.0
            later = started(part, q, k, v, first).attend(q[:, :, PROMPT:], k, v, first, SCALE)
            torch.testing.assert_close(later.o[:, :, 0], clean.o[:, :, 0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_shapes_and_dtypes(self, part: Part, dtype: torch.dtype) -> None:
        q, k, v = draw(2, dtype)
        out = started(part, q, k, v, None).attend(q[:, :, PROMPT:], k, v, None, SCALE)
        assert out.o.shape == (3, 4, 2, 6) and out.o.dtype == dtype
        assert out.lse.shape == (3, 4, 2) and out.lse.dtype == torch.float32

    def test_what_is_read_is_counted(self, part: Part) -> None:
        q, k, v = draw(1)
        state = started(part, q, k, v, None)
        state.attend(q[:, :, PROMPT:], k, v, None, SCALE)
        if part.kind == "everything":
            assert state.read is None
        else:
            assert state.read is not None and 0 < int(state.read) < 0.75 * 6 * KEYS

    @pytest.mark.parametrize("part", sorted({*Reader.members()} - {"lookup"}), indirect=True)
    def test_samples_do_not_touch_each_other(self, part: Part) -> None:
        """The threshold of "lookup" is one for all heads and samples, as in the paper."""
        q, k, v = draw(1)
        together = started(part, q, k, v, None).attend(q[:, :, PROMPT:], k, v, None, SCALE)
        for sample in range(3):
            one = slice(sample, sample + 1)
            alone = started(part, q[one], k[one], v[one], None).attend(q[one, :, PROMPT:], k[one], v[one], None, SCALE)
            torch.testing.assert_close(together.o[one], alone.o, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("first", [None, (0, 17, 60)])
    @pytest.mark.parametrize("n", [1, 3])
    def test_with_room_for_all_it_reads_everything(self, part: Part, n: int, first: tuple[int, ...] | None) -> None:
        q, k, v = draw(n)
        begin = None if first is None else torch.tensor(first)
        wide = type(part)(**LARGE.get(part.kind, {}))
        out = started(wide, q, k, v, begin).attend(q[:, :, PROMPT:], k, v, begin, SCALE)
        expected = Everything().start().attend(q[:, :, PROMPT:], k, v, begin, SCALE)
        torch.testing.assert_close(out.o, expected.o, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(out.lse, expected.lse, rtol=2e-5, atol=2e-5)

    def test_another_batch_starts_afresh(self, part: Part) -> None:
        """A state that meets caches of another batch size computes, and does not mix them up."""
        q, k, v = draw(1)
        state = started(part, q, k, v, None)
        state.attend(q[:, :, PROMPT:], k, v, None, SCALE)
        out = state.attend(q[:1, :, PROMPT:], k[:1], v[:1], None, SCALE)
        assert out.o.shape == (1, 4, 1, 6) and torch.isfinite(out.o).all()
