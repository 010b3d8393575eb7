"""A function that runs as several programs, one after another, instead of as one.

A piece that runs many times is compiled once, and what it returns stays where it is until the last
of its readers has run: a training step of `ops.layer_scan.unroll_layers` compiles the passes of one
layer, and copies nothing of what layers keep.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun
from jax.sharding import NamedSharding, PartitionSpec, Sharding


class Memory(NamedTuple):
    """Bytes, by the names that `memory_analysis()` of a compiled program gives them."""

    argument_size_in_bytes: int
    output_size_in_bytes: int
    alias_size_in_bytes: int
    temp_size_in_bytes: int


class Pieces:
    """`jax.jit(function, donate_argnums=donate_argnums)` on one device, as several programs.

    It traces and compiles for the first arguments of their structure, shapes and types. It can't be
    traced or differentiated.
    """

    def __init__(
        self, function: Callable, names: Collection[str], donate_argnums: Sequence[int] = ()
    ):
        """names: of the jitted functions that `function` calls and that are programs of their own.
        What lies between their calls are the other programs."""
        self._function, self._names = function, frozenset(names)
        self._donate_argnums, self._compiled = frozenset(donate_argnums), {}

    def __call__(self, *args: Any) -> Any:
        """function(*args). What `donate_argnums` names is not to be used after it."""
        leaves, structure = jax.tree.flatten(args)
        kind = structure, tuple((x.shape, x.dtype) for x in leaves)
        if kind not in self._compiled:
            self._compiled[kind] = self.trace(*args).lower().compile()
        return self._compiled[kind](*args)

    def trace(self, *args: Any) -> "TracedPieces":
        """As `jax.jit(function).trace(*args)`: arguments are arrays or their shapes.

        Raises:
          ValueError: they are on several devices.
        """
        # Where arrays are is part of their types, by which a piece's calls would not all be alike.
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        traced = jax.jit(self._function).trace(*shapes)
        donated = [
            i in self._donate_argnums for i, arg in enumerate(args) for _ in jax.tree.leaves(arg)
        ]
        return TracedPieces(
            traced.jaxpr,
            _Sequence(traced.jaxpr, self._names, {}, donated),
            jax.tree.structure(traced.out_info),
            _sharding(args),
        )


def _sharding(args: Any) -> Sharding | None:
    """Of all arrays: on the one device of the arguments; None where these don't tell it."""
    found = (getattr(x, "sharding", None) for x in jax.tree.leaves(args))
    sharding = next((x for x in found if x is not None), None)
    if sharding is not None and len(sharding.device_set) > 1:
        raise ValueError(f"pieces run on one device, the arguments are on {sharding.device_set}")
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


class TracedPieces:
    """A traced function in pieces; as `jax.stages.Traced` and, once lowered, `Lowered`."""

    def __init__(self, jaxpr: Any, sequence: "_Sequence", structure: Any, sharding: Any):
        self.jaxpr, self._sequence = jaxpr, sequence
        self._structure, self._sharding = structure, sharding

    def lower(self, lowering_platforms: tuple[str, ...] | None = None) -> "TracedPieces":
        """Lowers all programs."""
        for program in self._sequence.programs():
            program.lower(self._sharding, lowering_platforms)
        return self

    def compile(self, compiler_options: dict | None = None) -> "CompiledPieces":
        """Compiles all programs, several at a time. One of the same name as another waits for it:
        on a GPU the fastest form of the matmuls that both have is then known."""
        programs = self._sequence.programs()
        with ThreadPoolExecutor() as pool:
            for turn in sorted({program.turn for program in programs}):
                own = [program for program in programs if program.turn == turn]
                list(pool.map(lambda program: program.compile(compiler_options), own))
        return CompiledPieces(self._sequence, self._structure)


class CompiledPieces:
    """The compiled programs of a function; as `jax.stages.Compiled`."""

    def __init__(self, sequence: "_Sequence", structure: Any):
        self._sequence, self._structure = sequence, structure

    def __call__(self, *args: Any) -> Any:
        """Queues the programs; the device may be behind."""
        return jax.tree.unflatten(self._structure, self._sequence(jax.tree.leaves(args)))

    def as_text(self) -> str:
        """The HLO modules of all programs, each once."""
        return "\n".join(program.compiled.as_text() for program in self._sequence.programs())

    def memory_analysis(self) -> Memory:
        """Of the whole: what is held between programs counts as temporary."""
        return self._sequence.memory()


