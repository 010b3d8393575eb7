"""Cross-attention by chunk is that of all tokens at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx
from numpy_twins import relative_error

from lact_jax.models.block import CrossAttention, copy_for_chunks
from lact_jax.models.dit import DiTConfig
from lact_jax.models.lact import LaCTConfig
from lact_jax.models.layers import without_bias
from lact_jax.ops.attention import attend

pytestmark = pytest.mark.usefixtures("quick_compile")

B, C, S, D, L, HEADS = 2, 3, 5, 16, 7, 2


def all_tokens_at_once(layer, x_BCSD, text_kv):
    x_BTD = rearrange(x_BCSD, "b c s d -> b (c s) d")
    q_BTNK = rearrange(layer.norm_q(layer.q(x_BTD)), "b t (n k) -> b t n k", n=HEADS)
    o_BTD = without_bias(layer.o, rearrange(attend(q_BTNK, *text_kv), "b t n k -> b t (n k)"))
    return rearrange(o_BTD, "b (c s) d -> b c s d", c=C)


def outputs_and_gradients(forward, dtype):
    """Of a random layer with random inputs: the gradients of its parameters, video and text."""
    config = DiTConfig(
        dim=D, num_heads=HEADS, lact=(LaCTConfig(fw_head_dim=D),), dtype=dtype, text_len=L
    )
    graph, params = nnx.split(CrossAttention(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    x, text, cotangent = (
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in ((B, C, S, D), (B, L, D), (B, C, S, D))
    )

    @jax.jit
    def run(params, x, text):
        def apply(params, x, text):
            layer = nnx.merge(graph, params)
            return forward(layer, x, layer.text_kv(text))

        output, transpose = jax.vjp(apply, params, x, text)
        return output, transpose(cotangent)

    return jax.tree.leaves(run(params, x, text))


@pytest.mark.usefixtures("float32_matmuls")
def test_chunks_in_the_batch_change_nothing():
    got = outputs_and_gradients(CrossAttention.__call__, "float32")
    want = outputs_and_gradients(all_tokens_at_once, "float32")
    assert len(got) > 10
    for mine, plain in zip(got, want, strict=True):
        if np.linalg.norm(plain) > 1e-4:
            assert relative_error(mine, plain) < 1e-5
        else:  # a bias of keys moves all scores of a query alike
            assert np.linalg.norm(mine) < 1e-4


def test_gradients_of_the_text_are_added_in_float32():
    text = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    _, transpose = jax.vjp(lambda k: copy_for_chunks(k, 300), text)
    copies = jnp.ones((1, 300, 2, 1, 4), jnp.bfloat16)
    program = jax.make_jaxpr(transpose)(copies)
    sums = [e.invars[0].aval for e in program.eqns if e.primitive.name == "reduce_sum"]
    assert copies.shape in {x.shape for x in sums}
    assert {x.dtype for x in sums} == {jnp.dtype(jnp.float32)}
    (total,) = transpose(copies)
    assert total.dtype == jnp.bfloat16
    assert np.all(np.asarray(total, np.float32) == 300)
