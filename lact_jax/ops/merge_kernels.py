"""A LaCT layer's two outputs as the one that its last projection reads, as one Triton kernel.

    y = gate * RMSNorm(o_fast) + o_window        the norm over E, the rest over D, all in float32

Fast weights and window attention each compute their output in parts: some of the chunks in each
array. XLA joins the parts in memory, then takes a pass for each reduction, and cuts the cotangents
up again; here each number is read and written once, where it lies. The plain form is in
`models.lact`, and the tests hold both to each other.

Letters: B batch, C chunks, S tokens of a chunk, D width, M fast-weight heads, E their width
(ME = D), W video chunks of a part, R copies of each.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton

from lact_jax.ops.chunk_kernels import (
    ChunkRange,
    Ranges,
    call_by_name,
    exists,
    in_own_case,
    load,
    own_tokens,
    store,
)
from lact_jax.ops.merge_tiles import MAX_LANES, Sizes


@dataclass(frozen=True)
class MergeOptions:
    """What `merge` reads.

    Attributes:
      eps: of the RMSNorm.
      fast, window: the range of chunks of every array; those of each cover all chunks.
      interpret: run on any device, slowly.
    """

    eps: float
    fast: tuple[ChunkRange, ...]
    window: tuple[ChunkRange, ...]
    interpret: bool = False


def fits(fast_heads: int, fast_head_dim: int) -> bool:
    """Whether registers hold a token of M fast heads of E numbers."""
    return math.prod(Sizes(1, 1, 1, fast_heads, fast_head_dim).tile) <= MAX_LANES


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def merge(
    fast: tuple[jax.Array, ...],
    window: tuple[jax.Array, ...],
    gate_BCS1: jax.Array,
    scale_E: jax.Array,
    options: MergeOptions,
):
    """The gated and normed fast output plus the window output.

    Args:
      fast: for each range of chunks, which are W video chunks with R copies of each, the fast
        weights' output (W, B, M, R S, E).
      window: for each range window attention's output (B, C', S, D).
      gate_BCS1: float32 factor of every token's fast output.
      scale_E: float32 scale of the RMSNorm.
      options: `MergeOptions`; sizes as `fits` wants them, no range of chunks empty.

    Returns:
      y (B, C, S, D) in the dtype of `window`. And without gradients, in float32 (B, C, S), every
      token's L2 norms before the RMSNorm: of the fast output, as the mean over its heads, and of
      the window output.
    """
    return _forward(fast, window, gate_BCS1, scale_E, options)[0]


def _forward(fast, window, gate_BCS1, scale_E, options):
    residuals = fast, gate_BCS1, scale_E
    sizes, arrays = _inputs(residuals, options)
    arrays["window"] = [x_BCSD.reshape(*x_BCSD.shape[:3], *sizes.token) for x_BCSD in window]
    norms = jax.ShapeDtypeStruct(gate_BCS1.shape[:3], jnp.float32)
    y = jax.ShapeDtypeStruct((*norms.shape, *sizes.token), window[0].dtype)
    out = {"y": y, "fast_norm": norms, "window_norm": norms}
    out = _run(_forward_kernel, arrays, out, sizes, options)
    y_BCSD = out["y"].reshape(*norms.shape, -1)
    return (y_BCSD, out["fast_norm"], out["window_norm"]), residuals


def _backward(options, residuals, cotangents):
    fast, gate_BCS1, scale_E = residuals
    dy_BCSD, _, _ = cotangents
    sizes, arrays = _inputs(residuals, options)
    arrays["y"] = dy_BCSD.reshape(*dy_BCSD.shape[:3], *sizes.token)
    out = {
        "fast": [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays["fast"]],
        "window": [
            jax.ShapeDtypeStruct(sizes.window_shape(chunks), dy_BCSD.dtype)
            for chunks in options.window
        ],
        "gate": jax.ShapeDtypeStruct(gate_BCS1.shape[:3], jnp.float32),
        "scale": jax.ShapeDtypeStruct(sizes.sums_shape, jnp.float32),
    }
    out = _run(_backward_kernel, arrays, out, sizes, options)
    dfast = tuple(dx.reshape(x.shape) for dx, x in zip(out["fast"], fast, strict=True))
    dwindow = tuple(dx.reshape(*dx.shape[:3], -1) for dx in out["window"])
    return dfast, dwindow, out["gate"][..., None], jnp.sum(out["scale"], axis=(0, 1, 2, 3))


merge.defvjp(_forward, _backward)


def _inputs(residuals: tuple, options: MergeOptions) -> tuple[Sizes, dict]:
    """The sizes, and the arrays that both passes read by name."""
    fast, gate_BCS1, scale_E = residuals
    sizes = Sizes(*gate_BCS1.shape[:3], fast[0].shape[2], scale_E.shape[0])
    return sizes, {
        # (W, B, M, R, S, E)
        "fast": [x.reshape(*x.shape[:3], -1, sizes.tokens, sizes.head_dim) for x in fast],
        "gate": gate_BCS1[..., 0],
        "scale": scale_E,
    }


def _run(kernel, arrays: dict, out: dict, sizes: Sizes, options: MergeOptions) -> dict:
    """Calls a kernel with arrays by name; what it makes, by name."""
    copies = [x_WBMRSE.shape[3] for x_WBMRSE in arrays["fast"]]
    blocks = {
        "fast": list(map(sizes.fast_block, options.fast, copies)),
        "window": list(map(sizes.window_block, options.window)),
        "y": sizes.window_block((0, sizes.chunks)),
        **dict.fromkeys(("gate", "fast_norm", "window_norm"), sizes.scalars_block()),
    }
    in_blocks = blocks | {"scale": sizes.scale_block()}
    out_blocks = blocks | {"scale": sizes.sums_block()}
    return call_by_name(
        kernel, arrays, out, in_blocks, out_blocks,
        sizes=sizes, options=options, warps=sizes.warps, name="merge",
    )  # fmt: skip


# The kernels. They hold a token as a tile (M, E), with zeros in its padding.

_ALL = slice(None)


def _token_and_scale(refs: dict, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """Which lanes of a token are not padding (M, E); the norm's scale (1, E)."""
    scale_E = load(refs["scale"], (_ALL,), exists(sizes.tile[1:], sizes.token[1:]))
    return exists(sizes.tile, sizes.token), scale_E[None]


