"""A block's residual sum, LayerNorm and modulation as one operation, and its fused GPU kernels.

    x_new = x + gate * (y + bias),    h = LN(x_new) * scale + shift     (REFERENCE.md 2)

The float32 residual stream is the widest array of a layer, and XLA reads it again for every
reduction. The kernels hold a row in registers instead: the forward pass reads x and y and writes
x_new and h, the backward pass reads the cotangents, x_new and y and writes dx and dy, each once.
The bias is that of the projection that made y, which would else take a pass of its own to be added,
and one more for its gradient.

Letters: B batch, C chunks, N = B C, S tokens of a chunk, D width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton

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
    **dict.fromkeys(("x", "y", "h", "dx", "dy", "dh"), Part.ROWS),
    **dict.fromkeys(("mean", "rstd"), Part.STATISTICS),
    **dict.fromkeys(("gate", "offset", "scale", "shift"), Part.VECTOR),
    **dict.fromkeys(("dgate", "doffset", "dscale", "dshift"), Part.SUMS),
}


def add_norm(
    x_BCSD: jax.Array,
    y_BCSD: jax.Array | None,
    bias_D: jax.Array | None,
    gate_BCD: jax.Array | None,
    scale_BCD: jax.Array,
    shift_BCD: jax.Array,
    *,
    eps: float,
    dtype,
    backend: str,
) -> tuple[jax.Array, jax.Array]:
    """Adds a branch's output to the residual stream, and normalises and modulates the sum.

    Args:
      x_BCSD: float32 residual stream.
      y_BCSD: what is added to it, in any float type; None adds nothing.
      bias_D: float32 bias of y; None for 0.
      gate_BCD: float32 factor of y and its bias for every chunk; None for 1.
      scale_BCD, shift_BCD: float32 factor and offset of the normalised sum for every chunk. B and C
        of these and of the gate may be 1: one for all.
      eps: added to the variance.
      dtype: of h.
      backend: one of BACKENDS, see `kernels.choose_backend`.

    Returns:
      x + gate * (y + bias) in float32 (x itself where y is None), and h (B, C, S, D) in `dtype`.
      LayerNorm has no affine part of its own; its statistics are taken in float32.

    Raises:
      ValueError: for a backend, shapes or types that don't fit.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, not one of {', '.join(BACKENDS)}")
    arrays = x_BCSD, y_BCSD, bias_D, gate_BCD, scale_BCD, shift_BCD
    _check(*arrays)
    return BACKENDS[backend](*arrays, eps, dtype)


