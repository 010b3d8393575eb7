"""A block's residual sum, LayerNorm and modulation as one operation, and its fused GPU kernels.

    x_new = x + gate * y,    h = LN(x_new) * scale + shift              (REFERENCE.md 2)

The float32 residual stream is the widest array of a layer, and XLA reads it again for every
reduction. The kernels hold a row in registers instead: the forward pass reads x and y and writes
x_new and h, the backward pass reads the cotangents, x_new and y and writes dx and dy, each once.

Letters: B batch, C chunks, N = B C, S tokens of a chunk, D width.
"""

from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Rows that one program runs over, one at a time. The backward pass writes one sum a program: with
# 40 these are 4 % of its bytes, and 4680 tokens are 117 programs a chunk.
ROWS = 40
WARP_THREADS = 32
PIECE_PER_THREAD = 4
# Of each array a thread holds at most so many numbers of a row: more would not fit its registers,
# nor would a row that takes more than 16 warps.
ROW_PER_THREAD = 16
MIN_WIDTH = 256
MAX_WIDTH = 16 * WARP_THREADS * ROW_PER_THREAD

_each = jax.tree.map


def fits(width: int) -> bool:
    """Whether the kernels take rows of this width D and gain by it: loads of 16 bytes need rows
    that begin at multiples of them."""
    return MIN_WIDTH <= width <= MAX_WIDTH and width % 8 == 0


