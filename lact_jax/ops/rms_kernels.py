"""A projection's bias and the RMSNorm after it as one operation, and its fused GPU kernels.

    n = x / rms(x) * scale,    x = z + bias,    z the matmul's output

XLA takes a pass to add the bias, one for the mean square and one for the norm; here the forward
pass reads z once, and the backward pass z and the cotangent. The plain form is
`models.layers.RMSNorm` of a Linear, and the tests hold both to each other.

Letters: T tokens, D width.
"""

from functools import partial

import jax
import jax.numpy as jnp

from lact_jax.ops.row_kernels import (
    BACKWARD,
    FORWARD,
    KernelOptions,
    Part,
    Row,
    for_own_rows,
    load_vectors,
    run_rows,
    sums_shape,
)

_each = jax.tree.map
_PARTS = {
    **dict.fromkeys(("z", "n", "dz", "dn"), Part.ROWS),
    **dict.fromkeys(("bias", "scale"), Part.VECTOR),
    **dict.fromkeys(("dbias", "dscale"), Part.SUMS),
}


def biased_rms_norm(
    z: jax.Array, bias_D: jax.Array, scale_D: jax.Array, options: KernelOptions
) -> jax.Array:
    """RMSNorm(z + bias), computed in float32.

    Args:
      z: a matmul's output (..., D), D as `row_kernels.fits` wants it.
      bias_D, scale_D: float32.
      options: see `KernelOptions`.

    Returns:
      An array shaped like z, in `options.dtype`.
    """
    return _biased_rms_norm(z.reshape(-1, z.shape[-1]), bias_D, scale_D, options).reshape(z.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _biased_rms_norm(z_TD, bias_D, scale_D, options):
    return _forward(z_TD, bias_D, scale_D, options)[0]


def _forward(z_TD, bias_D, scale_D, options):
    out = {"n": ((1, *z_TD.shape), options.dtype)}
    residuals = z_TD, bias_D, scale_D
    out = _run(_forward_kernel, *residuals, {}, out, options, program=FORWARD, name="rms_norm")
    return out["n"][0], residuals


def _backward(options, residuals, dn_TD):
    z_TD = residuals[0]
    sums = sums_shape((1, *z_TD.shape), options), jnp.float32
    out = {"dz": ((1, *z_TD.shape), z_TD.dtype), "dbias": sums, "dscale": sums}
    others = {"dn": dn_TD[None]}
    out = _run(
        _backward_kernel, *residuals, others, out, options, program=BACKWARD, name="rms_norm_grad"
    )
    return out["dz"][0], *(jnp.sum(out[name], axis=(0, 1)) for name in ("dbias", "dscale"))


_biased_rms_norm.defvjp(_forward, _backward)


def _run(kernel, z_TD, bias_D, scale_D, others: dict, out: dict, options, **how) -> dict:
    """Runs a kernel over all tokens as one chunk; its outputs by name."""
    arrays = {"z": z_TD[None], "bias": bias_D[None], "scale": scale_D[None]} | others
    kernel = partial(kernel, eps=options.eps)
    return run_rows(kernel, arrays, out, _PARTS, (1, *z_TD.shape), options, **how)


def _forward_kernel(refs, out, *, rows, shape, lanes, eps):
    _, tokens, width = shape
    row = Row(width, lanes)
    bias, scale = load_vectors(row, refs, "bias", "scale")

    def body(r, carry):
        """Row r, from its load to its store; nothing is carried."""
        x = _each(jnp.add, row.load(refs["z"], r), bias)
        rrms = jax.lax.rsqrt(row.mean(_each(jnp.square, x)) + eps)
        row.store(_each(lambda x, scale: x * rrms * scale, x, scale), out["n"], r)
        return carry

    for_own_rows(rows, tokens, body, None)


def _backward_kernel(refs, out, *, rows, shape, lanes, eps):
    """dz, and this run's sums of the gradients of bias and scale."""
    _, tokens, width = shape
    row = Row(width, lanes)
    bias, scale = load_vectors(row, refs, "bias", "scale")

    def body(r, sums):
        """Row r, from its loads to its store; its terms are added to the sums."""
        z, dn = (row.load(refs[name], r) for name in ("z", "dn"))
        x, to_normed = _each(jnp.add, z, bias), _each(jnp.multiply, dn, scale)
        # Neither mean waits for the other.
        rrms = jax.lax.rsqrt(row.mean(_each(jnp.square, x)) + eps)
        along = row.mean(_each(jnp.multiply, to_normed, x)) * rrms
        normed = _each(lambda x: x * rrms, x)
        dz = _each(lambda to, n: (to - n * along) * rrms, to_normed, normed)
        row.store(dz, out["dz"], r)
        return _each(jnp.add, sums, {"dbias": dz, "dscale": _each(jnp.multiply, dn, normed)})

    zeros = _each(jnp.zeros_like, scale)
    sums = for_own_rows(rows, tokens, body, {"dbias": zeros, "dscale": zeros})
    for name, total in sums.items():
        row.store(total, out[name])
