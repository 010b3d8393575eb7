"""Layers run one after another, by a loop or without, so that their backward pass is cheap.

`jax.lax.scan` first writes zeros to every array that its steps will write: 70 GB in a training step
of ar_chunk3f. `scan_layers` is a scan that leaves that out. `unroll_layers` calls the passes of one
layer instead of having a loop, and `pieces.Pieces` makes programs of them: what a layer keeps stays
where it was computed and is not copied to a stack and back. The tests hold both to `jax.lax.scan`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

# By these names a program shows what its forward pass keeps, and which loop is the backward pass.
KEPT, GRADIENT = "kept of a layer", "gradient of a layer"
# Names of the jitted functions that `unroll_layers` calls for each layer's passes.
PASSES = ("layer_forward", "layer_backward")


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
    body, around = jax.closure_convert(body, carry, _one_of(layers))
    return _scan(body, (around,), carry, layers)


def unroll_layers(bodies: Sequence[Callable], carry: Any, layers: Any) -> tuple[Any, Any]:
    """`scan_layers` without a loop, with a body for each layer.

    Differentiated, it calls jitted functions, one for each of PASSES and kind of layer. It is meant
    for `Pieces`: as part of one program it is right as well, but takes minutes to compile, and XLA
    may keep what `jax.checkpoint` would have computed again.

    Args:
      bodies: functions of that kind for layer 0, 1, .. which compute the same and differ in what
        they keep. Those that are the same object are one kind.
      carry, layers: as there.

    Returns:
      As there.
    """
    own = list(dict.fromkeys(bodies))
    functions, around = zip(
        *(jax.closure_convert(body, carry, _one_of(layers)) for body in own), strict=True
    )
    kinds = tuple(own.index(body) for body in bodies)
    return _unroll(functions, kinds, around, carry, layers)


def _one_of(layers: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), layers)


@dataclass(frozen=True)
class _Argument:
    """Which leaves of an argument are differentiated, and how to put them beside the others."""

    structure: Any
    moves: tuple[bool, ...]

    @classmethod
    def split(cls, primals: Any) -> tuple["_Argument", list]:
        """(what it is, its leaves: first those that are differentiated, then the others)."""
        leaves, structure = jax.tree.flatten(primals, is_leaf=_is_primal)
        moved = [leaf.value for leaf in leaves if leaf.perturbed]
        fixed = [leaf.value for leaf in leaves if not leaf.perturbed]
        return cls(structure, tuple(leaf.perturbed for leaf in leaves)), moved + fixed

    def divide(self, leaves: list) -> tuple[list, list]:
        """Leaves in the order of `split` as those that are differentiated and the others."""
        return leaves[: sum(self.moves)], leaves[sum(self.moves) :]

    def join(self, moved: list, fixed: list | None = None) -> Any:
        """The argument; without `fixed`, its cotangent from those of the leaves that move."""
        moved, fixed = iter(moved), iter(fixed or [None] * len(self.moves))
        return self.structure.unflatten([next(moved if m else fixed) for m in self.moves])


@dataclass(frozen=True)
class _Layers:
    """The layers of a call, and how one of them is run and differentiated.

    Attributes:
      bodies: one for each kind of layer.
      around: what is around them: for each body the arrays that it takes from there.
      layers: what the stacked layers are.
      length: number of layers.
      transposes: for each kind the places (name and index) of the arrays that the transpose of a
        layer reads, and the tree of that transpose, which is a function. Filled by tracing a layer.
    """

    bodies: tuple[Callable, ...]
    around: _Argument
    layers: _Argument
    length: int
    transposes: dict = field(default_factory=dict, compare=False)

    def forward(self, kind: int, arrays: dict[str, list], carry: Any, i: jax.Array):
        """Layer i, of that kind: its carry, its output, and what it keeps.

        arrays: 'around' the bodies, and the stacked 'layers'.
        """
        own = [_take(x, i) for x in arrays["layers"]]
        moved, fixed = self.layers.divide(own)
        shared, constant = self.around.divide(arrays["around"])

        def function(shared, carry, moved):
            around = self.around.join(shared, constant)[kind]
            return self.bodies[kind](carry, self.layers.join(moved, fixed), *around)

        (carry, output), transpose = jax.vjp(function, shared, carry, moved)
        reads, structure = jax.tree.flatten(transpose)
        places = {id(x): ("around", k) for k, x in enumerate(arrays["around"])}
        places |= {id(x): ("layers", k) for k, x in enumerate(own)}
        kept = {id(x): x for x in reads if id(x) not in places}
        places |= {key: ("kept", k) for k, key in enumerate(kept)}
        self.transposes[kind] = tuple(places[id(x)] for x in reads), structure
        return carry, (output, [checkpoint_name(x, KEPT) for x in kept.values()])

    def backward(self, kind: int, arrays: dict[str, list], kept: list, cotangents: Any, i):
        """Cotangents of what is around, of layer i's carry, and of layer i.

        cotangents: of its carry and its output.
        """
        places, structure = self.transposes[kind]
        layers = [_take(x, i) for x in arrays["layers"]]
        found = {"around": arrays["around"], "layers": layers, "kept": kept}
        transpose = jax.tree.unflatten(structure, [found[name][k] for name, k in places])
        return checkpoint_name(transpose(cotangents), GRADIENT)


@partial(
    jax.tree_util.register_dataclass, data_fields=("arrays", "kept"), meta_fields=("call",)
)
@dataclass(frozen=True)
class _Residuals:
    """What the backward pass reads: the arrays of `_Layers.forward`, and what layers kept."""

    arrays: dict[str, list[jax.Array]]
    kept: list
    call: _Layers


def _start(bodies, around, carry, layers) -> tuple[_Layers, dict, Any]:
    """The call, the arrays of `_Layers.forward` and the first carry, of a fwd rule's arguments."""
    around, around_arrays = _Argument.split(around)
    layers, layer_arrays = _Argument.split(layers)
    carry = jax.tree.map(lambda x: x.value, carry, is_leaf=_is_primal)
    arrays = {"around": around_arrays, "layers": layer_arrays}
    return _Layers(bodies, around, layers, len(layer_arrays[0])), arrays, carry


