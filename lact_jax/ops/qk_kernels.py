"""All that stands between the q and k projections and their readers, as one Triton kernel.

    n = RMSNorm(x) over D
    window attention reads   RoPE(n)
    the fast weights read    RoPE(y) / (|y| + eps),   y = n * fast_scale + fast_offset, |y| over E

A training sequence of ar_chunk3f passes 93 million numbers each of q and k through this in every
layer. XLA takes a pass over memory for every reduction, rotation and regrouping; here the forward
pass reads x once, and the backward pass x and the cotangents. The plain form is in `models.lact`
and `models.layers`, and the tests hold both to each other.

Letters: B batch, C chunks, S tokens of a chunk, D width, N attention heads, K head width,
P = K / 2, M fast-weight heads, E their width (ME = NK = D), H = E / K attention heads in each.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Tokens that a program goes through, one at a time. The backward pass writes its sums once a
# program: with 60 these are 3 % of its bytes, and 13 chunks of 4680 tokens are 1014 programs.
_TOKENS, _WARPS = 60, 4
_MAX_LANES = 8192  # of a padded token: a thread then has 64 numbers of every array

ChunkRange = tuple[int, int]


@dataclass(frozen=True)
class QKOptions:
    """What `window_and_fast` makes.

    Attributes:
      fast_heads: M.
      eps: of the RMSNorm.
      l2_eps: added to the L2 norm.
      window, fast: first chunk and end of every array of outputs. Arrays that are read apart are
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
    token = fast_heads, num_heads // fast_heads, head_dim
    lanes = math.prod(map(pl.next_power_of_2, token))
    return num_heads % fast_heads == 0 and lanes <= _MAX_LANES


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def window_and_fast(x_BCSD, rotation_CSP2, norm_scale_D, fast_scale_D, fast_offset_D, options):
    """q or k as window attention and as the fast weights read it, computed in float32.

    Args:
      x_BCSD: output of the projection.
      rotation_CSP2: of `ops.rope.rope_rotations`; it gets no gradient.
      norm_scale_D, fast_scale_D, fast_offset_D: float32 parameters.
      options: `QKOptions`; sizes as `fits` wants them, no range of chunks empty.

    Returns:
      Two tuples of arrays in x's dtype, one for each range: (B, C', S, N, K) for window attention,
      (B, C', M, S, E) for the fast weights.
    """
    vectors = norm_scale_D, fast_scale_D, fast_offset_D
    return _forward(x_BCSD, rotation_CSP2, *vectors, options)[0]


def _forward(x_BCSD, rotation_CSP2, norm_scale_D, fast_scale_D, fast_offset_D, options):
    residuals = x_BCSD, rotation_CSP2, norm_scale_D, fast_scale_D, fast_offset_D
    sizes = _Sizes.of(x_BCSD.shape, 2 * rotation_CSP2.shape[2], options.fast_heads)
    shapes = {
        "window": [sizes.window_shape(chunks) for chunks in options.window],
        "fast": [sizes.fast_shape(chunks) for chunks in options.fast],
    }
    out = jax.tree.map(partial(jax.ShapeDtypeStruct, dtype=x_BCSD.dtype), shapes, is_leaf=_is_shape)
    out = _run(_forward_kernel, _inputs(residuals, sizes), out, sizes, options)
    window = tuple(y.reshape(*y.shape[:3], -1, sizes.head_dim) for y in out["window"])
    fast = tuple(y.reshape(*y.shape[:4], -1) for y in out["fast"])
    return (window, fast), residuals


