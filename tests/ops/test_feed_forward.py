"""The feed-forward kernels, interpreted, against the plain layer and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_fixtures import equations

from lact_jax.models.layers import MLP, gelu_tanh
from lact_jax.ops.feed_forward import feed_forward

WIDTH, HIDDEN = 24, 512


def relative(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def case(tokens):
    mlp = MLP(WIDTH, HIDDEN, WIDTH, gelu_tanh, dtype=jnp.float32, rngs=nnx.Rngs(0))
    draw = np.random.default_rng(tokens)
    mlp.fc1.bias[...] = jnp.asarray(draw.normal(size=HIDDEN), jnp.float32)
    x, dy = (jnp.asarray(draw.normal(size=(tokens, WIDTH)), jnp.float32) for _ in range(2))
    return mlp, (x, mlp.fc1.kernel[...], mlp.fc1.bias[...], mlp.fc2.kernel[...]), dy


def plain(x, w1, bias, w2):
    return gelu_tanh(x @ w1 + bias) @ w2


@pytest.mark.parametrize("tokens", [64, 45, 3])  # whole blocks of rows, a part of one, less
def test_values_and_gradients_of_the_kernels_are_those_of_the_plain_layer(tokens):
    mlp, args, dy = case(tokens)
    with jax.default_matmul_precision("highest"):
        y, gradient = jax.vjp(lambda *args: feed_forward(*args, True), *args)
        want, want_gradient = jax.vjp(plain, *args)
        assert relative(y, mlp(args[0])) < 1e-6  # its second bias is zero
        assert relative(y, want) < 1e-6
        for got, wanted in zip(gradient(dy), want_gradient(dy), strict=True):
            assert got.shape == wanted.shape and got.dtype == wanted.dtype
            assert relative(got, wanted) < 2e-6


def test_frozen_weights_leave_the_other_gradients_as_they_are():
    mlp, (x, *weights), dy = case(45)
    _, gradient = jax.vjp(lambda x: feed_forward(x, *weights, True), x)
    _, of_all = jax.vjp(lambda *args: feed_forward(*args, True), x, *weights)
    np.testing.assert_array_equal(gradient(dy)[0], of_all(dy)[0])


# x alone, the weights too
@pytest.mark.parametrize(("trained", "results", "matrices"), [(1, 1, 0), (4, 2, 2)])
def test_backward_computes_what_trained_weights_need_for_them_only(trained, results, matrices):
    _, args, dy = case(45)

    def loss(*some):
        return jnp.vdot(feed_forward(*some, *args[trained:], True), dy)

    gradient = jax.grad(jax.checkpoint(loss), tuple(range(trained)))
    program = jax.make_jaxpr(gradient)(*args[:trained]).jaxpr
    kernels = equations(program, "pallas_call")
    *before, last = (sum(x.aval.shape == (45, HIDDEN) for x in e.outvars) for e in kernels)
    assert set(before) == {1} and last == results
    shapes = [e.outvars[0].aval.shape for e in equations(program, "dot_general")]
    assert shapes.count((WIDTH, HIDDEN)) + shapes.count((HIDDEN, WIDTH)) == matrices


def test_in_bfloat16_the_kernels_stay_near_float32():
    _, (x, w1, bias, w2), dy = case(70)
    low = [a.astype(jnp.bfloat16) for a in (x, w1, w2, dy)]
    exact = [a.astype(jnp.float32) for a in low]
    args = *low[:2], bias, low[2]
    y, gradient = jax.vjp(lambda *args: feed_forward(*args, True), *args)
    want, want_gradient = jax.vjp(plain, *exact[:2], bias, exact[2])
    assert relative(y, want) < 5e-3
    for got, wanted in zip(gradient(low[3]), want_gradient(exact[3]), strict=True):
        assert relative(got, wanted) < 5e-3


def test_large_activations_have_finite_gradients():
    z = jnp.asarray([[-300.0, -30.0, 30.0, 300.0]], jnp.float32).repeat(64, axis=1)
    args = jnp.eye(256, dtype=jnp.float32), jnp.zeros(256, jnp.float32)
    eye = jnp.eye(256, dtype=jnp.float32)
    y, gradient = jax.vjp(lambda z: feed_forward(z, *args, eye, True), z)
    want = jnp.where(z > 0, z, 0)
    np.testing.assert_allclose(y, want, atol=1e-5)
    np.testing.assert_allclose(gradient(jnp.ones_like(y))[0], want > 0, atol=1e-5)
