"""What every sequence mixer (the self-attention of a block) shares: projections and the contract.

A mixer is an nnx.Module with four methods. Activations are (B, C, S, D): batch, chunks, tokens of
a chunk, width. `angle_CSP` are RoPE angles.

    sequence(x_BCSD, angle_CSP, layout) -> (y_BCSD, stats)     teacher-forced training sequence
    init_cache(batch) -> cache                                 nothing committed yet
    denoise(x_BSD, angle_SP, cache) -> y_BSD                   a noisy chunk reads the cache
    commit(x_BSD, angle_SP, cache) -> (y_BSD, cache)           a clean chunk joins it

`denoise` after committing chunks 0..i-1 equals what `sequence` gives the noise copies of chunk i.
`stats` is a dict of float32 scalars, named as in REFERENCE.md 4.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from lact_jax.models.layers import RMSNorm, linear
from lact_jax.ops.attention import attend
from lact_jax.ops.rope import apply_rope
from lact_jax.ops.sequence import SequenceLayout


class QKVO(nnx.Module):
    """Projections of Wan's self-attention: q and k with an RMSNorm over the whole width."""

    def __init__(self, dim: int, num_heads: int, eps: float, *, dtype, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.dtype = dtype
        for name in ("q", "k", "v", "o"):
            setattr(self, name, linear(dim, dim, dtype=dtype, rngs=rngs))
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k, v of (..., S, D) as heads (..., S, N, K), before RoPE."""
        qkv = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        return tuple(rearrange(y, "... (n k) -> ... n k", n=self.num_heads) for y in qkv)

    def rotated(self, x: jax.Array, angle_CSP: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `project`, q and k after RoPE."""
        q, k, v = self.project(x)
        return apply_rope(q, angle_CSP), apply_rope(k, angle_CSP), v


def attend_chunks(q_BCSNK: jax.Array, k_BCTNK: jax.Array, v_BCTNK: jax.Array) -> jax.Array:
    """Attention inside every chunk: queries of a chunk see that chunk's keys only."""
    batch, chunks = q_BCSNK.shape[:2]
    flat = (x.reshape(batch * chunks, *x.shape[2:]) for x in (q_BCSNK, k_BCTNK, v_BCTNK))
    return attend(*flat).reshape(q_BCSNK.shape)


def mean_norm(x: jax.Array) -> jax.Array:
    """Mean L2 norm over the last axis, without a gradient: a float32 scalar, for `stats`."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    return jnp.mean(jnp.linalg.norm(x, axis=-1))


def last_tokens(x_TNK: jax.Array, size: int | None) -> jax.Array:
    """The last `size` tokens of keys or values (..., T, N, K); all of them where it is None."""
    if size is None:
        return x_TNK
    return x_TNK[..., max(x_TNK.shape[-3] - size, 0) :, :, :]


def window_attention(q, k, v, layout: SequenceLayout, size: int | None) -> jax.Array:
    """Attention inside a chunk and, for noise copies, to the clean chunk before (REFERENCE.md 4.7).

    Args:
      q, k, v: (B, C, S, N, K) in the layout's order, q and k after RoPE.
      layout: the teacher-forcing sequence's.
      size: tokens of the clean chunk before that a noise copy sees; None for all.

    Returns:
      (B, C, S, N, K), in two calls that need no mask.
    """
    alone, later, clean = slice(0, layout.later.start), layout.later, layout.clean
    o_alone = attend_chunks(q[:, alone], k[:, alone], v[:, alone])
    if layout.num_clean == 0:
        return o_alone
    k_later, v_later = (
        jnp.concatenate(
            [jnp.repeat(last_tokens(y[:, clean], size), layout.num_repeat, axis=1), y[:, later]],
            axis=2,
        )
        for y in (k, v)
    )
    return jnp.concatenate([o_alone, attend_chunks(q[:, later], k_later, v_later)], axis=1)
