"""The kernel that merges a layer's two outputs, interpreted, against the plain operations."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from lact_jax.ops.merge_kernels import MergeOptions, fits, merge

EPS = 1e-6


def relative(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def case(batch, tokens, heads, head_dim, copies, video_chunks, seed=0):
    """Arguments of `merge` in float32, for the sequence of REFERENCE.md 3, and its options."""
    draw = np.random.default_rng(seed)

    def normal(*shape, centre=0.0, spread=1.0):
        return jnp.asarray(centre + spread * draw.normal(size=shape), jnp.float32)

    clean = video_chunks - 1
    alone, chunks = copies + clean, copies + clean + clean * copies
    fast = tuple(
        normal(w, batch, heads, r * tokens, head_dim, spread=3)
        for w, r in ((1, copies), (clean, 1), (clean, copies))
    )
    window = tuple(
        normal(batch, count, tokens, heads * head_dim) for count in (alone, chunks - alone)
    )
    gate, scale = normal(batch, chunks, tokens, 1), normal(head_dim, centre=1, spread=0.2)
    options = MergeOptions(
        EPS, ((0, copies), (copies, alone), (alone, chunks)), ((0, alone), (alone, chunks)),
        interpret=True,
    )  # fmt: skip
    return (fast, window, gate, scale), options


def each_apart(args, options):
    """The same with every video chunk's fast output in an array of its own."""
    (fast, *others), parts = args, []
    for (first, end), x_WBMTE in zip(options.fast, fast, strict=True):
        copies = (end - first) // len(x_WBMTE)
        parts += [(i, i + copies) for i in range(first, end, copies)]
    fast = tuple(itertools.chain(*(jnp.split(x, len(x)) for x in fast)))
    return (fast, *others), replace(options, fast=tuple(parts))


def plain(fast, window, gate_BCS1, scale_E, options):
    """As models/lact.py and models/layers.py have it, in float32."""
    tokens = gate_BCS1.shape[2]
    parts = (rearrange(x, "w b m (r s) e -> b (w r) m s e", s=tokens) for x in fast)
    o_fast, o_window = jnp.concatenate(list(parts), axis=1), jnp.concatenate(window, axis=1)
    rms = jnp.sqrt(jnp.mean(o_fast**2, axis=-1, keepdims=True) + options.eps)
    normed = rearrange(o_fast / rms * scale_E, "b c m s e -> b c s (m e)")
    fast_norm = jnp.mean(jnp.linalg.norm(o_fast, axis=-1), axis=2)
    return gate_BCS1 * normed + o_window, fast_norm, jnp.linalg.norm(o_window, axis=-1)


def outputs_and_gradients(form, options):
    """A compiled function of a cotangent and `case`: what `form` gives, and its gradients."""

    def run(dy, *args):
        def merged(*args):
            y, *norms = form(*args, options)
            return y, norms

        y, transpose, norms = jax.vjp(merged, *args, has_aux=True)
        return (y, norms), transpose(dy.astype(y.dtype))

    return jax.jit(run)


def check(args, options, low, forward_limit, gradient_limit):
    """Holds the kernel with outputs in `low` to the plain form in float32 of the same numbers."""
    args = *jax.tree.map(lambda x: x.astype(low), args[:2]), *args[2:]
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), args)
    shape = *args[2].shape[:3], args[1][0].shape[-1]
    dy = jnp.asarray(np.random.default_rng(1).normal(size=shape), low)
    got, grads = outputs_and_gradients(merge, options)(dy, *args)
    want, want_grads = outputs_and_gradients(plain, options)(dy, *exact)
    assert got[0].dtype == low
    for mine, other, limit in ((got, want, forward_limit), (grads, want_grads, gradient_limit)):
        assert jax.tree.structure(mine) == jax.tree.structure(other)
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True):
            assert a.shape == b.shape
            assert relative(a, b) < limit
    assert [g.dtype for g in jax.tree.leaves(grads)] == [a.dtype for a in jax.tree.leaves(args)]


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim", "copies", "video_chunks"),
    [
        (1, 15, 2, 12, 1, 3),  # fewer tokens than a program takes
        (2, 130, 3, 8, 1, 2),  # more, and not a multiple
        (2, 7, 1, 6, 2, 3),  # noise copies of a video chunk stand beside each other
    ],
)
def test_values_and_gradients_are_those_of_the_plain_form(
    batch, tokens, heads, head_dim, copies, video_chunks
):
    check(*case(batch, tokens, heads, head_dim, copies, video_chunks), jnp.float32, 1e-6, 2e-6)


@pytest.mark.parametrize(("copies", "video_chunks"), [(1, 4), (2, 3)])
def test_every_chunk_in_an_array_of_its_own(copies, video_chunks):
    args, options = each_apart(*case(1, 15, 2, 12, copies, video_chunks))
    assert len(options.fast) == 2 * video_chunks - 1
    check(args, options, jnp.float32, 1e-6, 2e-6)


def test_in_bfloat16_the_kernel_stays_near_float32():
    check(*case(2, 61, 2, 12, 1, 3), jnp.bfloat16, 5e-3, 5e-3)


def test_a_closed_gate_and_tokens_of_zeros_have_finite_gradients():
    (fast, window, gate, scale), options = case(1, 9, 2, 8, 1, 2)
    fast = tuple(x.at[..., 4:6, :].set(0) for x in fast)
    dy = jnp.ones((1, 3, 9, 16), jnp.float32)
    (y, _), (dfast, _, dgate, dscale) = outputs_and_gradients(merge, options)(
        dy, fast, window, jnp.zeros_like(gate), scale
    )
    np.testing.assert_array_equal(y, jnp.concatenate(window, axis=1))
    assert not any(np.any(x) for x in (*dfast, dscale))
    assert np.all(np.isfinite(dgate)) and np.any(dgate)


def test_the_norms_have_no_gradient():
    args, options = case(1, 5, 2, 4, 1, 2)
    grads = jax.grad(lambda *args: sum(map(jnp.sum, merge(*args, options)[1:])), range(4))(*args)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_kernels_take_heads_that_fit_into_registers():
    assert fits(2, 768) and fits(10, 512)
    assert not fits(10, 768)