def _backward(options, residuals, cotangents):
    x_BCSD, rotation_CSP2, *vectors = residuals
    sizes = _Sizes.of(x_BCSD.shape, 2 * rotation_CSP2.shape[2], options.fast_heads)
    arrays = _inputs(residuals, sizes)
    for name, shape_of, grads in zip(
        ("window", "fast"), (sizes.window_shape, sizes.fast_shape), cotangents, strict=True
    ):
        ranges = getattr(options, name)
        arrays[name] = [
            g.reshape(shape_of(chunks)) for g, chunks in zip(grads, ranges, strict=True)
        ]
    out = {name: jax.ShapeDtypeStruct(sizes.sums_shape, jnp.float32) for name in _VECTORS}
    out["x"] = jax.ShapeDtypeStruct(arrays["x"].shape, x_BCSD.dtype)
    out = _run(_backward_kernel, arrays, out, sizes, options)
    sums = (jnp.sum(out[name], axis=(0, 1, 2)).reshape(-1) for name in _VECTORS)
    return out["x"].reshape(x_BCSD.shape), None, *sums


window_and_fast.defvjp(_forward, _backward)

_VECTORS = "norm_scale", "fast_scale", "fast_offset"


def _is_shape(x) -> bool:
    return isinstance(x, tuple)


def _inputs(residuals: tuple, sizes: "_Sizes") -> dict:
    """The arrays that both passes read, by name, their widths as (M, H, K)."""
    x_BCSD, rotation_CSP2, *vectors_D = residuals
    vectors = (v_D.reshape(sizes.token) for v_D in vectors_D)
    return {
        "x": x_BCSD.reshape(sizes.window_shape((0, sizes.chunks))),
        "rotation": rotation_CSP2,
        **dict(zip(_VECTORS, vectors, strict=True)),
    }


@dataclass(frozen=True)
class _Sizes:
    """B, C, S and (M, H, K), and which block of each array a program has.

    A program has a run of tokens of one chunk: the grid is (runs, C, B). Where an array has a range
    of the chunks only, a program of another chunk is given some block, which it masks.
    """

    batch: int
    chunks: int
    tokens: int
    token: tuple[int, int, int]

    @classmethod
    def of(cls, shape_BCSD, head_dim: int, fast_heads: int) -> "_Sizes":
        *sizes, width = shape_BCSD
        return cls(*sizes, (fast_heads, width // (fast_heads * head_dim), head_dim))

    @property
    def head_dim(self) -> int:
        return self.token[2]

    @property
    def width(self) -> int:
        return math.prod(self.token)

    @property
    def run(self) -> int:
        return min(_TOKENS, self.tokens)

    @property
    def grid(self) -> tuple[int, int, int]:
        return pl.cdiv(self.tokens, self.run), self.chunks, self.batch

    @property
    def tile(self) -> tuple[int, int, int]:
        """(M, H, K) padded to powers of two."""
        return tuple(map(pl.next_power_of_2, self.token))

    def window_shape(self, chunks: ChunkRange) -> tuple[int, ...]:
        return self.batch, chunks[1] - chunks[0], self.tokens, *self.token

    def fast_shape(self, chunks: ChunkRange) -> tuple[int, ...]:
        fast_heads, *head = self.token
        return self.batch, chunks[1] - chunks[0], fast_heads, self.tokens, *head

    @property
    def sums_shape(self) -> tuple[int, ...]:
        return self.batch, self.chunks, self.grid[0], *self.token

    def window_block(self, chunks: ChunkRange) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, self.run, *self.tile),
            lambda run, chunk, clip: (clip, _place(chunk, chunks), run, 0, 0, 0),
        )

    def fast_block(self, chunks: ChunkRange) -> pl.BlockSpec:
        fast_heads, *head = self.tile
        return pl.BlockSpec(
            (None, None, fast_heads, self.run, *head),
            lambda run, chunk, clip: (clip, _place(chunk, chunks), 0, run, 0, 0),
        )

    def blocks(self, options: QKOptions) -> dict:
        """Of every array by name but the vectors or their sums."""
        rotation = (None, self.run, self.tile[2] // 2, 2)
        return {
            "x": self.window_block((0, self.chunks)),
            "rotation": pl.BlockSpec(rotation, lambda run, chunk, clip: (chunk, run, 0, 0)),
            "window": [self.window_block(chunks) for chunks in options.window],
            "fast": [self.fast_block(chunks) for chunks in options.fast],
        }

    def vector_block(self) -> pl.BlockSpec:
        return pl.BlockSpec(self.tile, lambda run, chunk, clip: (0, 0, 0))

    def sums_block(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, None, *self.tile), lambda run, chunk, clip: (clip, chunk, run, 0, 0, 0)
        )


