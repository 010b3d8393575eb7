"""A scan over layers that keeps what its backward pass reads in arrays that nobody fills first.

`jax.lax.scan` does the same, but first writes zeros to every array that its steps will write: 70 GB
in a training step of ar_chunk3f. Its tests hold both to each other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

# By these names a program shows what its forward pass keeps, and which loop is the backward pass.
KEPT, GRADIENT = "kept of a layer", "gradient of a layer"


def scan_layers(body: Callable, carry: Any, layers: Any) -> tuple[Any, Any]:
    """jax.lax.scan(body, carry, layers), differentiated layer by layer.

    Args:
      body: (carry, layer) -> (carry, output). It may use arrays from around it. What is kept of a
        layer for the backward pass is what `jax.vjp` keeps: a policy of `jax.checkpoint` decides.
      carry: float arrays.
      layers: arrays with a leading axis of layers. One that is differentiated but not read by
        `body` gets a gradient of zeros, which is written and added like any other.

    Returns:
      The last carry, and the outputs with a leading axis of layers.
    """
    layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), layers)
    body, around = jax.closure_convert(body, carry, layer)
    return _scan(body, around, carry, layers)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(body, around, carry, layers):
    return jax.lax.scan(lambda carry, layer: body(carry, layer, *around), carry, layers)


@dataclass(frozen=True)
class _Argument:
    """Which leaves of an argument are differentiated, and how to put them beside the others."""

    structure: Any
    moves: tuple[bool, ...]

    @classmethod
    def split(cls, primals: Any) -> tuple["_Argument", list, list]:
        """(what it is, the leaves that are differentiated, the others)."""
        leaves, structure = jax.tree.flatten(primals, is_leaf=_is_primal)
        moved = [leaf.value for leaf in leaves if leaf.perturbed]
        fixed = [leaf.value for leaf in leaves if not leaf.perturbed]
        return cls(structure, tuple(leaf.perturbed for leaf in leaves)), moved, fixed

    def join(self, moved: list, fixed: list | None = None) -> Any:
        """The argument; without `fixed`, its cotangent from those of the leaves that move."""
        moved, fixed = iter(moved), iter(fixed or [None] * len(self.moves))
        return self.structure.unflatten([next(moved if m else fixed) for m in self.moves])


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("arrays",),
    meta_fields=("around", "layers", "places", "transpose", "length"),
)
@dataclass(frozen=True)
class _Kept:
    """What the backward pass reads.

    Attributes:
      arrays: lists by name: 'around' the body; 'layers' and what they 'kept', stacked.
      around, layers: what the arguments are.
      places: name and index of every array that a layer's transpose reads.
      transpose: the tree of that transpose, which is a function.
      length: number of layers.
    """

    arrays: dict[str, list[jax.Array]]
    around: _Argument
    layers: _Argument
    places: tuple[tuple[str, int], ...]
    transpose: Any
    length: int

    def transpose_of(self, i: jax.Array) -> Callable:
        """The transpose of layer i."""

        def find(name, k):
            array = self.arrays[name][k]
            return array if name == "around" else _take(array, i)

        return jax.tree.unflatten(self.transpose, [find(*place) for place in self.places])


def _scan_fwd(body, around, carry, layers):
    around, *around_arrays = _Argument.split(around)
    layers, *layer_arrays = _Argument.split(layers)
    carry = jax.tree.map(lambda x: x.value, carry, is_leaf=_is_primal)
    arrays = {"around": sum(around_arrays, []), "layers": sum(layer_arrays, [])}
    length, found = len(arrays["layers"][0]), {}

    def forward(carry, i):
        """Layer i: its carry, its output, and what it keeps; `found` says where that goes."""
        moved, fixed = ([_take(x, i) for x in arrays] for arrays in layer_arrays)

        def function(shared, carry, own):
            shared = around.join(shared, around_arrays[1])
            return body(carry, layers.join(own, fixed), *shared)

        (carry, output), transpose = jax.vjp(function, around_arrays[0], carry, moved)
        reads, found["transpose"] = jax.tree.flatten(transpose)
        places = {id(x): ("around", k) for k, x in enumerate(arrays["around"])}
        places |= {id(x): ("layers", k) for k, x in enumerate(moved + fixed)}
        kept = {id(x): x for x in reads if id(x) not in places}
        places |= {key: ("kept", k) for k, key in enumerate(kept)}
        found["places"] = tuple(places[id(x)] for x in reads)
        return carry, (output, [checkpoint_name(x, KEPT) for x in kept.values()])

    def step(i, state):
        carry, stacks = state
        carry, values = forward(carry, i)
        return carry, jax.tree.map(partial(_put, i=i), stacks, values)

    _, shapes = jax.eval_shape(forward, carry, jnp.int32(0))
    start = carry, jax.tree.map(partial(_empty, length), shapes)
    carry, (outputs, arrays["kept"]) = jax.lax.fori_loop(0, length, step, start)
    return (carry, outputs), _Kept(arrays, around, layers, length=length, **found)


def _scan_bwd(body, kept, cotangents):
    del body
    dcarry, doutputs = cotangents
    dcarry = jax.tree.map(lambda x: _zeros(x) if _is_zero(x) else x, dcarry, is_leaf=_is_zero)

    def backward(dcarry, i):
        """Cotangents of what is around, of layer i's carry, and of layer i."""

        def of_layer(x):
            return jnp.zeros(x.shape[1:], x.dtype) if _is_zero(x) else _take(x, i)

        return kept.transpose_of(i)((dcarry, jax.tree.map(of_layer, doutputs, is_leaf=_is_zero)))

    def step(j, state):
        i = kept.length - 1 - j
        daround, dcarry, dlayers = state
        more, dcarry, own = checkpoint_name(backward(dcarry, i), GRADIENT)
        daround = jax.tree.map(jnp.add, daround, more)
        return daround, dcarry, jax.tree.map(partial(_put, i=i), dlayers, own)

    around, _, own = jax.eval_shape(backward, dcarry, jnp.int32(0))
    start = jax.tree.map(_zeros, around), dcarry, jax.tree.map(partial(_empty, kept.length), own)
    daround, dcarry, dlayers = jax.lax.fori_loop(0, kept.length, step, start)
    return kept.around.join(daround), dcarry, kept.layers.join(dlayers)


_scan.defvjp(_scan_fwd, _scan_bwd, symbolic_zeros=True)


def _take(stack: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)


def _put(stack: jax.Array, value: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value, i, 0)


def _empty(length: int, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.lax.empty((length, *like.shape), like.dtype)


def _zeros(like: Any) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype)


def _is_primal(x: Any) -> bool:
    return isinstance(x, CustomVJPPrimal)


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)
