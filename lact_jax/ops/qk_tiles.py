"""How the kernels of `qk_kernels` cut their arrays: shapes, and each program's block of them.

Letters: B batch, C chunks, S tokens of a chunk, D width, N attention heads, K head width,
M fast-weight heads, L numbers of a piece of a fast head.
"""

import math
from dataclasses import dataclass

from jax.experimental import pallas as pl

from lact_jax.ops.chunk_kernels import Ranges, TokenRuns, num_chunks, place_in_turn

WARP_THREADS = 32
# Wider tokens are not taken: 16 warps of a program have 128 registers a thread, of which the sums
# over its tokens would need more than half.
MAX_LANES = 8192
SUMS = 4  # a program of the backward pass adds up so many arrays (D,) over its tokens


@dataclass(frozen=True)
class Program:
    """How much a program has to do.

    Attributes:
      tokens: it goes through so many, one after the other.
      lanes: of each array a thread holds at most so many numbers of a token. The fewer threads
        share a token the less they have to exchange, until registers run out.
    """

    tokens: int
    lanes: int


# The fastest of six each on an H200: 1 and 2 warps for the 1536 numbers of ar_chunk3f. The backward
# pass writes its sums once a program: with 40 tokens they are 6 % of its bytes.
FORWARD = Program(tokens=10, lanes=48)
BACKWARD = Program(tokens=40, lanes=24)


@dataclass(frozen=True)
class Sizes(TokenRuns):
    """Sizes, and which block of each array a program has.

    Where an array has some of the chunks only, a program of another chunk is given some block,
    which it leaves alone.

    head_dim: K.
    token: a token's numbers as (M, pieces, L). A piece is as many whole attention heads as the
      largest power of two that divides those of a fast head. Blocks have to be powers of two: were
      it all one piece, the 6 heads of ar_chunk3f would be padded to 8, and the kernels are busy
      enough.
    program: of the pass.
    """

    head_dim: int
    token: tuple[int, int, int]
    program: Program

    @classmethod
    def of(
        cls, shape_BCSD: tuple[int, ...], head_dim: int, fast_heads: int, program: Program
    ) -> "Sizes":
        """Sizes of q or k (B, C, S, D) in heads of `head_dim`."""
        *sizes, width = shape_BCSD
        heads = width // (fast_heads * head_dim)
        together = heads & -heads
        token = fast_heads, heads // together, together * head_dim
        return cls(*sizes, head_dim, token, program)

    @property
    def longest_run(self) -> int:
        return self.program.tokens

    @property
    def width(self) -> int:
        """D."""
        return math.prod(self.token)

    @property
    def heads(self) -> int:
        """N."""
        return self.width // self.head_dim

    @property
    def all_chunks(self) -> Ranges:
        return ((0, self.chunks),)

    @property
    def pieces(self) -> int:
        """In how many arrays (M, L) the kernels hold a token."""
        return self.token[1]

    @property
    def piece(self) -> tuple[int, int]:
        """(M, L)."""
        fast_heads, _, length = self.token
        return fast_heads, length

    @property
    def tile(self) -> tuple[int, int]:
        """(M, L) padded to powers of two."""
        return tuple(map(pl.next_power_of_2, self.piece))

    @property
    def lanes(self) -> int:
        """Numbers of a token, padding included."""
        return self.pieces * math.prod(self.tile)

    @property
    def warps(self) -> int:
        return pl.next_power_of_2(pl.cdiv(self.lanes, WARP_THREADS * self.program.lanes))

    # Shapes.

    def window_shape(self, ranges: Ranges) -> tuple[int, ...]:
        """Of an array with the layout of attention."""
        return self.batch, num_chunks(ranges), self.tokens, *self.token

    def fast_shape(self, ranges: Ranges) -> tuple[int, ...]:
        """Of an array with the layout of the fast weights."""
        fast_heads, *pieces = self.token
        return self.batch, num_chunks(ranges), fast_heads, self.tokens, *pieces

    @property
    def sums_shape(self) -> tuple[int, ...]:
        """Of each program's sums over its tokens."""
        return self.batch, self.chunks, self.grid[0], SUMS, *self.token

    # Blocks.

    def window_block(self, ranges: Ranges) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, self.run, *self._token_block),
            lambda run, chunk, clip: (clip, place_in_turn(chunk, ranges), run, 0, 0, 0),
        )

    def fast_block(self, ranges: Ranges) -> pl.BlockSpec:
        fast_heads, *pieces = self._token_block
        return pl.BlockSpec(
            (None, None, fast_heads, self.run, *pieces),
            lambda run, chunk, clip: (clip, place_in_turn(chunk, ranges), 0, run, 0, 0),
        )

    def rotation_block(self) -> pl.BlockSpec:
        """Of cosines and sines in turn, (C, S, K)."""
        block = (None, self.run, pl.next_power_of_2(self.head_dim))
        return pl.BlockSpec(block, lambda run, chunk, clip: (chunk, run, 0))

    def vector_block(self) -> pl.BlockSpec:
        return pl.BlockSpec(self._token_block, lambda run, chunk, clip: (0, 0, 0))

    def sums_block(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, None, SUMS, *self._token_block),
            lambda run, chunk, clip: (clip, chunk, run, 0, 0, 0, 0),
        )

    @property
    def _token_block(self) -> tuple[int, int, int]:
        fast_heads, length = self.tile
        return fast_heads, self.pieces, length
