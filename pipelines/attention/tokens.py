"""Which tokens of an attention call are the video and which are text: measured on the network, not known about it.

One extra evaluation is spent on each new kind of call. Some positions of the latents, chosen at random, are NaN in it, and
attention is replaced by something that mixes no tokens: the output of a query is NaN where the query is. Tokens then stay
apart all the way through the network, and those that turn out NaN show where every patch of the latents went: which range
of the sequence is video, and that its tokens stand row by row. What comes from anywhere else (text, clean reference
tokens) stays finite.

Shapes: B batch of the latents, M times as large a batch of attention, H heads, S tokens, D head dimension.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.pipelines.attention.grids import Grid, grids_of
from hasten.pipelines.attention.sites import ELSEWHERE, Site
from hasten.pipelines.host import Call
from hasten.sparse_attn.segments import Segment, Tokens, reference, text

Key = tuple[int, int]
"""Number of a site, and which of its calls within one evaluation."""

PATCH = 4
"""Positions in a patch where nobody says. Half of the patches are to be NaN, so that both kinds are frequent."""

TEXT_AT_MOST = 2048
"""A longer range that does not depend on the latents is taken for clean pictures: dense queries would cost too much."""

TEXT_ONLY = "none of its tokens comes from the latents"
CROSS = "its keys do not come from the latents"
"""Reasons that nobody needs to be told: attention within the prompt, and cross-attention."""


@dataclass(frozen=True, slots=True)
class Learned:
    """What a kind of call is like at one site. q, k: the tokens of both sides; None where it stays dense for `reason`.

    times: batch of the attention call over that of the latents. layer: its number among the sites that have tokens.
    """

    name: str
    shapes: tuple[torch.Size, torch.Size]
    q: Tokens | None = None
    k: Tokens | None = None
    reason: str = ""
    layer: int = -1


@dataclass(slots=True)
class Marks:
    """One attention call of a learning walk. q, k: bool [B * M, S] on the CPU, what depends on the latents."""

    name: str
    q: Tensor
    k: Tensor
    shapes: tuple[torch.Size, torch.Size]


@dataclass(slots=True)
class Learning:
    """A walk that mixes no tokens and notes which of them are NaN."""

    marks: dict[Key, Marks] = field(default_factory=dict)
    visits: dict[int, int] = field(default_factory=dict)
    elsewhere: int = 0

    def wants(self, site: Site) -> bool:
        """Every one."""
        return True

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, named: dict[str, Any]) -> Tensor:
        """Zeros, and NaN for queries that hold one."""
        blind = q.isnan().any(-1)
        if site.name == ELSEWHERE:
            self.elsewhere += bool(blind.any())
        elif q.dim() == 4:
            visit = self.visits[site.number] = self.visits.get(site.number, -1) + 1
            sides = [side.any(1).cpu() for side in (blind, k.isnan().any(-1))]
            self.marks[site.number, visit] = Marks(site.name, sides[0], sides[1], (q.shape, k.shape))
        found = q.new_zeros((*q.shape[:-1], v.shape[-1]))
        return found.masked_fill_(blind[..., None], math.nan)


@dataclass(frozen=True, slots=True)
class Latents:
    """How latents are laid out. sizes: positions, without batch and channels; axis: of the channels. batched: does the
    first axis count samples? (Not in lists of latents.)"""

    sizes: tuple[int, ...]
    axis: int
    batched: bool

    @classmethod
    def of(cls, call: Call, channels: set[int]) -> Latents | None:
        """None where the latents are no floating-point tensor with positions."""
        value = call.get(call.layout.sample)
        batched = isinstance(value, Tensor)
        x = value if batched else value[0] if isinstance(value, list | tuple) and value else None
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return None
        shape = x.shape if batched else torch.Size((1, *x.shape))
        if len(shape) < 3:
            return None
        usual = 1 if len(shape) > 3 else 2
        fitting = [axis for axis in range(1, len(shape)) if shape[axis] in channels]
        axis = usual if usual in fitting or not fitting else fitting[0]
        return cls(tuple(n for at, n in enumerate(shape) if at not in (0, axis)), axis, batched)

    def mark(self, patch: int, *, everywhere: bool) -> Tensor:
        """bool of `sizes`: positions that become NaN. patch: positions that make a token."""
        if everywhere or math.prod(self.sizes) < 2:
            return torch.ones(self.sizes, dtype=torch.bool)
        share: float = 1 - 0.5 ** (1 / (patch if len(self.sizes) > 1 else 1))
        chosen: Tensor = torch.rand(self.sizes, generator=torch.Generator().manual_seed(0)) < share
        chosen.view(-1)[0], chosen.view(-1)[-1] = True, False
        return chosen

    def poison(self, value: Any, marked: Tensor) -> Any:
        """The latents with NaN at `marked`; a list entry by entry, as far as its entries are alike."""
        if not self.batched:
            alike = value[0].shape
            return [self._poison(x[None], marked)[0] if x.shape == alike else torch.full_like(x, math.nan) for x in value]
        return self._poison(value, marked)

    def _poison(self, x: Tensor, marked: Tensor) -> Tensor:
        return x.masked_fill(marked.to(x.device)[None].unsqueeze(self.axis), math.nan)


Evaluate = Callable[[Call, Learning], None]


def learn(
    call: Call, evaluate: Evaluate, channels: set[int], patch: int = PATCH, *, agreed: Callable[[bool], bool] = bool
) -> tuple[dict[Key, Learned], int]:
    """What the sites of a network are given in calls like this one, and how many calls stand outside of processors.

    evaluate: runs the network on a call, with attention answered by the walk. channels: how many the latents may have.
    patch: positions of the latents that make a token, about. agreed: unclear calls are looked at once more; where ranks
    share a sample they all do it if any has one, because they have to evaluate equally often.
    Raises whatever the network raises when it is shown NaN.
    """
    latents = Latents.of(call, channels)
    if latents is None:
        return {}, 0
    first, marked = _walk(call, evaluate, latents, latents.mark(patch, everywhere=False))
    batch = call.get(call.layout.sample).shape[0] if latents.batched else len(call.get(call.layout.sample))
    resolver = Resolver(batch, list(boxes(marked)), call)
    unclear = agreed(not all(resolver.clear(marks) for marks in first.marks.values()))
    second = _walk(call, evaluate, latents, latents.mark(patch, everywhere=True))[0].marks if unclear else {}
    found: dict[Key, Learned] = {}
    for key, marks in first.marks.items():
        learned = resolver.learned(marks, second.get(key))
        if learned.q is not None:
            layer = sum(other.q is not None for other in found.values())
            learned = Learned(learned.name, learned.shapes, learned.q, learned.k, "", layer)
        found[key] = learned
    return found, first.elsewhere


def _walk(call: Call, evaluate: Evaluate, latents: Latents, marked: Tensor) -> tuple[Learning, Tensor]:
    walk = Learning()
    evaluate(call.changed(lambda value: latents.poison(value, marked)), walk)
    return walk, marked


def boxes(marked: Tensor) -> Iterator[Tensor]:
    """bool [frames, height, width] in patches, for every size of patches: which of them hold a marked position."""
    box = (marked.flatten(0, -3) if marked.dim() > 3 else marked[(None,) * (3 - marked.dim())]).float()
    frames, height, width = box.shape
    for deep, wide in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16, 32)):
        if deep <= frames and wide <= max(height, width):
            patch = (deep, min(wide, height), min(wide, width))
            yield F.max_pool3d(box[None, None], patch, ceil_mode=True)[0, 0].bool()


@dataclass(slots=True)
class Resolver:
    """Explains marks by patches of the latents. batch: of the latents. boxes: see `boxes`. call: its other arguments say
    what latents are that come as a sequence."""

    batch: int
    boxes: list[Tensor]
    call: Call
    known: dict[tuple[int, bytes], Tokens | str] = field(default_factory=dict)
    by_length: dict[int, Tokens] = field(default_factory=dict)

    def clear(self, marks: Marks) -> bool:
        """Can both sides be explained without a second look?"""
        video = bool(marks.q.any()) and bool(marks.k.any())
        return not video or all(isinstance(self._side(side), Tokens) for side in (marks.q, marks.k))

    def learned(self, marks: Marks, again: Marks | None) -> Learned:
        """What to do with a call. again: its marks when all latents are NaN."""
        if not marks.q.any():
            return Learned(marks.name, marks.shapes, reason=TEXT_ONLY)
        if not marks.k.any():
            return Learned(marks.name, marks.shapes, reason=CROSS)
        sides: list[Tokens] = []
        for side in ("q", "k"):
            tokens = self._side(getattr(marks, side))
            if isinstance(tokens, str) and again is not None:
                tokens = self._ranges(getattr(again, side))
            if isinstance(tokens, str):
                return Learned(marks.name, marks.shapes, reason=tokens)
            sides.append(tokens)
        return Learned(marks.name, marks.shapes, sides[0], sides[1])

    # --- one side ---------------------------------------------------------------------------------

    def _side(self, marks: Tensor) -> Tokens | str:
        """The tokens that marks [B * M, S] of the first look show, or why they cannot be told."""
        place = (marks.shape[1], marks.numpy().tobytes())
        if place not in self.known:
            self.known[place] = self._joint(marks) if marks.shape[0] == self.batch else self._apart(marks)
        found = self.known[place]
        if isinstance(found, Tokens):
            self.by_length.setdefault(found.length, found)
        return found

    def _joint(self, marks: Tensor) -> Tokens | str:
        """Every sample's tokens in one sequence, perhaps with others."""
        row = marks[0]
        if not torch.equal(marks, row.expand_as(marks)):
            return "its samples are laid out in different ways"
        total, at = int(row.sum()), int(row.int().argmax())
        for box in self.boxes:
            if bool(box.all()):  # that says nothing about order
                continue
            for order in itertools.permutations(range(3)):
                turned = box.permute(order)
                flat = turned.reshape(-1)
                start = at - int(flat.int().argmax())
                if int(flat.sum()) != total or start < 0 or start + flat.numel() > row.numel():
                    continue
                if torch.equal(row[start : start + flat.numel()], flat):
                    return self._tokens(row.numel(), start, flat.numel(), _grid(turned))
            times = row.numel() // box.numel()
            if times > 1 and torch.equal(row, box.reshape(-1).repeat(times)):  # a decoder that reads its encoder's tokens
                return Tokens(tuple(Segment(f"video {at}", box.numel(), grid=_grid(box)) for at in range(times)))
        return self._assumed(row)

    def _assumed(self, row: Tensor) -> Tokens | str:
        """Patches have been mixed before: go by the number of tokens that depend on the latents."""
        start, total = int(row.int().argmax()), int(row.sum())
        if not bool(row[start : start + total].all()):
            return "the tokens that depend on the latents stand in several places"
        grids = {_grid(box) for box in self.boxes if box.numel() == total}
        if not grids:
            return "text and video are mixed before it, in an order that is unknown"
        if total == row.numel() and total in self.by_length:
            return self.by_length[total]
        return self._tokens(row.numel(), start, total, grids.pop() if len(grids) == 1 else None)

    def _apart(self, marks: Tensor) -> Tokens | str:
        """Attention within frames, or between the frames at one place: their rest is in the batch."""
        rows, length = marks.shape
        if rows % self.batch:
            return "its batch is no multiple of the batch of the latents"
        for box in self.boxes:
            flat = box.reshape(box.shape[0], -1)
            for turned, grid in ((flat, (1, box.shape[1], box.shape[2])), (flat.T, (box.shape[0], 1, 1))):
                if turned.shape != (rows // self.batch, length):
                    continue
                if torch.equal(marks, turned.repeat(self.batch, 1)) or bool(marks.all()):
                    return self._tokens(length, 0, length, grid)
        return "its tokens lie in the batch in an unknown way"

    def _ranges(self, marks: Tensor) -> Tokens | str:
        """The tokens, when all that depends on the latents is marked."""
        row = marks[0]
        if marks.shape[0] != self.batch or not torch.equal(marks, row.expand_as(marks)):
            return "its tokens lie in the batch in an unknown way"
        known = self.by_length.get(row.numel())
        if bool(row.all()):
            return known or "text and video are mixed before it, in an order that is unknown"
        lengths = [(bool(value), len(list(run))) for value, run in itertools.groupby(row.tolist())]
        return Tokens(tuple(_segment(number, *run) for number, run in enumerate(lengths)))

    def _tokens(self, length: int, start: int, count: int, grid: Grid | None) -> Tokens:
        """A sequence with `count` tokens of the latents from `start` on, and others around them."""
        pictures = [grid] if grid is not None else []
        if grid is None or sorted(grid)[1] == 1:  # the latents are a sequence themselves
            pictures = grids_of(self.call, count, start, length)
        parts = [_segment(0, False, start)]
        parts.append(Segment("video", math.prod(pictures[0]), grid=pictures[0]) if pictures else Segment("video", count))
        parts += [reference(math.prod(more), f"reference {number}") for number, more in enumerate(pictures[1:], 1)]
        parts.append(_segment(1, False, length - start - count))
        return Tokens(tuple(part for part in parts if part.length))


def _segment(number: int, video: bool, length: int) -> Segment:
    if video:
        return Segment(f"video {number}" if number else "video", length)
    return text(length, f"text {number}") if length <= TEXT_AT_MOST else reference(length, f"reference {number}")


def _grid(box: Tensor) -> Grid:
    frames, height, width = box.shape
    return frames, height, width
