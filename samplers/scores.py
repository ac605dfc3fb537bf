"""What an evaluation says about each slot: the token it would write there, and how sure it is.

Shapes: B texts, L slots; of one evaluation m texts with R slots each whose logits were asked for, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from hasten.canvas import DONE, Canvas
from hasten.noise import gumbel, uniform
from hasten.part import Part

Sees = Literal["block", "rest"]
"""Whose logits are wanted: of the open slots of the active block, or of all open slots of the text."""


@dataclass(slots=True)
class Logits:
    """Logits of one evaluation. values [m, R, V], any float dtype; slots int64 [m, R], L where there is none; members
    int64 [m]: which texts."""

    values: Tensor
    slots: Tensor
    members: Tensor


@dataclass(slots=True)
class Scores:
    """What is known of each slot after an evaluation; all [B, L].

    token int64: what would be written. confidence, second float32: probability of `token` and of the next best.
    entropy float32, nats. present float32: the probability of what stands there now. rank float32: the higher, the
    sooner it is written. seen bool: this evaluation gave logits for the slot; elsewhere the other fields mean
    nothing. guide int64: what a guiding model would write there if `token` stood in every open slot before, -1 where
    there is none.
    """

    token: Tensor
    confidence: Tensor
    second: Tensor
    entropy: Tensor
    present: Tensor
    rank: Tensor
    seen: Tensor
    guide: Tensor

    @classmethod
    def blank(cls, canvas: Canvas) -> Self:
        """Nothing is known."""
        shape, device = canvas.ids.shape, canvas.ids.device
        inf = float("inf")
        low = [torch.full(shape, value, device=device) for value in (-1.0, 0.0, inf, float("nan"), -inf)]
        token, seen = torch.zeros_like(canvas.ids), torch.zeros(shape, dtype=torch.bool, device=device)
        return cls(*[token, *low, seen, torch.full_like(token, -1)])

    def put(self, logits: Logits, **given: Tensor) -> None:
        """Write fields, given as [m, R], to their slots. Slots numbered L (no slot) are left out."""
        bins = self.seen.shape[1]
        rows = logits.members[:, None].expand_as(logits.slots)
        for name, value in given.items():
            wide = F.pad(getattr(self, name), (0, 1))  # one bin for what is no slot
            wide[rows, logits.slots] = value.to(wide.dtype)
            setattr(self, name, wide[:, :bins])

    def take(self, rows: Tensor) -> Self:
        """The texts `rows` (int64 [n])."""
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def merge(self, other: Scores, rows: Tensor) -> None:
        """Take the texts `rows` (bool [B]) from `other`."""
        for field in fields(self):
            setattr(self, field.name, torch.where(rows[:, None], getattr(other, field.name), getattr(self, field.name)))

    def among(self, canvas: Canvas) -> Tensor:
        """Slots that may be written and of which something is known, bool [B, L]."""
        return canvas.eligible & self.seen


@dataclass(slots=True)
class Draw:
    """How a token is taken from logits. temperature 0: the most probable one. seed int64 [B], one for each text."""

    seed: Tensor
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


class Score(Part):
    """Which slot is the surest? A family; `start()` gives the state for one generation.

    remembers: it uses more than the present evaluation, so that drafts cannot be verified with it (a draft stands for
    steps that were never taken, and of which nothing is remembered). timed: it asks for the number of the step.
    """

    sees: ClassVar[Sees] = "block"
    remembers: ClassVar[bool] = False
    timed: ClassVar[bool] = False

    def start(self) -> ScoreState:
        """State of one generation."""
        return ScoreState(self)


class ScoreState:
    """The state of a `Score`; by itself, that of one without memory."""

    def __init__(self, part: Score) -> None:
        self.part = part

    def adjust(self, logits: Logits, canvas: Canvas) -> Tensor:
        """Logits [m, R, V] float32 with what earlier evaluations say mixed in; by default as they are. They come with
        -inf at the tokens that are never written, and that has to stay."""
        return logits.values

    def rank(self, scores: Scores, canvas: Canvas, draw: Draw) -> Tensor:
        """Order in which slots are written, [B, L] float32; the other fields of `scores` are set already."""
        return scores.confidence

    def note(self, chosen: Tensor, scores: Scores, canvas: Canvas) -> None:
        """These slots (bool [B, L]) have just been written."""


class Confidence(Score):
    """The slot whose token has the highest probability (LLaDA's low-confidence remasking, arXiv 2502.09992)."""

    kind: ClassVar[str] = "confidence"


class Margin(Score):
    """The slot whose best token is furthest ahead of the next: p1 - p2 (Dream, arXiv 2508.15487, `topk_margin`)."""

    kind: ClassVar[str] = "margin"

    def start(self) -> ScoreState:
        return _MarginState(self)


class _MarginState(ScoreState):
    def rank(self, scores: Scores, canvas: Canvas, draw: Draw) -> Tensor:
        return scores.confidence - scores.second


class Certainty(Score):
    """The slot whose distribution has the least entropy (Dream, `entropy`)."""

    kind: ClassVar[str] = "certainty"

    def start(self) -> ScoreState:
        return _CertaintyState(self)


class _CertaintyState(ScoreState):
    def rank(self, scores: Scores, canvas: Canvas, draw: Draw) -> Tensor:
        return -scores.entropy


class Arbitrary(Score):
    """Slots in random order (LLaDA's `remasking="random"`, MDLM's ancestral order): one order per text and seed."""

    kind: ClassVar[str] = "arbitrary"

    def start(self) -> ScoreState:
        return _ArbitraryState(self)


class _ArbitraryState(ScoreState):
    def rank(self, scores: Scores, canvas: Canvas, draw: Draw) -> Tensor:
        return uniform(draw.seed[:, None], _stream(canvas, _ORDER), _behind(canvas), 1)[..., 0].float()


class Softened(Score):
    """`score`'s order with Gumbel noise: slots are drawn without replacement from softmax(score / temperature).

    Dream's `alg_temp` (arXiv 2508.15487), which calls `multinomial` on that distribution: adding noise and taking the
    highest draws from the same law, without it being formed. The noise is new at every step.
    """

    kind: ClassVar[str] = "softened"
    timed: ClassVar[bool] = True
    score: Score = Confidence()
    temperature: float = Field(0.1, gt=0)

    def start(self) -> ScoreState:
        return _SoftenedState(self, self.score.start())


class _SoftenedState(ScoreState):
    def __init__(self, part: Softened, inner: ScoreState) -> None:
        super().__init__(part)
        self.inner, self.temperature = inner, part.temperature

    def adjust(self, logits: Logits, canvas: Canvas) -> Tensor:
        return self.inner.adjust(logits, canvas)

    def rank(self, scores: Scores, canvas: Canvas, draw: Draw) -> Tensor:
        noise = gumbel(draw.seed[:, None], _stream(canvas, canvas.step), _behind(canvas), 1)[..., 0]
        return self.inner.rank(scores, canvas, draw) / self.temperature + noise

    def note(self, chosen: Tensor, scores: Scores, canvas: Canvas) -> None:
        self.inner.note(chosen, scores, canvas)


_ORDER = 1 << 40
"""A step that no generation reaches: noise of `Arbitrary`."""


def _stream(canvas: Canvas, step: Tensor | int) -> Tensor:
    """Steps int64 [B, 1] for noise about slots: negative, so that it is not the noise that tokens are drawn with."""
    return (-1 - torch.zeros_like(canvas.step) - step)[:, None]


def _behind(canvas: Canvas) -> Tensor:
    """Slot numbers counted from the end of each text's prompt, int64 [B, L]."""
    return canvas.place - canvas.start[:, None]


def measure(logits: Logits, state: ScoreState, draw: Draw, forbidden: Tensor, canvas: Canvas, scores: Scores) -> Logits:
    """Fill `scores` at the slots of `logits`. forbidden: tokens that are never written, int64 [n].

    Confidence is the probability in softmax(logits) without temperature, as LLaDA and Dream have it; `token` is drawn
    with temperature, top-k and top-p. The normalisation leaves the forbidden tokens out. Returns the
    log-probabilities that the scores are about, [m, R, V] float32.
    """
    allowed = logits.values.float().index_fill(-1, forbidden, -float("inf"))
    values = state.adjust(Logits(allowed, logits.slots, logits.members), canvas)
    best = values.topk(min(2, values.shape[-1]), dim=-1)
    known = values - values.logsumexp(-1, keepdim=True)
    spread = known.exp()
    entropy = torch.special.entr(spread).sum(-1)
    probability = spread.gather(-1, best.indices)
    token, confidence = best.indices[..., 0], probability[..., 0]
    second = probability[..., 1] if probability.shape[-1] > 1 else torch.zeros_like(confidence)
    if draw.temperature > 0:
        token = _drawn(values, logits, draw, canvas)
        confidence = spread.gather(-1, token[..., None])[..., 0]
    stands = F.pad(canvas.ids, (0, 1))[logits.members[:, None], logits.slots]
    present = spread.gather(-1, stands.clamp(max=values.shape[-1] - 1)[..., None])[..., 0]
    scores.put(
        logits, token=token, confidence=confidence, second=second, entropy=entropy, present=present,
        seen=torch.ones_like(token, dtype=torch.bool),
    )  # fmt: skip
    scores.present = torch.where(canvas.status == DONE, scores.present, float("nan"))
    scores.rank = torch.where(scores.seen, state.rank(scores, canvas, draw), -float("inf"))
    return Logits(known, logits.slots, logits.members)


def _drawn(values: Tensor, logits: Logits, draw: Draw, canvas: Canvas) -> Tensor:
    """Tokens [m, R] by Gumbel-max over what top-k and top-p leave."""
    scaled = values / draw.temperature
    if draw.top_k is not None and draw.top_k < scaled.shape[-1]:
        floor = scaled.topk(draw.top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < floor, -float("inf"))
    if draw.top_p is not None and draw.top_p < 1:
        order = scaled.sort(dim=-1, descending=True)
        mass = order.values.softmax(-1)
        late = (mass.cumsum(-1) - mass) >= draw.top_p  # the first one always stays
        scaled = scaled.masked_fill(torch.zeros_like(late).scatter(-1, order.indices, late), -float("inf"))
    members = logits.members
    seed, step = draw.seed[members][:, None], canvas.step[members][:, None]
    noise = gumbel(seed, step, logits.slots - canvas.start[members][:, None], values.shape[-1])
    return (scaled + noise).argmax(-1)


def ranked(key: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Slots by falling `key` [B, L], those of `among` first: int64 [B, L]; and which of these places hold one of
    them, bool [B, L]. Ties: the earlier slot."""
    order = torch.where(among, key, -float("inf")).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, (~among.gather(1, order)).to(torch.uint8).argsort(dim=1, stable=True))
    return order, among.gather(1, order)


def best(rank: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` (int64 [B]) highest of `rank` [B, L] among the slots `among`, bool [B, L]. Ties: the earlier
    slot."""
    order, inside = ranked(rank, among)
    place = torch.arange(rank.shape[1], device=rank.device)
    return torch.zeros_like(among).scatter(1, order, inside & (place < count[:, None]))
