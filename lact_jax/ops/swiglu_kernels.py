"""The elementwise passes between the fast-weight matmuls as Triton kernels.

Letters: T tokens (of any batch, chunk and head), H hidden width, G = 2H, "..." the axes of T.

    h = silu(g) u,    dg = dh u silu'(g),    du = dh silu(g)

The fast weights pass `gu`, which holds g beside u, through this once to be updated and once to be
read, and through its gradients. All of it is bound by memory. XLA writes every result in a pass of
its own, which reads the inputs again; here each number is read and written once. The plain forms
are in `ops.swiglu`, and the tests hold both to each other.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# A thread holds 8 numbers of each array, a load of 16 bytes. With 16 it would need registers that
# leave fewer threads to wait for memory: the gradients of gradients hold six arrays.
_ROWS, _COLUMNS, _WARPS = 8, 256, 8

# Arrays that hold both halves, as gu does. A block has the same columns of each.
_PAIRS = ("gu", "dgu", "to_gu")
_HALVES = np.arange(2, dtype=np.int32)  # the interpreter takes no Python numbers as indices


def fits(hidden: int) -> bool:
    """Whether the kernels take this hidden width."""
    return hidden % _COLUMNS == 0


def value_and_gradient(gu: jax.Array, dh: jax.Array, *, interpret: bool = False):
    """(h, dgu) from gu (..., G) and dh (..., H), in their dtype; dgu (..., G) is dg beside du.

    Args:
      gu, dh: of one dtype; H as `fits` wants it.
      interpret: run on any device, slowly.
    """
    arrays = {"gu": gu, "dh": dh}
    return _run("swiglu_grad", _joined_kernel, arrays, ("h", "dgu"), interpret)


def value_and_gradients(gu: jax.Array, dh: jax.Array, *, interpret: bool = False):
    """(h, dg, du) from gu (..., G) and dh (..., H), each (..., H) in their dtype.

    Args:
      gu, dh: of one dtype; H as `fits` wants it.
      interpret: run on any device, slowly.
    """
    arrays = {"gu": gu, "dh": dh}
    return _run("swiglu_update", _apart_kernel, arrays, ("h", "dg", "du"), interpret)


def gradients_of_gradients(
    gu: jax.Array,
    dh: jax.Array,
    to_h: jax.Array,
    to_dg: jax.Array,
    to_du: jax.Array,
    *,
    interpret: bool = False,
):
    """Cotangents of gu (..., G) and dh (..., H) from those of `value_and_gradients`, in gu's dtype.

    Args:
      gu, dh: what `value_and_gradients` took.
      to_h, to_dg, to_du: cotangents (..., H) of what it gave.
      interpret: run on any device, slowly.
    """
    arrays = {"gu": gu, "dh": dh, "to_h": to_h, "to_dg": to_dg, "to_du": to_du}
    return _run("swiglu_update_grad", _second_kernel, arrays, ("to_gu", "to_dh"), interpret)


def _run(name: str, kernel, arrays: dict, out: tuple[str, ...], interpret: bool) -> tuple:
    """Runs `kernel` over all blocks of tokens and columns.

    Args:
      name: what profiles call it.
      kernel: takes inputs and outputs by name, and the number of tokens.
      arrays: inputs by name.
      out: names of outputs.
      interpret: run on any device, slowly.

    Returns:
      The outputs, in the order of their names.
    """
    gu = arrays["gu"]
    leading, hidden = gu.shape[:-1], gu.shape[-1] // 2
    rows = math.prod(leading)

    def halves(name: str) -> tuple[int, ...]:
        return (2,) if name in _PAIRS else ()

    def spec(name: str) -> pl.BlockSpec:
        if name in _PAIRS:
            return pl.BlockSpec((_ROWS, 2, _COLUMNS), lambda i, j: (i, 0, j))
        return pl.BlockSpec((_ROWS, _COLUMNS), lambda i, j: (i, j))

    call = pl.pallas_call(
        partial(kernel, rows=rows),
        out_shape={
            name: jax.ShapeDtypeStruct((rows, *halves(name), hidden), gu.dtype) for name in out
        },
        grid=(pl.cdiv(rows, _ROWS), hidden // _COLUMNS),
        in_specs=[{name: spec(name) for name in arrays}],
        out_specs={name: spec(name) for name in out},
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name=name,
    )
    result = call({name: x.reshape(rows, *halves(name), hidden) for name, x in arrays.items()})
    return tuple(result[name].reshape(*leading, -1) for name in out)


# The kernels. The last blocks of tokens may have fewer rows than the others.


def _exists(rows: int) -> jax.Array:
    """Which elements of this program's blocks are within the arrays."""
    first = pl.program_id(0) * _ROWS
    return first + jax.lax.broadcasted_iota(jnp.int32, (_ROWS, _COLUMNS), 0) < rows


def _load(ref, exists: jax.Array) -> jax.Array:
    return triton.load(ref, mask=exists, other=0.0).astype(jnp.float32)


def _store(ref, value: jax.Array, exists: jax.Array) -> None:
    triton.store(ref, value.astype(ref.dtype), mask=exists)


def _load_with_sigmoid(refs: dict, exists: jax.Array) -> tuple[jax.Array, ...]:
    """(g, u, dh, sigmoid(g))."""
    g, u = (_load(refs["gu"].at[:, half, :], exists) for half in _HALVES)
    return g, u, _load(refs["dh"].at[...], exists), 1 / (1 + jnp.exp(-g))


def _first_order(refs: dict, exists: jax.Array) -> tuple[jax.Array, ...]:
    """(h, dg, du)."""
    g, u, dh, sigmoid = _load_with_sigmoid(refs, exists)
    silu, slope = g * sigmoid, sigmoid * (1 + g * (1 - sigmoid))
    return silu * u, dh * u * slope, dh * silu


def _apart_kernel(refs, out, *, rows):
    exists = _exists(rows)
    for name, value in zip(("h", "dg", "du"), _first_order(refs, exists), strict=True):
        _store(out[name].at[...], value, exists)


def _joined_kernel(refs, out, *, rows):
    exists = _exists(rows)
    h, *pair = _first_order(refs, exists)
    _store(out["h"].at[...], h, exists)
    for half, value in zip(_HALVES, pair, strict=True):
        _store(out["dgu"].at[:, half, :], value, exists)


def _second_kernel(refs, out, *, rows):
    exists = _exists(rows)
    g, u, dh, sigmoid = _load_with_sigmoid(refs, exists)
    to_h, to_dg, to_du = (_load(refs[name].at[...], exists) for name in ("to_h", "to_dg", "to_du"))
    silu, slope = g * sigmoid, sigmoid * (1 + g * (1 - sigmoid))
    curvature = sigmoid * (1 - sigmoid) * (2 + g * (1 - 2 * sigmoid))
    to_g = to_h * u * slope + dh * (to_dg * u * curvature + to_du * slope)
    to_u = to_h * silu + dh * to_dg * slope
    for half, value in zip(_HALVES, (to_g, to_u), strict=True):
        _store(out["to_gu"].at[:, half, :], value, exists)
    _store(out["to_dh"].at[...], to_dg * u * slope + to_du * silu, exists)
