"""Layers by a loop and without one against jax.lax.scan, and what that spares."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from model_fixtures import equations
from numpy_twins import relative_error

from lact_jax.ops.layer_scan import scan_layers, unroll_layers

pytestmark = pytest.mark.usefixtures("float32_matmuls")

LAYERS, ROWS, WIDTH, HIDDEN = 4, 3, 5, 7
SAVED = jax.checkpoint_policies.save_only_these_names("hidden")


def arguments():
    """Weights that are trained, others, the first carry, and two arrays around the body."""
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.float32)

    trained = {"up": normal(LAYERS, WIDTH, HIDDEN), "down": normal(LAYERS, HIDDEN, WIDTH)}
    return trained, normal(LAYERS, WIDTH, WIDTH), normal(ROWS, WIDTH), normal(WIDTH), normal(WIDTH)


def unrolled(body, carry, layers):
    """`unroll_layers` with one body for all layers."""
    return unroll_layers([body] * LAYERS, carry, layers)


def loss(scan, policy, trained, frozen, x, shift, factor):
    """Reads the last carry and one of two outputs; `factor` has no gradient."""

    def body(x, layer):
        layer, frozen = layer
        hidden = checkpoint_name(jnp.sin(x @ layer["up"]), "hidden")
        x = jnp.tanh(hidden) @ layer["down"] + (x * factor) @ frozen + shift
        return x, {"square": jnp.sum(x**2), "sum": jnp.sum(x)}

    if policy is not None:
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    x, outputs = scan(body, x, (trained, frozen))
    return jnp.sum(jnp.cos(x)) + jnp.sum(outputs["square"][1:3]), outputs


@pytest.mark.parametrize("policy", [None, SAVED], ids=["everything", "by name"])
@pytest.mark.parametrize("form", [scan_layers, unrolled])
def test_values_and_gradients_are_those_of_lax_scan(form, policy):
    def run(scan):
        function = jax.value_and_grad(
            lambda *args: loss(scan, policy, *args), argnums=(0, 2, 3), has_aux=True
        )
        return jax.jit(function)(*arguments())

    got, want = (jax.tree.leaves(run(scan)) for scan in (form, jax.lax.scan))
    for ours, theirs in zip(got, want, strict=True):
        assert np.any(theirs) and relative_error(ours, theirs) < 1e-6


def test_unrolled_layers_that_are_not_differentiated_give_the_same():
    got, want = (loss(scan, SAVED, *arguments())[0] for scan in (unrolled, jax.lax.scan))
    assert relative_error(got, want) < 1e-6


def mixed(body, carry, layers):
    """Unrolled layers, the last of which keeps all that its backward pass reads."""
    plain = jax.checkpoint(body, policy=SAVED)
    return unroll_layers([plain] * (LAYERS - 1) + [body], carry, layers)


def test_kinds_of_layers_differ_in_what_they_keep_alone():
    def gradient(scan, policy=None):
        return jax.grad(lambda *args: loss(scan, policy, *args)[0], argnums=(0, 1, 2, 3))

    def matmuls(*args):
        return len(equations(jax.make_jaxpr(gradient(*args))(*arguments()).jaxpr, "dot_general"))

    got, want = (jax.tree.leaves(gradient(x)(*arguments())) for x in (mixed, jax.lax.scan))
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) < 1e-6
    # A layer's three, which all layers compute again or all but the last.
    assert matmuls(unrolled, SAVED) - matmuls(mixed) == 3


def gradients(policy, argnums):
    function = jax.grad(lambda *args: loss(scan_layers, policy, *args)[0], argnums=argnums)
    return jax.make_jaxpr(function)(*arguments())


def test_layers_that_are_not_trained_get_no_gradients_computed():
    def matmuls(argnums):
        return len(equations(gradients(SAVED, argnums).jaxpr, "dot_general"))

    # Their own gradient: one product more.
    assert matmuls((0, 1)) - matmuls((0,)) == 1


def test_a_layer_keeps_what_the_policy_says_and_its_carry():
    jaxpr = gradients(SAVED, (0,)).jaxpr
    kept = [eqn.outvars[0].aval.shape for eqn in equations(jaxpr, "empty")]
    assert kept.count((LAYERS, ROWS, HIDDEN)) == 1
    assert kept.count((LAYERS, ROWS, WIDTH)) == 1


def test_a_card_fills_no_stack_with_zeros_before_layers_write_it():
    function = jax.grad(lambda *args: loss(scan_layers, SAVED, *args)[0])
    text = jax.jit(function).trace(*arguments()).lower(lowering_platforms=("cuda",)).as_text()
    stack = rf"tensor<{LAYERS}x{ROWS}x{HIDDEN}xf32>"
    made = re.findall(rf"stablehlo\.(\w+).*-> {stack}", text)
    assert made.count("custom_call") == 1 and "broadcast_in_dim" not in made
