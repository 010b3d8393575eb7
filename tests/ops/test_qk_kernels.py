"""The kernel between projections and their readers, interpreted, against the plain operations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import sharding

from lact_jax.ops.numerics import l2_norm
from lact_jax.ops.qk_kernels import QKOptions, fits, window_and_fast
from lact_jax.ops.qk_tiles import BACKWARD, Sizes
from lact_jax.ops.rope import apply_rope, rope_rotations

EPS, L2_EPS = 1e-6, 1e-5
B, C, HEIGHT, WIDTH = 2, 4, 3, 5
S = HEIGHT * WIDTH
SOME, ALL = ((1, 3),), ((0, C),)
EACH = tuple((i, i + 1) for i in range(C))


def relative(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def options(fast_heads, window=ALL, fast=ALL, joined=()):
    return QKOptions(fast_heads, EPS, L2_EPS, window, fast, joined, interpret=True)


def case(heads, head_dim, seed=0):
    """Arguments of `window_and_fast` in float32."""
    draw = np.random.default_rng(seed)
    width = heads * head_dim
    z, bias, scale, fast_scale, offset = (
        jnp.asarray(centre + spread * draw.normal(size=shape), jnp.float32)
        for centre, spread, shape in (
            (0, 2, (B, C, S, width)), (0, 1, width), (1, 0.2, width), (1, 0.2, width),
            (0, 0.3, width),
        )
    )  # fmt: skip
    frames = jnp.arange(C, dtype=jnp.int32)[:, None]
    rotation = rope_rotations(frames, HEIGHT, WIDTH, head_dim)
    return z, bias, rotation, scale, fast_scale, offset


def plain(z, bias, rotation, scale, fast_scale, offset, options):
    """As models/lact.py and models/layers.py have it, in float32."""
    x = z + bias
    normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + options.eps) * scale
    heads = (*x.shape[:-1], -1, 2 * rotation.shape[2])
    window = apply_rope(normed.reshape(heads), rotation)
    y = apply_rope((normed * fast_scale + offset).reshape(heads), rotation)
    y = jnp.swapaxes(y.reshape(*x.shape[:-1], options.fast_heads, -1), -3, -2)
    fast = y / (l2_norm(y) + options.l2_eps)
    windows, fasts = (
        tuple(out[:, first:end] for first, end in ranges)
        for out, ranges in ((window, options.window), (fast, options.fast))
    )
    joined = (
        jnp.concatenate([window[:, first:end] for first, end in pair], axis=2)
        for pair in options.joined
    )
    return (*windows, *joined), fasts


def outputs_and_gradients(form, options):
    """A compiled function of `case` and cotangents: what `form` gives, and its gradients."""

    def run(cotangents, *args):
        outputs, transpose = jax.vjp(lambda *args: form(*args, options), *args)
        cotangents = jax.tree.map(lambda g, y: g.astype(y.dtype), cotangents, outputs)
        return outputs, transpose(cotangents)

    return jax.jit(run)


def both_ways(args, options, low=jnp.float32):
    """Outputs and gradients of the kernel with z in `low`, and of the plain form in float32."""
    args = args[0].astype(low), *args[1:]
    exact = args[0].astype(jnp.float32), *args[1:]
    draw = np.random.default_rng(1)
    cotangents = jax.tree.map(
        lambda y: jnp.asarray(draw.normal(size=y.shape), low).astype(jnp.float32),
        jax.eval_shape(partial(plain, options=options), *exact),
    )
    got, grads = outputs_and_gradients(window_and_fast, options)(cotangents, *args)
    want, want_grads = outputs_and_gradients(plain, options)(cotangents, *exact)
    assert not np.any(grads[2])  # the rotation's
    return (got, grads[:2] + grads[3:]), (want, want_grads[:2] + want_grads[3:])


def check(got, want, dtype, limit):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for mine, exact in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.shape == exact.shape
        assert mine.dtype == (jnp.float32 if mine.ndim == 1 else dtype)
        assert relative(mine, exact) < limit


CASES = [
    (3, 12, 3, ALL, ALL, ()),  # a fast head is an attention head; neither size is a power of two
    (6, 4, 1, ((0, 3), (3, 4)), SOME, ()),  # the fast weights read two chunks of four
    (4, 4, 2, ALL, ((1, 3), (0, 2)), ()),  # chunk 1 is read twice, chunk 3 not by the fast weights
    (4, 4, 2, ((1, 2),), ((2, 3),), ()),  # chunks that one of both reads, and that none does
    (6, 4, 2, ((0, 2),), ((1, 2),), (((1, 2), (3, 4)),)),  # chunk 1 thrice, chunk 2 not at all
    (3, 12, 3, (), SOME, (((0, 2), (2, 4)), ((1, 2), (2, 3)))),  # all joined, some of them twice
    (6, 4, 2, ((0, 2), (2, 4)), EACH, ()),  # each chunk apart, for the fast weights
    (4, 4, 2, (), EACH[1:3], (((0, 2), (2, 4)),)),  # as for k
]


@pytest.mark.parametrize(("heads", "head_dim", "fast_heads", "window", "fast", "joined"), CASES)
def test_values_and_gradients_are_those_of_the_plain_form(
    heads, head_dim, fast_heads, window, fast, joined
):
    args = case(heads, head_dim)
    got, want = both_ways(args, options(fast_heads, window, fast, joined))
    check(got, want, jnp.float32, 2e-6)


@pytest.mark.parametrize("joined", [(), (((0, 2), (2, 4)),)])
def test_in_bfloat16_the_kernel_stays_near_float32(joined):
    got, want = both_ways(case(6, 4), options(2, ALL, SOME, joined), low=jnp.bfloat16)
    check(got, want, jnp.bfloat16, 5e-3)


def test_many_programs_count_all_tokens_and_zeros_have_finite_gradients():
    _, _, _, scale, fast_scale, _ = case(2, 4)
    z = np.random.default_rng(3).normal(size=(1, 2, 130, 8))
    z[:, :, 70:80] = 0
    zero = jnp.zeros(8, jnp.float32)  # bias and offset: so those tokens' fast vectors are zero
    rotation = rope_rotations(jnp.arange(2, dtype=jnp.int32)[:, None], 10, 13, 4)
    args = jnp.asarray(z, jnp.float32), zero, rotation, scale, fast_scale, zero
    got, want = both_ways(args, options(1, ((0, 2),), ((1, 2),)))
    check(got, want, jnp.float32, 2e-6)


@pytest.mark.parametrize("ranges", [((0, 2), (1, 2)), ((1, 3), (2, 3)), ((2, 3), (1, 2))])
def test_only_ranges_of_one_length_in_order_are_joined(ranges):
    with pytest.raises(ValueError, match="can't join the chunks"):
        options(1, joined=(ranges,))


@pytest.mark.parametrize("joined", [(), (((1, 2), (2, 3)),)])
@pytest.mark.parametrize(("heads", "fast_heads"), [(12, 2), (40, 8), (5, 1)])
def test_kernels_lower_for_cuda_to_one_call_each_way(heads, fast_heads, joined):
    def gradient(*args):
        made = QKOptions(fast_heads, EPS, L2_EPS, ((0, 1), (1, 3)), ((1, 2),), joined)
        outputs, transpose = jax.vjp(lambda *args: window_and_fast(*args, made), *args)
        return transpose(outputs)

    width, like = heads * 128, partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    z = jax.ShapeDtypeStruct((1, 3, 77, width), jnp.bfloat16)
    hopper = sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with sharding.use_abstract_mesh(sharding.AbstractMesh((), (), abstract_device=hopper)):
        vectors = [like((width,))] * 3
        traced = jax.jit(gradient).trace(z, like((width,)), like((3, 77, 64, 2)), *vectors)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 2


@pytest.mark.parametrize(
    ("width", "fast_heads", "warps"), [(256, 2, 1), (1536, 2, 2), (5120, 8, 8), (8192, 2, 16)]
)
def test_a_thread_holds_a_limited_part_of_a_token(width, fast_heads, warps):
    sizes = Sizes.of((1, 2, 3, width), 128, fast_heads, BACKWARD)
    assert sizes.warps == warps and sizes.lanes <= BACKWARD.lanes * 32 * warps


def test_kernels_take_whole_heads_that_fit_into_registers():
    assert fits(12, 128, 2) and fits(40, 128, 8)
    assert not fits(12, 128, 8)  # one and a half heads in each
    assert not fits(80, 128, 1)