def _place(chunk: jax.Array, chunks: ChunkRange) -> jax.Array:
    """A chunk's place in an array of the range `chunks`, or some place where it has none."""
    first, end = chunks
    return jnp.minimum(jnp.maximum(chunk - first, 0), end - first - 1)


def _run(kernel, arrays: dict, out: dict, sizes: _Sizes, options: QKOptions) -> dict:
    blocks = sizes.blocks(options)
    in_blocks = blocks | dict.fromkeys(_VECTORS, sizes.vector_block())
    out_blocks = blocks | dict.fromkeys(_VECTORS, sizes.sums_block())
    call = pl.pallas_call(
        partial(kernel, sizes=sizes, options=options),
        grid=sizes.grid,
        in_specs=[{name: in_blocks[name] for name in arrays}],
        out_specs={name: out_blocks[name] for name in out},
        out_shape=out,
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=options.interpret,
        name="qk" + kernel.__name__.removesuffix("_kernel"),
    )
    return call(arrays)


# The kernels. What they hold of a token is (M, H, K), padded.


def _exists(padded: tuple[int, ...], sizes: tuple[int, ...]) -> jax.Array:
    """Which lanes of a padded tile are not padding."""
    exists = jnp.full(padded, True)
    for axis, (lanes, size) in enumerate(zip(padded, sizes, strict=True)):
        if lanes > size:
            exists &= jax.lax.broadcasted_iota(jnp.int32, padded, axis) < size
    return exists


def _within(ranges: tuple[ChunkRange, ...]) -> list[jax.Array]:
    """Whether this program's chunk is of each range."""
    chunk = pl.program_id(1)
    return [(first <= chunk) & (chunk < end) for first, end in ranges]


def _load(ref, index, mask) -> jax.Array:
    return triton.load(ref.at[index], mask=mask, other=0.0).astype(jnp.float32)


def _store(ref, index, value, mask) -> None:
    triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x[..., 0] and x[..., 1]; a kernel can't index an array."""
    halves = jax.lax.split(x, (1, 1), axis=x.ndim - 1)
    return tuple(half.reshape(x.shape[:-1]) for half in halves)


def _rotate(x_MHK: jax.Array, cos_P: jax.Array, sin_P: jax.Array) -> jax.Array:
    """`ops.rope.apply_rope` of one token; its transpose with the negative of sin."""
    even, odd = _halves(x_MHK.reshape(*x_MHK.shape[:-1], -1, 2))
    cos, sin = cos_P[None, None], sin_P[None, None]
    pair = even * cos - odd * sin, even * sin + odd * cos
    return jnp.concatenate([half[..., None] for half in pair], axis=-1).reshape(x_MHK.shape)


def _sum_of_each(x_MHK: jax.Array) -> jax.Array:
    """The sum over each fast head: (M, 1, 1)."""
    return jnp.sum(x_MHK.reshape(x_MHK.shape[0], -1), axis=1)[:, None, None]


def _sum_of_all(x_MHK: jax.Array) -> jax.Array:
    return jnp.sum(_sum_of_each(x_MHK), axis=0, keepdims=True)