def _ranges(chunks: tuple[ChunkRange, ...]) -> list[Ranges]:
    """As `in_own_case` takes them."""
    return [(own,) for own in chunks]


def _rms_factor(squares_M: jax.Array, sizes: Sizes, options: MergeOptions) -> jax.Array:
    """1 / rms of each head (M, 1), from the sums of its squares."""
    return jax.lax.rsqrt(squares_M / sizes.head_dim + options.eps)[:, None]


def _forward_kernel(refs, out, *, sizes: Sizes, options: MergeOptions):
    (mask_ME, scale_1E), count = _token_and_scale(refs, sizes), own_tokens(sizes)

    def own_case(fast_refs, window_refs):
        """This program's tokens, from the arrays that have its chunk."""
        (fast_ref,), (window_ref,) = fast_refs, window_refs

        def token(t, carry):
            """Token t of this program, from its loads to its stores; nothing is carried."""
            fast, window = load(fast_ref, (_ALL, t), mask_ME), load(window_ref, (t,), mask_ME)
            gate = triton.load(refs["gate"].at[t])
            squares_M = jnp.sum(fast * fast, axis=1)
            y = gate * (fast * _rms_factor(squares_M, sizes, options) * scale_1E) + window
            store(out["y"], (t,), y, mask_ME)
            triton.store(out["fast_norm"].at[t], jnp.sum(jnp.sqrt(squares_M)) / sizes.heads)
            window_norm = jnp.sqrt(jnp.sum(jnp.sum(window * window, axis=1)))
            triton.store(out["window_norm"].at[t], window_norm)
            return carry

        jax.lax.fori_loop(0, count, token, None)

    in_own_case(
        own_case, sizes.chunks,
        (refs["fast"], _ranges(options.fast)), (refs["window"], _ranges(options.window)),
    )  # fmt: skip


def _backward_kernel(refs, out, *, sizes: Sizes, options: MergeOptions):
    (mask_ME, scale_1E), count = _token_and_scale(refs, sizes), own_tokens(sizes)

    def own_case(fast_refs, dfast_refs, dwindow_refs):
        """The gradients of this program's tokens, to the arrays that have its chunk."""
        (fast_ref,), (dfast_ref,), (dwindow_ref,) = fast_refs, dfast_refs, dwindow_refs

        def token(t, sums):
            """Token t of this program: stores its gradients, adds its terms to the scale's."""
            fast, dy = load(fast_ref, (_ALL, t), mask_ME), load(refs["y"], (t,), mask_ME)
            gate = triton.load(refs["gate"].at[t])
            store(dwindow_ref, (t,), dy, mask_ME)
            factor = _rms_factor(jnp.sum(fast * fast, axis=1), sizes, options)
            normed = fast * factor
            scaled = dy * scale_1E
            along_M = jnp.sum(scaled * normed, axis=1)
            triton.store(out["gate"].at[t], jnp.sum(along_M))
            dfast = (scaled - normed * (along_M[:, None] / sizes.head_dim)) * (factor * gate)
            store(dfast_ref, (_ALL, t), dfast, mask_ME)
            return sums + gate * dy * normed

        zeros = jnp.zeros(sizes.tile, jnp.float32)
        sums = jax.lax.fori_loop(0, count, token, zeros)
        store(out["scale"], (_ALL, _ALL), sums, mask_ME)

    fast = _ranges(options.fast)
    in_own_case(
        own_case, sizes.chunks,
        (refs["fast"], fast), (out["fast"], fast), (out["window"], _ranges(options.window)),
    )  # fmt: skip
