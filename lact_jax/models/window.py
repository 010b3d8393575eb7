"""Window attention alone: what a LaCT layer is without its memory.

Letters: B batch, C chunks, S tokens of a chunk, T key tokens, D width, N heads, K head width,
P = K / 2.
"""

import jax
from einops import rearrange

from lact_jax.models.mixer import (
    QKVO,
    KeyValues,
    attend_and_keep,
    attend_with_past,
    mean_norm,
    window_attention,
)
from lact_jax.ops.sequence import SequenceLayout


class WindowAttention(QKVO):
    """Attends to the own chunk and to the clean chunk before it, and knows nothing of older ones.

    The same as a LaCT layer whose fast output is multiplied by zero. Of the LaCT options it takes
    `kv_cache_size`.
    """

    def __init__(self, config, options, *, rngs):
        super().__init__(config.dim, config.num_heads, config.eps, dtype=config.dtype, rngs=rngs)
        self.kv_cache_size = options.kv_cache_size

    def sequence(self, x_BCSD: jax.Array, rotation_CSP2: jax.Array, layout: SequenceLayout):
        """See mixer.py."""
        q, k, v = self.rotated(x_BCSD, rotation_CSP2)
        o_BCSNK = window_attention(q, k, v, layout, self.kv_cache_size)
        o_BCSD = rearrange(o_BCSNK, "b c s n k -> b c s (n k)")
        y_BCSD = self.output(o_BCSD)
        return y_BCSD, {"window_x_norm": mean_norm(o_BCSD), "y_norm": self.y_norm(y_BCSD)}

    def init_cache(self, batch: int) -> KeyValues:
        """An empty window; later the last committed chunk's."""
        return self.no_past(batch)

    def cache_specs(self, batch_axes: tuple[str, ...]) -> KeyValues:
        """See mixer.py."""
        return self.past_specs(batch_axes)

    def denoise(self, x_BSD: jax.Array, rotation_SP2: jax.Array, cache: KeyValues) -> jax.Array:
        """See mixer.py."""
        o_BSNK, _ = attend_with_past(*self.rotated(x_BSD, rotation_SP2[None]), cache)
        return self.output(rearrange(o_BSNK, "b s n k -> b s (n k)"))

    def commit(self, x_BSD: jax.Array, rotation_SP2: jax.Array, cache: KeyValues):
        """See mixer.py."""
        del cache  # it holds the chunk before, which this one takes the place of
        q, k, v = self.rotated(x_BSD, rotation_SP2[None])
        o_BSNK, past = attend_and_keep(q, k, v, self.kv_cache_size)
        return self.output(rearrange(o_BSNK, "b s n k -> b s (n k)")), past
