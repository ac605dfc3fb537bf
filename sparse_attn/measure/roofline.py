"""What sparse attention can gain, before anything is run: work of a model's shape over the rates of a machine.

A prediction has two uses: attention that would not get faster stays dense (short sequences, small models), and a
measured speed-up is shown beside what the shape allows. Nothing here runs anything; `calibrate` measures a machine's
rates.

Units: FLOP (a multiplication and an addition are two), FLOP per second, seconds, bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hasten.errors import UsageError, nearest

POINTWISE = 0.35
"""Time of norms, modulation, activations and copies, relative to that of the linear layers."""

PLANNING = 0.03
"""Time of making a plan relative to dense attention, where it was not measured: two k-means iterations are 1.2 to 1.7 %
of the operations, scores, selection and packing the rest; a plan that serves several steps costs its share of it."""

WORTH = 1.1
"""Predicted gain of the whole step below which the risk to quality is not taken."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The work of one evaluation of a network.

    tokens: queries of self-attention (one sample). keys: None: as many. linear: FLOP of the linear layers for each
    token, all layers together; 0 where only the attention calls are looked at. cross: keys of cross-attention, which
    stays dense. evaluations: of the network per step (2 with classifier-free guidance). batch: samples in one
    evaluation.
    """

    name: str
    tokens: int
    layers: int
    heads: int
    head_dim: int
    linear: float = 0.0
    cross: int = 0
    keys: int | None = None
    evaluations: int = 1
    batch: int = 1

    @property
    def width(self) -> int:
        """Heads times head dimension."""
        return self.heads * self.head_dim

    @property
    def attention_flop(self) -> float:
        """FLOP of dense self-attention of one evaluation: 4 N^2 per layer and coordinate (Q K^T and P V)."""
        return 4.0 * self.batch * self.tokens * (self.keys or self.tokens) * self.width * self.layers

    @property
    def linear_flop(self) -> float:
        """FLOP of everything else that is a matrix product: linear layers and cross-attention."""
        crossed = 4.0 * self.cross * self.width * self.layers
        return self.batch * self.tokens * (self.linear + crossed)

    @property
    def attention_share(self) -> float:
        """Share of self-attention in the FLOP of one evaluation."""
        return self.attention_flop / (self.attention_flop + self.linear_flop)

    def attention_bytes(self, itemsize: int = 2) -> float:
        """Bytes that one evaluation's attention must move: Q, K, V and the output once."""
        return itemsize * self.batch * 2.0 * (self.tokens + (self.keys or self.tokens)) * self.width * self.layers


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates of one device: FLOP per second of the fastest dense attention, of our sparse kernel, of linear layers.

    overhead: seconds that one sparse call costs whatever its size (launches, planning of small plans). bandwidth: bytes
    per second of its memory. source: where the numbers are from.
    """

    name: str
    dense: float
    sparse: float
    linear: float
    bandwidth: float
    overhead: float = 3e-4
    source: str = "assumed"


TERA = 1e12

MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine(
            "A100", 200 * TERA, 150 * TERA, 230 * TERA, 1.9e12, source="FlashAttention-2's paper; kernel assumed"
        ),
        Machine(
            "H100", 600 * TERA, 450 * TERA, 550 * TERA, 3.3e12, source="FlashAttention-3's paper; Triton's tutorial"
        ),
        Machine("H200", 600 * TERA, 450 * TERA, 550 * TERA, 4.8e12, source="as H100, faster memory"),
        Machine(
            "B200", 1500 * TERA, 700 * TERA, 1400 * TERA, 8e12, source="FlashAttention-4's claim; kernel assumed"
        ),
    )
}
"""Tables by name, bf16 and head dimension 128. None of them is measured by us: see `calibrate.measured`."""


def linear_of(width: int, layers: int, matrices: float) -> float:
    """FLOP per token of `layers` layers with `matrices` weight matrices of width x width on a token's path."""
    return 2.0 * layers * matrices * width * width


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        # 33 x 45 x 80 video tokens and 256 of text; double and single blocks have 12 matrices on a token's path.
        Shape("hunyuan-720p", 119_056, 60, 24, 128, linear_of(3072, 60, 12)),
        # 21 frames of 45 x 80 or 30 x 52 tokens; 4 matrices of self-, 2 of cross-attention, feed-forward up and down.
        Shape(
            "wan-14b-720p", 75_600, 40, 40, 128, linear_of(5120, 40, 6 + 2 * 13_824 / 5120), cross=512, evaluations=2
        ),
        Shape(
            "wan-14b-480p", 32_760, 40, 40, 128, linear_of(5120, 40, 6 + 2 * 13_824 / 5120), cross=512, evaluations=2
        ),
        Shape(
            "wan-1.3b-720p", 75_600, 30, 12, 128, linear_of(1536, 30, 6 + 2 * 8960 / 1536), cross=512, evaluations=2
        ),
        Shape(
            "wan-1.3b-480p", 32_760, 30, 12, 128, linear_of(1536, 30, 6 + 2 * 8960 / 1536), cross=512, evaluations=2
        ),
    )
}
"""Published shapes (configurations of HunyuanVideo and Wan 2.1), batch 1."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """speedup: of the whole evaluation. kernel: of the attention calls alone, planning included. dense, sparse: seconds
    of one evaluation. ceiling: speed-up if sparse attention took no time. why: one sentence."""

    speedup: float
    kernel: float
    dense: float
    sparse: float
    ceiling: float
    worthwhile: bool
    why: str


def predict(
    shape: Shape,
    density: float,
    machine: Machine | str,
    *,
    planning: float = PLANNING,
    waste: float = 1.0,
    dense_share: float = 0.0,
    at_least: float = WORTH,
) -> Prediction:
    """Expected gain of sparse attention at `density` (share of the query-key pairs that are read).

    machine: a `Machine` or a name in `MACHINES`. planning: relative to one dense call. waste: computed pairs over read
    pairs (partly filled tiles). dense_share: share of steps and layers that stay dense. at_least: gain from which it is
    worthwhile. Seconds are FLOP over the machine's rates; linear layers take `POINTWISE` longer for what lies between.
    Attention is never predicted below the time of moving Q, K, V and the output.
    Raises `UsageError` for a density outside 0 to 1 and for an unknown machine.
    """
    if not 0.0 < density <= 1.0:
        raise UsageError(
            f"Density is the share of query-key pairs that are read, above 0 and up to 1; got {density}."
        )
    rates = machine_called(machine) if isinstance(machine, str) else machine
    rest = shape.linear_flop / rates.linear * (1 + POINTWISE)
    moving = shape.attention_bytes() / rates.bandwidth
    attention = max(shape.attention_flop / rates.dense, moving)
    call = max(shape.attention_flop * min(1.0, density * waste) / rates.sparse, moving)
    sparse = call + planning * attention + rates.overhead * shape.layers
    mixed = dense_share * attention + (1 - dense_share) * sparse
    before, after = attention + rest, mixed + rest
    speedup = before / after
    worthwhile = speedup >= at_least and sparse < attention
    kernel, ceiling = attention / sparse, before / rest if rest else float("inf")
    return Prediction(
        speedup, kernel, before, after, ceiling, worthwhile, _why(shape, density, rates, speedup, kernel, at_least)
    )


def _why(shape: Shape, density: float, rates: Machine, speedup: float, kernel: float, at_least: float) -> str:
    share = shape.attention_flop / rates.dense
    head = f"{shape.tokens:,} tokens at density {density:.0%} on {rates.name}"
    if kernel <= 1:
        return f"{head}: a sparse call would take {1 / kernel:.1f} times as long as a dense one, planning included"
    if speedup < at_least:
        rest = shape.linear_flop / rates.linear * (1 + POINTWISE)
        return (
            f"{head}: attention would be {kernel:.1f} times as fast, but is only"
            f" {share / (share + rest):.0%} of the time; the whole would gain {speedup:.2f}x, less than {at_least:.2f}x"
        )
    return f"{head}: attention {kernel:.1f}x, the whole {speedup:.2f}x"


def density_for(shape: Shape, speedup: float, machine: Machine | str, *, planning: float = PLANNING) -> float | None:
    """The largest density (to a thousandth) with which the whole gains `speedup`; None where none does."""
    low, high = 0.0, 1.0
    if predict(shape, 1e-6, machine, planning=planning).speedup < speedup:
        return None
    for _ in range(20):
        middle = (low + high) / 2
        good = predict(shape, max(middle, 1e-6), machine, planning=planning).speedup >= speedup
        low, high = (middle, high) if good else (low, middle)
    return round(low, 3)


def machine_called(name: str) -> Machine:
    """The table whose name stands in `name`, which may be what a driver says ("NVIDIA H200 NVL")."""
    for known, machine in MACHINES.items():
        if known.lower() in name.lower().replace("gh200", "h200").replace("gb200", "b200"):
            return machine
    raise UsageError(
        f"There are no rates for {name!r}; known: {', '.join(MACHINES)}.{nearest(name, MACHINES)}"
        " Measure them: hasten.sparse_attn.measure.calibrate.measured(device)."
    )


def at_resolution(shape: Shape, tokens: int) -> Shape:
    """The same network on another number of tokens."""
    return replace(shape, name=f"{shape.name} at {tokens} tokens", tokens=tokens)
