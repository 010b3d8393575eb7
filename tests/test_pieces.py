"""A function in pieces against the same function as one program."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lact_jax.pieces import Pieces

WIDTH = 8
TABLE = np.linspace(-1, 1, WIDTH, dtype=np.float32)


def layer(x, weights, i, scale):
    """A result, two names of an input, one of a constant, and a result twice."""
    y = jnp.tanh(x @ weights[i]) * scale + TABLE
    return y, checkpoint_name(x, "kept"), x, jnp.float32(2), checkpoint_name(y, "same")


def function(state, x, *, layers=3):
    """Calls `layer` with literals, arguments and results of other calls. The first state is
    replaced, the second passes through."""
    call, kept = jax.jit(layer), []
    x, weights = x + 1, state["weights"]
    for i in range(layers):
        x, *others = call(x, weights, jnp.int32(i % 2), 0.5)
        kept.append(others)
    total = sum(jnp.sum(a * b * c + d) for a, b, c, d in kept)
    return {"weights": weights - 0.1 * total, "other": state["other"]}, (total, x)


def arguments():
    keys = jax.random.split(jax.random.key(0), 3)
    state = {"weights": jax.random.normal(keys[0], (2, WIDTH, WIDTH)), "other": jnp.arange(3)}
    return state, jax.random.normal(keys[1], (5, WIDTH))


def assert_close(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.dtype == other.dtype
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-6)


def test_results_are_those_of_one_program_again_and_again():
    pieces, whole = Pieces(function, {"layer"}), jax.jit(function)
    state, x = arguments()
    mine = other = state
    for _ in range(3):
        (mine, seen), (other, expected) = pieces(mine, x), whole(other, x)
        assert_close((mine, seen), (other, expected))
    assert np.any(mine["weights"] != state["weights"])


def test_arguments_of_another_shape_are_compiled_for():
    pieces, (state, x) = Pieces(function, {"layer"}), arguments()
    for rows in (5, 3, 5):
        assert_close(pieces(state, x[:rows]), jax.jit(function)(state, x[:rows]))


def test_a_piece_is_one_program_however_often_it_runs():
    text = Pieces(function, {"layer"}).trace(*arguments()).lower().compile().as_text()
    assert re.findall(r"HloModule jit_(\w+)", text) == ["between_0", "layer_0", "between_4"]
    inner = Pieces(twice, {"layer"}).trace(*arguments()).lower().compile().as_text()
    modules = re.findall(r"HloModule jit_(\w+)", inner)
    assert modules.count("layer_0") == 1 and len(modules) == 5


def twice(state, x):
    """Calls a function, twice, that calls the piece."""
    call = jax.jit(function)
    state, (total, y) = call(state, x)
    state, (more, z) = call(state, y + 1)
    return state, (total + more, z)


def test_pieces_within_a_function_that_is_called():
    assert_close(Pieces(twice, {"layer"})(*arguments()), jax.jit(twice)(*arguments()))


def test_a_function_without_pieces_is_one_program():
    def plain(x):
        return jnp.sin(x) + 1, 3.0

    compiled = Pieces(plain, {"layer"}).trace(jnp.ones(4)).lower().compile()
    assert_close(compiled(jnp.ones(4)), jax.jit(plain)(jnp.ones(4)))
    assert compiled.as_text().count("HloModule") == 1


def test_what_is_donated_is_written_over_and_nothing_else():
    (state, x), weights = arguments(), arguments()[0]["weights"]
    new, _ = Pieces(function, {"layer"}, donate_argnums=(0,))(state, x)
    assert state["weights"].is_deleted() and not x.is_deleted()
    np.testing.assert_array_equal(new["other"], np.arange(3))
    want, _ = jax.jit(function)({"weights": weights, "other": jnp.arange(3)}, x)
    assert_close(new, want)


def test_arrays_are_held_to_their_last_reader_and_counted_so():
    def chain(x, *, layers, keep):
        call, kept = jax.jit(layer), []
        for i in range(layers):
            x, *_ = call(x, weights, jnp.int32(i % 2), 0.5)
            kept.append(x)
        return sum(map(jnp.sum, kept if keep else kept[-1:]))

    def temporaries(**options):
        compiled = Pieces(partial(chain, **options), {"layer"}).trace(x).lower().compile()
        return compiled.memory_analysis().temp_size_in_bytes

    state, x = arguments()
    weights = state["weights"]
    assert temporaries(layers=3, keep=False) == temporaries(layers=9, keep=False)
    more = temporaries(layers=9, keep=True) - temporaries(layers=3, keep=True)
    assert more == 6 * x.nbytes


def test_the_whole_is_counted_from_shapes():
    compiled = Pieces(function, {"layer"}, (0,)).trace(*arguments()).lower().compile()
    memory, (state, x) = compiled.memory_analysis(), arguments()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes == held
    assert memory.output_size_in_bytes == held + 4 + x.nbytes
    # The constant of the layer and the literals belong to the programs.
    assert memory.argument_size_in_bytes == held + x.nbytes
