"""Attention against a loop over heads, and the table that chooses its backend."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_fixtures import equations
from numpy_twins import attention, relative_error

from lact_jax.ops import attention as attention_module
from lact_jax.ops.attention import attend, choose_backend


def card(capability):
    return SimpleNamespace(platform="gpu", compute_capability=capability)


CPU, TPU = (SimpleNamespace(platform=name) for name in ("cpu", "tpu"))


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "backend"),
    [
        (card("9.0"), jnp.bfloat16, 128, "cudnn"),
        (card("9.0"), jnp.float16, 64, "cudnn"),
        (card("9.0"), jnp.dtype("bfloat16"), 256, "cudnn"),
        (card("10.0"), jnp.bfloat16, 256, "cudnn"),
        (card("8.0"), jnp.bfloat16, 128, "cudnn"),
        (card("8.6"), jnp.bfloat16, 136, "xla"),
        (card("7.0"), jnp.bfloat16, 128, "xla"),
        (card("gfx942"), jnp.bfloat16, 128, "xla"),
        (card("9.0"), jnp.bfloat16, 264, "xla"),
        (card("9.0"), jnp.bfloat16, 12, "xla"),
        (card("9.0"), jnp.float32, 128, "xla"),
        (CPU, jnp.bfloat16, 128, "xla"),
        (TPU, jnp.bfloat16, 128, "xla"),
    ],
)
def test_cudnn_is_chosen_only_where_it_takes_the_call(device, dtype, head_dim, backend):
    assert choose_backend(device, dtype, head_dim) == backend


def random_qkv(rng, tokens=5, keys=9):
    shapes = ((2, tokens, 3, 8), (2, keys, 3, 8), (2, keys, 3, 8))
    return [jnp.asarray(2 * rng.standard_normal(s), jnp.float32) for s in shapes]


def test_attend_is_softmax_attention_head_by_head():
    qkv = random_qkv(np.random.default_rng(0))
    want = [attention(*(np.asarray(x[b], np.float64) for x in qkv)) for b in range(2)]
    assert relative_error(attend(*qkv), want) < 2e-6


def test_bfloat16_attention_takes_its_softmax_in_float32():
    rng = np.random.default_rng(1)
    qkv = [x.astype(jnp.bfloat16) for x in random_qkv(rng, keys=300)]
    want = [attention(*(np.asarray(x[b], np.float64) for x in qkv)) for b in range(2)]
    out = attend(*qkv)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, want) < 6e-3


@pytest.mark.parametrize(("tokens", "keys"), [(5, 8), (6, 9), (5, 9)])
def test_what_cudnn_is_given_in_place_of_odd_lengths_gives_the_same(monkeypatch, tokens, keys):
    qkv = random_qkv(np.random.default_rng(3), tokens, keys)

    def results():
        o, transpose = jax.vjp(attend, *qkv)
        return o, *transpose(jnp.cos(o))

    want, lengths = results(), []

    def by_xla(q, k, v, *, implementation, **options):
        assert implementation == "cudnn"
        lengths.append((q.shape[1], k.shape[1]))
        return dot_product_attention(q, k, v, implementation="xla", **options)

    dot_product_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    monkeypatch.setattr(attention_module, "choose_backend", lambda *_: "cudnn")
    for got, expected in zip(results(), want, strict=True):
        assert relative_error(got, expected) < 2e-6
    assert lengths == [(6, keys + keys % 2)]


def test_float32_attention_is_exact_on_any_accelerator():
    qkv = random_qkv(np.random.default_rng(2))
    grad = jax.grad(lambda *args: jnp.sum(attend(*args) ** 2), argnums=(0, 1, 2))
    products = equations(jax.make_jaxpr(grad)(*qkv).jaxpr, "dot_general")
    assert len(products) >= 6
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    for equation in products:
        assert equation.params["precision"] == highest, equation
