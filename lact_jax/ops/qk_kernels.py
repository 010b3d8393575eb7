"""All that stands between the q and k projections and their readers, as one Triton kernel.

    n = RMSNorm(z + bias) over D, z the matmul's output
    window attention reads   RoPE(n)
    the fast weights read    RoPE(y) / (|y| + eps),   y = n * fast_scale + fast_offset, |y| over E

A training sequence of ar_chunk3f passes 93 million numbers each of q and k through this in every
layer. XLA takes a pass over memory for every reduction, rotation and regrouping; here the forward
pass reads z once, and the backward pass z and the cotangents. The plain form is in `models.lact`
and `models.layers`, and the tests hold both to each other.

Letters: B batch, C chunks, S tokens of a chunk, D width, N attention heads, K head width,
P = K / 2, M fast-weight heads, E their width (ME = NK = D), h as in `qk_tiles`.
"""

from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lact_jax.ops.chunk_kernels import ChunkRange, call_by_name, exists, load, store, within
from lact_jax.ops.qk_tiles import MAX_LANES, Sizes

_VECTORS = "norm_scale", "fast_scale", "fast_offset"


@dataclass(frozen=True)
class QKOptions:
    """What `window_and_fast` makes.

    Attributes:
      fast_heads: M.
      eps: of the RMSNorm.
      l2_eps: added to the L2 norm.
      window, fast: the range of chunks of every array of outputs. Arrays that are read apart are
        written apart, which spares the copies that slicing one would take.
      interpret: run on any device, slowly.
    """

    fast_heads: int
    eps: float
    l2_eps: float
    window: tuple[ChunkRange, ...]
    fast: tuple[ChunkRange, ...]
    interpret: bool = False


def fits(num_heads: int, head_dim: int, fast_heads: int) -> bool:
    """Whether the kernels take N heads of K numbers in M fast heads: whole heads in each, and no
    more numbers of a token than registers hold."""
    if num_heads % fast_heads:
        return False
    sizes = Sizes.of((1, 1, 1, num_heads * head_dim), head_dim, fast_heads)
    return sizes.lanes <= MAX_LANES


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def window_and_fast(
    z_BCSD, bias_D, rotation_CSP2, norm_scale_D, fast_scale_D, fast_offset_D, options: QKOptions
):
    """q or k as window attention and as the fast weights read it, computed in float32.

    Args:
      z_BCSD: output of the projection's matmul.
      bias_D: the projection's, in any float type.
      rotation_CSP2: of `ops.rope.rope_rotations`; it gets no gradient.
      norm_scale_D, fast_scale_D, fast_offset_D: float32 parameters.
      options: `QKOptions`; sizes as `fits` wants them, no range of chunks empty.

    Returns:
      Two tuples of arrays in z's dtype, one for each range: (B, C', S, N, K) for window attention,
      (B, C', M, S, E) for the fast weights.
    """
    vectors = norm_scale_D, fast_scale_D, fast_offset_D
    return _forward(z_BCSD, bias_D, rotation_CSP2, *vectors, options)[0]


def _forward(z_BCSD, bias_D, rotation_CSP2, norm_scale_D, fast_scale_D, fast_offset_D, options):
    residuals = z_BCSD, bias_D, rotation_CSP2, norm_scale_D, fast_scale_D, fast_offset_D
    sizes, arrays = _inputs(residuals, options)
    like = partial(jax.ShapeDtypeStruct, dtype=z_BCSD.dtype)
    out = {
        "window": [like(sizes.window_shape(chunks)) for chunks in options.window],
        "fast": [like(sizes.fast_shape(chunks)) for chunks in options.fast],
    }
    out = _run(_forward_kernel, arrays, out, sizes, options)
    window = tuple(x.reshape(*x.shape[:3], -1, x.shape[-1]) for x in out["window"])
    fast = tuple(x.reshape(*x.shape[:4], -1) for x in out["fast"])
    return (window, fast), residuals


def _backward(options, residuals, cotangents):
    z_BCSD, bias_D, *_ = residuals
    sizes, arrays = _inputs(residuals, options)
    window, fast = (
        [x.reshape(shape(chunks)) for x, chunks in zip(arrays, ranges, strict=True)]
        for arrays, ranges, shape in zip(
            cotangents,
            (options.window, options.fast),
            (sizes.window_shape, sizes.fast_shape),
            strict=True,
        )
    )
    out = {name: jax.ShapeDtypeStruct(sizes.sums_shape, jnp.float32) for name in _VECTORS}
    out["z"] = jax.ShapeDtypeStruct(arrays["z"].shape, z_BCSD.dtype)
    arrays |= {"window": window, "fast": fast}
    out = _run(_backward_kernel, arrays, out, sizes, options)
    dz_BCSD = out["z"].reshape(z_BCSD.shape)
    # Its sums would take registers that the kernel does not have.
    dbias_D = jnp.sum(dz_BCSD, axis=(0, 1, 2), dtype=jnp.float32).astype(bias_D.dtype)
    sums = (jnp.sum(out[name], axis=(0, 1, 2)).reshape(-1) for name in _VECTORS)
    return dz_BCSD, dbias_D, None, *sums


