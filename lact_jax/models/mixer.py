"""What every sequence mixer (the self-attention of a block) shares: projections and the contract.

A mixer is an nnx.Module with four methods. Activations are (B, C, S, D): batch, chunks, tokens of
a chunk, width. `rotation_CSP2` are those of RoPE (`ops.rope.rope_rotations`).

    sequence(x_BCSD, rotation_CSP2, layout) -> (y_BCSD, stats)  teacher-forced training sequence
    init_cache(batch) -> cache                                  nothing committed yet
    denoise(x_BSD, rotation_SP2, cache) -> y_BSD                a noisy chunk reads the cache
    commit(x_BSD, rotation_SP2, cache) -> (y_BSD, cache)        a clean chunk joins it
    cache_specs(batch_axes) -> PartitionSpecs                   how a mesh cuts the cache

y is the output of the projection `o` without its bias: the block adds `o.bias` where it adds y
to the residual stream, which spares a pass over y.

On a mesh each device has some of the clips and of every chunk's tokens: a mixer that mixes tokens
other than by the functions below asks ops/parallel.py for what it lacks.

`denoise` after committing chunks 0..i-1 equals what `sequence` gives the noise copies of chunk i.
`stats` is a dict of float32 scalars, means over clips and tokens, named as in REFERENCE.md 4.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lact_jax.models.layers import RMSNorm, linear, without_bias
from lact_jax.ops import parallel
from lact_jax.ops.attention import attend
from lact_jax.ops.parallel import attend_to_whole_chunks
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

    def heads(self, x_SD: jax.Array) -> jax.Array:
        """(..., S, D) to heads (..., S, N, K)."""
        return rearrange(x_SD, "... (n k) -> ... n k", n=self.num_heads)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k, v of (..., S, D) as heads (..., S, N, K), before RoPE."""
        q, k, v = checkpoint_name((self.q(x), self.k(x), self.v(x)), "qkv")
        return self.heads(self.norm_q(q)), self.heads(self.norm_k(k)), self.heads(v)

    def rotated(
        self, x: jax.Array, rotation_CSP2: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `project`, q and k after RoPE."""
        q, k, v = self.project(x)
        return apply_rope(q, rotation_CSP2), apply_rope(k, rotation_CSP2), v

    def output(self, o_SD: jax.Array) -> jax.Array:
        """A mixer's y from what it mixed, (..., S, D)."""
        return without_bias(self.o, o_SD)

    def y_norm(self, y_SD: jax.Array) -> jax.Array:
        """`mean_norm` of the layer's output, bias included."""
        return mean_norm(y_SD + self.o.bias[...])

    def no_past(self, batch: int) -> "KeyValues":
        """Keys and values before the first chunk."""
        share = parallel.head_share(self.num_heads)
        empty = jnp.zeros((batch, 0, self.num_heads // share, self.head_dim), self.dtype)
        return KeyValues(empty, empty)

    def past_specs(self, batch_axes: tuple[str, ...]) -> "KeyValues":
        """How a mesh cuts keys and values: PartitionSpecs."""
        spec = PartitionSpec(batch_axes, None, parallel.head_axis(self.num_heads))
        return KeyValues(spec, spec)


def attend_chunks(q_BCSNK: jax.Array, k_BCTNK: jax.Array, v_BCTNK: jax.Array) -> jax.Array:
    """Attention inside every chunk: queries of a chunk see that chunk's keys only."""
    batch, chunks = q_BCSNK.shape[:2]
    flat = (x.reshape(batch * chunks, *x.shape[2:]) for x in (q_BCSNK, k_BCTNK, v_BCTNK))
    return attend(*flat).reshape(q_BCSNK.shape)


def regroup_heads(x_SNK: jax.Array, heads: int) -> jax.Array:
    """(..., S, N, K) as M other heads: (..., M, S, E) with M E = N K. There may be no chunks."""
    width = x_SNK.shape[-2] * x_SNK.shape[-1] // heads
    return jnp.swapaxes(x_SNK.reshape(*x_SNK.shape[:-2], heads, width), -3, -2)


def mean_norm(x: jax.Array) -> jax.Array:
    """Mean L2 norm over the last axis, without a gradient: a float32 scalar, for `stats`."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    return jnp.mean(jnp.linalg.norm(x, axis=-1))


def last_tokens(x_TNK: jax.Array, size: int | None) -> jax.Array:
    """The last `size` tokens of keys or values (..., T, N, K); all of them where it is None."""
    if size is None:
        return x_TNK
    return x_TNK[..., max(x_TNK.shape[-3] - size, 0) :, :, :]


def window_parts(layout: SequenceLayout) -> tuple[slice, ...]:
    """The chunks that attend alike: first those that see themselves alone."""
    alone = slice(0, layout.later.start)
    return (alone, layout.later) if layout.num_clean else (alone,)


class KeysWithPast(NamedTuple):
    """Keys of each of `window_parts` as queries see them.

    alone: of the chunk itself, (B, C', S, N, K).
    later: of the clean chunk before and of the chunk itself, (B, C', 2 S, N, K).
    """

    alone: jax.Array
    later: jax.Array


def can_join_past(layout: SequenceLayout, size: int | None) -> bool:
    """Whether `window_attention_parts` takes `KeysWithPast`: where a clean chunk is seen whole, by
    one noise copy, and no device has to exchange tokens first."""
    seen_once = layout.num_clean > 0 and layout.num_repeat == 1
    return seen_once and size is None and parallel.seq_size() == 1


def window_attention(q, k, v, layout: SequenceLayout, size: int | None) -> jax.Array:
    """`window_attention_parts` joined: (B, C, S, N, K)."""
    return jnp.concatenate(window_attention_parts(q, k, v, layout, size), axis=1)


def window_attention_parts(
    q, k, v, layout: SequenceLayout, size: int | None
) -> tuple[jax.Array, ...]:
    """Attention inside a chunk and, for noise copies, to the clean chunk before (REFERENCE.md 4.7).

    Args:
      q, k, v: (B, C, S, N, K) in the layout's order, q and k after RoPE; or each as a tuple of
        arrays, one for each of `window_parts`, which spares the copies that slicing takes. Where
        `can_join_past`, k may be `KeysWithPast`, which spares those of joining as well.
      layout: the teacher-forcing sequence's.
      size: tokens of the clean chunk before that a noise copy sees; None for all.

    Returns:
      (B, C', S, N, K) for each of `window_parts`, in two calls that need no mask.
    """
    parts = window_parts(layout)
    qkv = (x if isinstance(x, tuple) else tuple(x[:, part] for part in parts) for x in (q, k, v))

    def attention(q, k, v):
        o_alone = attend_chunks(q[0], k[0], v[0])
        if layout.num_clean == 0:
            return (o_alone,), None
        k_later, v_later = (_with_past(x, layout, size) for x in (k, v))
        return (o_alone, attend_chunks(q[1], k_later, v_later)), None

    return attend_to_whole_chunks(attention, *qkv)[0]


def _with_past(parts: tuple, layout: SequenceLayout, size: int | None) -> jax.Array:
    """Keys or values that each of the later chunks attends to: (B, C', T, N, K)."""
    if isinstance(parts, KeysWithPast):
        return parts.later
    alone, own = parts
    past = jnp.repeat(last_tokens(alone[:, layout.clean], size), layout.num_repeat, axis=1)
    return jnp.concatenate([past, own], axis=2)


class KeyValues(NamedTuple):
    """Keys (after RoPE) and values (B, T, N, K) of committed chunks.

    On a mesh they lie as attention reads them: all tokens, and the heads cut over `seq` where it
    divides them.
    """

    k_BTNK: jax.Array
    v_BTNK: jax.Array


def attend_with_past(
    q_BSNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array, past: KeyValues
) -> tuple[jax.Array, KeyValues]:
    """Attention of a chunk to `past` and to itself: (o (B, S, N, K), keys and values of both)."""

    def attention(q, *own):
        joined = (jnp.concatenate(pair, axis=1) for pair in zip(past, own, strict=True))
        k_BTNK, v_BTNK = joined
        return attend(q, k_BTNK, v_BTNK), KeyValues(k_BTNK, v_BTNK)

    return attend_to_whole_chunks(attention, q_BSNK, k_BSNK, v_BSNK)


def attend_and_keep(
    q_BSNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array, size: int | None
) -> tuple[jax.Array, KeyValues]:
    """Attention of a chunk to itself: (o (B, S, N, K), its last `size` keys and values)."""

    def attention(q, k, v):
        return attend(q, k, v), KeyValues(last_tokens(k, size), last_tokens(v, size))

    return attend_to_whole_chunks(attention, q_BSNK, k_BSNK, v_BSNK)
