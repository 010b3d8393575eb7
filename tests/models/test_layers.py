"""Norms, projections, time embedding and patches against float64 formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy_twins import relative_error

from lact_jax.models import layers
from lact_jax.ops.norm_kernels import layer_norm

EPS = 1e-6


def normal(seed, *shape, scale=1.0, offset=0.0):
    x = scale * np.random.default_rng(seed).standard_normal(shape) + offset
    return jnp.asarray(x, jnp.float32)


def float64(x):
    return np.asarray(x, np.float64)


def whitened(x):
    x = float64(x)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS)


@pytest.mark.parametrize("width", [16, 256])
def test_timestep_embedding_is_exact_up_to_one_thousand(width):
    rng = np.random.default_rng(0)
    whole = np.arange(1001.0)
    t = np.concatenate([whole, rng.uniform(0, 1000, 5000), 1000 - rng.uniform(0, 1, 100)])
    t = t.astype(np.float32)
    angle = t.astype(np.float64)[:, None] * 10000.0 ** (-np.arange(width // 2) / (width // 2))
    want = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    got = layers.timestep_embedding(jnp.asarray(t)[None], width)[0]
    assert got.dtype == jnp.float32
    assert np.max(np.abs(got - want)) < 1e-6


def test_rms_norm_has_its_formula():
    x = normal(1, 2, 5, 24, scale=3.0, offset=2.0)
    scale = normal(2, 24)
    rms = layers.RMSNorm(24, EPS)
    rms.scale[...] = scale
    root = np.sqrt(np.mean(float64(x) ** 2, -1, keepdims=True) + EPS)
    assert relative_error(rms(x), float64(x) / root * float64(scale)) < 1e-6


def test_norms_reduce_bfloat16_in_float32():
    x = normal(4, 3, 512, offset=30.0).astype(jnp.bfloat16)
    out = layers.RMSNorm(512, EPS)(x)
    assert out.dtype == jnp.bfloat16
    root = np.sqrt(np.mean(float64(x) ** 2, -1, keepdims=True) + EPS)
    assert relative_error(out, float64(x) / root) < 3e-3
    assert layer_norm(x, EPS).dtype == jnp.float32
    assert relative_error(layer_norm(x, EPS), whitened(x)) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", jnp.float32])
def test_float32_linear_is_exact_on_any_accelerator(dtype):
    layer = layers.linear(8, 6, dtype=dtype, rngs=nnx.Rngs(0))
    assert layer.precision == jax.lax.Precision.HIGHEST


def test_linear_starts_without_bias_and_keeps_float32_parameters():
    layer = layers.linear(8, 6, dtype="bfloat16", rngs=nnx.Rngs(0))
    x = normal(5, 4, 8)
    assert layer(x).dtype == jnp.bfloat16
    assert layer.kernel[...].dtype == layer.bias[...].dtype == jnp.float32
    assert layer.precision is None
    assert np.all(layer.bias[...] == 0)
    assert relative_error(layer(x), float64(x) @ float64(layer.kernel[...])) < 1e-2
    layer.bias[...] = normal(6, 6)
    want = float64(x) @ float64(layer.kernel[...]) + float64(layer.bias[...])
    assert relative_error(layer(x), want) < 1e-2


def test_project_float32_does_not_round_its_result():
    layer = layers.linear(64, 6, dtype="bfloat16", rngs=nnx.Rngs(1))
    layer.bias[...] = normal(7, 6, offset=100.0)
    x = normal(8, 20, 64).astype(jnp.bfloat16)
    out = layers.project_float32(layer, x)
    assert out.dtype == jnp.float32
    kernel = float64(layer.kernel[...].astype(jnp.bfloat16))
    want = float64(x) @ kernel + float64(layer.bias[...])
    assert relative_error(out, want) < 1e-6
    assert relative_error(layer(x), want) > 1e-4  # bfloat16 cannot hold it


def narrow_layers(dtype):
    rngs = nnx.Rngs(3)
    narrow = nnx.List([layers.linear(64, n, dtype=dtype, rngs=rngs) for n in (6, 1, 2)])
    for i, layer in enumerate(narrow):
        layer.bias[...] = normal(20 + i, *layer.bias.shape)
    return narrow


def side_by_side(narrow, x):
    return jnp.concatenate([layer(x) for layer in narrow], axis=-1)


def value_and_gradients(project, narrow, x):
    """project(narrow, x), and the gradients of its parameters and of x in a weighted sum."""
    graph, params = nnx.split(narrow)

    def weigh(params, x):
        y = project(nnx.merge(graph, params), x)
        return jnp.sum(jnp.sin(y) * normal(14, *y.shape)), y

    gradients, y = jax.grad(weigh, (0, 1), has_aux=True)(params, x)
    return y, *gradients


@pytest.mark.parametrize("shape", [(30, 64), (2, 30, 64), (2, 3, 30, 64)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 1e-2)])
def test_joined_projection_is_its_layers_side_by_side(shape, dtype, tolerance):
    x = normal(13, *shape).astype(dtype)
    got = value_and_gradients(layers.project_joined_float32, narrow_layers(dtype), x)
    want = value_and_gradients(side_by_side, narrow_layers("float32"), x.astype(jnp.float32))
    y, dparams, dx = got
    assert y.dtype == jnp.float32 and dx.dtype == x.dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(dparams)} == {jnp.dtype("float32")}
    for mine, plain in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.shape == plain.shape
        assert relative_error(mine, plain) < tolerance


def test_mlp_is_two_linears_around_the_tanh_gelu():
    mlp = layers.MLP(6, 10, 4, layers.gelu_tanh, dtype="float32", rngs=nnx.Rngs(2))
    mlp.fc1.bias[...], mlp.fc2.bias[...] = normal(9, 10), normal(10, 4)
    x = normal(11, 7, 6)
    h = float64(x) @ float64(mlp.fc1.kernel[...]) + float64(mlp.fc1.bias[...])
    h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    want = h @ float64(mlp.fc2.kernel[...]) + float64(mlp.fc2.bias[...])
    assert relative_error(mlp(x), want) < 1e-6


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3), (1, 1, 1)])
def test_tokens_are_patches_frame_by_frame_and_row_by_row(patch):
    x = normal(12, 2, 3, 4, 6, 6, 5)
    tokens = layers.patchify(x, patch)
    pt, ph, pw = patch
    corners = [(f, y, z) for f in range(0, 4, pt) for y in range(0, 6, ph) for z in range(0, 6, pw)]
    assert tokens.shape == (2, 3, len(corners), pt * ph * pw * 5)
    for s, (f, y, z) in enumerate(corners):
        block = x[:, :, f : f + pt, y : y + ph, z : z + pw]
        assert np.array_equal(tokens[:, :, s], block.reshape(2, 3, -1))
    assert np.array_equal(layers.unpatchify(tokens, patch, 4, 6, 6), x)