def _check(x_BCSD, y_BCSD, bias_D, gate_BCD, scale_BCD, shift_BCD) -> None:
    if x_BCSD.ndim != 4 or x_BCSD.dtype != jnp.float32:
        raise ValueError(
            f"the residual stream is {x_BCSD.dtype}{x_BCSD.shape}; add_norm takes float32 "
            "(B, C, S, D)"
        )
    for name, value in (("gate", gate_BCD), ("bias", bias_D)):
        if y_BCSD is None and value is not None:
            raise ValueError(f"add_norm got a {name} without the y that it is for: leave out both")
    if y_BCSD is not None and y_BCSD.shape != x_BCSD.shape:
        raise ValueError(f"y is {y_BCSD.shape}, the residual stream {x_BCSD.shape}")
    batch, chunks, _, width = x_BCSD.shape
    if bias_D is not None and (bias_D.shape != (width,) or bias_D.dtype != jnp.float32):
        raise ValueError(f"bias is {bias_D.dtype}{bias_D.shape}; it has to be float32({width},)")
    for name, value in (("gate", gate_BCD), ("scale", scale_BCD), ("shift", shift_BCD)):
        if value is None:
            continue
        fits = value.ndim == 3 and all(
            got in (1, want) for got, want in zip(value.shape[:2], (batch, chunks), strict=True)
        )
        if not fits or value.shape[2] != width or value.dtype != jnp.float32:
            raise ValueError(
                f"{name} is {value.dtype}{value.shape}; a stream of {x_BCSD.shape} takes float32 "
                f"({batch} or 1, {chunks} or 1, {width})"
            )


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """LayerNorm over the last axis without an affine part, in float32."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + eps)


def add_branch(x_BCSD, y_BCSD, bias_D, gate_BCD) -> jax.Array:
    """x + gate * (y + bias) in float32, arguments as in `add_norm`."""
    y = y_BCSD.astype(jnp.float32)
    if gate_BCD is not None:
        y = gate_BCD[:, :, None] * y
    offset = _offset(bias_D, gate_BCD)
    return x_BCSD + (y if offset is None else y + offset[:, :, None])


def _offset(bias_D, gate_BCD) -> jax.Array | None:
    """gate * bias, what a chunk's tokens have of the bias: so the gradients of both by it take no
    more than the sum of a cotangent over tokens. (B, C, D), or (1, 1, D) without a gate."""
    if bias_D is None:
        return None
    return bias_D[None, None] if gate_BCD is None else gate_BCD * bias_D


def _plain(x_BCSD, y_BCSD, bias_D, gate_BCD, scale_BCD, shift_BCD, eps, dtype):
    """The operation as written above, differentiated by JAX."""
    if y_BCSD is not None:
        x_BCSD = add_branch(x_BCSD, y_BCSD, bias_D, gate_BCD)
    h = layer_norm(x_BCSD, eps) * scale_BCD[:, :, None] + shift_BCD[:, :, None]
    return x_BCSD, h.astype(dtype)


def _fused(x_BCSD, y_BCSD, bias_D, gate_BCD, scale_BCD, shift_BCD, eps, dtype, *, interpret):
    options = KernelOptions(float(eps), jnp.dtype(dtype), interpret=interpret)
    return add_norm_kernel(x_BCSD, y_BCSD, bias_D, gate_BCD, scale_BCD, shift_BCD, options)


BACKENDS = {
    "triton": partial(_fused, interpret=False),
    "interpret": partial(_fused, interpret=True),
    "xla": _plain,
}


def add_norm_kernel(x_BCSD, y_BCSD, bias_D, gate_BCD, scale_BCD, shift_BCD, options: KernelOptions):
    """`add_norm` by the kernels, arguments unchecked."""
    batch, chunks, tokens, width = x_BCSD.shape

    def for_every_chunk(value):
        if value is None:
            return None
        return jnp.broadcast_to(value, (batch, chunks, width)).reshape(-1, width)

    vectors = gate_BCD, _offset(bias_D, gate_BCD), scale_BCD, shift_BCD
    x_NSD, h_NSD = _add_norm(
        x_BCSD.reshape(-1, tokens, width),
        None if y_BCSD is None else y_BCSD.reshape(-1, tokens, width),
        *map(for_every_chunk, vectors),
        options,
    )
    return x_NSD.reshape(x_BCSD.shape), h_NSD.reshape(x_BCSD.shape)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _add_norm(x_NSD, y_NSD, gate_ND, offset_ND, scale_ND, shift_ND, options):
    return _add_norm_fwd(x_NSD, y_NSD, gate_ND, offset_ND, scale_ND, shift_ND, options)[0]


def _add_norm_fwd(x_NSD, y_NSD, gate_ND, offset_ND, scale_ND, shift_ND, options):
    vectors = {"gate": gate_ND, "offset": offset_ND, "scale": scale_ND, "shift": shift_ND}
    shape, rows = x_NSD.shape, x_NSD.shape[:2]
    out = {"h": (shape, options.dtype), "mean": (rows, jnp.float32), "rstd": (rows, jnp.float32)}
    if y_NSD is not None:
        out["x"] = (shape, jnp.float32)
    kernel = partial(_forward_kernel, eps=options.eps)
    arrays = {"x": x_NSD, "y": y_NSD} | vectors
    out = run_rows(
        kernel, arrays, out, _PARTS, shape, options, program=FORWARD, name="add_norm"
    )  # fmt: skip
    x_NSD = out.get("x", x_NSD)
    kept = {"x": x_NSD, "scale": scale_ND, "mean": out["mean"], "rstd": out["rstd"]}
    if gate_ND is not None:
        kept |= {"y": y_NSD, "gate": gate_ND}
    like_y = None if y_NSD is None else jnp.zeros((), y_NSD.dtype)
    has_offset = None if offset_ND is None else jnp.zeros(())
    return (x_NSD, out["h"]), (kept, like_y, has_offset)


def _add_norm_bwd(options, residuals, cotangents):
    kept, like_y, has_offset = residuals
    dx_NSD, dh_NSD = cotangents
    shape = kept["x"].shape
    sums = ["dscale", "dshift"]
    sums += ["dgate"] if "gate" in kept else []
    sums += ["doffset"] if has_offset is not None else []
    out = {name: (sums_shape(shape, options), jnp.float32) for name in sums}
    out["dx"] = (shape, jnp.float32)
    if like_y is not None and ("gate" in kept or like_y.dtype != jnp.float32):
        out["dy"] = (shape, like_y.dtype)
    arrays = kept | {"dx": dx_NSD, "dh": dh_NSD}
    out = run_rows(
        _backward_kernel, arrays, out, _PARTS, shape, options, program=BACKWARD,
        name="add_norm_grad",
    )  # fmt: skip
    dy_NSD = None if like_y is None else out.get("dy", out["dx"])
    dvectors = {name: jnp.sum(out[name], axis=1) for name in sums}
    names = "dgate", "doffset", "dscale", "dshift"
    return out["dx"], dy_NSD, *map(dvectors.get, names)


_add_norm.defvjp(_add_norm_fwd, _add_norm_bwd)


# The kernels.


def _forward_kernel(refs, out, *, rows, shape, lanes, eps):
    """x = x + gate y + offset, h = (x - mean) rstd scale + shift, and each row's statistics."""
    _, tokens, width = shape
    row = Row(width, lanes)
    gate, scale = load_vectors(row, refs, "gate", "scale")

    def body(r, carry):
        """Row r, from its loads to its stores; nothing is carried."""
        # Two vectors are read for every row, from cache: registers for them would be taken from
        # other programs.
        offset, shift = load_vectors(row, refs, "offset", "shift")
        x = row.load(refs["x"], r)
        if "y" in refs:
            y = row.load(refs["y"], r)
            y = y if gate is None else _each(jnp.multiply, gate, y)
            y = y if offset is None else _each(jnp.add, y, offset)
            x = _each(jnp.add, x, y)
            row.store(x, out["x"], r)
        mean = row.mean(x)
        centred = row.inside(_each(lambda x: x - mean, x))
        rstd = jax.lax.rsqrt(row.mean(_each(jnp.square, centred)) + eps)
        h = _each(lambda c, scale, shift: c * rstd * scale + shift, centred, scale, shift)
        row.store(h, out["h"], r)
        triton.store(out["mean"].at[r], mean)
        triton.store(out["rstd"].at[r], rstd)
        return carry

    for_own_rows(rows, tokens, body, None)


