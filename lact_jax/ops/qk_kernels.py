"""All that stands between the q and k projections and their readers, as one Triton kernel.

    n = RMSNorm(z + bias) over D, z the matmul's output
    window attention reads   RoPE(n)
    the fast weights read    RoPE(y) / (|y| + eps),   y = n * fast_scale + fast_offset, |y| over E

A training sequence of ar_chunk3f passes 93 million numbers each of q and k through this in every
layer. XLA takes a pass over memory for every reduction, rotation and regrouping; here the forward
pass reads z once, and the backward pass z and the cotangents. The plain form is in `models.lact`
and `models.layers`, and the tests hold both to each other.

Beside memory, instructions and exchanges between warps bound such kernels. So they have a loop for
every set of readers (`in_own_case`), few warps share a token, and all of its numbers are on their
way before the first sum over them.

Letters: B batch, C chunks, S tokens of a chunk, D width, N attention heads, K head width,
P = K / 2, M fast-weight heads, E their width (ME = NK = D), L as in `qk_tiles`.
"""

from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp

from lact_jax.ops.chunk_kernels import (
    ChunkRange,
    Ranges,
    call_by_name,
    exists,
    in_own_case,
    load,
    multiply_add,
    own_tokens,
    store,
)
from lact_jax.ops.qk_tiles import BACKWARD, FORWARD, MAX_LANES, SUMS, Program, Sizes

_VECTORS = "bias", "norm_scale", "fast_scale", "fast_offset"
_EVERY = slice(None)


@dataclass(frozen=True)
class QKOptions:
    """What `window_and_fast` makes.

    Attributes:
      fast_heads: M.
      eps: of the RMSNorm.
      l2_eps: added to the L2 norm.
      window, fast: the range of chunks of every array of outputs. Arrays that are read apart are
        written apart, which spares the copies that slicing one would take.
      joined: the two ranges of every further array for window attention: each of its places has
        the tokens of a chunk of the first range, then those of the second range's chunk. The ranges
        are equally long, and the first ends before the second.
      interpret: run on any device, slowly.
    """

    fast_heads: int
    eps: float
    l2_eps: float
    window: tuple[ChunkRange, ...]
    fast: tuple[ChunkRange, ...]
    joined: tuple[tuple[ChunkRange, ChunkRange], ...] = ()
    interpret: bool = False

    def __post_init__(self):
        for past, own in self.joined:
            if past[1] - past[0] != own[1] - own[0] or past[1] > own[0]:
                raise ValueError(f"can't join the chunks {past} with {own}")

    @property
    def of_window(self) -> tuple[Ranges, ...]:
        """The chunks of every array for window attention."""
        return (*((chunks,) for chunks in self.window), *self.joined)

    @property
    def of_fast(self) -> tuple[Ranges, ...]:
        """The chunks of every array for the fast weights."""
        return tuple((chunks,) for chunks in self.fast)


