"""What kernels over whole rows share: a row's numbers in registers, runs of rows, sums of a run.

A program has a run of rows of one chunk, and goes through them one at a time. A row is a tuple of
pieces: Triton takes only powers of two, and a piece of four numbers a thread has the same layout in
registers whatever its type, so that no row is exchanged between threads.

Letters: N chunks, S rows of a chunk, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

WARP_THREADS = 32
PIECE_PER_THREAD = 4


class Program(NamedTuple):
    """What a program has: rows that it goes through one at a time, and of each of a row's arrays at
    most so many numbers a thread."""

    rows: int
    per_thread: int


# The fastest of 18 and 14 on an H200, for add and norm of the 1536 numbers of ar_chunk3f. A single
# warp holds a row of those without waiting for others; the backward passes hold too many arrays for
# that. They write their sums once a program: with 40 rows these are 5 % of their bytes.
FORWARD = Program(rows=20, per_thread=48)
BACKWARD = Program(rows=40, per_thread=16)

MIN_WIDTH = 256
# No program has more than 16 warps.
MAX_WIDTH = 16 * WARP_THREADS * BACKWARD.per_thread


class Part(Enum):
    """What a program has of an array."""

    ROWS = "its rows, of (N, S, D)"
    STATISTICS = "a number of each of its rows, of (N, S)"
    VECTOR = "its chunk's vector, of (N, D)"
    SUMS = "sums over its rows, of (N, runs, D)"


def fits(width: int) -> bool:
    """Whether the kernels take rows of this width D and gain by it: loads of 16 bytes need rows
    that begin at multiples of them."""
    return MIN_WIDTH <= width <= MAX_WIDTH and width % 8 == 0


@dataclass(frozen=True)
class KernelOptions:
    """How the kernels run.

    Attributes:
      eps: added to the variance or mean square of a row.
      dtype: of the normalised rows.
      rows: of a program, at most; None for its pass's.
      num_warps: of a program; None for as many as hold a row.
      interpret: run as plain JAX, on any device, slowly.
    """

    eps: float
    dtype: jnp.dtype
    rows: int | None = None
    num_warps: int | None = None
    interpret: bool = False


def _rows_of_run(tokens: int, program: Program, options: KernelOptions) -> int:
    return min(options.rows or program.rows, tokens)


def sums_shape(shape: tuple, options: KernelOptions) -> tuple[int, int, int]:
    """(N, runs, D) for rows (N, S, D): every run of a backward pass writes sums of its own."""
    chunks, tokens, width = shape
    return chunks, pl.cdiv(tokens, _rows_of_run(tokens, BACKWARD, options)), width


def _num_warps(width: int, program: Program) -> int:
    return pl.next_power_of_2(pl.cdiv(width, program.per_thread * WARP_THREADS))


def run_rows(
    kernel: Callable, arrays: dict, out: dict, parts: dict, shape: tuple, options: KernelOptions,
    *, program: Program, name: str,
) -> dict:  # fmt: skip
    """Runs kernel(arrays, out, rows=..., shape=..., lanes=...) over all runs of rows of all chunks.

    Args:
      kernel: takes references by name.
      arrays, out: inputs, and shape and dtype of outputs, by name. Inputs that are None are left
        out.
      parts: the `Part` of every array by name; there may be more than are used.
      shape: (N, S, D).
      options: see `KernelOptions`.
      program: FORWARD or BACKWARD.
      name: what profiles call it.

    Returns:
      The outputs by name.
    """
    chunks, tokens, width = shape
    rows = _rows_of_run(tokens, program, options)
    num_warps = options.num_warps or _num_warps(width, program)
    lanes = PIECE_PER_THREAD * WARP_THREADS * num_warps
    padded = pl.cdiv(width, lanes) * lanes
    specs = {
        Part.ROWS: pl.BlockSpec((None, rows, padded), lambda n, i: (n, i, 0)),
        Part.STATISTICS: pl.BlockSpec((None, rows), lambda n, i: (n, i)),
        Part.VECTOR: pl.BlockSpec((None, padded), lambda n, i: (n, 0)),
        Part.SUMS: pl.BlockSpec((None, None, padded), lambda n, i: (n, i, 0)),
    }
    arrays = {name: array for name, array in arrays.items() if array is not None}
    call = pl.pallas_call(
        partial(kernel, rows=rows, shape=shape, lanes=lanes),
        out_shape={name: jax.ShapeDtypeStruct(*what) for name, what in out.items()},
        grid=(chunks, pl.cdiv(tokens, rows)),
        in_specs=[{name: specs[parts[name]] for name in arrays}],
        out_specs={name: specs[parts[name]] for name in out},
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=options.interpret,
        name=name,
    )
    return call(arrays)


# Inside a kernel.


@dataclass(frozen=True)
class Row:
    """How a row of `width` numbers is cut into pieces of `lanes`."""

    width: int
    lanes: int

    def _pieces(self):
        """Where each piece is, and which of its lanes are within the width: None for all."""
        for start in range(0, self.width, self.lanes):
            left = self.width - start
            lane = jnp.arange(self.lanes, dtype=jnp.int32)
            yield pl.ds(start, self.lanes), lane < left if left < self.lanes else None

    def load(self, ref, *index) -> tuple[jax.Array, ...]:
        """The pieces in float32, with zeros beyond the width."""
        return tuple(
            triton.load(
                ref.at[*index, piece], mask=mask, other=None if mask is None else 0.0
            ).astype(jnp.float32)
            for piece, mask in self._pieces()
        )

    def store(self, row, ref, *index) -> None:
        """Stores a row in the type of `ref`."""
        for value, (piece, mask) in zip(row, self._pieces(), strict=True):
            triton.store(ref.at[*index, piece], value.astype(ref.dtype), mask=mask)

    def mean(self, row) -> jax.Array:
        """Mean over the width of a row that is zero beyond."""
        return jnp.sum(reduce(jnp.add, row)) / self.width

    def inside(self, row) -> tuple[jax.Array, ...]:
        """The row, with zeros beyond the width."""
        return tuple(
            value if mask is None else jnp.where(mask, value, 0.0)
            for value, (_, mask) in zip(row, self._pieces(), strict=True)
        )


def load_vectors(row: Row, refs: dict, *names: str) -> list[tuple[jax.Array, ...] | None]:
    """This chunk's vectors, None for those that there are not."""
    return [row.load(refs[name]) if name in refs else None for name in names]


def for_own_rows(rows: int, tokens: int, body, carry):
    """Runs body(row of the block, carry) -> carry over those of this program that there are."""
    first = pl.program_id(1) * rows
    return jax.lax.fori_loop(0, jnp.minimum(rows, tokens - first), body, carry)
