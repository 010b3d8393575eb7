"""The fast weights against their definition, a float64 twin and jax.grad; what bf16 may cost."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_twins as twins
import pytest
from model_fixtures import equations
from numpy_twins import relative_error

from lact_jax.ops import fast_weights as fw

pytestmark = pytest.mark.usefixtures("quick_compile")

B, M, S, E, H, CHUNKS = 2, 2, 6, 8, 12, 3
RULES = [
    fw.UpdateRule(momentum, muon, 4, weight_norm)
    for momentum, muon, weight_norm in itertools.product((False, True), repeat=3)
]


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def random_weights(rng, hidden=H):
    return (
        normal(rng, B, M, hidden, E) / E**0.5,
        normal(rng, B, M, E, hidden) / hidden**0.5,
        normal(rng, B, M, hidden, E) / E**0.5,
    )


def random_chunk(rng, *leading, tokens=S):
    """Learning rates are large enough for every chunk to change the weights by their own size."""
    return fw.Chunk(
        normal(rng, *leading, B, M, tokens, E),
        normal(rng, *leading, B, M, tokens, E),
        jnp.asarray(rng.uniform(0.05, 0.3, (*leading, B, M, tokens, 3)), jnp.float32),
        jnp.asarray(rng.uniform(0.2, 0.9, (*leading, B, M)), jnp.float32),
    )


@pytest.mark.usefixtures("float32_matmuls")
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradient_is_that_of_the_loss_with_a_learning_rate_for_each_token(which):
    rng = np.random.default_rng(which)
    matrices, chunk = random_weights(rng), random_chunk(rng)

    def loss(matrix):
        w0, w1, w2 = (matrix if i == which else w for i, w in enumerate(matrices))
        g = jnp.einsum("bmhe,bmse->bmsh", w0, chunk.k_BMSE)
        u = jnp.einsum("bmhe,bmse->bmsh", w2, chunk.k_BMSE)
        f = jnp.einsum("bmeh,bmsh->bmse", w1, g / (1 + jnp.exp(-g)) * u)
        return -jnp.sum(chunk.lr_BMS3[..., which] * jnp.sum(f * chunk.v_BMSE, axis=-1))

    step = fw.to_matrices(fw.gradient(fw.from_matrices(*matrices), chunk))
    assert relative_error(step[which], -jax.grad(loss)(matrices[which])) < 1e-5


@functools.cache
def scan_of(rule):
    return jax.jit(lambda initial, chunks, queries: fw.scan_chunks(initial, chunks, queries, rule))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_scan_is_a_loop_over_chunks_heads_and_tokens(rule):
    rng = np.random.default_rng(1)
    matrices, chunks = random_weights(rng), random_chunk(rng, CHUNKS)
    queries = normal(rng, CHUNKS, B, M, S, E), normal(rng, CHUNKS, B, M, 2 * S, E)
    state, outputs = scan_of(rule)(fw.from_matrices(*matrices), chunks, queries)
    want = [np.zeros(q.shape) for q in queries]
    final = [np.zeros(w.shape) for w in matrices]
    for b, m in itertools.product(range(B), range(M)):
        initial = [np.asarray(w[b, m], np.float64) for w in matrices]
        weights, last = initial, [np.zeros(w.shape) for w in initial]
        for c in range(CHUNKS):
            chunk = [np.asarray(x[c, b, m], np.float64) for x in chunks]
            weights, last = twins.update(weights, initial, last, *chunk, rule)
            for q, out in zip(queries, want, strict=True):
                out[c, b, m] = twins.read(weights, np.asarray(q[c, b, m], np.float64))
        for out, w in zip(final, weights, strict=True):
            out[b, m] = w
    for got, out in zip(outputs, want, strict=True):
        assert relative_error(got, out) < 2e-5
    for got, out, start in zip(fw.to_matrices(state.weights), final, matrices, strict=True):
        assert relative_error(got, out) < 2e-5
        assert relative_error(got, start) > 0.1  # or there would be nothing to see
    assert (state.last_update is not None) == rule.momentum


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5)])
def test_newton_schulz_is_the_plain_iteration(shape):
    x = np.random.default_rng(2).standard_normal((2, 3, *shape))
    got = fw.newton_schulz(jnp.asarray(x, jnp.float32), 5)
    want = [[twins.newton_schulz(matrix, 5) for matrix in row] for row in x]
    assert relative_error(got, want) < 1e-5


def test_newton_schulz_brings_singular_values_near_one():
    rng = np.random.default_rng(3)
    left, right = (np.linalg.qr(rng.standard_normal((8, 8)))[0] for _ in range(2))
    x = left * np.geomspace(1, 0.05, 8) @ right
    values = np.linalg.svd(fw.newton_schulz(jnp.asarray(1e-3 * x, jnp.float32), 5))[1]
    assert np.all((values > 0.6) & (values < 1.25))


def test_muon_of_a_hidden_width_below_the_head_width():
    rng = np.random.default_rng(4)
    update = random_weights(rng, hidden=E // 2)
    got = fw.to_matrices(fw.muon(fw.from_matrices(*update), 5))
    for dw, out in zip(update, got, strict=True):
        want = [[twins.newton_schulz(np.asarray(x, np.float64), 5) for x in row] for row in dw]
        assert relative_error(out, want) < 1e-5


@pytest.mark.parametrize("muon", [False, True])
def test_weight_norm_keeps_the_norm_of_every_row(muon):
    rng = np.random.default_rng(5)
    initial = fw.from_matrices(*random_weights(rng))

    def row_norms(weight_norm):
        rule = fw.UpdateRule(muon=muon, weight_norm=weight_norm)
        chunks = random_chunk(rng, CHUNKS)
        state, _ = scan_of(rule)(initial, chunks, (chunks.k_BMSE,))
        return [np.linalg.norm(w, axis=-1) for w in fw.to_matrices(state.weights)]

    start = [np.linalg.norm(w, axis=-1) for w in fw.to_matrices(initial)]
    for norm, other, before in zip(row_norms(True), row_norms(False), start, strict=True):
        np.testing.assert_allclose(norm, before, rtol=1e-4)
        assert np.max(np.abs(other / before - 1)) > 0.1


def test_rows_of_zeros_have_finite_gradients():
    """Identity weights with H > E have such rows; the norm's own gradient is NaN there."""
    rng = np.random.default_rng(6)
    hidden = 2 * E
    w0 = jnp.broadcast_to(jnp.eye(hidden, E, dtype=jnp.float32), (B, M, hidden, E))
    w1 = jnp.broadcast_to(jnp.eye(E, hidden, dtype=jnp.float32), (B, M, E, hidden))
    chunk, q = random_chunk(rng), normal(rng, B, M, S, E)
    rule = fw.UpdateRule()

    @jax.jit
    def output(weights, chunk):
        initial = fw.from_matrices(*weights)
        state = fw.update(fw.initial_state(initial, rule), chunk, fw.row_norms(initial), rule)
        return jnp.sum(fw.read(state.weights, q) ** 2)

    gradient_of = jax.jit(jax.grad(output, argnums=(0, 1)))
    gradients = gradient_of((w0, w1, w0), chunk._replace(momentum_BM=None))
    for gradient in jax.tree.leaves(gradients):
        assert np.all(np.isfinite(gradient))
    d_k = normal(rng, B, M, S, E)
    slope = jnp.vdot(gradients[1].k_BMSE, d_k)
    ahead, behind = (
        output((w0, w1, w0), fw.Chunk(chunk.k_BMSE + h * d_k, chunk.v_BMSE, chunk.lr_BMS3))
        for h in (1e-3, -1e-3)
    )
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-3, rtol=1e-2)


