"""The kernels between fast-weight matmuls, interpreted, against the plain passes and jax.grad."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_fixtures import equations
from numpy_twins import relative_error

from lact_jax.ops import fast_weights as fw
from lact_jax.ops import swiglu_kernels
from lact_jax.ops.swiglu import BACKENDS
from lact_jax.ops.swiglu_kernels import fits

B, M, S, E, H, CHUNKS = 1, 2, 21, 24, 256, 2
NAMES = BACKENDS["xla"]._fields


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def inputs(name, tokens, dtype, hidden=H):
    """What the pass `name` takes: gu, dh, and three cotangents where it is the second order."""
    rng = np.random.default_rng(tokens)
    widths = (2 * hidden, *[hidden] * (4 if name == "gradients_of_gradients" else 1))
    return [normal(rng, B, M, tokens, width, dtype=dtype) for width in widths]


def h_of(gu):
    g, u = jnp.split(gu, 2, axis=-1)
    return g / (1 + jnp.exp(-g)) * u


def first_order(gu, dh):
    """(h, dg, du) as JAX derives them."""
    h, transpose = jax.vjp(h_of, gu)
    return h, *jnp.split(transpose(dh)[0], 2, axis=-1)


def derived(name, gu, dh, *cotangents):
    """What the pass `name` gives, with every derivative by JAX."""
    if name == "value_and_gradient":
        h, transpose = jax.vjp(h_of, gu)
        return h, transpose(dh)[0]
    if name == "value_and_gradients":
        return first_order(gu, dh)
    return jax.vjp(first_order, gu, dh)[1](cotangents)


def results(name, backend, args):
    return jax.jit(getattr(BACKENDS[backend], name))(*args)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [16, 11, 3])  # whole blocks of rows, a part of one, less
def test_kernels_and_plain_passes_are_what_jax_derives(tokens, name):
    args = inputs(name, tokens, jnp.float32, hidden=512)
    derived_results = jax.jit(partial(derived, name))(*args)
    for backend in ("xla", "interpret"):
        for got, want in zip(results(name, backend, args), derived_results, strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype
            assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_kernels_round_their_results_alone(name):
    args = inputs(name, 21, jnp.bfloat16)
    exact = jax.jit(partial(derived, name))(*(x.astype(jnp.float32) for x in args))
    both = (results(name, backend, args) for backend in ("interpret", "xla"))
    for got, plain, want in zip(*both, exact, strict=True):
        assert got.dtype == jnp.bfloat16
        assert relative_error(got, want) < 3e-3
        # Both compute in float32, so that only a rounding now and then falls to the other side.
        assert relative_error(got, plain) < 3e-4


def test_large_activations_have_finite_gradients():
    gate = jnp.asarray([-1e30, -300.0, -30.0, 30.0, 300.0, 1e30], jnp.float32)
    ones = jnp.ones((gate.size, H), jnp.float32)
    gu = jnp.concatenate([gate[:, None] * ones, ones], axis=-1)
    h, dgu = swiglu_kernels.value_and_gradient(gu, ones, interpret=True)
    want = np.maximum(gate, 0)[:, None] * ones
    np.testing.assert_allclose(h, want, atol=1e-9)
    np.testing.assert_allclose(dgu, np.concatenate([want > 0, want], axis=-1), atol=1e-9)
    second = swiglu_kernels.gradients_of_gradients(gu, ones, ones, ones, ones, interpret=True)
    assert all(np.isfinite(x).all() for x in second)


@functools.cache
def case(dtype):
    """(what `scan_chunks` takes, cotangents of what it returns)."""
    rng = np.random.default_rng(0)
    initial = fw.from_matrices(
        normal(rng, B, M, H, E) / E**0.5,
        normal(rng, B, M, E, H) / H**0.5,
        normal(rng, B, M, H, E) / E**0.5,
    )
    chunks = fw.Chunk(
        normal(rng, CHUNKS, B, M, S, E, dtype=dtype),
        normal(rng, CHUNKS, B, M, S, E, dtype=dtype),
        jnp.asarray(rng.uniform(0.01, 0.05, (CHUNKS, B, M, S, 3)), jnp.float32),
        jnp.asarray(rng.uniform(0.2, 0.9, (CHUNKS, B, M)), jnp.float32),
    )
    queries = tuple(normal(rng, CHUNKS, B, M, n, E, dtype=dtype) for n in (S, 2 * S))
    cotangents = (
        jax.tree.map(lambda w: normal(rng, *w.shape), initial),
        tuple(normal(rng, *q.shape, dtype=dtype) for q in queries),
    )
    return (initial, chunks, queries), cotangents


def scan(arguments, *, backend, keep_hidden):
    rule = fw.UpdateRule(momentum=True)
    return fw.scan_chunks(*arguments, rule, keep_hidden=keep_hidden, backend=backend)


@partial(jax.jit, static_argnames=("backend", "keep_hidden"))
def scan_with_gradients(arguments, cotangents, **options):
    def outputs(arguments):
        state, outputs = scan(arguments, **options)
        return state.weights, outputs

    result, transpose = jax.vjp(outputs, arguments)
    return result, transpose(cotangents)


@pytest.mark.usefixtures("float32_matmuls", "quick_compile")
@pytest.mark.parametrize("keep_hidden", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_scan_with_the_kernels_is_the_plain_one(dtype, bound, keep_hidden):
    run = partial(scan_with_gradients, *case(dtype), keep_hidden=keep_hidden)
    got, want = (jax.tree.leaves(run(backend=name)) for name in ("interpret", "xla"))
    for mine, plain in zip(got, want, strict=True):
        assert mine.dtype == plain.dtype
        assert relative_error(mine, plain) < bound


@pytest.mark.usefixtures("float32_matmuls", "quick_compile")
def test_chunks_and_a_stream_given_one_by_one_are_the_same():
    (initial, chunks, (clean, later)), (dweights, dqueries) = case("float32")
    options = dict(backend="interpret", keep_hidden=False)

    def apart(initial, k_C, v_C, clean_C):
        one_by_one = chunks._replace(k_BMSE=list(k_C), v_BMSE=list(v_C))
        state, outputs = scan((initial, one_by_one, (list(clean_C), later)), **options)
        assert isinstance(outputs[0], list) and outputs[1].shape == later.shape
        return state.weights, (jnp.stack(outputs[0]), outputs[1])

    def whole(initial, k_C, v_C, clean_C):
        stacked = chunks._replace(k_BMSE=k_C, v_BMSE=v_C)
        state, outputs = scan((initial, stacked, (clean_C, later)), **options)
        return state.weights, outputs

    def run(form):
        outputs, transpose = jax.vjp(form, initial, chunks.k_BMSE, chunks.v_BMSE, clean)
        return outputs, transpose((dweights, dqueries))

    for mine, other in zip(*map(jax.tree.leaves, map(run, (apart, whole))), strict=True):
        assert relative_error(mine, other) < 1e-6


@pytest.mark.parametrize("backend", ["xla", "interpret"])
@pytest.mark.parametrize("keep_hidden", [False, True])
def test_the_products_of_the_hidden_width_are_kept_where_asked_and_nothing_else(
    keep_hidden, backend
):
    arguments, _ = case("bfloat16")
    run = partial(scan, backend=backend, keep_hidden=keep_hidden)
    kept = jax.tree.leaves(jax.eval_shape(lambda args: jax.vjp(run, args)[1], arguments))
    of_tokens = [x.shape[-2:] for x in kept if x.ndim > 3 and x.shape[-2] in (S, 2 * S)]
    wide = sorted(shape for shape in of_tokens if shape[-1] in (H, 2 * H))
    # gu and dh of the update, gu of each read.
    products = [(S, H), (S, 2 * H), (S, 2 * H), (2 * S, 2 * H)]
    assert wide == (sorted(products * CHUNKS) if keep_hidden else [])


def test_the_backward_pass_of_unrolled_chunks_does_not_compute_their_raw_updates_again():
    arguments, _ = case("bfloat16")

    def matmuls(backend):
        run = partial(fw.scan_chunks, rule=fw.UpdateRule(), backend=backend)
        outputs, transpose = jax.vjp(run, *arguments)
        return len(equations(jax.make_jaxpr(transpose)(outputs).jaxpr, "dot_general"))

    loop, unrolled = matmuls("xla"), matmuls("interpret")
    assert loop - unrolled / CHUNKS == 3


def test_kernels_take_whole_blocks_of_columns():
    assert fits(1536) and not fits(24)


@pytest.mark.parametrize("use", [fw.gradient, fw.read])
def test_backends_that_do_not_exist_are_named(use):
    (initial, chunks, queries), _ = case("float32")
    argument = {fw.gradient: jax.tree.map(lambda x: x[0], chunks), fw.read: queries[0][0]}[use]
    with pytest.raises(ValueError, match="backend is 'cuda', not one of xla, triton, interpret"):
        use(initial, argument, backend="cuda")
