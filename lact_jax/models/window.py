"""Window attention alone: what a LaCT layer is without its memory.

Letters: B batch, C chunks, S tokens of a chunk, T key tokens, D width, N heads, K head width,
P = K / 2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from lact_jax.models.mixer import QKVO, last_tokens, mean_norm, window_attention
from lact_jax.ops.attention import attend
from lact_jax.ops.sequence import SequenceLayout


class WindowCache(NamedTuple):
    """Keys (after RoPE) and values (B, T, N, K) of the last committed chunk."""

    k_BTNK: jax.Array
    v_BTNK: jax.Array


class WindowAttention(QKVO):
    """Attends to the own chunk and to the clean chunk before it, and knows nothing of older ones.

    The same as a LaCT layer whose fast output is multiplied by zero. Of the LaCT options it takes
    `kv_cache_size`.
    """

    def __init__(self, config, options, *, rngs):
        super().__init__(config.dim, config.num_heads, config.eps, dtype=config.dtype, rngs=rngs)
        self.kv_cache_size = options.kv_cache_size

    def sequence(self, x_BCSD: jax.Array, angle_CSP: jax.Array, layout: SequenceLayout):
        """See mixer.py."""
        q, k, v = self.rotated(x_BCSD, angle_CSP)
        o_BCSNK = window_attention(q, k, v, layout, self.kv_cache_size)
        o_BCSD = rearrange(o_BCSNK, "b c s n k -> b c s (n k)")
        y_BCSD = self.o(o_BCSD)
        return y_BCSD, {"window_x_norm": mean_norm(o_BCSD), "y_norm": mean_norm(y_BCSD)}

    def init_cache(self, batch: int) -> WindowCache:
        """An empty window."""
        empty = jnp.zeros((batch, 0, self.num_heads, self.head_dim), self.dtype)
        return WindowCache(empty, empty)

    def denoise(self, x_BSD: jax.Array, angle_SP: jax.Array, cache: WindowCache) -> jax.Array:
        """See mixer.py."""
        q, k, v = self.rotated(x_BSD, angle_SP[None])
        k_BTNK = jnp.concatenate([cache.k_BTNK, k], axis=1)
        v_BTNK = jnp.concatenate([cache.v_BTNK, v], axis=1)
        return self.o(rearrange(attend(q, k_BTNK, v_BTNK), "b s n k -> b s (n k)"))

    def commit(self, x_BSD: jax.Array, angle_SP: jax.Array, cache: WindowCache):
        """See mixer.py."""
        del cache  # it holds the chunk before, which this one takes the place of
        q, k, v = self.rotated(x_BSD, angle_SP[None])
        y_BSD = self.o(rearrange(attend(q, k, v), "b s n k -> b s (n k)"))
        return y_BSD, WindowCache(*(last_tokens(x, self.kv_cache_size) for x in (k, v)))