def plain_sequence(matrices, chunks, queries):
    """The definition with its update by jax.grad, so that its own gradient is a second one."""

    def f(w0, w1, w2, x):
        return (jax.nn.silu(x @ w0.mT) * (x @ w2.mT)) @ w1.mT

    def loss(which, matrix, weights, chunk):
        weights = (*weights[:which], matrix, *weights[which + 1 :])
        products = jnp.sum(f(*weights, chunk.k_BMSE) * chunk.v_BMSE, axis=-1)
        return jnp.sum(chunk.lr_BMS3[..., which] * products)

    weights, outputs = matrices, []
    for c in range(CHUNKS):
        chunk = jax.tree.map(lambda x, c=c: x[c], chunks)
        steps = [jax.grad(loss, argnums=1)(i, w, weights, chunk) for i, w in enumerate(weights)]
        weights = tuple(w + step for w, step in zip(weights, steps, strict=True))
        outputs.append(tuple(f(*weights, q[c]) for q in queries))
    return tuple(jnp.stack(stream) for stream in zip(*outputs, strict=True))


@pytest.mark.usefixtures("float32_matmuls")
@pytest.mark.parametrize("keep_hidden", [False, True])
def test_gradients_of_a_sequence_are_those_that_jax_derives(keep_hidden):
    rng = np.random.default_rng(8)
    matrices, chunks = random_weights(rng), random_chunk(rng, CHUNKS)
    chunks = chunks._replace(momentum_BM=None)
    queries = normal(rng, CHUNKS, B, M, S, E), normal(rng, CHUNKS, B, M, 2 * S, E)
    cotangents = tuple(normal(rng, *q.shape) for q in queries)
    rule = fw.UpdateRule(weight_norm=False)

    def ours(matrices, chunks, queries):
        initial = fw.from_matrices(*matrices)
        return fw.scan_chunks(initial, chunks, queries, rule, keep_hidden=keep_hidden)[1]

    def gradients(function):
        def run(*args):
            outputs, transpose = jax.vjp(function, *args)
            return outputs, transpose(cotangents)

        return jax.jit(run)(matrices, chunks, queries)

    got, want = (jax.tree.leaves(gradients(function)) for function in (ours, plain_sequence))
    for mine, derived in zip(got, want, strict=True):
        assert relative_error(mine, derived) < 3e-5


