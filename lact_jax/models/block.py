"""A transformer block of the Wan DiT, its cross-attention, and the head after the last one.

Letters: B batch, C chunks, S tokens of a chunk, D width, L text tokens, N heads, K head width.
`config` is a `dit.DiTConfig`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lact_jax.models.full_attention import FullAttention
from lact_jax.models.gla import GatedLinearAttention
from lact_jax.models.lact import LaCT
from lact_jax.models.layers import MLP, NormParams, RMSNorm, gelu_tanh, linear, without_bias
from lact_jax.models.mixer import attend_chunks
from lact_jax.models.window import WindowAttention
from lact_jax.ops import feed_forward, kernels, row_kernels
from lact_jax.ops.norm_kernels import add_branch, add_norm, layer_norm
from lact_jax.ops.rms_kernels import biased_rms_norm

# Mixer name -> module; mixer.py says what a mixer is.
MIXERS = {
    "lact": LaCT,
    "window": WindowAttention,
    "full": FullAttention,
    "gla": GatedLinearAttention,
}


class CrossAttention(nnx.Module):
    """Attention from video tokens to text tokens. No mask: padding is attended to.

    As with a mixer, the output lacks the bias of `o`, which the block adds.
    """

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        dim, dtype = config.dim, config.dtype
        self.num_heads, self.eps, self.kernels = config.num_heads, config.eps, config.kernels
        for name in ("q", "k", "v", "o"):
            setattr(self, name, linear(dim, dim, dtype=dtype, rngs=rngs))
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)

    def _heads(self, x):
        return rearrange(x, "... (n k) -> ... n k", n=self.num_heads)

    def text_kv(self, text_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the text, (B, L, N, K) each: computed once a clip."""
        return self._heads(self.norm_k(self.k(text_BLD))), self._heads(self.v(text_BLD))

    def _queries(self, x_BCSD: jax.Array) -> jax.Array:
        """q (B, C, S, N, K)."""
        fits = row_kernels.fits(x_BCSD.shape[-1])
        backend = kernels.choose_backend(self.kernels, x_BCSD.dtype, fits)
        if backend == "xla":
            return self._heads(self.norm_q(self.q(x_BCSD)))
        z_BCSD = without_bias(self.q, x_BCSD)
        options = row_kernels.KernelOptions(
            self.eps, z_BCSD.dtype, interpret=backend == "interpret"
        )
        vectors = self.q.bias[...], self.norm_q.scale[...]
        return self._heads(biased_rms_norm(z_BCSD, *vectors, options))

    def __call__(self, x_BCSD: jax.Array, text_kv: tuple[jax.Array, jax.Array]) -> jax.Array:
        q_BCSNK = self._queries(x_BCSD)
        k_BCLNK, v_BCLNK = (copy_for_chunks(x, x_BCSD.shape[1]) for x in text_kv)
        o_BCSNK = attend_chunks(q_BCSNK, k_BCLNK, v_BCLNK)
        return without_bias(self.o, rearrange(o_BCSNK, "b c s n k -> b c s (n k)"))


def copy_for_chunks(x_BLNK: jax.Array, chunks: int) -> jax.Array:
    """A copy of the text's keys or values for every chunk: (B, C, L, N, K).

    Chunks could share them in one call, but a fused backward pass runs in parallel over keys and
    heads alone: 512 keys leave most of a large device idle. The copies are made in float32, so that
    their gradients are added in float32.
    """
    copies = jnp.broadcast_to(
        x_BLNK.astype(jnp.float32)[:, None], (x_BLNK.shape[0], chunks, *x_BLNK.shape[1:])
    )
    return copies.astype(x_BLNK.dtype)


class FeedForward(MLP):
    """Linear, GELU, Linear; the hidden layer by kernels where `config.kernels` wants them.

    The output lacks the bias of `fc2`, which the block adds.
    """

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        dim, dtype = config.dim, config.dtype
        super().__init__(dim, config.ffn_dim, dim, gelu_tanh, dtype=dtype, rngs=rngs)
        self.kernels, self.fits = config.kernels, feed_forward.fits(config.ffn_dim)

    def __call__(self, x_BCSD: jax.Array) -> jax.Array:
        backend = kernels.choose_backend(self.kernels, x_BCSD.dtype, self.fits)
        if backend == "xla":
            return without_bias(self.fc2, self.activation(self.fc1(x_BCSD)))
        w1, w2 = (fc.kernel[...].astype(x_BCSD.dtype) for fc in (self.fc1, self.fc2))
        flat_TD = x_BCSD.reshape(-1, x_BCSD.shape[-1])
        bias_H, interpret = self.fc1.bias[...], backend == "interpret"
        y_TD = feed_forward.feed_forward(flat_TD, w1, bias_H, w2, interpret)
        return y_TD.reshape(x_BCSD.shape)