def _backward_kernel(refs, out, *, rows, shape, lanes):
    """dx and dy, and this run's sums of the gradients of scale, shift, gate and offset.

    Among the inputs, x is the sum that the forward pass wrote, and dx its cotangent.
    """
    _, tokens, width = shape
    row = Row(width, lanes)
    gate, scale = load_vectors(row, refs, "gate", "scale")

    def body(r, sums):
        """Row r, from its loads to its stores; its terms are added to the sums."""
        # All loads come before the first reduction, which waits for the whole row: what comes after
        # it would wait for memory a second time.
        mean, rstd = (triton.load(refs[name].at[r]) for name in ("mean", "rstd"))
        dh, x, dx = (row.load(refs[name], r) for name in ("dh", "x", "dx"))
        y = None if gate is None else row.load(refs["y"], r)
        normed = _each(lambda x: (x - mean) * rstd, x)
        to_normed = _each(jnp.multiply, dh, scale)
        shifted = row.mean(to_normed)
        scaled = row.mean(_each(jnp.multiply, to_normed, normed))
        dx = _each(lambda dx, to, n: dx + (to - shifted - n * scaled) * rstd, dx, to_normed, normed)
        row.store(dx, out["dx"], r)
        if "dy" in out:
            dy = dx if gate is None else _each(jnp.multiply, dx, gate)
            row.store(dy, out["dy"], r)
        terms = {"dscale": _each(jnp.multiply, dh, normed), "dshift": dh}
        if gate is not None:
            terms["dgate"] = _each(jnp.multiply, dx, y)
        if "doffset" in out:
            terms["doffset"] = dx
        return _each(jnp.add, sums, terms)

    zeros = _each(jnp.zeros_like, scale)
    sums = {name: zeros for name in ("dscale", "dshift", "dgate", "doffset") if name in out}
    for name, total in for_own_rows(rows, tokens, body, sums).items():
        row.store(total, out[name])
