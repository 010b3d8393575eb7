"""The feed-forward network's hidden layer as Triton kernels, where it is bound by memory.

Letters: T tokens, D width, H hidden width.

A step of ar_chunk3f passes 545 million hidden activations a layer. XLA computes tanh for them in a
pass of its own and adds up the bias gradient in bfloat16; here each pass reads and writes every
number once. `models.layers.MLP` is the plain form, and the tests hold both to each other.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Of gelu(h) = h sigmoid(2 sqrt(2 / pi) (h + 0.044715 h^3)), the tanh form.
_SLOPE = 2 * (2 / jnp.pi) ** 0.5
_CUBIC = 0.044715
# The fastest of nine on an H200; the backward pass has half of the rows.
_ROWS, _COLUMNS, _WARPS = 32, 128, 4


def fits(hidden: int) -> bool:
    """Whether the kernels take this hidden width."""
    return hidden % _COLUMNS == 0


def _hidden(z_ref, bias_ref, rows):
    """(h, sigmoid) of this block, float32, and which of its rows exist."""
    first = pl.program_id(0) * z_ref.shape[0]
    exists = first + jax.lax.broadcasted_iota(jnp.int32, z_ref.shape, 0) < rows
    z = triton.load(z_ref.at[...], mask=exists, other=0.0).astype(jnp.float32)
    h = z + bias_ref[...][None]
    return h, 1 / (1 + jnp.exp(-_SLOPE * (h + _CUBIC * h * h * h))), exists


def _forward_kernel(z_ref, bias_ref, out_ref, *, rows):
    h, sigmoid, exists = _hidden(z_ref, bias_ref, rows)
    triton.store(out_ref.at[...], (h * sigmoid).astype(out_ref.dtype), mask=exists)


def _backward_kernel(z_ref, bias_ref, grad_ref, dz_ref, dbias_ref, *out_refs, rows):
    h, sigmoid, exists = _hidden(z_ref, bias_ref, rows)
    for out_ref in out_refs:
        triton.store(out_ref.at[...], (h * sigmoid).astype(out_ref.dtype), mask=exists)
    grad = triton.load(grad_ref.at[...], mask=exists, other=0.0).astype(jnp.float32)
    slope = _SLOPE * (1 + 3 * _CUBIC * h * h)
    dz = grad * (sigmoid + h * sigmoid * (1 - sigmoid) * slope)
    triton.store(dz_ref.at[...], dz.astype(dz_ref.dtype), mask=exists)
    dbias_ref[...] = jnp.sum(dz, axis=0)[None]


def _blocks(rows: int, hidden: int, rows_of_block: int):
    """The grid, and the specs of a (T, H), the (H,) and a (blocks of rows, H) array."""
    return (
        (pl.cdiv(rows, rows_of_block), hidden // _COLUMNS),
        pl.BlockSpec((rows_of_block, _COLUMNS), lambda i, j: (i, j)),
        pl.BlockSpec((_COLUMNS,), lambda i, j: (j,)),
        pl.BlockSpec((1, _COLUMNS), lambda i, j: (i, j)),
    )


def _options(interpret: bool) -> dict:
    return {
        "interpret": interpret,
        "compiler_params": triton.CompilerParams(num_warps=_WARPS, num_stages=1),
    }


def biased_gelu(z_TH: jax.Array, bias_H: jax.Array, *, interpret: bool = False) -> jax.Array:
    """gelu(z + bias) in its tanh form: (T, H) in z's dtype, computed in float32.

    Args:
      z_TH: matmul output; H as `fits` wants it.
      bias_H: float32.
      interpret: run on any device, slowly.
    """
    grid, table, vector, _ = _blocks(*z_TH.shape, _ROWS)
    return pl.pallas_call(
        partial(_forward_kernel, rows=z_TH.shape[0]),
        grid=grid,
        in_specs=[table, vector],
        out_specs=table,
        out_shape=jax.ShapeDtypeStruct(z_TH.shape, z_TH.dtype),
        name="biased_gelu",
        **_options(interpret),
    )(z_TH, bias_H)


def biased_gelu_grad(
    z_TH: jax.Array,
    bias_H: jax.Array,
    grad_TH: jax.Array,
    *,
    with_value: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Gradients of `biased_gelu` by z (T, H) in z's dtype and by the bias (H,) float32.

    Args:
      z_TH, bias_H, interpret: as there.
      grad_TH: the cotangent of its result.
      with_value: give the result as well, as a third array, in the same pass over z.
    """
    grid, table, vector, sums = _blocks(*z_TH.shape, _ROWS // 2)
    wide = jax.ShapeDtypeStruct(z_TH.shape, z_TH.dtype)
    parts = jax.ShapeDtypeStruct((grid[0], z_TH.shape[1]), jnp.float32)
    dz_TH, dbias, *value = pl.pallas_call(
        partial(_backward_kernel, rows=z_TH.shape[0]),
        grid=grid,
        in_specs=[table, vector, table],
        out_specs=[table, sums] + [table] * with_value,
        out_shape=[wide, parts] + [wide] * with_value,
        input_output_aliases={2: 0},  # nobody else reads grad; z may be what a layer keeps
        name="biased_gelu_grad",
        **_options(interpret),
    )(z_TH, bias_H, grad_TH)
    return dz_TH, dbias.sum(0), *value


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def feed_forward(x_TD, w1_DH, bias_H, w2_HD, interpret=False):
    """gelu(x w1 + bias) w2, the second bias left out: (T, D).

    The backward pass computes the gradients of w1 and w2, and for the latter the activations
    again, only where they are asked for, which they are not where the weights are frozen.

    Args:
      x_TD, w1_DH, w2_HD: of one dtype, in which the matmuls run.
      bias_H: float32.
      interpret: run the kernels on any device, slowly.
    """
    return biased_gelu(x_TD @ w1_DH, bias_H, interpret=interpret) @ w2_HD


class _IsTrained(NamedTuple):
    """Says by its presence among the residuals that w2 is differentiated."""


def _feed_forward_fwd(x, w1, bias, w2, interpret):
    x_TD, w1_DH, bias_H, w2_HD = (primal.value for primal in (x, w1, bias, w2))
    z_TH = x_TD @ w1_DH
    y_TD = biased_gelu(z_TH, bias_H, interpret=interpret) @ w2_HD
    input_of_w1 = x_TD if w1.perturbed else None
    return y_TD, (input_of_w1, z_TH, w1_DH, bias_H, w2_HD, _IsTrained() if w2.perturbed else None)


def _feed_forward_bwd(interpret, residuals, dy_TD):
    x_TD, z_TH, w1_DH, bias_H, w2_HD, trained = residuals
    dz_TH, dbias_H, *a_TH = biased_gelu_grad(
        z_TH, bias_H, dy_TD @ w2_HD.T, with_value=trained is not None, interpret=interpret
    )
    dw1_DH = None if x_TD is None else x_TD.T @ dz_TH
    dw2_HD = a_TH[0].T @ dy_TD if a_TH else None
    return dz_TH @ w1_DH.T, dw1_DH, dbias_H, dw2_HD


feed_forward.defvjp(_feed_forward_fwd, _feed_forward_bwd, symbolic_zeros=True)
