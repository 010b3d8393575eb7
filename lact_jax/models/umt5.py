"""The UMT5 text encoder (REFERENCE.md 7), the one Wan2.1 is conditioned on.

T5's pre-norm encoder (Raffel et al. 2020, arXiv:1910.10683) with UMT5's change (Chung et al. 2023,
arXiv:2304.09151): every layer has a relative-position bias of its own.

Letters: B batch, L text tokens (queries), M text tokens (keys), D width, N heads, K head width.
"""

import dataclasses
import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lact_jax.models.layers import RMSNorm, gelu_tanh


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Sizes of the encoder; the defaults are UMT5-XXL's.

    `param_dtype` is how the matrices are held (norm scales are always float32), `compute_dtype`
    what the matmuls multiply. Softmax, norms, activations and the residual stream are float32.
    """

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    param_dtype: str = "float32"
    compute_dtype: str = "float32"

    def __post_init__(self):
        if self.dim_attn % self.num_heads:
            raise ValueError(
                f"UMT5Config: dim_attn={self.dim_attn} must be a multiple of "
                f"num_heads={self.num_heads}"
            )
        if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"UMT5Config: num_buckets={self.num_buckets} must be a multiple of 4 and "
                f"max_distance={self.max_distance} above a quarter of it"
            )


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every (query, key) pair by the offset key - query: (length, length) int32.

    Half of the buckets are for keys to the right. In each half the first half of the buckets are
    single distances, the rest grow logarithmically up to `max_distance`, and the last one takes
    all that is farther. The logarithm is float32, as in the PyTorch encoders, so that distances
    at a bucket's edge fall on the same side.
    """
    per_side = num_buckets // 2
    exact = per_side // 2
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(per_side - exact)
    coarse = np.minimum(exact + ratio.astype(np.int32), per_side - 1)
    return (np.where(distance < exact, distance, coarse) + per_side * (offset > 0)).astype(np.int32)


def _linear(d_in: int, d_out: int, cfg: UMT5Config, rngs: nnx.Rngs, gain: float = 1.0):
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=False,
        dtype=jnp.dtype(cfg.compute_dtype),
        param_dtype=jnp.dtype(cfg.param_dtype),
        kernel_init=nnx.initializers.variance_scaling(gain, "fan_in", "normal"),
        rngs=rngs,
    )


def _embedding(count: int, width: int, cfg: UMT5Config, rngs: nnx.Rngs, std: float):
    # Looked up in the parameters' dtype: a cast before the lookup would copy the whole table.
    return nnx.Embed(
        count,
        width,
        param_dtype=jnp.dtype(cfg.param_dtype),
        embedding_init=nnx.initializers.normal(std),
        rngs=rngs,
    )


class SelfAttention(nnx.Module):
    """softmax(q k^T + bias) v. There is no 1/sqrt(K): T5 starts q that much smaller instead."""

    def __init__(self, cfg: UMT5Config, *, rngs: nnx.Rngs):
        self.num_heads = cfg.num_heads
        head_dim = cfg.dim_attn // cfg.num_heads
        self.q = _linear(cfg.dim, cfg.dim_attn, cfg, rngs, gain=1.0 / head_dim)
        self.k = _linear(cfg.dim, cfg.dim_attn, cfg, rngs)
        self.v = _linear(cfg.dim, cfg.dim_attn, cfg, rngs)
        self.o = _linear(cfg.dim_attn, cfg.dim, cfg, rngs)

    def __call__(self, x_BLD, bias_1NLM, mask_B11M):
        batch, length, _ = x_BLD.shape
        q_BLNK, k_BMNK, v_BMNK = (
            project(x_BLD).reshape(batch, length, self.num_heads, -1)
            for project in (self.q, self.k, self.v)
        )
        # The bias is additive and dense, which cuDNN's kernel does badly: XLA on every device.
        o_BLNK = jax.nn.dot_product_attention(
            q_BLNK, k_BMNK, v_BMNK, bias_1NLM, mask_B11M, scale=1.0, implementation="xla"
        )
        return self.o(o_BLNK.reshape(batch, length, -1))