def fits(num_heads: int, head_dim: int, fast_heads: int) -> bool:
    """Whether the kernels take N heads of K numbers in M fast heads: whole heads in each, and no
    more numbers of a token than registers hold."""
    if num_heads % fast_heads:
        return False
    sizes = Sizes.of((1, 1, 1, num_heads * head_dim), head_dim, fast_heads, BACKWARD)
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
      Two tuples of arrays in z's dtype: for window attention (B, C', S, N, K) of each range, then
      (B, C', 2 S, N, K) of each two that are joined; for the fast weights (B, C', M, S, E) of each
      range.
    """
    vectors = norm_scale_D, fast_scale_D, fast_offset_D
    return _forward(z_BCSD, bias_D, rotation_CSP2, *vectors, options)[0]


def _forward(z_BCSD, bias_D, rotation_CSP2, norm_scale_D, fast_scale_D, fast_offset_D, options):
    residuals = z_BCSD, bias_D, rotation_CSP2, norm_scale_D, fast_scale_D, fast_offset_D
    sizes, arrays = _inputs(residuals, options, FORWARD)
    like = partial(jax.ShapeDtypeStruct, dtype=z_BCSD.dtype)
    out = {
        "window": [like(sizes.window_shape(ranges)) for ranges in options.of_window],
        "fast": [like(sizes.fast_shape(ranges)) for ranges in options.of_fast],
    }
    out = _run(_forward_kernel, arrays, out, sizes, options)
    window = tuple(
        x.reshape(x.shape[0], -1, len(ranges) * sizes.tokens, sizes.heads, sizes.head_dim)
        for x, ranges in zip(out["window"], options.of_window, strict=True)
    )
    fast = tuple(x.reshape(*x.shape[:4], -1) for x in out["fast"])
    return (window, fast), residuals


def _backward(options, residuals, cotangents):
    z_BCSD, bias_D, _, norm_scale_D, fast_scale_D, _ = residuals
    sizes, arrays = _inputs(residuals, options, BACKWARD)
    window, fast = (
        [x.reshape(shape(ranges)) for x, ranges in zip(arrays, of_arrays, strict=True)]
        for arrays, of_arrays, shape in zip(
            cotangents,
            (options.of_window, options.of_fast),
            (sizes.window_shape, sizes.fast_shape),
            strict=True,
        )
    )
    arrays |= {"window": window, "fast": fast}
    out = {
        "z": jax.ShapeDtypeStruct(arrays["z"].shape, z_BCSD.dtype),
        "sums": jax.ShapeDtypeStruct(sizes.sums_shape, jnp.float32),
    }
    out = _run(_backward_kernel, arrays, out, sizes, options)
    sums = jnp.sum(out["sums"], axis=(0, 1, 2)).reshape(SUMS, -1)
    dbias_D, window_D, fast_D, doffset_D = sums
    # The scales are factors of every token's term, so they wait until all are added up.
    dscales = window_D + fast_scale_D * fast_D, norm_scale_D * fast_D
    return out["z"].reshape(z_BCSD.shape), dbias_D.astype(bias_D.dtype), None, *dscales, doffset_D


window_and_fast.defvjp(_forward, _backward)


def _inputs(residuals: tuple, options: QKOptions, program: Program) -> tuple[Sizes, dict]:
    """The sizes, and the arrays that both passes read by name."""
    z_BCSD, bias_D, rotation_CSP2, *vectors_D = residuals
    head_dim = 2 * rotation_CSP2.shape[2]
    sizes = Sizes.of(z_BCSD.shape, head_dim, options.fast_heads, program)
    vectors = dict(zip(_VECTORS, (bias_D, *vectors_D), strict=True))
    return sizes, {
        "z": z_BCSD.reshape(sizes.window_shape(sizes.all_chunks)),
        "rotation": rotation_CSP2.reshape(*rotation_CSP2.shape[:2], head_dim),
        **{name: vector_D.reshape(sizes.token) for name, vector_D in vectors.items()},
    }


def _run(kernel, arrays: dict, out: dict, sizes: Sizes, options: QKOptions) -> dict:
    """Calls a kernel with arrays by name; what it makes, by name."""
    blocks = {
        "z": sizes.window_block(sizes.all_chunks),
        "rotation": sizes.rotation_block(),
        "window": list(map(sizes.window_block, options.of_window)),
        "fast": list(map(sizes.fast_block, options.of_fast)),
        "sums": sizes.sums_block(),
        **dict.fromkeys(_VECTORS, sizes.vector_block()),
    }
    return call_by_name(
        kernel, arrays, out, blocks, blocks,
        sizes=sizes, options=options, warps=sizes.warps, name="qk",
    )  # fmt: skip


# The kernels. They hold a token as a list of pieces (M, L).


def _of_readers(body, arrays: dict, sizes: Sizes, options: QKOptions) -> None:
    """Runs body(window, fast) with those of the readers' arrays that have this program's chunk."""
    window, fast = (arrays["window"], options.of_window), (arrays["fast"], options.of_fast)
    in_own_case(body, sizes.chunks, window, fast)


def _window_at(t):
    """Where a piece of token t is in a block with the layout of attention."""
    return lambda piece: (t, _EVERY, piece)


def _fast_at(t):
    """Where a piece of token t is in a block with the layout of the fast weights."""
    return lambda piece: (_EVERY, t, piece)


class _Tokens:
    """Reads and writes tokens for both kernels, and does what both do with one."""

    def __init__(self, refs: dict, sizes: Sizes, options: QKOptions):
        self.refs, self.sizes, self.options = refs, sizes, options
        self.exists_ML = exists(sizes.tile, sizes.piece)

    def load(self, ref, at) -> list[jax.Array]:
        return [load(ref, at(i), self.exists_ML) for i in range(self.sizes.pieces)]

    def store(self, refs: list, at, pieces: list[jax.Array]) -> None:
        """To each of the arrays. A piece is done with before the next: so few registers wait."""
        for i, piece in enumerate(pieces):
            for ref in refs:
                store(ref, at(i), piece, self.exists_ML)

    def vector(self, name: str) -> list[jax.Array]:
        """A parameter. Read for every token, from cache: there are no registers left for it."""
        return self.load(self.refs[name], lambda piece: (_EVERY, piece))

    def rotation(self, t) -> tuple[jax.Array, jax.Array]:
        """cos and sin of every pair of a piece: (M, L / 2) each. A thread reads those of its own
        pairs, which spares an exchange between threads."""
        lane_ML = jax.lax.broadcasted_iota(jnp.int32, self.sizes.tile, 1)
        of_head_ML = jax.lax.rem(lane_ML, jnp.int32(self.sizes.head_dim))
        return _halves(load(self.refs["rotation"], (t, of_head_ML), self.exists_ML))

    def add_product(self, a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        """a b + c; a has the shape of all."""
        b, c = (jnp.broadcast_to(x, a.shape) for x in (b, c))
        return multiply_add(a, b, c, self.options.interpret)

    def products(self, a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
        """The sum of a b over the pieces: (M, L)."""
        rest = zip(a[1:], b[1:], strict=True)
        return reduce(lambda total, pair: self.add_product(*pair, total), rest, a[0] * b[0])

    def rotate(self, pieces: list[jax.Array], cos, sin) -> list[jax.Array]:
        """`ops.rope.apply_rope` of one token; its transpose with the negative of sin."""

        def piece(x_ML):
            even, odd = _halves(x_ML)
            even, odd = (
                self.add_product(odd, -sin, even * cos),
                self.add_product(even, sin, odd * cos),
            )
            return _joined(even, odd).reshape(x_ML.shape)

        return list(map(piece, pieces))

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
        """What the fast weights read, before RoPE and L2 norm."""
        return list(map(self.add_product, n, self.vector("fast_scale"), self.vector("fast_offset")))

    def dy(self, y: list[jax.Array], dfast: list[jax.Array]) -> list[jax.Array]:
        """The cotangent of y from that of the fast weights' input with RoPE undone: it keeps norms
        and products, so that y need not be rotated."""
        squares, along = _for_each(self.products(y, y), self.products(dfast, y))
        norm = jnp.sqrt(squares)
        factor = 1 / (norm + self.options.l2_eps)
        along = -along * factor * factor / jnp.where(norm > 0, norm, 1.0)
        return [self.add_product(x, along, dx * factor) for x, dx in zip(y, dfast, strict=True)]


def _forward_kernel(refs, out, *, sizes: Sizes, options: QKOptions):
    tokens, count = _Tokens(refs, sizes, options), own_tokens(sizes)

    def own_case(window, fast):
        """This program's tokens, for the readers that they have."""

        def token(t, carry):
            """Token t of this program, from its loads to its stores; nothing is carried."""
            cos, sin = tokens.rotation(t)
            _, _, n = tokens.normed(tokens.load(refs["z"], _window_at(t)))
            if window:
                tokens.store(window, _window_at(t), tokens.rotate(n, cos, sin))
            if fast:
                y = tokens.y(n)
                (squares,) = _for_each(tokens.products(y, y))
                factor = 1 / (jnp.sqrt(squares) + options.l2_eps)
                rotated = tokens.rotate([piece * factor for piece in y], cos, sin)
                tokens.store(fast, _fast_at(t), rotated)
            return carry

        jax.lax.fori_loop(0, count, token, None)

    _of_readers(own_case, out, sizes, options)