class _Reader:
    """Reads parameters and tokens for both kernels, and does what both do first.

    Attributes:
      exists_MHK: which lanes of a token are not padding.
      norm_scale, fast_scale, fast_offset: (M, H, K).
    """

    def __init__(self, refs: dict, sizes: _Sizes, eps: float):
        self.refs, self.sizes, self.eps = refs, sizes, eps
        self.first_token = pl.program_id(0) * sizes.run
        self.exists_MHK = _exists(sizes.tile, sizes.token)
        pairs = sizes.tile[2] // 2, 2
        self.exists_P2 = _exists(pairs, (sizes.token[2] // 2, 2))
        self.norm_scale, self.fast_scale, self.fast_offset = (
            _load(refs[name], ..., self.exists_MHK) for name in _VECTORS
        )

    def mask(self, t) -> jax.Array:
        """Which lanes of this program's token t there are: (M, H, K)."""
        return self.exists_MHK & (self.first_token + t < self.sizes.tokens)

    def rotation(self, t) -> tuple[jax.Array, jax.Array]:
        """cos and sin, (P,) each."""
        is_token = self.first_token + t < self.sizes.tokens
        return _halves(_load(self.refs["rotation"], t, self.exists_P2 & is_token))

    def normed(self, t) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """x / rms(x); 1 / rms(x); n = RMSNorm(x) as rounded to x's dtype; y."""
        x = _load(self.refs["x"], t, self.mask(t))
        rrms = jax.lax.rsqrt(_sum_of_all(x * x) / self.sizes.width + self.eps)
        n = (x * rrms * self.norm_scale).astype(self.refs["x"].dtype).astype(jnp.float32)
        return x * rrms, rrms, n, n * self.fast_scale + self.fast_offset


def _forward_kernel(refs, out, *, sizes: _Sizes, options: QKOptions):
    reader = _Reader(refs, sizes, options.eps)
    for_window, for_fast = _within(options.window), _within(options.fast)

    def token(t, carry):
        rotation, (_, _, n, y) = reader.rotation(t), reader.normed(t)
        window = _rotate(n, *rotation)
        norm = jnp.sqrt(_sum_of_each(y * y))
        fast = _rotate(y / (norm + options.l2_eps), *rotation)
        for ref, is_read in zip(out["window"], for_window, strict=True):
            _store(ref, t, window, reader.mask(t) & is_read)
        for ref, is_read in zip(out["fast"], for_fast, strict=True):
            _store(ref, (slice(None), t), fast, reader.mask(t) & is_read)
        return carry

    jax.lax.fori_loop(0, sizes.run, token, None)


def _backward_kernel(refs, out, *, sizes: _Sizes, options: QKOptions):
    reader = _Reader(refs, sizes, options.eps)
    of_window, of_fast = _within(options.window), _within(options.fast)

    def cotangent(name, index, of_range, mask):
        parts = zip(refs[name], of_range, strict=True)
        return sum(_load(ref, index, mask & is_read) for ref, is_read in parts)

    def token(t, sums):
        (cos, sin), (normed, rrms, n, y) = reader.rotation(t), reader.normed(t)
        mask = reader.mask(t)
        dwindow = _rotate(cotangent("window", t, of_window, mask), cos, -sin)
        dfast = _rotate(cotangent("fast", (slice(None), t), of_fast, mask), cos, -sin)
        # RoPE keeps norms and products, so neither needs y rotated.
        norm = jnp.sqrt(_sum_of_each(y * y))
        factor = 1 / (norm + options.l2_eps)
        along = _sum_of_each(dfast * y) * factor * factor / jnp.where(norm > 0, norm, 1.0)
        dy = dfast * factor - y * along
        dn = dwindow + dy * reader.fast_scale
        dnormed = dn * reader.norm_scale
        along = _sum_of_all(dnormed * normed) / sizes.width
        _store(out["x"], t, (dnormed - normed * along) * rrms, mask)
        terms = {"norm_scale": dn * normed, "fast_scale": dy * n, "fast_offset": dy}
        return {name: sums[name] + term for name, term in terms.items()}

    zeros = {name: jnp.zeros(sizes.tile, jnp.float32) for name in _VECTORS}
    for name, total in jax.lax.fori_loop(0, sizes.run, token, zeros).items():
        _store(out[name], ..., total, reader.exists_MHK)
