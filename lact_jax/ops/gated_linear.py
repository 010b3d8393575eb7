"""Gated linear attention over chunks: a matrix per head that decays, and takes in k v^T.

Letters: B batch, C clean chunks, M heads, S tokens of a chunk, T query tokens, E head width.
Everything here is a pure function.

    S <- diag(decay) S + sum over tokens k v^T,      o = S^T q

Once per finished chunk, where Gated Linear Attention (Yang et al. 2023, arXiv:2312.06635, eq. 3)
does it once per token: the tokens of a chunk have no order among themselves. The state is float32;
matmuls run in the inputs' dtype and accumulate in float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lact_jax.ops.fast_weights import sum_of_outer
from lact_jax.ops.numerics import matmul_precision
from lact_jax.ops.parallel import sum_over_tokens


class Chunk(NamedTuple):
    """What one clean chunk writes: k, v (B, M, S, E), and the decay (B, M, E) in (0, 1] of every
    key channel, by which what was there before is multiplied."""

    k_BMSE: jax.Array
    v_BMSE: jax.Array
    decay_BME: jax.Array


def read(state_BMEE: jax.Array, q_BMTE: jax.Array) -> jax.Array:
    """S^T q for every query: (B, M, T, E), in q's dtype. State axes are (key, value)."""
    dtype = q_BMTE.dtype
    precision = matmul_precision(dtype)
    return jnp.einsum("bmte,bmef->bmtf", q_BMTE, state_BMEE.astype(dtype), precision=precision)


def update(state_BMEE: jax.Array, chunk: Chunk) -> jax.Array:
    """The state after a chunk, (B, M, E, E) float32."""
    written = sum_of_outer(chunk.k_BMSE, chunk.v_BMSE)
    decay_BME1 = chunk.decay_BME.astype(jnp.float32)[..., None]
    return decay_BME1 * state_BMEE + sum_over_tokens(written)


def scan_chunks(
    initial_BMEE: jax.Array, chunks_C: Chunk, queries_C: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Updates with every clean chunk in turn and reads after each update.

    Args:
      initial_BMEE: the state at the start of the sequence.
      chunks_C: the clean chunks, each array with a leading chunk axis C.
      queries_C: streams of queries (C, B, M, T, E); chunk c of each reads the state that clean
        chunk c has just updated.

    Returns:
      The final state and one output (C, B, M, T, E) for each stream.
    """

    def body(state_BMEE, inputs):
        chunk, queries = inputs
        state_BMEE = update(state_BMEE, chunk)
        return state_BMEE, tuple(read(state_BMEE, q_BMTE) for q_BMTE in queries)

    return jax.lax.scan(body, initial_BMEE, (chunks_C, queries_C))
