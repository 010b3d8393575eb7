"""Window attention with a gated linear state for what is older: the baseline of the LaCT layer.

Letters: B batch, C chunks of the sequence, S tokens of a chunk, T key tokens, D width,
N attention heads, K head width, P = K / 2, M heads of the state, E their width (ME = D),
R noise repeats, W chunks of the video.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec

from lact_jax.models.layers import RMSNorm, linear, project_float32
from lact_jax.models.mixer import (
    QKVO,
    KeyValues,
    attend_and_keep,
    attend_with_past,
    mean_norm,
    regroup_heads,
    window_attention,
)
from lact_jax.ops import gated_linear
from lact_jax.ops.numerics import l2_norm
from lact_jax.ops.parallel import mean_over_tokens
from lact_jax.ops.rope import apply_rope
from lact_jax.ops.sequence import SequenceLayout

L2_EPS = 1e-5


@dataclass(frozen=True)
class GLAConfig:
    """The gated linear state.

    The state has D·E numbers, LaCT's fast weights of hidden width H have 3·D·H: an E of 3·H holds
    as many, and where that is over D, one head of E = D comes nearest.

    Attributes:
      head_dim: E, a divisor of the model width; 0 for all of it, one head.
      gate_rank: width between the two matrices of the decay gate.
      gate_temperature: the gate's log is divided by this, so that a new layer forgets 4 % a chunk.
    """

    head_dim: int = 0
    gate_rank: int = 16
    gate_temperature: float = 16.0

    def __post_init__(self):
        if self.head_dim < 0 or self.gate_rank < 1 or self.gate_temperature <= 0:
            raise ValueError(
                f"model.gla={self}: head_dim is at least 0, gate_rank at least 1, and "
                "gate_temperature positive"
            )


class GLACache(NamedTuple):
    """Memory of the committed chunks: the state (B, M, E, E), keys and values of the last chunk."""

    state_BMEE: jax.Array
    past: KeyValues


class GatedLinearAttention(QKVO):
    """A LaCT layer with another memory: the same q, k and v go in, and the same gate lets it out.

    `options` are the layer's LaCT options, of which these hold here as well: qk_l2_norm, o_norm,
    learnable_ttt_scale, ttt_scale and kv_cache_size. The state starts from learned values, as the
    fast weights do.
    """

    def __init__(self, config, options, *, rngs: nnx.Rngs):
        dim, dtype, gla = config.dim, config.dtype, config.gla
        head_dim = gla.head_dim or dim
        super().__init__(dim, config.num_heads, config.eps, dtype=dtype, rngs=rngs)
        self.config, self.temperature = options, gla.gate_temperature
        self.num_state_heads = dim // head_dim
        shape = self.num_state_heads, head_dim, head_dim
        noise = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.initial_state = nnx.Param(noise / jnp.float32(head_dim) ** 0.5)
        self.qk_scale = nnx.Param(jnp.ones((dim, 2), jnp.float32))
        self.qk_offset = nnx.Param(jnp.zeros((dim, 2), jnp.float32))
        self.decay_down = linear(dim, gla.gate_rank, dtype=dtype, rngs=rngs)
        self.decay_up = linear(gla.gate_rank, dim, dtype=dtype, rngs=rngs)
        if options.o_norm:
            self.output_norm = RMSNorm(head_dim, config.eps)
        if options.learnable_ttt_scale:
            zeros = nnx.initializers.zeros_init()
            self.ttt_scale_proj = linear(dim, 1, dtype=dtype, rngs=rngs, kernel_init=zeros)

    # The state's path: its q, k, v, its decay, and its output.

    def _regroup(self, x_SNK: jax.Array) -> jax.Array:
        """(..., S, N, K) to heads of the state (..., M, S, E)."""
        return regroup_heads(x_SNK, self.num_state_heads)

    def _state_qk(self, x_CSNK: jax.Array, rotation_CSP2: jax.Array, column: int) -> jax.Array:
        """q (column 0) or k (column 1) of the state, from q or k before RoPE: (..., C, M, S, E)."""
        scale, offset = (
            p[...][:, column].reshape(self.num_heads, self.head_dim)
            for p in (self.qk_scale, self.qk_offset)
        )
        y = self._regroup(apply_rope(x_CSNK.astype(jnp.float32) * scale + offset, rotation_CSP2))
        if self.config.qk_l2_norm:
            y = y / (l2_norm(y) + L2_EPS)
        return y.astype(x_CSNK.dtype)

    def _decay(self, x_SD: jax.Array) -> jax.Array:
        """What a chunk leaves of each key channel of the state: (..., M, E) float32 in (0, 1)."""
        logits_SD = project_float32(self.decay_up, self.decay_down(x_SD))
        log_decay_D = mean_over_tokens(jax.nn.log_sigmoid(logits_SD), axis=-2) / self.temperature
        return rearrange(jnp.exp(log_decay_D), "... (m e) -> ... m e", m=self.num_state_heads)

    def _initial(self, batch: int) -> jax.Array:
        initial_MEE = self.initial_state[...]
        return jnp.broadcast_to(initial_MEE, (batch, *initial_MEE.shape))

    def _gate(self, x_SD: jax.Array) -> jax.Array:
        """The factor of the state's output: (..., S, 1) or a scalar, float32."""
        if not self.config.learnable_ttt_scale:
            return jnp.float32(self.config.ttt_scale)
        return jax.nn.silu(project_float32(self.ttt_scale_proj, x_SD))

    def _merge(self, x_SD: jax.Array, o_state: jax.Array, o_window_SNK: jax.Array) -> jax.Array:
        """Gated output of the state (..., M, S, E) plus window output, projected: (..., S, D)."""
        if self.config.o_norm:
            o_state = self.output_norm(o_state)
        o_state_SD = rearrange(o_state, "... m s e -> ... s (m e)").astype(jnp.float32)
        o_window_SD = rearrange(o_window_SNK, "... n k -> ... (n k)").astype(jnp.float32)
        return self.output((self._gate(x_SD) * o_state_SD + o_window_SD).astype(self.dtype))

    # Teacher-forced training.

    def sequence(self, x_BCSD: jax.Array, rotation_CSP2: jax.Array, layout: SequenceLayout):
        """See mixer.py."""
        q, k, v = self.project(x_BCSD)
        o_state, state, decay = self._state_sequence(x_BCSD, q, k, v, rotation_CSP2, layout)
        q, k = apply_rope(q, rotation_CSP2), apply_rope(k, rotation_CSP2)
        o_window = window_attention(q, k, v, layout, self.config.kv_cache_size)
        y_BCSD = self._merge(x_BCSD, o_state, o_window)
        stats = {
            "gate_mean": jnp.mean(jax.lax.stop_gradient(self._gate(x_BCSD))),
            "gla_decay": jnp.mean(jax.lax.stop_gradient(decay)),
            "gla_state_norm": mean_norm(state),
            "tttx_norm": mean_norm(o_state),
            "window_x_norm": mean_norm(rearrange(o_window, "... n k -> ... (n k)")),
            "y_norm": self.y_norm(y_BCSD),
        }
        return y_BCSD, stats

    def _state_sequence(self, x, q, k, v, rotation_CSP2, layout):
        """(output of every chunk (B, C, M, S, E), the final state, the decay of clean chunks)."""
        clean, repeat = layout.clean, layout.num_repeat
        initial = self._initial(x.shape[0])
        q_state = self._state_qk(q, rotation_CSP2, 0)
        decay = self._decay(x[:, clean])
        writes = (
            self._state_qk(k[:, clean], rotation_CSP2[clean], 1), self._regroup(v[:, clean]), decay,
        )  # fmt: skip
        chunks = gated_linear.Chunk(*(jnp.swapaxes(y, 0, 1) for y in writes))
        q_first = rearrange(q_state[:, layout.first], "b r m s e -> b m (r s) e")
        q_clean = jnp.swapaxes(q_state[:, clean], 0, 1)
        q_later = rearrange(q_state[:, layout.later], "b (w r) m s e -> w b m (r s) e", r=repeat)
        o_first = gated_linear.read(initial, q_first)
        state, (o_clean, o_later) = gated_linear.scan_chunks(initial, chunks, (q_clean, q_later))
        parts = [
            rearrange(o_first, "b m (r s) e -> b r m s e", r=repeat),
            jnp.swapaxes(o_clean, 0, 1),
            rearrange(o_later, "w b m (r s) e -> b (w r) m s e", r=repeat),
        ]
        return jnp.concatenate(parts, axis=1), state, decay

    # Sampling.

    def init_cache(self, batch: int) -> GLACache:
        """The initial state and an empty window."""
        return GLACache(self._initial(batch), self.no_past(batch))

    def cache_specs(self, batch_axes: tuple[str, ...]) -> GLACache:
        """See mixer.py."""
        return GLACache(PartitionSpec(batch_axes), self.past_specs(batch_axes))

    def denoise(self, x_BSD: jax.Array, rotation_SP2: jax.Array, cache: GLACache) -> jax.Array:
        """See mixer.py."""
        q, k, v = self.project(x_BSD)
        o_state = gated_linear.read(cache.state_BMEE, self._state_qk(q, rotation_SP2[None], 0))
        q, k = apply_rope(q, rotation_SP2[None]), apply_rope(k, rotation_SP2[None])
        return self._merge(x_BSD, o_state, attend_with_past(q, k, v, cache.past)[0])

    def commit(self, x_BSD: jax.Array, rotation_SP2: jax.Array, cache: GLACache):
        """See mixer.py."""
        q, k, v = self.project(x_BSD)
        chunk = gated_linear.Chunk(
            self._state_qk(k, rotation_SP2[None], 1), self._regroup(v), self._decay(x_BSD)
        )
        state_BMEE = gated_linear.update(cache.state_BMEE, chunk)
        o_state = gated_linear.read(state_BMEE, self._state_qk(q, rotation_SP2[None], 0))
        q, k = apply_rope(q, rotation_SP2[None]), apply_rope(k, rotation_SP2[None])
        o_window, past = attend_and_keep(q, k, v, self.config.kv_cache_size)
        return self._merge(x_BSD, o_state, o_window), GLACache(state_BMEE, past)
