"""Residual, LayerNorm and modulation: the kernels, run as plain JAX, against their plain twin."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import sharding
from numpy_twins import relative_error

from lact_jax.ops.norm_kernels import add_norm, add_norm_kernel
from lact_jax.ops.row_kernels import KernelOptions, fits

pytestmark = pytest.mark.usefixtures("quick_compile")

EPS = 1e-6
# With 3 rows a run, the last run of 7 has one; with one warp, 300 is two pieces and a part of one.
B, C, S, D = 2, 3, 7, 300
OPTIONS = dict(rows=3, num_warps=1, interpret=True)
NAMES = ("x", "y", "bias", "gate", "scale", "shift")


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype)


def random_inputs(rng, y_dtype=jnp.float32, width=D):
    """A stream far from zero, as it is in a trained model, and one shift for all chunks."""
    shape, vector = (B, C, S, width), (B, C, width)
    return {
        "x": 3 + 2 * normal(rng, *shape),
        "y": normal(rng, *shape, dtype=y_dtype),
        "bias": normal(rng, width),
        "gate": normal(rng, *vector),
        "scale": 1 + normal(rng, *vector),
        "shift": normal(rng, 1, 1, width),
    }


def fused(inputs, dtype=jnp.float32):
    options = KernelOptions(EPS, jnp.dtype(dtype), **OPTIONS)
    return add_norm_kernel(*(inputs.get(name) for name in NAMES), options)


def plain(inputs, dtype=jnp.float32):
    arguments = (inputs.get(name) for name in NAMES)
    return add_norm(*arguments, eps=EPS, dtype=dtype, backend="xla")


@partial(jax.jit, static_argnums=(0, 3))
def values_and_gradients(function, inputs, cotangents, dtype=jnp.float32):
    """The outputs, and the gradient of every input by its name."""
    outputs, transpose = jax.vjp(lambda inputs: function(inputs, dtype), inputs)
    dx, dh = cotangents
    return outputs, transpose((dx, dh.astype(dtype)))[0]


def random_cotangents(rng, width=D):
    return normal(rng, B, C, S, width), normal(rng, B, C, S, width)


def test_the_plain_form_is_layer_norm_of_the_sum_in_float64():
    inputs = random_inputs(np.random.default_rng(0))
    x, y, bias, gate, scale, shift = (np.asarray(inputs[name], np.float64) for name in NAMES)
    x_new, h = plain(inputs)
    x = x + gate[:, :, None] * (y + bias)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS)
    assert relative_error(x_new, x) < 1e-7
    assert relative_error(h, normed * scale[:, :, None] + shift[:, :, None]) < 1e-6


@pytest.mark.parametrize(
    "absent", [(), ("gate",), ("bias",), ("bias", "gate"), ("y", "bias", "gate")]
)
def test_kernels_give_the_twins_values_and_gradients(absent):
    rng = np.random.default_rng(len(absent))
    inputs = {k: v for k, v in random_inputs(rng).items() if k not in absent}
    cotangents = random_cotangents(rng)
    got = values_and_gradients(fused, inputs, cotangents)
    want = values_and_gradients(plain, inputs, cotangents)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, got, want))
    errors = jax.tree.map(relative_error, got, want)
    assert all(error < 1e-6 for error in jax.tree.leaves(errors)), errors


@pytest.mark.parametrize("absent", [(), ("gate",)])
def test_bfloat16_costs_its_own_rounding_and_leaves_the_stream_float32(absent):
    rng = np.random.default_rng(3)
    inputs = random_inputs(rng, jnp.bfloat16)
    inputs = {k: v for k, v in inputs.items() if k not in absent}
    cotangents = tuple(x.astype(jnp.bfloat16).astype(jnp.float32) for x in random_cotangents(rng))
    (x_new, h), gradients = values_and_gradients(fused, inputs, cotangents, jnp.bfloat16)
    (want_x, want_h), wanted = values_and_gradients(plain, inputs, cotangents)
    assert h.dtype == gradients["y"].dtype == jnp.bfloat16
    assert relative_error(x_new, want_x) < 1e-6
    assert relative_error(h, want_h) < 3e-3
    errors = jax.tree.map(relative_error, gradients, wanted)
    assert errors.pop("y") < 3e-3
    assert all(error < 1e-6 for error in errors.values()), errors


def test_a_spoilt_row_spoils_no_other():
    rng = np.random.default_rng(4)
    inputs = random_inputs(rng)
    spoilt = (1, 2, 3)
    inputs["x"] = inputs["x"].at[spoilt].set(jnp.nan)
    (x_new, h), gradients = values_and_gradients(fused, inputs, random_cotangents(rng))
    is_spoilt = np.zeros((B, C, S), bool)
    is_spoilt[spoilt] = True
    for rows in (x_new, h, gradients["x"], gradients["y"]):
        np.testing.assert_array_equal(np.isnan(rows).any(-1), is_spoilt)
    np.testing.assert_array_equal(np.isnan(gradients["scale"]).any(-1), is_spoilt.any(-1))


def test_kernels_run_in_a_rematerialised_layer_of_a_scan_on_a_mesh():
    rng = np.random.default_rng(5)
    inputs = random_inputs(rng, width=8)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(sharding.AxisType.Auto,))
    by_data, whole = sharding.PartitionSpec("data"), sharding.PartitionSpec()

    def loss(add_norm, x, scales):
        @jax.checkpoint
        def layer(x, scale):
            return add_norm({"x": x, "y": jnp.sin(x), "scale": scale, "shift": scale})

        def total(x, scales):
            x, h = jax.lax.scan(layer, x, scales)
            return jnp.sum(x**2) + jnp.sum(h**3)

        on_mesh = jax.shard_map(
            total, mesh=mesh, in_specs=(by_data, whole), out_specs=whole, check_vma=False
        )
        return on_mesh(x, scales)

    def gradients(add_norm):
        scales = jnp.stack([inputs["scale"], inputs["gate"]])
        return jax.jit(jax.grad(partial(loss, add_norm), argnums=(0, 1)))(inputs["x"], scales)

    errors = jax.tree.map(relative_error, gradients(fused), gradients(plain))
    assert max(errors) < 2e-6, errors


@pytest.mark.parametrize("width", [264, 1536, 5120])
def test_kernels_lower_for_cuda_to_one_call_each_way(width):
    def gradient(*arguments):
        options = KernelOptions(EPS, jnp.dtype(jnp.bfloat16))
        outputs, transpose = jax.vjp(lambda *a: add_norm_kernel(*a, options), *arguments)
        return transpose(outputs)

    vector = jax.ShapeDtypeStruct((1, 2, width), jnp.float32)
    x = jax.ShapeDtypeStruct((1, 2, 77, width), jnp.float32)
    y = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    hopper = sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with sharding.use_abstract_mesh(sharding.AbstractMesh((), (), abstract_device=hopper)):
        bias = jax.ShapeDtypeStruct((width,), jnp.float32)
        traced = jax.jit(gradient).trace(x, y, bias, vector, vector, vector)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 2


def test_kernels_take_rows_that_fill_a_program_and_fit_its_registers():
    assert all(map(fits, (1536, 5120, 8192)))
    assert not any(map(fits, (8200, 1540, 128)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend is 'cuda', not one of triton, interpret, xla"),
        ({"x": jnp.zeros((2, 3, 4), jnp.float32)}, "the residual stream is float32"),
        ({"x": jnp.zeros((B, C, S, D), jnp.bfloat16)}, "the residual stream is bfloat16"),
        ({"y": None, "bias": None}, "a gate without the y"),
        ({"y": None, "gate": None}, "a bias without the y"),
        ({"bias": jnp.zeros((1, 1, D), jnp.float32)}, "bias is float32"),
        ({"bias": jnp.zeros((D,), jnp.bfloat16)}, "bias is bfloat16"),
        ({"y": jnp.zeros((B, C, S, D + 1), jnp.float32)}, "y is "),
        ({"gate": jnp.zeros((B, 2, D), jnp.float32)}, "gate is float32"),
        ({"scale": jnp.zeros((D,), jnp.float32)}, "scale is float32"),
        ({"shift": jnp.zeros((B, C, D), jnp.bfloat16)}, "shift is bfloat16"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {**random_inputs(np.random.default_rng(6)), "backend": "xla", **change}
    arrays = [arguments[name] for name in NAMES]
    with pytest.raises(ValueError, match=message):
        add_norm(*arrays, eps=EPS, dtype=jnp.float32, backend=arguments["backend"])
