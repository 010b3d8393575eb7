"""What kernels over chunks of the sequence share: runs of tokens, masked access, ranges of chunks.

Triton takes only blocks whose sides are powers of two, so blocks are padded and masked. Arrays that
are read or written apart have a range of the chunks each; of those that lack its own chunk a
program is given some block, which it leaves alone (`in_own_case`).
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

ChunkRange = tuple[int, int]  # the first chunk and the end
# The chunks of an array: one range, or several with their chunks in turn (`place_in_turn`).
Ranges = tuple[ChunkRange, ...]

# Tokens that a program goes through, one at a time, where its kernel says no other number. With 60,
# 13 chunks of 4680 tokens are 1014 programs, too few to keep an H200 busy to the end.
TOKENS = 20


@dataclass(frozen=True)
class TokenRuns:
    """A program has a run of tokens of one chunk: the grid is (runs, C, B)."""

    batch: int
    chunks: int
    tokens: int

    @property
    def longest_run(self) -> int:
        """No program has more tokens."""
        return TOKENS

    @property
    def run(self) -> int:
        """Tokens of a program."""
        return min(self.longest_run, self.tokens)

    @property
    def grid(self) -> tuple[int, int, int]:
        return pl.cdiv(self.tokens, self.run), self.chunks, self.batch


def call_by_name(
    kernel: Callable, arrays: dict, out: dict, in_blocks: dict, out_blocks: dict, *,
    sizes: TokenRuns, options, warps: int, name: str,
) -> dict:  # fmt: skip
    """Runs kernel(arrays, out, sizes=..., options=...) over `sizes.grid`; what it makes, by name.

    Args:
      kernel: ends in `_kernel`; profiles call it by `name` and what stands before that.
      arrays, out: inputs, and shapes and types of outputs, by name.
      in_blocks, out_blocks: BlockSpecs by name; there may be more than are used.
      sizes, options: of the kernel; `options.interpret` runs it on any device, slowly.
      warps: of a program.
    """
    call = pl.pallas_call(
        partial(kernel, sizes=sizes, options=options),
        grid=sizes.grid,
        in_specs=[{name: in_blocks[name] for name in arrays}],
        out_specs={name: out_blocks[name] for name in out},
        out_shape=out,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=options.interpret,
        name=name + kernel.__name__.removesuffix("_kernel"),
    )
    return call(arrays)


def exists(padded: tuple[int, ...], sizes: tuple[int, ...]) -> jax.Array:
    """Which lanes of a padded tile are not padding."""
    lanes_exist = jnp.full(padded, True)
    for axis, (lanes, size) in enumerate(zip(padded, sizes, strict=True)):
        if lanes > size:
            lanes_exist &= jax.lax.broadcasted_iota(jnp.int32, padded, axis) < size
    return lanes_exist


@dataclass(frozen=True)
class OneOf:
    """Arrays of one kind, of which a program has the one at `which`."""

    refs: tuple
    which: jax.Array


def in_own_case(body: Callable, chunks: int, *groups: tuple[list, Sequence[Ranges]]) -> None:
    """Runs body(arrays, ...), for each group with those of its arrays that have this program's
    chunk, which the grid's second axis counts. They may be `OneOf`, for `load` and `store`.

    The body is compiled once for each run of chunks with as many arrays of the same lengths: so a
    program computes nothing that nobody reads, and has no instructions that a mask turns off.

    Args:
      body: it gets a list for each group.
      chunks: C.
      groups: arrays, and the chunks of each.
    """
    ranges = itertools.chain(*(of_array for _, of_arrays in groups for of_array in of_arrays))
    starts = sorted({0, chunks, *itertools.chain(*ranges)})

    def own_arrays(chunk: int) -> list[list]:
        """Those that have the chunk, with the numbers of their chunks."""
        return [
            [
                (ref, num_chunks(of_array))
                for ref, of_array in zip(refs, of_arrays, strict=True)
                if any(first <= chunk < end for first, end in of_array)
            ]
            for refs, of_arrays in groups
        ]

    def numbers(chunk: int) -> list[list[int]]:
        return [[number for _, number in arrays] for arrays in own_arrays(chunk)]

    own = pl.program_id(1)
    for _, run in itertools.groupby(starts[:-1], key=numbers):
        run = list(run)
        end = starts[starts.index(run[-1]) + 1]
        lists = [
            [_one_of([ref for ref, _ in each], run, own) for each in zip(*arrays, strict=True)]
            for arrays in zip(*map(own_arrays, run), strict=True)
        ]
        pl.when((run[0] <= own) & (own < end))(partial(body, *lists))


def _one_of(refs: list, starts: list[int], own: jax.Array):
    """The array of chunk `own`, where each has the chunks from one of the starts to the next."""
    changes = [i for i in range(len(refs)) if i == 0 or refs[i] is not refs[i - 1]]
    if len(changes) == 1:
        return refs[0]
    which = sum((starts[i] <= own).astype(jnp.int32) for i in changes[1:])
    return OneOf(tuple(refs[i] for i in changes), which)


def num_chunks(ranges: Ranges) -> int:
    """How many chunks an array has."""
    return sum(end - first for first, end in ranges)


def place(chunk: jax.Array, chunks: ChunkRange) -> jax.Array:
    """A chunk's place in an array of the range `chunks`, or some place where it has none."""
    first, end = chunks
    return jnp.minimum(jnp.maximum(chunk - first, 0), end - first - 1)


def place_in_turn(chunk: jax.Array, ranges: tuple[ChunkRange, ...]) -> jax.Array:
    """`place` in an array that has the first chunk of every range, then the second of every range,
    and so on. The ranges are equally long, and each ends before the next."""
    places = [place(chunk, chunks) * len(ranges) + i for i, chunks in enumerate(ranges)]
    result = places[0]
    for (first, _), other in zip(ranges[1:], places[1:], strict=True):
        result = jnp.where(first <= chunk, other, result)
    return result


def _at(ref, index: tuple):
    # Interpreted, JAX 0.10 takes no plain integers beside a mask.
    return ref.at[tuple(jnp.int32(i) if isinstance(i, int) else i for i in index)]


def multiply_add(a: jax.Array, b: jax.Array, c: jax.Array, interpret: bool) -> jax.Array:
    """a b + c in float32, one instruction where XLA lets Triton make two. Arrays of one shape."""
    if interpret:
        return a * b + c
    (result,) = triton.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=(a, b, c),
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=(jax.ShapeDtypeStruct(a.shape, jnp.float32),),
    )
    return result


def own_tokens(sizes: TokenRuns) -> jax.Array:
    """How many tokens of its run this program has: the last run of a chunk may be shorter."""
    return jnp.minimum(sizes.run, sizes.tokens - pl.program_id(0) * sizes.run)


def load(ref, index: tuple, mask) -> jax.Array:
    """The block's numbers in float32, with zeros where the mask is False."""
    if isinstance(ref, OneOf):
        return jax.lax.switch(ref.which, [partial(load, one, index, mask) for one in ref.refs])
    return triton.load(_at(ref, index), mask=mask, other=0.0).astype(jnp.float32)


def store(ref, index: tuple, value: jax.Array, mask) -> None:
    """Stores in the type of `ref` where the mask is True."""
    if isinstance(ref, OneOf):
        for i, one in enumerate(ref.refs):
            pl.when(ref.which == i)(partial(store, one, index, value, mask))
        return
    triton.store(_at(ref, index), value.astype(ref.dtype), mask=mask)
