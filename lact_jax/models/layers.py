"""Small layers of the Wan DiT: norms, projections, time embedding, patches.

Letters: B batch, C chunks, F latent frames of a chunk, h, w latent height and width, c channels,
S tokens of a chunk, D width, N width of a narrow output.
"""

from collections.abc import Sequence
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from lact_jax.ops.numerics import matmul_precision

MAX_TIMESTEP = 1000
POSITION_THETA = 100.0


def linear(d_in: int, d_out: int, *, dtype, rngs: nnx.Rngs, kernel_init=None) -> nnx.Linear:
    """A Linear with float32 parameters, a zero bias and matmuls in `dtype`."""
    return nnx.Linear(
        d_in,
        d_out,
        dtype=dtype,
        precision=matmul_precision(dtype),
        kernel_init=kernel_init or nnx.initializers.xavier_uniform(),
        rngs=rngs,
    )


def without_bias(layer: nnx.Linear, x: jax.Array) -> jax.Array:
    """x times the layer's kernel, in x's dtype."""
    return jnp.matmul(x, layer.kernel[...].astype(x.dtype), precision=matmul_precision(x.dtype))


def project_float32(layer: nnx.Linear, x: jax.Array) -> jax.Array:
    """layer(x), multiplied in x's dtype but accumulated, biased and returned in float32.

    For narrow outputs whose nonlinearity would feel the rounding of a bfloat16 result.
    """
    return project_joined_float32((layer,), x)


def project_joined_float32(layers: Sequence[nnx.Linear], x: jax.Array) -> jax.Array:
    """`project_float32` of several layers side by side, by one matmul: x is read once for all.

    Args:
      layers: of the same input width; their output widths add up to N.
      x: (..., S, D).

    Returns:
      (..., S, N) float32.
    """
    kernel_DN = jnp.concatenate([layer.kernel[...] for layer in layers], axis=-1)
    bias_N = jnp.concatenate([layer.bias[...] for layer in layers])
    return _matmul_to_float32(x, kernel_DN) + bias_N


@jax.custom_vjp
def _matmul_to_float32(x: jax.Array, kernel_DN: jax.Array) -> jax.Array:
    """x (..., S, D) times the kernel in x's dtype: (..., S, N) float32."""
    kernel_DN, precision = kernel_DN.astype(x.dtype), matmul_precision(x.dtype)
    return jnp.matmul(x, kernel_DN, precision=precision, preferred_element_type=jnp.float32)


def _matmul_to_float32_fwd(x, kernel_DN):
    return _matmul_to_float32(x, kernel_DN), (x, kernel_DN)


def _part_of(tokens: int, largest: int = 512) -> int:
    """The largest divisor up to `largest` that is a multiple of 8; all of them if there is none."""
    return next((size for size in range(largest, 0, -8) if tokens % size == 0), tokens)


def _matmul_to_float32_bwd(residuals, grad):
    x, kernel_DN = residuals
    precision = matmul_precision(x.dtype)
    # The cotangent arrives in float32; unless it is cast, x is copied to float32 to meet it.
    grad = grad.astype(x.dtype)
    dx = jnp.matmul(grad, kernel_DN.astype(x.dtype).T, precision=precision)
    # Products of some hundred tokens: XLA cuts a longer sum up itself, in a padded copy of x.
    size = _part_of(x.shape[-2])
    parts = (y.reshape(-1, size, y.shape[-1]) for y in (x, grad))
    dkernel = jnp.einsum(
        "psd,psn->pdn", *parts, precision=precision, preferred_element_type=jnp.float32
    )
    dkernel_DN = jnp.sum(dkernel, axis=0)
    return dx, dkernel_DN.astype(kernel_DN.dtype)


_matmul_to_float32.defvjp(_matmul_to_float32_fwd, _matmul_to_float32_bwd)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, reduced in float32, returned in x's dtype."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * rms * self.scale[...]).astype(x.dtype)


