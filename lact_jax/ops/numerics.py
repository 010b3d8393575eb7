"""Numerics that more than one operation needs."""

import jax
import jax.numpy as jnp


def matmul_precision(dtype) -> jax.lax.Precision | None:
    """HIGHEST for float32 operands, which accelerators else multiply in TF32; None for others."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def l2_norm(x: jax.Array, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """L2 norm over `axis`, which stays with size 1; its gradient at zero is zero.

    The gradient of `jnp.linalg.norm` is NaN there. Rows of zeros do occur: identity fast weights
    with a hidden width over E have them.
    """
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))
