"""How the kernels of `merge_kernels` cut their arrays: shapes, and each program's block of them.

Letters: B batch, C chunks, S tokens of a chunk, M fast-weight heads, E their width,
W video chunks of a part, R copies of each.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lact_jax.ops.chunk_kernels import ChunkRange, TokenRuns, place

WARP_THREADS = 32
# Of each array a thread holds so many numbers of a token: the backward pass then takes up to 126
# registers.
LANES_PER_THREAD = 16
MAX_LANES = 16 * WARP_THREADS * LANES_PER_THREAD


@dataclass(frozen=True)
class Sizes(TokenRuns):
    """Sizes, and which block of each array a program has.

    A token is M heads of E numbers; window attention's heads are merged and cut anew.
    """

    heads: int
    head_dim: int

    @property
    def token(self) -> tuple[int, int]:
        """(M, E)."""
        return self.heads, self.head_dim

    @property
    def tile(self) -> tuple[int, int]:
        """(M, E) padded to powers of two."""
        return pl.next_power_of_2(self.heads), pl.next_power_of_2(self.head_dim)

    @property
    def warps(self) -> int:
        return max(math.prod(self.tile) // (WARP_THREADS * LANES_PER_THREAD), 1)

    def window_shape(self, chunks: ChunkRange) -> tuple[int, ...]:
        """(B, C', S, M, E)."""
        return self.batch, chunks[1] - chunks[0], self.tokens, *self.token

    @property
    def sums_shape(self) -> tuple[int, ...]:
        """Of each program's sums over its tokens."""
        return self.batch, self.chunks, self.grid[0], *self.token

    def window_block(self, chunks: ChunkRange) -> pl.BlockSpec:
        """Of (B, C', S, M, E)."""
        return pl.BlockSpec(
            (None, None, self.run, *self.tile),
            lambda run, chunk, clip: (clip, place(chunk, chunks), run, 0, 0),
        )

    def fast_block(self, chunks: ChunkRange, copies: int) -> pl.BlockSpec:
        """Of (W, B, M, R, S, E), R being `copies`."""

        def index(run, chunk, clip):
            at, each = place(chunk, chunks), jnp.int32(copies)
            return jax.lax.div(at, each), clip, 0, jax.lax.rem(at, each), run, 0

        heads, head_dim = self.tile
        return pl.BlockSpec((None, None, heads, None, self.run, head_dim), index)

    def scalars_block(self) -> pl.BlockSpec:
        """Of (B, C, S)."""
        return pl.BlockSpec((None, None, self.run), lambda run, chunk, clip: (clip, chunk, run))

    def scale_block(self) -> pl.BlockSpec:
        """Of (E,)."""
        return pl.BlockSpec(self.tile[1:], lambda run, chunk, clip: (0,))

    def sums_block(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, None, *self.tile), lambda run, chunk, clip: (clip, chunk, run, 0, 0)
        )