def add_norm(
    x_BCSD: jax.Array,
    y_BCSD: jax.Array | None,
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
      gate_BCD: float32 factor of y for every chunk; None for 1.
      scale_BCD, shift_BCD: float32 factor and offset of the normalised sum for every chunk. B and C
        of these and of the gate may be 1: one for all.
      eps: added to the variance.
      dtype: of h.
      backend: one of BACKENDS, see `kernels.choose_backend`.

    Returns:
      x + gate * y in float32 (x itself where y is None), and h (B, C, S, D) in `dtype`. LayerNorm
      has no affine part of its own; its statistics are taken in float32.

    Raises:
      ValueError: for a backend, shapes or types that don't fit.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, not one of {', '.join(BACKENDS)}")
    _check(x_BCSD, y_BCSD, gate_BCD, scale_BCD, shift_BCD)
    return BACKENDS[backend](x_BCSD, y_BCSD, gate_BCD, scale_BCD, shift_BCD, eps, dtype)


def _check(x_BCSD, y_BCSD, gate_BCD, scale_BCD, shift_BCD) -> None:
    if x_BCSD.ndim != 4 or x_BCSD.dtype != jnp.float32:
        raise ValueError(
            f"the residual stream is {x_BCSD.dtype}{x_BCSD.shape}; add_norm takes float32 "
            "(B, C, S, D)"
        )
    if y_BCSD is None and gate_BCD is not None:
        raise ValueError("add_norm got a gate without the y that it multiplies: leave out both")
    if y_BCSD is not None and y_BCSD.shape != x_BCSD.shape:
        raise ValueError(f"y is {y_BCSD.shape}, the residual stream {x_BCSD.shape}")
    batch, chunks, _, width = x_BCSD.shape
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


def _plain(x_BCSD, y_BCSD, gate_BCD, scale_BCD, shift_BCD, eps, dtype):
    """The operation as written above, differentiated by JAX."""
    if y_BCSD is not None:
        y = y_BCSD.astype(jnp.float32)
        x_BCSD = x_BCSD + (y if gate_BCD is None else gate_BCD[:, :, None] * y)
    h = layer_norm(x_BCSD, eps) * scale_BCD[:, :, None] + shift_BCD[:, :, None]
    return x_BCSD, h.astype(dtype)


@dataclass(frozen=True)
class KernelOptions:
    """How the kernels run; `interpret` runs them as plain JAX, on any device."""

    eps: float
    dtype: jnp.dtype
    rows: int = ROWS
    num_warps: int | None = None
    interpret: bool = False


def _fused(x_BCSD, y_BCSD, gate_BCD, scale_BCD, shift_BCD, eps, dtype, *, interpret):
    options = KernelOptions(float(eps), jnp.dtype(dtype), interpret=interpret)
    return add_norm_kernel(x_BCSD, y_BCSD, gate_BCD, scale_BCD, shift_BCD, options)


BACKENDS = {
    "triton": partial(_fused, interpret=False),
    "interpret": partial(_fused, interpret=True),
    "xla": _plain,
}


def add_norm_kernel(x_BCSD, y_BCSD, gate_BCD, scale_BCD, shift_BCD, options: KernelOptions):
    """`add_norm` by the kernels, arguments unchecked."""
    batch, chunks, tokens, width = x_BCSD.shape

    def for_every_chunk(value):
        if value is None:
            return None
        return jnp.broadcast_to(value, (batch, chunks, width)).reshape(-1, width)

    x_NSD, h_NSD = _add_norm(
        x_BCSD.reshape(-1, tokens, width),
        None if y_BCSD is None else y_BCSD.reshape(-1, tokens, width),
        *map(for_every_chunk, (gate_BCD, scale_BCD, shift_BCD)),
        options,
    )
    return x_NSD.reshape(x_BCSD.shape), h_NSD.reshape(x_BCSD.shape)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _add_norm(x_NSD, y_NSD, gate_ND, scale_ND, shift_ND, options):
    return _add_norm_fwd(x_NSD, y_NSD, gate_ND, scale_ND, shift_ND, options)[0]


def _add_norm_fwd(x_NSD, y_NSD, gate_ND, scale_ND, shift_ND, options):
    arrays = {"x": x_NSD, "y": y_NSD, "gate": gate_ND, "scale": scale_ND, "shift": shift_ND}
    shape, rows = x_NSD.shape, x_NSD.shape[:2]
    out = {"h": (shape, options.dtype), "mean": (rows, jnp.float32), "rstd": (rows, jnp.float32)}
    if y_NSD is not None:
        out["x"] = (shape, jnp.float32)
    kernel = partial(_forward_kernel, eps=options.eps)
    out = _run("add_norm", kernel, arrays, out, shape, options)
    x_NSD = out.get("x", x_NSD)
    kept = {"x": x_NSD, "scale": scale_ND, "mean": out["mean"], "rstd": out["rstd"]}
    if gate_ND is not None:
        kept |= {"y": y_NSD, "gate": gate_ND}
    like_y = None if y_NSD is None else jnp.zeros((), y_NSD.dtype)
    return (x_NSD, out["h"]), (kept, like_y)


def _add_norm_bwd(options, residuals, cotangents):
    kept, like_y = residuals
    dx_NSD, dh_NSD = cotangents
    shape = kept["x"].shape
    runs = pl.cdiv(shape[1], _rows_of_run(shape[1], options))
    sums = ("dscale", "dshift", "dgate") if "gate" in kept else ("dscale", "dshift")
    out = {name: ((shape[0], runs, shape[2]), jnp.float32) for name in sums}
    out["dx"] = (shape, jnp.float32)
    if like_y is not None and ("gate" in kept or like_y.dtype != jnp.float32):
        out["dy"] = (shape, like_y.dtype)
    arrays = kept | {"dx": dx_NSD, "dh": dh_NSD}
    out = _run("add_norm_grad", _backward_kernel, arrays, out, shape, options)
    dy_NSD = None if like_y is None else out.get("dy", out["dx"])
    dvectors = {name: jnp.sum(out[name], axis=1) for name in sums}
    return out["dx"], dy_NSD, dvectors.get("dgate"), dvectors["dscale"], dvectors["dshift"]


_add_norm.defvjp(_add_norm_fwd, _add_norm_bwd)


# The kernels. A program has a run of rows of one chunk, and goes through them one at a time. A row
# is a tuple of pieces: Triton takes only powers of two, and a piece of four numbers a thread has
# the same layout in registers whatever its type, so that no row is exchanged between threads.

_ROWS, _STATISTICS, _VECTOR, _SUMS = "rows", "statistics", "vector", "sums"
_BLOCKS = {
    **dict.fromkeys(("x", "y", "h", "dx", "dy", "dh"), _ROWS),
    **dict.fromkeys(("mean", "rstd"), _STATISTICS),
    **dict.fromkeys(("gate", "scale", "shift"), _VECTOR),
    **dict.fromkeys(("dgate", "dscale", "dshift"), _SUMS),
}


def _rows_of_run(tokens: int, options: KernelOptions) -> int:
    return min(options.rows, tokens)


def _num_warps(width: int) -> int:
    return pl.next_power_of_2(pl.cdiv(width, ROW_PER_THREAD * WARP_THREADS))


def _run(name: str, kernel, arrays: dict, out: dict, shape: tuple, options: KernelOptions) -> dict:
    """Runs `kernel` over all runs of rows of all chunks.

    Args:
      name: what profiles call it.
      kernel: `_forward_kernel` or `_backward_kernel`.
      arrays, out: inputs, and shape and dtype of outputs, by their names in `_BLOCKS`. Inputs that
        are None are left out.
      shape: (N, S, D).
      options: see `KernelOptions`.

    Returns:
      The outputs by name.
    """
    chunks, tokens, width = shape
    rows, num_warps = _rows_of_run(tokens, options), options.num_warps or _num_warps(width)
    lanes = PIECE_PER_THREAD * WARP_THREADS * num_warps
    padded = pl.cdiv(width, lanes) * lanes
    specs = {
        _ROWS: pl.BlockSpec((None, rows, padded), lambda n, i: (n, i, 0)),
        _STATISTICS: pl.BlockSpec((None, rows), lambda n, i: (n, i)),
        _VECTOR: pl.BlockSpec((None, padded), lambda n, i: (n, 0)),
        _SUMS: pl.BlockSpec((None, None, padded), lambda n, i: (n, i, 0)),
    }
    arrays = {name: array for name, array in arrays.items() if array is not None}
    call = pl.pallas_call(
        partial(kernel, rows=rows, shape=shape, lanes=lanes),
        out_shape={name: jax.ShapeDtypeStruct(*what) for name, what in out.items()},
        grid=(chunks, pl.cdiv(tokens, rows)),
        in_specs=[{name: specs[_BLOCKS[name]] for name in arrays}],
        out_specs={name: specs[_BLOCKS[name]] for name in out},
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=options.interpret,
        name=name,
    )
    return call(arrays)


@dataclass(frozen=True)
class _Row:
    """How a row of `width` numbers is cut into pieces of `lanes`."""

    width: int
    lanes: int

    def _pieces(self):
        """Where each piece is, and which of its lanes are within the width: None for all."""
        for start in range(0, self.width, self.lanes):
            left = self.width - start
            lane = jnp.arange(self.lanes, dtype=jnp.int32)
            yield pl.ds(start, self.lanes), lane < left if left < self.lanes else None

    def load(self, ref, *index) -> tuple[jax.Array, ...]:
        """The pieces in float32, with zeros beyond the width."""
        return tuple(
            triton.load(
                ref.at[*index, piece], mask=mask, other=None if mask is None else 0.0
            ).astype(jnp.float32)
            for piece, mask in self._pieces()
        )

    def store(self, row, ref, *index) -> None:
        """Stores a row in the type of `ref`."""
        for value, (piece, mask) in zip(row, self._pieces(), strict=True):
            triton.store(ref.at[*index, piece], value.astype(ref.dtype), mask=mask)

    def mean(self, row) -> jax.Array:
        """Mean over the width of a row that is zero beyond."""
        return jnp.sum(reduce(jnp.add, row)) / self.width

    def inside(self, row) -> tuple[jax.Array, ...]:
        """The row, with zeros beyond the width."""
        return tuple(
            value if mask is None else jnp.where(mask, value, 0.0)
            for value, (_, mask) in zip(row, self._pieces(), strict=True)
        )


def _load_vectors(row: _Row, refs: dict, *names: str) -> list[tuple[jax.Array, ...] | None]:
    return [row.load(refs[name]) if name in refs else None for name in names]


def _for_own_rows(rows: int, tokens: int, body, carry):
    """Runs body(row of the block, carry) -> carry over those of this program that there are."""
    first = pl.program_id(1) * rows
    return jax.lax.fori_loop(0, jnp.minimum(rows, tokens - first), body, carry)


def _forward_kernel(refs, out, *, rows, shape, lanes, eps):
    """x = x + gate y, h = (x - mean) rstd scale + shift, and the statistics of each row."""
    _, tokens, width = shape
    row = _Row(width, lanes)
    gate, scale, shift = _load_vectors(row, refs, "gate", "scale", "shift")

    def body(r, carry):
        """Row r, from its loads to its stores; nothing is carried."""
        x = row.load(refs["x"], r)
        if "y" in refs:
            y = row.load(refs["y"], r)
            y = y if gate is None else _each(jnp.multiply, gate, y)
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

    _for_own_rows(rows, tokens, body, None)


def _backward_kernel(refs, out, *, rows, shape, lanes):
    """dx and dy, and this run's sums of the gradients of scale, shift and gate.

    Among the inputs, x is the sum that the forward pass wrote, and dx its cotangent.
    """
    _, tokens, width = shape
    row = _Row(width, lanes)
    gate, scale = _load_vectors(row, refs, "gate", "scale")

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
        return _each(jnp.add, sums, terms)

    zeros = _each(jnp.zeros_like, scale)
    sums = {name: zeros for name in ("dscale", "dshift", "dgate") if name in out}
    for name, total in _for_own_rows(rows, tokens, body, sums).items():
        row.store(total, out[name])
