"""Full block-causal attention: the growing-cache alternative to the LaCT layer.

Letters: B batch, C chunks, S tokens of a chunk, T key tokens, D width, N heads, K head width,
P = K / 2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from lact_jax.models.mixer import QKVO
from lact_jax.ops.attention import attend
from lact_jax.ops.sequence import SequenceLayout


class FullCache(NamedTuple):
    """Keys (after RoPE) and values of every committed chunk: (B, T, N, K), T grows by S."""

    k_BTNK: jax.Array
    v_BTNK: jax.Array


class FullAttention(QKVO):
    """Attends to the own chunk and to all clean chunks before it (REFERENCE.md 4).

    With a sequence of one chunk this is the plain bidirectional attention of Wan.
    """

    def __init__(self, config, options, *, rngs):
        del options
        super().__init__(config.dim, config.num_heads, config.eps, dtype=config.dtype, rngs=rngs)

    def sequence(self, x_BCSD: jax.Array, angle_CSP: jax.Array, layout: SequenceLayout):
        """See mixer.py. Each step of the loop has exactly its keys, so no mask is needed."""
        q, k, v = self.rotated(x_BCSD, angle_CSP)
        repeat = layout.num_repeat
        first = _attend_each(q[:, layout.first], k[:, layout.first], v[:, layout.first], None)
        clean, later = [], []
        k_clean, v_clean = k[:, layout.clean], v[:, layout.clean]
        for i in range(layout.num_clean):
            past = tuple(rearrange(y[:, : i + 1], "b c s n k -> b (c s) n k")
                         for y in (k_clean, v_clean))  # fmt: skip
            start = layout.later.start + i * repeat
            copies = slice(start, start + repeat)
            clean.append(attend(q[:, layout.clean.start + i], *past)[:, None])
            later.append(_attend_each(q[:, copies], k[:, copies], v[:, copies], past))
        o_BCSNK = jnp.concatenate([first, *clean, *later], axis=1)
        return self.o(rearrange(o_BCSNK, "b c s n k -> b c s (n k)")), {}

    def init_cache(self, batch: int) -> FullCache:
        """An empty cache."""
        empty = jnp.zeros((batch, 0, self.num_heads, self.head_dim), self.dtype)
        return FullCache(empty, empty)

    def denoise(self, x_BSD: jax.Array, angle_SP: jax.Array, cache: FullCache) -> jax.Array:
        """See mixer.py."""
        return self.commit(x_BSD, angle_SP, cache)[0]

    def commit(self, x_BSD: jax.Array, angle_SP: jax.Array, cache: FullCache):
        """See mixer.py."""
        q, k, v = (y[:, 0] for y in self.rotated(x_BSD[:, None], angle_SP[None]))
        k_BTNK = jnp.concatenate([cache.k_BTNK, k], axis=1)
        v_BTNK = jnp.concatenate([cache.v_BTNK, v], axis=1)
        o_BSNK = attend(q, k_BTNK, v_BTNK)
        return self.o(rearrange(o_BSNK, "b s n k -> b s (n k)")), FullCache(k_BTNK, v_BTNK)


def _attend_each(q_BRSNK, k_BRSNK, v_BRSNK, past):
    """Each of R chunks attends to itself and to the keys and values `past` (B, T, N, K)."""
    outputs = []
    for r in range(q_BRSNK.shape[1]):
        k, v = k_BRSNK[:, r], v_BRSNK[:, r]
        if past is not None:
            k, v = jnp.concatenate([past[0], k], axis=1), jnp.concatenate([past[1], v], axis=1)
        outputs.append(attend(q_BRSNK[:, r], k, v))
    return jnp.stack(outputs, axis=1)