class NormParams(nnx.Module):
    """Scale and bias of a LayerNorm; `ops.norm_kernels.add_norm` computes it."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))


class MLP(nnx.Module):
    """Linear - activation - Linear."""

    def __init__(self, d_in, d_hidden, d_out, activation, *, dtype, rngs, kernel_init=None):
        self.fc1 = linear(d_in, d_hidden, dtype=dtype, rngs=rngs, kernel_init=kernel_init)
        self.fc2 = linear(d_hidden, d_out, dtype=dtype, rngs=rngs, kernel_init=kernel_init)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x)))


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU in its tanh form."""
    return jax.nn.gelu(x, approximate=True)


@lru_cache
def _whole_timestep_table(width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    half = width // 2
    frequency = 10000.0 ** (-np.arange(half, dtype=np.float64) / half)
    angle = np.arange(MAX_TIMESTEP + 1, dtype=np.float64)[:, None] * frequency
    return tuple(x.astype(np.float32) for x in (frequency, np.cos(angle), np.sin(angle)))


def timestep_embedding(timestep: jax.Array, width: int) -> jax.Array:
    """[cos | sin] of t * 10000^(-i / (width/2)), t in [0, 1000]: (..., width) float32.

    Float32 angles near 1000 would lose three digits. So the angle of the whole part of t comes
    from a table made in float64, and the small angle of its fraction is added by the angle sum.
    """
    frequency, cos_table, sin_table = map(jnp.asarray, _whole_timestep_table(width))
    timestep = timestep.astype(jnp.float32)
    whole = jnp.floor(timestep)
    index = jnp.clip(whole.astype(jnp.int32), 0, MAX_TIMESTEP)
    small = (timestep - whole)[..., None] * frequency
    cos_a, sin_a, cos_b, sin_b = cos_table[index], sin_table[index], jnp.cos(small), jnp.sin(small)
    return jnp.concatenate([cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b], axis=-1)


def position_embedding(frames: int, height: int, width: int, dim: int) -> jax.Array:
    """[cos | sin] of the row, then of the column, of every token of a chunk: (S, D) float32.

    The angles turn by pi * 100^(-i / (D/4)) from one token to the next: neighbours differ as much
    as can be, and no two of some hundred are alike. A token's does not depend on the size.

    Args:
      frames, height, width: tokens of a chunk; all frames have the same embedding.
      dim: D, a multiple of 4.
    """
    pairs = dim // 4
    frequency = np.pi * POSITION_THETA ** (-np.arange(pairs, dtype=np.float64) / pairs)
    parts = []
    for shape in ((height, 1), (1, width)):
        # By NumPy: XLA would compute the sines again for every clip and chunk they are added to.
        angle = np.arange(max(shape)).reshape(*shape, 1) * frequency
        part = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
        part = jnp.asarray(part, jnp.float32)
        parts.append(jnp.broadcast_to(part, (frames, height, width, dim // 2)))
    return jnp.concatenate(parts, axis=-1).reshape(frames * height * width, dim)


def patchify(x_BCFhwc: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
    """Latent chunks to tokens: (B, C, S, pt*ph*pw*c), channels fastest."""
    return rearrange(
        x_BCFhwc,
        "b n (f pt) (h ph) (w pw) c -> b n (f h w) (pt ph pw c)",
        pt=patch[0], ph=patch[1], pw=patch[2],
    )  # fmt: skip


def unpatchify(
    x_BCSP: jax.Array, patch: tuple[int, int, int], frames: int, height: int, width: int
) -> jax.Array:
    """Tokens back to latent chunks of `frames` x `height` x `width`: (B, C, F, h, w, c)."""
    return rearrange(
        x_BCSP,
        "b n (f h w) (pt ph pw c) -> b n (f pt) (h ph) (w pw) c",
        pt=patch[0], ph=patch[1], pw=patch[2],
        f=frames // patch[0], h=height // patch[1], w=width // patch[2],
    )  # fmt: skip