@pytest.mark.usefixtures("float32_matmuls")
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.weight_norm], ids=str)
def test_unrolled_chunks_have_the_gradients_of_the_loop(rule):
    """Weight norm's own backward pass among them, which the loop leaves to JAX."""
    rng = np.random.default_rng(9)
    initial, chunks = fw.from_matrices(*random_weights(rng)), random_chunk(rng, CHUNKS)
    if not rule.momentum:
        chunks = chunks._replace(momentum_BM=None)
    arguments = initial, chunks, (normal(rng, CHUNKS, B, M, S, E),)

    def gradients(keep_hidden):
        def run(*args):
            state, outputs = fw.scan_chunks(*args, rule, keep_hidden=keep_hidden)
            return state.weights, outputs

        def transposed(*args):
            outputs, transpose = jax.vjp(run, *args)
            return transpose(jax.tree.map(jnp.sin, outputs))

        return jax.jit(transposed)(*arguments)

    # Each of Muon's four iterations multiplies rounding by up to 3.4.
    bound = 1e-4 if rule.muon else 1e-5
    for got, want in zip(*(jax.tree.leaves(gradients(x)) for x in (True, False)), strict=True):
        assert relative_error(got, want) < bound


def test_keeping_hidden_activations_spares_their_matmuls_and_keeps_them_in_bfloat16():
    rule, _, arguments = bfloat16_case()

    def run(keep_hidden):
        def outputs(*args):
            return fw.scan_chunks(*args, rule, keep_hidden=keep_hidden)[1]

        _, transpose = jax.vjp(outputs, *arguments)
        cotangents = tuple(jnp.ones_like(q) for q in arguments[2])
        residuals = [x for x in jax.tree.leaves(transpose) if x.shape[-1] in (H, 2 * H)]
        hidden = [x for x in residuals if x.shape[-2] in (S, 64)]
        return len(equations(jax.make_jaxpr(transpose)(cotangents).jaxpr, "dot_general")), hidden

    (again, none), (kept, hidden) = run(False), run(True)
    # Two products of the hidden width and three outer ones to update, one product to read.
    # What is kept is unrolled, the other a loop.
    assert again - kept / CHUNKS == 2 + 3 + 1
    assert none == []
    of_chunk = [(B, M, 64, 2 * H), (B, M, 64, H), (B, M, S, 2 * H)]
    assert sorted(x.shape for x in hidden) == sorted(of_chunk * CHUNKS)
    assert all(x.dtype == jnp.bfloat16 for x in hidden)


