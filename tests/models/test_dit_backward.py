"""What the backward pass keeps, and kernels in the place of plain passes, change no result."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_fixtures import (
    CARD,
    FITS_KERNELS,
    MODELS,
    compiled,
    equations,
    kernels_of,
    random_inputs,
    random_params,
)
from numpy_twins import relative_error

from lact_jax.flops import count_jaxpr_flops
from lact_jax.planning.measure import kept_bytes
from lact_jax.planning.search import FRUGALITY
from lact_jax.planning.virtual import building_for

pytestmark = pytest.mark.usefixtures("quick_compile")


def sequence_loss(config):
    """A loss of the parameters, on random inputs."""
    x = random_inputs(1, 1)

    def loss(params):
        out, _ = compiled(config).sequence_raw(params, x.clean, x.noise, x.timestep, x.text)
        return jnp.mean(jnp.square(out - x.noise))

    return loss


@functools.cache
def loss_and_gradients(config):
    run = jax.jit(jax.value_and_grad(sequence_loss(config)))
    return run(random_params(replace(config, remat="none", kernels="xla")))


def assert_same_loss_and_gradients(config, other):
    loss, gradients = loss_and_gradients(config)
    other_loss, other_gradients = loss_and_gradients(other)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(gradients), strict=True)
    for path, got, want in zip(paths, jax.tree.leaves(other_gradients), leaves, strict=True):
        assert relative_error(got, want) < 1e-5, path


REMATS = [("default", remat) for remat in ("full", "attention", "selective", "dots")]
REMATS += [("default", "all_dots")]
REMATS += [(name, "full") for name in ("full attention", "window alone", "gated linear")]


@pytest.mark.parametrize(("name", "remat"), REMATS)
def test_recomputing_activations_changes_nothing(name, remat):
    assert_same_loss_and_gradients(MODELS[name], replace(MODELS[name], remat=remat))


MIXED = replace(MODELS["mixed"], num_layers=4)


@pytest.mark.parametrize(
    ("config", "remats"),
    [(MODELS["default"], ("selective", "dots")), (MIXED, ("dots", "none"))],
)
def test_layers_without_a_loop_change_nothing(config, remats):
    # The last of two, or the last pair of two, keeps more than the others.
    remat, last = remats
    unrolled = replace(
        config, unroll_layers=True, remat=remat, last_layers=config.period, last_remat=last
    )
    assert_same_loss_and_gradients(config, unrolled)


def test_a_policy_that_keeps_less_computes_more():
    config = MODELS["momentum and muon"]
    flops, kept = {}, []
    for remat in FRUGALITY:
        if remat == "all_dots":  # here as `dots`: chunks are in a loop
            continue
        gradient = jax.grad(sequence_loss(replace(config, remat=remat)))
        jaxpr = jax.make_jaxpr(gradient)(random_params(config)).jaxpr
        flops[remat] = count_jaxpr_flops(jaxpr)
        kept.append(kept_bytes(jaxpr))
    assert list(flops) == sorted(flops, key=flops.get) and len(set(flops.values())) == len(flops)
    assert kept == sorted(kept, reverse=True)
    # Muon's matmuls are a quarter of all: `dots` keeps their results as well.
    assert flops["dots"] < 1.02 * flops["none"]


def test_all_dots_keeps_the_products_of_unrolled_chunks():
    def matmuls(remat):
        gradient = jax.grad(sequence_loss(replace(FITS_KERNELS, remat=remat)))
        jaxpr = jax.make_jaxpr(gradient)(random_params(FITS_KERNELS)).jaxpr
        return len(equations(jaxpr, "dot_general")), kept_bytes(jaxpr)

    (more, less_kept), (fewer, kept) = matmuls("dots"), matmuls("all_dots")
    # In the body of the layers: two of each update, one of each read.
    chunks = random_inputs(1, 1).clean.shape[1] - 1
    assert more - fewer == 2 * chunks + 2 * chunks + 1
    assert kept > less_kept


KERNELS = {
    "add_norm", "add_norm_grad", "biased_gelu", "biased_gelu_grad", "merge_forward",
    "merge_backward", "qk_forward", "qk_backward", "rms_norm", "rms_norm_grad",
    "swiglu_grad", "swiglu_update", "swiglu_update_grad",
}  # fmt: skip


def test_a_model_of_kernels_is_that_of_plain_passes():
    gradient = jax.grad(sequence_loss(FITS_KERNELS))
    assert kernels_of(jax.make_jaxpr(gradient)(random_params(FITS_KERNELS)).jaxpr) == KERNELS
    plain = replace(FITS_KERNELS, kernels="xla", remat="none")
    assert_same_loss_and_gradients(plain, FITS_KERNELS)


def test_a_model_for_a_card_takes_all_kernels_there():
    config = replace(FITS_KERNELS, kernels="auto", dtype="bfloat16")
    gradient = jax.jit(jax.grad(sequence_loss(config)))
    assert not kernels_of(jax.make_jaxpr(gradient)(random_params(config)).jaxpr)  # here
    with building_for(CARD):
        traced = jax.jit(jax.grad(sequence_loss(config))).trace(random_params(config))
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r'xla\.gpu\.triton.*?name = "(\w+)"', program)
    assert set(calls) == kernels_of(traced.jaxpr.jaxpr) == KERNELS
