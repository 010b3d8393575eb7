"""The SwiGLU nonlinearity of the fast weights, its gradient and its gradient's gradient.

Letters: B batch, M fast-weight heads, S tokens of a chunk, E head width, H hidden width, G = 2H.

    h = silu(g) u,    y = w1 h,    with (g, u) = (w0 x, w2 x) side by side

What runs between the matmuls is plain JAX here and Triton kernels in `ops.swiglu_kernels`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lact_jax.ops import swiglu_kernels
from lact_jax.ops.numerics import matmul_precision

# Of (w0 x, w2 x) as (..., 2, H): which half is the gate.
_IS_GATE_21 = np.array([[True], [False]])


def einsum(equation: str, a: jax.Array, b: jax.Array, **options) -> jax.Array:
    """jnp.einsum in the precision that the operands' type asks for."""
    return jnp.einsum(equation, a, b, precision=matmul_precision(a.dtype), **options)


def _gate_and_up(gu_BMSG: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(w0 x, w2 x), upcast to float32 for the nonlinearity."""
    g_BMSH, u_BMSH = jnp.split(gu_BMSG.astype(jnp.float32), 2, axis=-1)
    return g_BMSH, u_BMSH


def _both_for_each_half(gu_BMSG: jax.Array) -> tuple[jax.Array, jax.Array]:
    """g and u as `_gate_and_up`, each twice: (B, M, S, 2, H), at every place of (g, u).

    What is computed from them for both halves is one elementwise pass over the joined array. XLA
    runs a concatenation of this size as a kernel of its own, which reads and writes all once more;
    a reversal it fuses.
    """
    own = gu_BMSG.astype(jnp.float32).reshape(*gu_BMSG.shape[:-1], 2, -1)
    other = jnp.flip(own, axis=-2)
    return jnp.where(_IS_GATE_21, own, other), jnp.where(_IS_GATE_21, other, own)


def _silu_and_derivatives(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """silu(x) = x sigmoid(x), its first and its second derivative."""
    sigmoid = jax.nn.sigmoid(x)
    slope = sigmoid * (1 + x * (1 - sigmoid))
    curvature = sigmoid * (1 - sigmoid) * (2 + x * (1 - 2 * sigmoid))
    return x * sigmoid, slope, curvature


def _plain_value_and_gradient(gu_BMSG: jax.Array, dh_BMSH: jax.Array) -> tuple[jax.Array, ...]:
    """(h, dgu): see `swiglu_kernels.value_and_gradient`, its twin."""
    g, u = _both_for_each_half(gu_BMSG)
    silu, slope, _ = _silu_and_derivatives(g)
    dh_BMS1H = dh_BMSH.astype(jnp.float32)[..., None, :]
    dgu = dh_BMS1H * jnp.where(_IS_GATE_21, u * slope, silu)
    return _swiglu(gu_BMSG), dgu.astype(gu_BMSG.dtype).reshape(gu_BMSG.shape)


def _plain_value_and_gradients(gu_BMSG: jax.Array, dh_BMSH: jax.Array) -> tuple[jax.Array, ...]:
    """(h, dg, du): see `swiglu_kernels.value_and_gradients`, its twin."""
    g, u = _gate_and_up(gu_BMSG)
    dh = dh_BMSH.astype(jnp.float32)
    silu, slope, _ = _silu_and_derivatives(g)
    return tuple(x.astype(gu_BMSG.dtype) for x in (silu * u, dh * u * slope, dh * silu))


def _plain_gradients_of_gradients(gu_BMSG, dh_BMSH, *cotangents) -> tuple[jax.Array, ...]:
    """(to_gu, to_dh): see `swiglu_kernels.gradients_of_gradients`, its twin."""
    dh, to_h, to_dg, to_du = (x.astype(jnp.float32) for x in (dh_BMSH, *cotangents))
    g, u = _gate_and_up(gu_BMSG)
    silu, slope, _ = _silu_and_derivatives(g)
    to_dh_BMSH = to_dg * u * slope + to_du * silu

    g, u = _both_for_each_half(gu_BMSG)
    dh, to_h, to_dg, to_du = (x[..., None, :] for x in (dh, to_h, to_dg, to_du))
    silu, slope, curvature = _silu_and_derivatives(g)
    to_g = to_h * u * slope + dh * (to_dg * u * curvature + to_du * slope)
    to_u = to_h * silu + dh * to_dg * slope
    to_gu = jnp.where(_IS_GATE_21, to_g, to_u).astype(gu_BMSG.dtype).reshape(gu_BMSG.shape)
    return to_gu, to_dh_BMSH.astype(dh_BMSH.dtype)


class _Passes(NamedTuple):
    """The elementwise passes between matmuls: see the functions of `swiglu_kernels`."""

    value_and_gradient: Callable
    value_and_gradients: Callable
    gradients_of_gradients: Callable


def _kernel_passes(interpret: bool) -> _Passes:
    functions = (getattr(swiglu_kernels, name) for name in _Passes._fields)
    return _Passes(*(partial(function, interpret=interpret) for function in functions))


BACKENDS = {
    "xla": _Passes(
        _plain_value_and_gradient, _plain_value_and_gradients, _plain_gradients_of_gradients
    ),
    "triton": _kernel_passes(interpret=False),
    "interpret": _kernel_passes(interpret=True),
}


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, not one of {', '.join(BACKENDS)}")


# The nonlinearity and its gradient have backward passes of their own: what they keep are matmul
# results in the inputs' dtype, not float32 intermediates, and the cotangent of both halves of
# (w0 x, w2 x) is written once, as the matmuls after it read it.


def _swiglu(gu_BMSG: jax.Array) -> jax.Array:
    """h = silu(g) u, in the dtype of (g, u): (B, M, S, H)."""
    g_BMSH, u_BMSH = _gate_and_up(gu_BMSG)
    return (jax.nn.silu(g_BMSH) * u_BMSH).astype(gu_BMSG.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def down(gu_BMSG: jax.Array, w1_BMEH: jax.Array, backend: str) -> jax.Array:
    """w1 (silu(g) u), in the dtype of (g, u) and w1: (B, M, S, E)."""
    return einsum("bmsh,bmeh->bmse", _swiglu(gu_BMSG), w1_BMEH)


def _down_fwd(gu_BMSG, w1_BMEH, backend):
    return down(gu_BMSG, w1_BMEH, backend), (gu_BMSG, w1_BMEH)


def _down_bwd(backend, residuals, dy_BMSE):
    gu_BMSG, w1_BMEH = residuals
    if backend != "xla":
        # XLA joins the matmuls of streams that read the same weights, and a kernel can't read its
        # part of the result before that is copied. So these weights are not seen to be the same.
        gu_BMSG, w1_BMEH = jax.lax.optimization_barrier((gu_BMSG, w1_BMEH))
    dh_BMSH = einsum("bmse,bmeh->bmsh", dy_BMSE, w1_BMEH)
    h_BMSH, dgu_BMSG = BACKENDS[backend].value_and_gradient(gu_BMSG, dh_BMSH)
    return dgu_BMSG, einsum("bmse,bmsh->bmeh", dy_BMSE, h_BMSH)


down.defvjp(_down_fwd, _down_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def swiglu_gradient(gu_BMSG, dh_BMSH, backend: str) -> tuple[jax.Array, ...]:
    """(h, dg, du) from (g, u) and dh, all in their dtype: h = silu(g) u, dg = dh u silu'(g),
    du = dh silu(g)."""
    return BACKENDS[backend].value_and_gradients(gu_BMSG, dh_BMSH)


def _swiglu_gradient_fwd(gu_BMSG, dh_BMSH, backend):
    return swiglu_gradient(gu_BMSG, dh_BMSH, backend), (gu_BMSG, dh_BMSH)


def _swiglu_gradient_bwd(backend, residuals, cotangents):
    return BACKENDS[backend].gradients_of_gradients(*residuals, *cotangents)


swiglu_gradient.defvjp(_swiglu_gradient_fwd, _swiglu_gradient_bwd)