class GatedFFN(nnx.Module):
    """fc2(gelu_tanh(gate x) * fc1 x)."""

    def __init__(self, cfg: UMT5Config, *, rngs: nnx.Rngs):
        self.gate = _linear(cfg.dim, cfg.dim_ffn, cfg, rngs)
        self.fc1 = _linear(cfg.dim, cfg.dim_ffn, cfg, rngs)
        self.fc2 = _linear(cfg.dim_ffn, cfg.dim, cfg, rngs)

    def __call__(self, x_BLD):
        return self.fc2(gelu_tanh(self.gate(x_BLD).astype(jnp.float32)) * self.fc1(x_BLD))


class Block(nnx.Module):
    """One encoder layer: x += attention(norm1(x)); x += ffn(norm2(x)), x in float32."""

    def __init__(self, cfg: UMT5Config, *, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(cfg.dim, cfg.eps)
        self.attn = SelfAttention(cfg, rngs=rngs)
        self.position_bias = _embedding(cfg.num_buckets, cfg.num_heads, cfg, rngs, std=0.1)
        self.norm2 = RMSNorm(cfg.dim, cfg.eps)
        self.ffn = GatedFFN(cfg, rngs=rngs)

    def __call__(self, x_BLD, buckets_LM, mask_B11M):
        bias_LMN = self.position_bias(buckets_LM).astype(jnp.float32)
        bias_1NLM = jnp.transpose(bias_LMN, (2, 0, 1))[None]
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD), bias_1NLM, mask_B11M).astype(jnp.float32)
        return x_BLD + self.ffn(self.norm2(x_BLD)).astype(jnp.float32)


class UMT5Encoder(nnx.Module):
    """Token ids to embeddings. The layers' parameters are stacked along a leading axis."""

    def __init__(self, cfg: UMT5Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.token_embedding = _embedding(cfg.vocab_size, cfg.dim, cfg, rngs, std=1.0)
        keys = jax.random.split(rngs.params(), cfg.num_layers)
        self.blocks = jax.vmap(lambda key: Block(cfg, rngs=nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(cfg.dim, cfg.eps)

    def __call__(self, ids_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
        """Encodes `ids_BL` (int), whose tokens are real where `mask_BL` isn't 0.

        Returns (B, L, D) float32, 0 at padding. An id outside the vocabulary gives NaN.
        """
        cfg = self.cfg
        mask_BL = mask_BL.astype(bool)
        buckets_LM = relative_position_buckets(ids_BL.shape[1], cfg.num_buckets, cfg.max_distance)
        buckets_LM = jnp.asarray(buckets_LM, jnp.int32)
        graphdef, stacked = nnx.split(self.blocks)

        def layer(x_BLD, params):
            block = nnx.merge(graphdef, params)
            return block(x_BLD, buckets_LM, mask_BL[:, None, None, :]), None

        # Where float32 was asked for, an accelerator's shortened float32 matmul is not it.
        precision = "highest" if cfg.compute_dtype == "float32" else "default"
        with jax.default_matmul_precision(precision):
            x_BLD = self.token_embedding(ids_BL).astype(jnp.float32)
            x_BLD, _ = jax.lax.scan(layer, x_BLD, stacked)
        return jnp.where(mask_BL[..., None], self.norm(x_BLD), jnp.float32(0))


@lru_cache
def abstract_umt5(cfg: UMT5Config) -> tuple[nnx.GraphDef, dict]:
    """The encoder's graph, and its parameters as a nested dict of shapes and dtypes (no memory)."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: UMT5Encoder(cfg, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


@partial(jax.jit, static_argnums=0)
def umt5_encode(cfg: UMT5Config, params: dict, ids_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
    """UMT5Encoder as a pure jitted function of a nested dict of parameters: (B, L, D) float32."""
    graphdef, _ = abstract_umt5(cfg)
    return nnx.merge(graphdef, params)(ids_BL, mask_BL)
