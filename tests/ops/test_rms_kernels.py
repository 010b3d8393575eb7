"""Bias and RMSNorm: the kernels, run as plain JAX, against the plain module."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import sharding
from numpy_twins import relative_error

from lact_jax.models.layers import RMSNorm
from lact_jax.ops.rms_kernels import biased_rms_norm
from lact_jax.ops.row_kernels import KernelOptions

pytestmark = pytest.mark.usefixtures("quick_compile")

EPS = 1e-6
# With 3 rows a run, the last run of 14 has two; with one warp, 300 is two pieces and a part of one.
SHAPE = 2, 7, 300
OPTIONS = dict(rows=3, num_warps=1, interpret=True)


def random_inputs(rng, dtype=jnp.float32):
    """z, bias, scale, and a cotangent."""
    z, dn = (jnp.asarray(rng.standard_normal(SHAPE), dtype) for _ in range(2))
    bias, scale = (jnp.asarray(rng.standard_normal(SHAPE[-1:]), jnp.float32) for _ in range(2))
    return (z, bias, 1 + scale), dn


def fused(z, bias, scale):
    return biased_rms_norm(z, bias, scale, KernelOptions(EPS, z.dtype, **OPTIONS))


def plain(z, bias, scale):
    norm = RMSNorm(z.shape[-1], EPS)
    norm.scale = nnx.Param(scale)
    return norm(z + bias)


@partial(jax.jit, static_argnums=0)
def value_and_gradients(function, inputs, dn):
    n, transpose = jax.vjp(function, *inputs)
    return n, *transpose(dn)


def test_kernels_give_the_twins_values_and_gradients():
    inputs, dn = random_inputs(np.random.default_rng(0))
    got = value_and_gradients(fused, inputs, dn)
    want = value_and_gradients(plain, inputs, dn)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    errors = list(map(relative_error, got, want))
    assert max(errors) < 1e-6, errors


def test_bfloat16_costs_its_own_rounding_and_sums_stay_float32():
    (z, *vectors), dn = random_inputs(np.random.default_rng(1), jnp.bfloat16)
    n, dz, *sums = value_and_gradients(fused, (z, *vectors), dn)
    wide = (z.astype(jnp.float32), *vectors), dn.astype(jnp.float32)
    want_n, want_dz, *want_sums = value_and_gradients(plain, *wide)
    assert n.dtype == dz.dtype == jnp.bfloat16
    assert relative_error(n, want_n) < 3e-3 and relative_error(dz, want_dz) < 3e-3
    errors = list(map(relative_error, sums, want_sums))
    assert max(errors) < 1e-6, errors


def test_a_spoilt_row_spoils_no_other():
    (z, *vectors), dn = random_inputs(np.random.default_rng(2))
    spoilt = np.zeros(SHAPE[:2], bool)
    spoilt[1, 3] = True
    n, dz, *_ = value_and_gradients(fused, (jnp.where(spoilt[..., None], jnp.nan, z), *vectors), dn)
    for rows in (n, dz):
        np.testing.assert_array_equal(np.isnan(rows).any(-1), spoilt)


@pytest.mark.parametrize("width", [264, 1536, 5120])
def test_kernels_lower_for_cuda_to_one_call_each_way(width):
    def gradients(z, bias, scale):
        options = KernelOptions(EPS, z.dtype)
        n, transpose = jax.vjp(lambda *a: biased_rms_norm(*a, options), z, bias, scale)
        return transpose(n)

    vector = jax.ShapeDtypeStruct((width,), jnp.float32)
    z = jax.ShapeDtypeStruct((1, 2, 77, width), jnp.bfloat16)
    hopper = sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with sharding.use_abstract_mesh(sharding.AbstractMesh((), (), abstract_device=hopper)):
        traced = jax.jit(gradients).trace(z, vector, vector)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 2
