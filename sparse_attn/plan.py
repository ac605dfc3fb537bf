"""The plan: what each tile of queries reads, as ranges of arranged keys. One format for every method and every executor.

Shapes: Pq planes of queries = B * Hq, Pk = B * Hk, Sq, Sk tokens, T tiles, R rows (lists of chunks), N chunks, C key
blocks, D head dimension. All index tensors are int32 and on the device of the queries.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hasten.sparse_attn.mask import Mask


@dataclass(frozen=True, slots=True)
class Compensation:
    """What stands in for key blocks that are not read: their mean key and value, counted as often as they have tokens.

    keys: float32 [Pk, C, D], values: float32 [Pk, C, Dv], log_sizes: float32 [Pk, C] (-inf: nothing to stand in for).
    variances: float32 [Pk, C, D], of the keys within each block along each coordinate; with it a block's logit is
    q.k + log n + q^2.var / 2 (all scaled), the second-order mean of exp over the block. None: first order.
    approximate: bool [R, C]: which blocks stand in for the tiles of each row.
    """

    keys: Tensor
    values: Tensor
    log_sizes: Tensor
    approximate: Tensor
    variances: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Which arranged keys each tile of queries reads.

    A tile is at most `block_m` consecutive arranged queries of one plane; a chunk is at most `block_n` consecutive
    arranged keys; a row is a list of chunks, which tiles (also of different planes) may share.

    q_perm: int64 [1 or Pq, Sq], k_perm: int64 [1 or Pk, Sk], or None: see `Order.perm`.
    tile_start, tile_length, tile_plane, tile_row: [T]. Lengths may be 0 (room that was not needed): skip those tiles.
    row_start, row_full, row_end: [R]. Chunks row_start to row_full are full (block_n keys, no mask applies); row_full to
    row_end are ragged: shorter, or `mask` has to be asked about each element. Rows may be empty: output 0, LSE -inf.
    chunk_start, chunk_length: [N].
    mask: asked in ragged chunks, with original positions. It is never needed in full ones.
    heads: (B, Hq, Hk).
    """

    heads: tuple[int, int, int]
    queries: int
    keys: int
    block_m: int
    block_n: int
    q_perm: Tensor | None
    k_perm: Tensor | None
    tile_start: Tensor
    tile_length: Tensor
    tile_plane: Tensor
    tile_row: Tensor
    row_start: Tensor
    row_full: Tensor
    row_end: Tensor
    chunk_start: Tensor
    chunk_length: Tensor
    mask: Mask | None = None

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.heads[1] // self.heads[2]

    def num_bytes(self) -> int:
        """Bytes of its index tensors."""
        tensors = (getattr(self, name) for name in self.__slots__)
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


@dataclass(frozen=True, slots=True)
class Output:
    """What attention gives back, in original token order.

    o: [B, Hq, Sq, Dv] in the dtype of the queries; 0 for queries that read nothing.
    lse: float32 [B, Hq, Sq], natural logarithm of the softmax denominator (compensation included); -inf there.
    lse_exact: the same without compensation; None where there was none.
    """

    o: Tensor
    lse: Tensor
    lse_exact: Tensor | None = None

    @property
    def rho(self) -> Tensor:
        """Estimated share of each query's softmax mass that was read exactly: [B, Hq, Sq], 1 without compensation."""
        if self.lse_exact is None:
            return (self.lse > float("-inf")).float()
        return (self.lse_exact - self.lse).exp().nan_to_num(0.0)
