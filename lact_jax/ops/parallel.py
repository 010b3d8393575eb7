"""What devices exchange where one computation is cut over a mesh: the only collectives there are.

The model runs inside one `jax.shard_map` (models/sharded.py): every device computes on its own
clips and its own tokens of every chunk. What needs more than that calls a function of this file.
Outside of such a region, and on axes of one device, each function is the identity or the plain
computation, so one device compiles what it would without this file.

Tokens of a chunk are cut in order: device i of `seq` has the i-th of equal runs.

Letters: S tokens of a chunk, N attention heads, K head width; "..." any leading axes.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

AXES = ("data", "fsdp", "seq")
BATCH_AXES = ("data", "fsdp")
SEQ = "seq"
TOKEN_AXIS = -3  # of (..., S, N, K)
HEAD_AXIS = -2


def mesh_shape() -> dict[str, int] | None:
    """Devices along each of AXES of the mesh that is being traced for; None without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.axis_names) != set(AXES):
        return None
    return dict(mesh.shape)


def inside() -> bool:
    """Whether what is being traced is one device's part of a computation."""
    return mesh_shape() is not None and bool(jax.sharding.get_abstract_mesh().manual_axes)


def seq_size() -> int:
    """Devices that share the tokens of a chunk: 1 outside of a device's part."""
    return mesh_shape()[SEQ] if inside() else 1


def batch_axes(batch: int) -> tuple[str, ...]:
    """The mesh axes that a batch is cut over: both, where it divides; else one; else none, and
    each device computes all of it."""
    shape = mesh_shape()
    choices = (BATCH_AXES, *((name,) for name in BATCH_AXES))
    fitting = (c for c in choices if batch % math.prod(shape[name] for name in c) == 0)
    return next(fitting, ())


def cut_clips(x: jax.Array, axis: int) -> jax.Array:
    """x, its clips along `axis` cut over the devices that share a batch; for outside of a device's
    part, where the compiler would choose for itself."""
    if mesh_shape() is None:
        return x
    spec = PartitionSpec(*(None,) * axis, batch_axes(x.shape[axis]))
    return jax.lax.with_sharding_constraint(x, spec)


# Sums and means.


def sum_over_tokens(tree: Any) -> Any:
    """Sums over the tokens of a chunk, from each device's sum over its own; one collective."""
    return jax.lax.psum(tree, SEQ) if seq_size() > 1 else tree


def mean_over_tokens(x: jax.Array, axis: int) -> jax.Array:
    """Mean along the token axis, over all tokens of the chunk."""
    mean = jnp.mean(x, axis=axis)
    return jax.lax.pmean(mean, SEQ) if seq_size() > 1 else mean


def mean_over_devices(tree: Any) -> Any:
    """Mean of what devices have computed each from their clips and tokens, which are as many."""
    return jax.lax.pmean(tree, AXES) if inside() else tree


# Tokens.


def check_tokens(tokens: int, size: int) -> None:
    """Raises ValueError unless `size` devices can share the tokens of a chunk evenly."""
    if tokens % size:
        raise ValueError(
            f"a chunk has {tokens} tokens, which the {size} devices of mesh.seq can't share "
            "evenly: choose a mesh.seq that divides it, or another height, width or "
            "objective.frames_per_chunk"
        )


def own_tokens(x: jax.Array, axis: int) -> jax.Array:
    """This device's tokens of an array that has all of them along `axis`."""
    size = seq_size()
    check_tokens(x.shape[axis], size)
    if size == 1:
        return x
    own = x.shape[axis] // size
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(SEQ) * own, own, axis)


def all_tokens(x: jax.Array, axis: int) -> jax.Array:
    """All tokens along `axis`, from each device's own."""
    if seq_size() == 1:
        return x
    return jax.lax.all_gather(x, SEQ, axis=axis % x.ndim, tiled=True)


# Attention.


def head_axis(num_heads: int) -> str | None:
    """The mesh axis over which `attend_to_whole_chunks` cuts heads, for the caches that keep what
    it kept; None where heads don't divide (or there is one device), and all are everywhere."""
    shape = mesh_shape()
    return SEQ if shape and shape[SEQ] > 1 and num_heads % shape[SEQ] == 0 else None


def head_share(num_heads: int) -> int:
    """Into how many parts heads are cut where `attend_to_whole_chunks` runs attention."""
    return seq_size() if head_axis(num_heads) else 1


def attend_to_whole_chunks(attention: Callable, q: jax.Array, k: jax.Array, v: jax.Array):
    """Runs `attention` with all tokens of every chunk in its keys and values.

    Where devices can share the heads evenly, each exchanges its tokens of all heads for all tokens
    of some heads (all-to-all), and the output back. Where they can't, keys and values are gathered
    and each device keeps its own queries.

    Args:
      attention: (q, k, v) -> (o shaped like q, anything); it may see fewer heads, or fewer queries
        than keys.
      q, k, v: (..., S, N, K), this device's tokens; or tuples of such arrays, with equal heads.

    Returns:
      What `attention` does; o holds this device's tokens again.
    """
    if seq_size() == 1:
        return attention(q, k, v)
    if head_axis(jax.tree.leaves(q)[0].shape[HEAD_AXIS]) is None:
        return attention(q, *jax.tree.map(partial(all_tokens, axis=TOKEN_AXIS), (k, v)))

    def exchange(tree, split: int, concat: int):
        def of_array(x):
            return jax.lax.all_to_all(x, SEQ, x.ndim + split, x.ndim + concat, tiled=True)

        return jax.tree.map(of_array, tree)

    o, kept = attention(*exchange((q, k, v), HEAD_AXIS, TOKEN_AXIS))
    return exchange(o, TOKEN_AXIS, HEAD_AXIS), kept


# Parameters.


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(x: jax.Array, axes: tuple[str, ...], dim: int, dtype) -> jax.Array:
    """The whole of a parameter of which this device has a part, cut along `dim` over `axes`.

    It travels in `dtype`. Its gradient is summed in the parameter's own (float32) while it is
    scattered, so that it does not lose more the more devices there are.
    """
    return jax.lax.all_gather(x.astype(dtype), axes, axis=dim, tiled=True)


def _gather_fwd(x, axes, dim, dtype):
    return gather(x, axes, dim, dtype), jnp.zeros((), x.dtype)


def _gather_bwd(axes, dim, dtype, like, grad):
    del dtype
    grad = grad.astype(like.dtype)
    return (jax.lax.psum_scatter(grad, axes, scatter_dimension=dim, tiled=True),)


gather.defvjp(_gather_fwd, _gather_bwd)


def is_computed_here(primitive, *_, **options) -> bool:
    """A checkpoint policy: all may be saved but what is gathered from other devices."""
    called = options.get("call_jaxpr")  # where the primitive is a call of `gather`
    names = {equation.primitive.name for equation in called.eqns} if called else set()
    return "all_gather" not in names | {primitive.name}