# Below, `closed` is a jaxpr with its constants, an atom a variable or a literal of a jaxpr, and a
# run a program or a sequence: it takes a list of arrays, which it empties, and returns a list.


class _Program:
    """A program of a sequence.

    donated: places of the inputs that it may write over. turn: how many are called as it is.
    """

    def __init__(self, closed: Any, name: str, donated: Sequence[int] = (), turn: int = 0):
        def function(*args):
            return jaxpr_as_fun(closed)(*args)

        function.__name__ = function.__qualname__ = name
        self._function, self._donated = function, tuple(donated)
        self._inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in closed.in_avals]
        self._lowered = self.compiled = None
        self.turn = turn

    def programs(self) -> list["_Program"]:
        return [self]

    def lower(self, sharding: Sharding | None, platforms: tuple[str, ...] | None) -> None:
        placed = {} if sharding is None else {"in_shardings": sharding, "out_shardings": sharding}
        function = jax.jit(self._function, donate_argnums=self._donated, **placed)
        self._lowered = function.trace(*self._inputs).lower(lowering_platforms=platforms)

    def compile(self, options: dict | None) -> None:
        self.compiled = self._lowered.compile(compiler_options=options)

    def __call__(self, arrays: list) -> list:
        args = tuple(arrays)
        arrays.clear()
        return self.compiled(*args)

    def memory(self) -> Memory:
        found = self.compiled.memory_analysis()
        return Memory(*(getattr(found, name) for name in Memory._fields))


class _Step(NamedTuple):
    """takes: atoms. gives: variables. done: those of both that nobody reads after it."""

    run: Any
    takes: list
    gives: list
    done: set


class _Sequence:
    """The steps of a traced function, in order."""

    def __init__(
        self, closed: Any, names: frozenset, known: dict, donated: Sequence[bool] | None = None
    ):
        """known: what was made of traced functions so far, by their identity."""
        jaxpr, self._constants = closed.jaxpr, closed.consts
        self._inputs = [*jaxpr.constvars, *jaxpr.invars]
        donated = donated or [False] * len(jaxpr.invars)
        given = [x for x, is_given in zip(jaxpr.invars, donated, strict=True) if is_given]
        groups, same = _groups(jaxpr.eqns, names), {}
        for group in groups:
            if _is_call(group[0], names):
                _find_same(group[0], same)

        def by_one_name(atoms):
            return [same.get(x, x) if _is_variable(x) else x for x in atoms]

        self._outputs = by_one_name(jaxpr.outvars)
        reads = [[x for equation in group for x in equation.invars] for group in groups]
        last = {}
        for i, atoms in enumerate([*map(by_one_name, reads), self._outputs]):
            last |= {x: i for x in atoms if _is_variable(x)}
        self._steps = []
        for i, (group, read) in enumerate(zip(groups, reads, strict=True)):
            made = [x for equation in group for x in equation.outvars]
            if _is_call(group[0], names):
                run, takes = _run_of(group[0], names, known), by_one_name(read)
                gives = [x for x in made if x not in same]
            else:
                # In the function's order, by which JAX pairs a donated input with an output.
                read = _ordered(filter(_is_variable, read), jaxpr.invars, but=made)
                gives = _ordered((x for x in made if last.get(x, i) > i), self._outputs)
                takes = by_one_name(read)
                part = closed.jaxpr.replace(constvars=[], invars=read, outvars=gives, eqns=group)
                free = [k for k, x in enumerate(takes) if x in given and last[x] == i]
                part = closed.replace(jaxpr=part, consts=[])
                run = _Program(part, f"between_{i}", _fit(takes, free, gives))
            ends = {x for x in filter(_is_variable, [*takes, *gives]) if last.get(x, i) == i}
            self._steps.append(_Step(run, takes, gives, ends))

    def programs(self) -> list[_Program]:
        """All of them, each once."""
        return list(dict.fromkeys(p for step in self._steps for p in step.run.programs()))

    def __call__(self, arrays: list) -> list:
        held = dict(zip(self._inputs, [*self._constants, *arrays], strict=True))
        arrays.clear()

        def value(x):
            return held[x] if _is_variable(x) else np.asarray(x.val, x.aval.dtype)

        for run, takes, gives, done in self._steps:
            args = [value(x) for x in takes]
            for x in done:
                held.pop(x, None)
            results = run(args)
            held |= {x: y for x, y in zip(gives, results, strict=True) if x not in done}
        return [value(x) for x in self._outputs]

    def memory(self) -> Memory:
        inputs, outputs = set(self._inputs), [*filter(_is_variable, self._outputs)]
        held = peak = reused = 0
        for run, _, gives, done in self._steps:
            memory = run.memory()
            reused += memory.alias_size_in_bytes
            made = memory.output_size_in_bytes - memory.alias_size_in_bytes
            peak = max(peak, held + made + memory.temp_size_in_bytes)
            held += _bytes(gives) - _bytes(x for x in done if x not in inputs)
        reused += _bytes(x for x in outputs if x in inputs)
        output = _bytes(outputs)
        return Memory(_bytes(inputs), output, reused, max(0, peak - (output - reused)))


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, Literal)