def _backward_kernel(refs, out, *, sizes: Sizes, options: QKOptions):
    tokens, count = _Tokens(refs, sizes, options), own_tokens(sizes)
    add_product = tokens.add_product
    zeros = [jnp.zeros(sizes.tile, jnp.float32)] * sizes.pieces

    def own_case(window, fast):
        """The gradients of this program's tokens, from the readers that they have."""

        def cotangent(arrays, at) -> list[jax.Array]:
            """A token's, from all arrays that have it."""
            parts = [tokens.load(ref, at) for ref in arrays]
            return reduce(lambda a, b: list(map(jnp.add, a, b)), parts) if parts else zeros

        def token(t, sums):
            """Token t of this program: stores its dz, adds its terms to the sums. These are dz,
            the two readers' cotangents of n and of y times x / rms(x), and that of y."""
            sum_dz, sum_window, sum_fast, sum_dy = sums
            cos, sin = tokens.rotation(t)
            z = tokens.load(refs["z"], _window_at(t))
            dwindow, dfast = cotangent(window, _window_at(t)), cotangent(fast, _fast_at(t))
            rrms, normed, n = tokens.normed(z)
            dn = zeros
            if window:
                dn = tokens.rotate(dwindow, cos, -sin)
                sum_window = list(map(add_product, dn, normed, sum_window))
            if fast:
                dy = tokens.dy(tokens.y(n), tokens.rotate(dfast, cos, -sin))
                dn = list(map(add_product, dy, tokens.vector("fast_scale"), dn))
                sum_fast = list(map(add_product, dy, normed, sum_fast))
                sum_dy = list(map(jnp.add, dy, sum_dy))
            dnormed = list(map(jnp.multiply, dn, tokens.vector("norm_scale")))
            along = _for_all(tokens.products(dnormed, normed)) * (-1 / sizes.width)
            dz = [add_product(x, along, dx) * rrms for x, dx in zip(normed, dnormed, strict=True)]
            tokens.store([out["z"]], _window_at(t), dz)
            return list(map(jnp.add, dz, sum_dz)), sum_window, sum_fast, sum_dy

        sums = jax.lax.fori_loop(0, count, token, (zeros,) * SUMS)
        for place, total in enumerate(sums):
            tokens.store([out["sums"]], partial(_sum_at, place), total)

    _of_readers(own_case, refs, sizes, options)


def _sum_at(place: int, piece: int) -> tuple:
    return place, _EVERY, piece


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The even and the odd numbers of the last axis. What a thread has in pairs it splits without
    an exchange; a kernel can't index an array."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    halves = jax.lax.split(pairs, (1, 1), axis=x.ndim)
    return tuple(half.reshape(pairs.shape[:-1]) for half in halves)


def _joined(*halves: jax.Array) -> jax.Array:
    """(..., 2)."""
    return jnp.concatenate([half[..., None] for half in halves], axis=-1)


def _for_each(*sums: jax.Array) -> tuple[jax.Array, ...]:
    """One or two (M, L) summed over each fast head, in one exchange: (M, 1) each."""
    if len(sums) == 1:
        totals = (jnp.sum(sums[0], axis=1),)
    else:
        totals = (half.reshape(-1) for half in _halves(jnp.sum(_joined(*sums), axis=1)))
    return tuple(total_M[:, None] for total_M in totals)


def _for_all(x_ML: jax.Array) -> jax.Array:
    """The sum over all, a scalar."""
    return jnp.sum(x_ML.reshape(-1))
