"""What the kernels over chunks of the sequence share: masked access, and arrays of some chunks.

Triton takes only blocks whose sides are powers of two, so blocks are padded and masked. Arrays that
are read or written apart have a range of the chunks each; of those that lack its own chunk a
program is given some block, which it masks.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

ChunkRange = tuple[int, int]  # the first chunk and the end


def exists(padded: tuple[int, ...], sizes: tuple[int, ...]) -> jax.Array:
    """Which lanes of a padded tile are not padding."""
    lanes_exist = jnp.full(padded, True)
    for axis, (lanes, size) in enumerate(zip(padded, sizes, strict=True)):
        if lanes > size:
            lanes_exist &= jax.lax.broadcasted_iota(jnp.int32, padded, axis) < size
    return lanes_exist


def within(ranges: tuple[ChunkRange, ...]) -> list[jax.Array]:
    """Whether this program's chunk, which the grid's second axis counts, is of each range."""
    chunk = pl.program_id(1)
    return [(first <= chunk) & (chunk < end) for first, end in ranges]


def place(chunk: jax.Array, chunks: ChunkRange) -> jax.Array:
    """A chunk's place in an array of the range `chunks`, or some place where it has none."""
    first, end = chunks
    return jnp.minimum(jnp.maximum(chunk - first, 0), end - first - 1)


def _at(ref, index: tuple):
    # Interpreted, JAX 0.10 takes no plain integers beside a mask.
    return ref.at[tuple(jnp.int32(i) if isinstance(i, int) else i for i in index)]


def load(ref, index: tuple, mask) -> jax.Array:
    """The block's numbers in float32, with zeros where the mask is False."""
    return triton.load(_at(ref, index), mask=mask, other=0.0).astype(jnp.float32)


def store(ref, index: tuple, value: jax.Array, mask) -> None:
    """Stores in the type of `ref` where the mask is True."""
    triton.store(_at(ref, index), value.astype(ref.dtype), mask=mask)