class Block(nnx.Module):
    """One transformer block; residual stream and modulation in float32 (REFERENCE.md 2)."""

    def __init__(self, config: Any, spec, *, rngs: nnx.Rngs):
        dim, dtype = config.dim, config.dtype
        mixer_name, options = spec
        self.eps, self.dtype, self.kernels = config.eps, dtype, config.kernels
        noise = jax.random.normal(rngs.params(), (6, dim), jnp.float32)
        self.modulation = nnx.Param(noise / jnp.float32(dim) ** 0.5)
        self.self_attn = MIXERS[mixer_name](config, options, rngs=rngs)
        self.norm3 = NormParams(dim)
        self.cross_attn = CrossAttention(config, rngs=rngs)
        self.ffn = FeedForward(config, rngs=rngs)

    def _add_norm(self, x_BCSD, y_BCSD, bias_D, gate_BCD, scale_BCD, shift_BCD):
        fits = row_kernels.fits(x_BCSD.shape[-1])
        backend = kernels.choose_backend(self.kernels, self.dtype, fits)
        return add_norm(
            x_BCSD, y_BCSD, bias_D, gate_BCD, scale_BCD, shift_BCD,
            eps=self.eps, dtype=self.dtype, backend=backend,
        )  # fmt: skip

    def __call__(self, x_BCSD: jax.Array, e0_BC6D: jax.Array, text_kv, mix):
        """Runs the block.

        Args:
          x_BCSD: float32 residual stream.
          e0_BC6D: float32 time modulation of every chunk.
          text_kv: this layer's text keys and values.
          mix: calls the mixer: (mixer, normalised (B, C, S, D)) -> (y, anything).

        Returns:
          The new stream and what `mix` returned beside y.
        """
        e = e0_BC6D + self.modulation[...]
        shift1, scale1, gate1, shift2, scale2, gate2 = (e[:, :, i] for i in range(6))
        o1, o2, o3 = self.self_attn.o, self.cross_attn.o, self.ffn.fc2
        norm3 = self.norm3.scale[...][None, None], self.norm3.bias[...][None, None]
        x_BCSD, y = self._add_norm(x_BCSD, None, None, None, 1 + scale1, shift1)
        with jax.named_scope("self_attention"):
            y, aux = mix(self.self_attn, y)
        x_BCSD, y = self._add_norm(x_BCSD, y, o1.bias[...], gate1, *norm3)
        with jax.named_scope("cross_attention"):
            y = self.cross_attn(y, text_kv)
        x_BCSD, y = self._add_norm(x_BCSD, y, o2.bias[...], None, 1 + scale2, shift2)
        with jax.named_scope("ffn"):
            y = checkpoint_name(self.ffn(y), "ffn")
        return add_branch(x_BCSD, y, o3.bias[...], gate2), aux


class Head(nnx.Module):
    """Modulated norm and projection to patches."""

    def __init__(self, config: Any, patch_width: int, *, rngs: nnx.Rngs):
        noise = jax.random.normal(rngs.params(), (2, config.dim), jnp.float32)
        self.modulation = nnx.Param(noise / jnp.float32(config.dim) ** 0.5)
        zeros = nnx.initializers.zeros_init()
        self.head = linear(
            config.dim, patch_width, dtype=config.dtype, rngs=rngs, kernel_init=zeros
        )
        self.eps, self.dtype = config.eps, config.dtype

    def __call__(self, x_BCSD: jax.Array, e_BCD: jax.Array) -> jax.Array:
        shift, scale = (e_BCD + self.modulation[...][i] for i in range(2))
        y = layer_norm(x_BCSD, self.eps) * (1 + scale[:, :, None]) + shift[:, :, None]
        return self.head(y.astype(self.dtype)).astype(jnp.float32)