window_and_fast.defvjp(_forward, _backward)


def _inputs(residuals: tuple, options: QKOptions) -> tuple[Sizes, dict]:
    """The sizes, and the arrays that both passes read by name."""
    z_BCSD, bias_D, rotation_CSP2, *vectors_D = residuals
    sizes = Sizes.of(z_BCSD.shape, 2 * rotation_CSP2.shape[2], options.fast_heads)
    vectors = dict(zip(("bias", *_VECTORS), (bias_D, *vectors_D), strict=True))
    return sizes, {
        "z": z_BCSD.reshape(sizes.window_shape((0, sizes.chunks))),
        "rotation": rotation_CSP2,
        **{name: vector_D.reshape(sizes.token) for name, vector_D in vectors.items()},
    }


def _run(kernel, arrays: dict, out: dict, sizes: Sizes, options: QKOptions) -> dict:
    """Calls a kernel with arrays by name; what it makes, by name."""
    blocks = {
        "z": sizes.window_block((0, sizes.chunks)),
        "rotation": sizes.rotation_block(),
        "window": list(map(sizes.window_block, options.window)),
        "fast": list(map(sizes.fast_block, options.fast)),
    }
    in_blocks = blocks | dict.fromkeys(("bias", *_VECTORS), sizes.vector_block())
    out_blocks = blocks | dict.fromkeys(_VECTORS, sizes.sums_block())
    return call_by_name(
        kernel, arrays, out, in_blocks, out_blocks,
        sizes=sizes, options=options, warps=sizes.warps, name="qk",
    )  # fmt: skip


# The kernels. They hold a token as a list of pieces (M, h, K).


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x[..., 0] and x[..., 1]; a kernel can't index an array."""
    halves = jax.lax.split(x, (1, 1), axis=x.ndim - 1)
    return tuple(half.reshape(x.shape[:-1]) for half in halves)


def _rotate(x_MhK: jax.Array, cos_P: jax.Array, sin_P: jax.Array) -> jax.Array:
    """`ops.rope.apply_rope` of one token; its transpose with the negative of sin."""
    even, odd = _halves(x_MhK.reshape(*x_MhK.shape[:-1], -1, 2))
    cos, sin = cos_P[None, None], sin_P[None, None]
    pair = even * cos - odd * sin, even * sin + odd * cos
    return jnp.concatenate([half[..., None] for half in pair], axis=-1).reshape(x_MhK.shape)


