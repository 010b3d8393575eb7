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

import itertools
from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lact_jax.ops.chunk_kernels import ChunkRange, call_by_name, exists, for_own_tokens, load, multiply_add, store, within
from lact_jax.ops.qk_tiles import MAX_LANES, Sizes

_VECTORS = "bias", "norm_scale", "fast_scale", "fast_offset"
_READERS = "window", "fast"


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
    dbias_D, *sums = (jnp.sum(out[name], axis=(0, 1, 2)).reshape(-1) for name in _VECTORS)
    return dz_BCSD, dbias_D.astype(bias_D.dtype), None, *sums


window_and_fast.defvjp(_forward, _backward)


def _inputs(residuals: tuple, options: QKOptions) -> tuple[Sizes, dict]:
    """The sizes, and the arrays that both passes read by name."""
    z_BCSD, bias_D, rotation_CSP2, *vectors_D = residuals
    sizes = Sizes.of(z_BCSD.shape, 2 * rotation_CSP2.shape[2], options.fast_heads)
    vectors = dict(zip(_VECTORS, (bias_D, *vectors_D), strict=True))
    return sizes, {
        "z": z_BCSD.reshape(sizes.window_shape((0, sizes.chunks))),
        "rotation": rotation_CSP2.reshape(*rotation_CSP2.shape[:2], -1),
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
    in_blocks = blocks | dict.fromkeys(_VECTORS, sizes.vector_block())
    out_blocks = blocks | dict.fromkeys(_VECTORS, sizes.sums_block())
    return call_by_name(
        kernel, arrays, out, in_blocks, out_blocks,
        sizes=sizes, options=options, warps=sizes.warps, name="qk",
    )  # fmt: skip


# The kernels. They hold a token as a list of pieces (M, h, K).


def _cases(options: QKOptions, chunks: int) -> list[tuple[ChunkRange, list[int], list[int]]]:
    """Runs of chunks with the same readers: their range, and the places of the arrays of `window`
    and `fast` that have them."""
    ends = sorted({0, chunks, *itertools.chain(*options.window, *options.fast)})
    return [
        ((first, end), *(_having(first, ranges) for ranges in (options.window, options.fast)))
        for first, end in itertools.pairwise(ends)
    ]


def _having(chunk: int, ranges: tuple[ChunkRange, ...]) -> list[int]:
    return [i for i, (first, end) in enumerate(ranges) if first <= chunk < end]


def _for_own_case(body, refs: list[dict], sizes: Sizes, options: QKOptions) -> None:
    """Runs body(*refs) with the readers' arrays that have this program's chunk, and no others.

    The code is there once for each case. What a token lacks is thus not computed, and costs no
    masked instructions.
    """
    for chunks, *places in _cases(options, sizes.chunks):
        own = [
            refs_by_name | {
                name: [refs_by_name[name][i] for i in indices]
                for name, indices in zip(_READERS, places, strict=True) if name in refs_by_name
            }
            for refs_by_name in refs
        ]  # fmt: skip
        (is_own,) = within((chunks,))
        pl.when(is_own)(partial(body, *own))


class _Token:
    """Reads parameters and tokens for both kernels, and does what both do first.

    Attributes:
      pieces: indices of a token's pieces.
      exists_MhK: which lanes of a piece are not padding.
    """

    def __init__(self, refs: dict, sizes: Sizes, options: QKOptions):
        self.refs, self.sizes, self.options = refs, sizes, options
        self.pieces = range(sizes.pieces)
        self.exists_MhK = exists(sizes.tile, sizes.piece)

    def multiply_add(self, a, b, c) -> jax.Array:
        """a b + c (M, h, K), of what broadcasts to that."""
        shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in (a, b, c)))
        whole = (jnp.broadcast_to(x, shape) for x in (a, b, c))
        return multiply_add(*whole, self.options.interpret)

    def products(self, a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
        """The sum of a b over the pieces: (M, h, K)."""
        total = a[0] * b[0]
        for x, y in zip(a[1:], b[1:], strict=True):
            total = self.multiply_add(x, y, total)
        return total

    def vector(self, name: str) -> list[jax.Array]:
        """A parameter. Read for every token, from cache: there are no registers left for it."""
        return [load(self.refs[name], (slice(None), i), self.exists_MhK) for i in self.pieces]

    def part(self, name: str, index) -> list[jax.Array]:
        """A token's pieces of one of the readers' arrays, or the sum of those of several."""
        loads = (
            [load(ref, index(i), self.exists_MhK) for i in self.pieces] for ref in self.refs[name]
        )
        return reduce(lambda a, b: list(map(jnp.add, a, b)), loads)

    def rotation(self, t) -> tuple[jax.Array, jax.Array]:
        """cos and sin for every pair of a piece: (M, h, P) each.

        Each thread loads those of its own pairs, which spares an exchange through shared memory.
        """
        lane_MhK = jax.lax.broadcasted_iota(jnp.int32, self.sizes.tile, 2)
        return _halves(_pairs(load(self.refs["rotation"], (t, lane_MhK), self.exists_MhK)))

    def rotate(self, x_MhK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """`ops.rope.apply_rope` of one token; its transpose with the negative of sin."""
        even, odd = _halves(_pairs(x_MhK))
        pair = (
            self.multiply_add(odd, -sin, even * cos),
            self.multiply_add(even, sin, odd * cos),
        )
        return jnp.concatenate([half[..., None] for half in pair], axis=-1).reshape(x_MhK.shape)

    def z(self, t) -> list[jax.Array]:
        return [load(self.refs["z"], (t, slice(None), i), self.exists_MhK) for i in self.pieces]

    def normed(self, z: list[jax.Array]) -> tuple[jax.Array, list, list]:
        """Of x = z + bias: 1 / rms(x); x / rms(x); n = RMSNorm(x), rounded to z's dtype."""
        x = list(map(jnp.add, z, self.vector("bias")))
        mean = _for_all(self.products(x, x)) * (1 / self.sizes.width)
        rrms = jax.lax.rsqrt(mean + self.options.eps)
        normed = [piece * rrms for piece in x]
        scaled = map(jnp.multiply, normed, self.vector("norm_scale"))
        dtype = self.refs["z"].dtype
        return rrms, normed, [piece.astype(dtype).astype(jnp.float32) for piece in scaled]

    def y(self, n: list[jax.Array]) -> list[jax.Array]:
        """What the fast weights read before rotation and L2 norm."""
        vectors = self.vector("fast_scale"), self.vector("fast_offset")
        return list(map(self.multiply_add, n, *vectors))


def _forward_kernel(refs, out, *, sizes: Sizes, options: QKOptions):
    def run(out):
        reader = _Token(refs, sizes, options)

        def store_all(name, index, pieces):
            for ref in out[name]:
                for i, piece in enumerate(pieces):
                    store(ref, index(i), piece, reader.exists_MhK)

        def token(t, carry):
            """Token t of this program, from its loads to its stores; nothing is carried."""
            z, (cos, sin) = reader.z(t), reader.rotation(t)
            _, _, n = reader.normed(z)
            if out["window"]:
                rotated = [reader.rotate(piece, cos, sin) for piece in n]
                store_all("window", lambda i: (t, slice(None), i), rotated)
            if out["fast"]:
                y = reader.y(n)
                norm = jnp.sqrt(_for_each(reader.products(y, y)))
                factor = 1 / (norm + options.l2_eps)
                cos, sin = cos * factor, sin * factor
                rotated = [reader.rotate(piece, cos, sin) for piece in y]
                store_all("fast", lambda i: (slice(None), t, i), rotated)
            return carry

        for_own_tokens(sizes, token, None)

    _for_own_case(run, [out], sizes, options)


def _backward_kernel(refs, out, *, sizes: Sizes, options: QKOptions):
    def run(refs):
        reader = _Token(refs, sizes, options)
        add = reader.multiply_add

        def token(t, sums):
            """Token t of this program: stores its dz, adds its terms to the sums."""
            every = slice(None)
            z, (cos, sin) = reader.z(t), reader.rotation(t)
            window = reader.part("window", lambda i: (t, every, i)) if refs["window"] else None
            fast = reader.part("fast", lambda i: (every, t, i)) if refs["fast"] else None
            rrms, normed, n = reader.normed(z)
            sums = dict(sums)
            dn = None
            if window:
                dn = [reader.rotate(piece, cos, -sin) for piece in window]
            if fast:
                # RoPE keeps norms and products, so neither needs y rotated.
                y, dfast = reader.y(n), [reader.rotate(piece, cos, -sin) for piece in fast]
                squares, along = _for_each(reader.products(y, y)), _for_each(reader.products(dfast, y))
                norm = jnp.sqrt(squares)
                factor = 1 / (norm + options.l2_eps)
                along = -along * factor * factor / jnp.where(norm > 0, norm, 1.0)
                dy = [add(piece, along, d * factor) for piece, d in zip(y, dfast)]
                sums["fast_scale"] = list(map(add, dy, n, sums["fast_scale"]))
                sums["fast_offset"] = list(map(jnp.add, dy, sums["fast_offset"]))
                scale = reader.vector("fast_scale")
                dn = list(map(add, dy, scale, dn)) if dn else list(map(jnp.multiply, dy, scale))
            if dn is None:
                dn = [jnp.zeros(sizes.tile, jnp.float32)] * sizes.pieces
            sums["norm_scale"] = list(map(add, dn, normed, sums["norm_scale"]))
            dnormed = list(map(jnp.multiply, dn, reader.vector("norm_scale")))
            along = _for_all(reader.products(dnormed, normed)) * (-1 / sizes.width)
            dz = [add(x, along, d) * rrms for x, d in zip(normed, dnormed)]
            for i, piece in enumerate(dz):
                store(out["z"], (t, every, i), piece, reader.exists_MhK)
            sums["bias"] = list(map(jnp.add, dz, sums["bias"]))
            return sums

        zeros = [jnp.zeros(sizes.tile, jnp.float32) for _ in reader.pieces]
        sums = for_own_tokens(sizes, token, dict.fromkeys(_VECTORS, zeros))
        for name, pieces in sums.items():
            for i, total in enumerate(pieces):
                store(out[name], (slice(None), i), total, reader.exists_MhK)

    _for_own_case(run, [refs], sizes, options)


def _pairs(x_MhK: jax.Array) -> jax.Array:
    """(M, h, P, 2)."""
    return x_MhK.reshape(*x_MhK.shape[:-1], -1, 2)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x[..., 0] and x[..., 1]; a kernel can't index an array."""
    halves = jax.lax.split(x, (1, 1), axis=x.ndim - 1)
    return tuple(half.reshape(x.shape[:-1]) for half in halves)


def _for_each(x_MhK: jax.Array) -> jax.Array:
    """The sum over each fast head: (M, 1, 1)."""
    return jnp.sum(x_MhK.reshape(x_MhK.shape[0], -1), axis=1)[:, None, None]


def _for_all(x_MhK: jax.Array) -> jax.Array:
    """The sum over all, a scalar."""
    return jnp.sum(x_MhK.reshape(-1))