def _of_carry(dcarry: Any) -> Any:
    """The cotangent of the last carry, with zeros in their places."""
    return jax.tree.map(lambda x: _zeros(x) if _is_zero(x) else x, dcarry, is_leaf=_is_zero)


def _of_layer(doutputs: Any, i: jax.Array) -> Any:
    """Layer i's part of the cotangent of the outputs."""

    def part(x):
        return jnp.zeros(x.shape[1:], x.dtype) if _is_zero(x) else _take(x, i)

    return jax.tree.map(part, doutputs, is_leaf=_is_zero)


# With a loop.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(body, around, carry, layers):
    return jax.lax.scan(lambda carry, layer: body(carry, layer, *around[0]), carry, layers)


def _scan_fwd(body, around, carry, layers):
    call, arrays, carry = _start((body,), around, carry, layers)
    forward = partial(call.forward, 0, arrays)

    def step(i, state):
        carry, stacks = state
        carry, values = forward(carry, i)
        return carry, jax.tree.map(partial(_put, i=i), stacks, values)

    _, shapes = jax.eval_shape(forward, carry, jnp.int32(0))
    start = carry, jax.tree.map(partial(_empty, call.length), shapes)
    carry, (outputs, kept) = jax.lax.fori_loop(0, call.length, step, start)
    return (carry, outputs), _Residuals(arrays, kept, call)


def _scan_bwd(body, residuals, cotangents):
    del body
    call, (dcarry, doutputs) = residuals.call, cotangents

    def backward(dcarry, i):
        kept = [_take(x, i) for x in residuals.kept]
        return call.backward(0, residuals.arrays, kept, (dcarry, _of_layer(doutputs, i)), i)

    def step(j, state):
        i = call.length - 1 - j
        daround, dcarry, dlayers = state
        more, dcarry, own = backward(dcarry, i)
        daround = jax.tree.map(jnp.add, daround, more)
        return daround, dcarry, jax.tree.map(partial(_put, i=i), dlayers, own)

    dcarry = _of_carry(dcarry)
    around, _, own = jax.eval_shape(backward, dcarry, jnp.int32(0))
    start = jax.tree.map(_zeros, around), dcarry, jax.tree.map(partial(_empty, call.length), own)
    daround, dcarry, dlayers = jax.lax.fori_loop(0, call.length, step, start)
    return call.around.join(daround), dcarry, call.layers.join(dlayers)


_scan.defvjp(_scan_fwd, _scan_bwd, symbolic_zeros=True)


# Without a loop. What the calls pass on is all that stands between them: it would be a program.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _unroll(bodies, kinds, around, carry, layers):
    # Kinds of layers differ in what they keep alone, and here nothing is kept.
    return _scan(bodies[0], around, carry, layers)


def _unroll_fwd(bodies, kinds, around, carry, layers):
    call, arrays, carry = _start(bodies, around, carry, layers)

    def layer_forward(kind, arrays, carry, i):
        return call.forward(kind, arrays, carry, i)

    forward = jax.jit(layer_forward, static_argnums=0)
    outputs, kept = [], []
    for i, kind in enumerate(kinds):
        carry, (output, values) = forward(kind, arrays, carry, jnp.int32(i))
        outputs.append(output)
        kept.append(values)
    return (carry, _stack(outputs)), _Residuals(arrays, kept, call)


def _unroll_bwd(bodies, kinds, residuals, cotangents):
    call, (dcarry, doutputs) = residuals.call, cotangents
    leaves, structure = jax.tree.flatten(doutputs, is_leaf=_is_zero)
    given = [x for x in leaves if not _is_zero(x)]

    def layer_backward(kind, arrays, kept, dcarry, given, daround, i):
        given = iter(given)
        doutputs = structure.unflatten([x if _is_zero(x) else next(given) for x in leaves])
        cotangents = dcarry, _of_layer(doutputs, i)
        more, dcarry, own = call.backward(kind, arrays, kept, cotangents, i)
        return jax.tree.map(jnp.add, daround, more), dcarry, own

    backward = jax.jit(layer_backward, static_argnums=0)
    dcarry, dlayers = _of_carry(dcarry), []
    daround = jax.tree.map(jnp.zeros_like, call.around.divide(residuals.arrays["around"])[0])
    for i, kind in reversed(list(enumerate(kinds))):
        daround, dcarry, own = backward(
            kind, residuals.arrays, residuals.kept[i], dcarry, given, daround, jnp.int32(i)
        )
        dlayers.append(own)
    return call.around.join(daround), dcarry, call.layers.join(_stack(dlayers[::-1]))


_unroll.defvjp(_unroll_fwd, _unroll_bwd, symbolic_zeros=True)


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


def _stack(trees: list) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)