def _products(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """The sum of a b over the pieces: (M, h, K)."""
    return reduce(jnp.add, map(jnp.multiply, a, b))


def _for_each(x_MhK: jax.Array) -> jax.Array:
    """The sum over each fast head: (M, 1, 1)."""
    return jnp.sum(x_MhK.reshape(x_MhK.shape[0], -1), axis=1)[:, None, None]


def _for_all(x_MhK: jax.Array) -> jax.Array:
    """The sum over all, a scalar."""
    return jnp.sum(x_MhK.reshape(-1))


class _Reader:
    """Reads parameters and tokens for both kernels, and does what both do first.

    Attributes:
      pieces: indices of a token's pieces.
      exists_MhK: which lanes of a piece are not padding.
    """

    def __init__(self, refs: dict, sizes: Sizes, eps: float):
        self.refs, self.sizes, self.eps = refs, sizes, eps
        self.first_token = pl.program_id(0) * sizes.run
        self.pieces = range(sizes.pieces)
        self.exists_MhK = exists(sizes.tile, sizes.piece)
        pairs = sizes.tile[2] // 2, 2
        self.exists_P2 = exists(pairs, (sizes.piece[2] // 2, 2))

    def vector(self, name: str) -> list[jax.Array]:
        """A parameter. Read for every token, from cache: there are no registers left for it."""
        return [load(self.refs[name], (slice(None), i), self.exists_MhK) for i in self.pieces]

    def mask(self, t) -> jax.Array:
        """Which lanes of a piece of this program's token t there are."""
        return self.exists_MhK & (self.first_token + t < self.sizes.tokens)

    def rotation(self, t) -> tuple[jax.Array, jax.Array]:
        """cos and sin, (P,) each."""
        is_token = self.first_token + t < self.sizes.tokens
        return _halves(load(self.refs["rotation"], (t,), self.exists_P2 & is_token))

    def normed(self, t) -> tuple[jax.Array, list, list, list]:
        """Of x = z + bias: 1 / rms(x); x / rms(x); n = RMSNorm(x), rounded to z's dtype; y."""
        ref, mask = self.refs["z"], self.mask(t)
        z = [load(ref, (t, slice(None), i), mask) for i in self.pieces]
        x = list(map(jnp.add, z, self.vector("bias")))
        rrms = jax.lax.rsqrt(_for_all(_products(x, x)) / self.sizes.width + self.eps)
        normed = [piece * rrms for piece in x]
        scaled = map(jnp.multiply, normed, self.vector("norm_scale"))
        n = [piece.astype(ref.dtype).astype(jnp.float32) for piece in scaled]
        y = map(jnp.multiply, n, self.vector("fast_scale"))
        return rrms, normed, n, list(map(jnp.add, y, self.vector("fast_offset")))


def _forward_kernel(refs, out, *, sizes: Sizes, options: QKOptions):
    reader = _Reader(refs, sizes, options.eps)
    for_window, for_fast = within(options.window), within(options.fast)

    def token(t, carry):
        """Token t of this program, from its loads to its stores; nothing is carried."""
        rotation, (_, _, n, y) = reader.rotation(t), reader.normed(t)
        norm = jnp.sqrt(_for_each(_products(y, y)))
        mask, factor = reader.mask(t), 1 / (norm + options.l2_eps)
        for i in reader.pieces:
            window, fast = _rotate(n[i], *rotation), _rotate(y[i] * factor, *rotation)
            for ref, is_read in zip(out["window"], for_window, strict=True):
                store(ref, (t, slice(None), i), window, mask & is_read)
            for ref, is_read in zip(out["fast"], for_fast, strict=True):
                store(ref, (slice(None), t, i), fast, mask & is_read)
        return carry

    jax.lax.fori_loop(0, sizes.run, token, None)


def _backward_kernel(refs, out, *, sizes: Sizes, options: QKOptions):
    reader = _Reader(refs, sizes, options.eps)
    of_window, of_fast = within(options.window), within(options.fast)

    def unrotated(name, index, is_written, mask, rotation):
        """The cotangent of what was rotated, from those of the arrays that have this chunk."""
        cos, sin = rotation
        arrays = zip(refs[name], is_written, strict=True)
        parts = (load(ref, index, mask & written) for ref, written in arrays)
        return _rotate(reduce(jnp.add, parts), cos, -sin)

    def token(t, sums):
        """Token t of this program: stores its dz, adds its terms to the sums."""
        rotation, (rrms, normed, n, y) = reader.rotation(t), reader.normed(t)
        mask, every = reader.mask(t), slice(None)
        dwindow, dfast = (
            [unrotated(name, index(i), has_chunk, mask, rotation) for i in reader.pieces]
            for name, has_chunk, index in (
                ("window", of_window, lambda i: (t, every, i)),
                ("fast", of_fast, lambda i: (every, t, i)),
            )
        )
        # RoPE keeps norms and products, so neither needs y rotated.
        norm = jnp.sqrt(_for_each(_products(y, y)))
        factor = 1 / (norm + options.l2_eps)
        along = _for_each(_products(dfast, y)) * factor * factor / jnp.where(norm > 0, norm, 1.0)
        dy = [dfast[i] * factor - y[i] * along for i in reader.pieces]
        dn = list(map(jnp.add, dwindow, map(jnp.multiply, dy, reader.vector("fast_scale"))))
        dnormed = list(map(jnp.multiply, dn, reader.vector("norm_scale")))
        along = _for_all(_products(dnormed, normed)) / sizes.width
        for i in reader.pieces:
            store(out["z"], (t, every, i), (dnormed[i] - normed[i] * along) * rrms, mask)
        terms = {
            "norm_scale": map(jnp.multiply, dn, normed),
            "fast_scale": map(jnp.multiply, dy, n),
            "fast_offset": dy,
        }
        return {name: list(map(jnp.add, sums[name], term)) for name, term in terms.items()}

    zeros = [jnp.zeros(sizes.tile, jnp.float32) for _ in reader.pieces]
    sums = jax.lax.fori_loop(0, sizes.run, token, dict.fromkeys(_VECTORS, zeros))
    for name, pieces in sums.items():
        for i, total in enumerate(pieces):
            store(out[name], (slice(None), i), total, reader.exists_MhK)