def _bytes(variables: Iterable) -> int:
    return sum(x.aval.size * x.aval.dtype.itemsize for x in variables)


def _is_call(equation: Any, names: frozenset) -> bool:
    """Whether it calls a piece, or a function that does."""
    if equation.primitive.name != "jit":
        return False
    inner = equation.params["jaxpr"].jaxpr
    return equation.params["name"] in names or any(_is_call(x, names) for x in inner.eqns)


def _groups(equations: Sequence, names: frozenset) -> list[list]:
    """The calls of pieces, alone, and what is between them, together."""
    groups = []
    for equation in equations:
        if _is_call(equation, names) or not groups or _is_call(groups[-1][0], names):
            groups.append([])
        groups[-1].append(equation)
    return groups


def _ordered(variables: Iterable, first: Sequence, but: Iterable = ()) -> list:
    """Each once, those of `first` in its order before the others, without those of `but`."""
    place, but = {x: i for i, x in enumerate(first) if _is_variable(x)}, set(but)
    found = [x for x in dict.fromkeys(variables) if x not in but]
    return sorted(found, key=lambda x: place.get(x, len(first)))


def _sources(jaxpr: Any) -> list:
    """Its results, without the names that `jax.ad_checkpoint.checkpoint_name` gives arrays."""
    named = {x.outvars[0]: x.invars[0] for x in jaxpr.eqns if x.primitive.name == "name"}
    return [named.get(x, x) if _is_variable(x) else x for x in jaxpr.outvars]


def _own_outputs(jaxpr: Any) -> list:
    """What it computes, each once."""
    sources = filter(_is_variable, _sources(jaxpr))
    return [x for x in dict.fromkeys(sources) if x not in jaxpr.invars]


def _find_same(call: Any, same: dict) -> None:
    """Adds to `same` the results of a call that are, by another name, one of its inputs, another of
    its results or a constant."""
    inner = call.params["jaxpr"].jaxpr
    inputs = (same.get(x, x) if _is_variable(x) else x for x in call.invars)
    known = dict(zip(inner.invars, inputs, strict=True))
    for x, own in zip(call.outvars, _sources(inner), strict=True):
        if not _is_variable(own):
            same[x] = own
        elif own in known:
            same[x] = known[own]
        else:
            known[own] = x


def _run_of(call: Any, names: frozenset, known: dict) -> Any:
    """What runs at a call: computes those of its results that `_find_same` leaves."""
    closed = call.params["jaxpr"]
    if id(closed) not in known:
        own = closed.replace(jaxpr=closed.jaxpr.replace(outvars=_own_outputs(closed.jaxpr)))
        if (name := call.params["name"]) in names:
            others = sum(other == name for _, other, _ in known.values())
            run = _Program(own, f"{name}_{others}", turn=others)
        else:
            run = _Sequence(own, names, known)
        known[id(closed)] = closed, name, run  # alive, so that nothing else gets its identity
    return known[id(closed)][-1]


def _fit(takes: list, free: list[int], gives: list) -> list[int]:
    """Those of the free inputs that an output can be written over."""
    room = Counter((x.aval.shape, x.aval.dtype) for x in gives)
    found = []
    for k in free:
        kind = takes[k].aval.shape, takes[k].aval.dtype
        if room[kind] and takes.count(takes[k]) == 1:
            room[kind] -= 1
            found.append(k)
    return found
