"""Full block-causal attention: the growing-cache alternative to the LaCT layer.

Letters: B batch, C chunks, S tokens of a chunk, T key tokens, D width, N heads, K head width,
P = K / 2.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from lact_jax.models.mixer import QKVO, KeyValues, attend_with_past
from lact_jax.ops.attention import attend
from lact_jax.ops.parallel import attend_to_whole_chunks
from lact_jax.ops.sequence import SequenceLayout


class FullAttention(QKVO):
    """Attends to the own chunk and to all clean chunks before it (REFERENCE.md 4).

    With a sequence of one chunk this is the plain bidirectional attention of Wan. Its cache holds
    the keys and values of every committed chunk: T grows by S.
    """

    def __init__(self, config, options, *, rngs):
        del options
        super().__init__(config.dim, config.num_heads, config.eps, dtype=config.dtype, rngs=rngs)

    def sequence(self, x_BCSD: jax.Array, rotation_CSP2: jax.Array, layout: SequenceLayout):
        """See mixer.py. Each step of the loop has exactly its keys, so no mask is needed."""
        o_BCSNK, _ = attend_to_whole_chunks(
            partial(_attend_to_clean, layout=layout), *self.rotated(x_BCSD, rotation_CSP2)
        )
        return self.output(rearrange(o_BCSNK, "b c s n k -> b c s (n k)")), {}

    def init_cache(self, batch: int) -> KeyValues:
        """An empty cache."""
        return self.no_past(batch)

    def cache_specs(self, batch_axes: tuple[str, ...]) -> KeyValues:
        """See mixer.py."""
        return self.past_specs(batch_axes)

    def denoise(self, x_BSD: jax.Array, rotation_SP2: jax.Array, cache: KeyValues) -> jax.Array:
        """See mixer.py."""
        return self.commit(x_BSD, rotation_SP2, cache)[0]

    def commit(self, x_BSD: jax.Array, rotation_SP2: jax.Array, cache: KeyValues):
        """See mixer.py."""
        q, k, v = (y[:, 0] for y in self.rotated(x_BSD[:, None], rotation_SP2[None]))
        o_BSNK, past = attend_with_past(q, k, v, cache)
        return self.output(rearrange(o_BSNK, "b s n k -> b s (n k)")), past


def _attend_to_clean(q, k, v, *, layout: SequenceLayout):
    """Attention of a whole sequence, (B, C, S, N, K) each: (its output, None)."""
    repeat = layout.num_repeat
    first = _attend_each(q[:, layout.first], k[:, layout.first], v[:, layout.first], None)
    clean, later = [], []
    k_clean, v_clean = k[:, layout.clean], v[:, layout.clean]
    for i in range(layout.num_clean):
        past = tuple(
            rearrange(y[:, : i + 1], "b c s n k -> b (c s) n k") for y in (k_clean, v_clean)
        )
        start = layout.later.start + i * repeat
        copies = slice(start, start + repeat)
        clean.append(attend(q[:, layout.clean.start + i], *past)[:, None])
        later.append(_attend_each(q[:, copies], k[:, copies], v[:, copies], past))
    return jnp.concatenate([first, *clean, *later], axis=1), None


def _attend_each(q_BRSNK, k_BRSNK, v_BRSNK, past):
    """Each of R chunks attends to itself and to the keys and values `past` (B, T, N, K)."""
    outputs = []
    for r in range(q_BRSNK.shape[1]):
        k, v = k_BRSNK[:, r], v_BRSNK[:, r]
        if past is not None:
            k, v = jnp.concatenate([past[0], k], axis=1), jnp.concatenate([past[1], v], axis=1)
        outputs.append(attend(q_BRSNK[:, r], k, v))
    return jnp.stack(outputs, axis=1)