def loss_of_sequence(rule, initial, chunks, queries):
    state, outputs = fw.scan_chunks(initial, chunks, queries, rule)
    first = fw.read(initial, queries[0][0])
    return sum(jnp.sum(o.astype(jnp.float32) ** 2) for o in (first, *outputs)), state


@functools.cache
def bfloat16_case():
    """(rule, arguments in float32, the same with k, v and queries in bfloat16)."""
    rng = np.random.default_rng(7)
    initial = fw.from_matrices(*random_weights(rng))
    chunks = random_chunk(rng, CHUNKS, tokens=64)
    chunks = chunks._replace(lr_BMS3=chunks.lr_BMS3 / 8)
    queries = (normal(rng, CHUNKS, B, M, S, E),)
    half = chunks._replace(
        k_BMSE=chunks.k_BMSE.astype(jnp.bfloat16), v_BMSE=chunks.v_BMSE.astype(jnp.bfloat16)
    )
    rule = fw.UpdateRule(momentum=True)
    return rule, (initial, chunks, queries), (initial, half, (queries[0].astype(jnp.bfloat16),))


def types(equation):
    return tuple(v.aval.dtype for v in (*equation.invars, *equation.outvars))


def test_bfloat16_multiplies_no_float32_matrices_in_either_direction():
    rule, _, args = bfloat16_case()
    grad = jax.grad(functools.partial(loss_of_sequence, rule), argnums=(0, 1, 2), has_aux=True)
    products = equations(jax.make_jaxpr(grad)(*args).jaxpr, "dot_general")
    assert len(products) > 20
    for equation in products:
        assert all(dtype == jnp.bfloat16 for dtype in types(equation)[:2]), equation


def test_bfloat16_sums_of_the_update_accumulate_in_float32():
    _, _, (initial, chunks, _) = bfloat16_case()
    chunk = jax.tree.map(lambda x: x[0], chunks)
    step = fw.gradient(initial, chunk)
    products = equations(jax.make_jaxpr(fw.gradient)(initial, chunk).jaxpr, "dot_general")
    over_tokens = [e for e in products if sorted(e.outvars[0].aval.shape[-2:]) == [E, H]]
    assert len(over_tokens) == 3
    assert all(types(e)[2] == jnp.float32 for e in over_tokens)
    assert all(x.dtype == jnp.float32 for x in step)


def test_bfloat16_stays_near_float32_and_keeps_float32_weights():
    rule, full, half = bfloat16_case()
    value = jax.jit(
        jax.value_and_grad(functools.partial(loss_of_sequence, rule), (0, 1), has_aux=True)
    )
    (loss, state), gradients = value(*full)
    (half_loss, half_state), half_gradients = value(*half)
    assert abs(half_loss / loss - 1) < 1e-2
    for got, want in zip(jax.tree.leaves(half_state), jax.tree.leaves(state), strict=True):
        assert got.dtype == jnp.float32
        assert relative_error(got, want) < 1e-2
    for got, want in zip(jax.tree.leaves(half_gradients), jax.tree.leaves(gradients), strict=True):
        assert relative_error(got, want) < 3e-2


def test_float32_products_are_exact_on_any_accelerator():
    rule, args, _ = bfloat16_case()
    rule = fw.UpdateRule(momentum=True, muon=True)
    grad = jax.grad(functools.partial(loss_of_sequence, rule), argnums=(0, 1), has_aux=True)
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    for equation in equations(jax.make_jaxpr(grad)(*args).jaxpr, "dot_general"):
        assert equation.params["precision"] == highest, equation
