"""Dense softmax attention without masks, and the one place that chooses its backend.

Letters: B batch, S query tokens, T key tokens, N heads, K head width.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lact_jax.ops.numerics import matmul_precision
from lact_jax.ops.target import capability, target_device

CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)
# Compute capability of a card -> widest head.
CUDNN_MAX_HEAD_DIM = {8.0: 128, 9.0: 256}


def choose_backend(device: jax.Device, dtype, head_dim: int) -> str:
    """'cudnn' where cuDNN's fused kernel takes the call, else 'xla'.

    cuDNN takes only 16-bit types, NVIDIA cards from Ampere on, and head widths that are multiples
    of 8 up to a largest one, and raises rather than falls back.
    """
    widths = [n for least, n in CUDNN_MAX_HEAD_DIM.items() if capability(device) >= least]
    fits = dtype in CUDNN_DTYPES and head_dim % 8 == 0 and head_dim <= max(widths, default=0)
    return "cudnn" if fits else "xla"


def attend(q_BSNK: jax.Array, k_BTNK: jax.Array, v_BTNK: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v for every head: (B, S, N, K), the softmax in float32."""
    backend = choose_backend(target_device(), q_BSNK.dtype, q_BSNK.shape[-1])
    exact = matmul_precision(q_BSNK.dtype) is not None
    queries, keys = q_BSNK.shape[1], k_BTNK.shape[1]
    key_lengths_B = None
    if backend == "cudnn":
        # JAX refuses to differentiate cuDNN's attention of odd lengths. One query more changes
        # nothing for the others; one key more has to be left out.
        q_BSNK, k_BTNK, v_BTNK = map(_padded_to_even, (q_BSNK, k_BTNK, v_BTNK))
        if keys % 2:
            key_lengths_B = jnp.full(q_BSNK.shape[0], keys, jnp.int32)
    with jax.default_matmul_precision("highest" if exact else "default"):
        o_BSNK = jax.nn.dot_product_attention(
            q_BSNK, k_BTNK, v_BTNK, key_value_seq_lengths=key_lengths_B, implementation=backend
        )
    # cuDNN's output is saved by its primitive, with what its backward pass needs.
    return o_BSNK[:, :queries] if backend == "cudnn" else checkpoint_name(o_BSNK, "attention")


def _padded_to_even(x_BSNK: jax.Array) -> jax.Array:
    odd = x_BSNK.shape[1] % 2
    return jnp.pad(x_BSNK, ((0, 0), (0, 1), (0, 0), (0, 0))) if odd else x_BSNK
