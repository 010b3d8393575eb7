"""Rotary positions against complex numbers, and the property they are for."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy_twins import positions, relative_error, rotate

from lact_jax.ops.rope import apply_rope, rope_rotations, split_pairs

HEIGHT, WIDTH, HEADS = 3, 4, 2


def rope(x_SNK, frames):
    """RoPE of one chunk that holds these frames."""
    rotation = rope_rotations(jnp.asarray([frames], jnp.int32), HEIGHT, WIDTH, x_SNK.shape[-1])
    return apply_rope(jnp.asarray(x_SNK, jnp.float32)[None, None], rotation)[0, 0]


def random_heads(seed, frames, head_dim):
    shape = (len(frames) * HEIGHT * WIDTH, HEADS, head_dim)
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(
    ("head_dim", "pairs"),
    [(128, (22, 21, 21)), (64, (12, 10, 10)), (12, (2, 2, 2)), (4, (2, 0, 0))],
)
def test_pairs_of_a_head_belong_to_time_height_and_width(head_dim, pairs):
    assert split_pairs(head_dim) == pairs


@pytest.mark.parametrize("head_dim", [12, 32, 128])
@pytest.mark.parametrize(
    ("frames", "tolerance"),
    [((0, 1, 2), 1e-6), ((20, 21), 2e-6), ((1023, 1024, 1500), 6e-5), ((5000,), 2e-4)],
)
def test_rope_multiplies_by_complex_numbers(head_dim, frames, tolerance):
    """Float32 angles lose digits far out, no faster than the frame index grows."""
    x = random_heads(0, frames, head_dim)
    want = rotate(x, positions(frames, HEIGHT, WIDTH))
    assert relative_error(rope(x, frames), want) < tolerance


def test_chunks_and_batch_are_rotated_by_their_own_frames():
    x = np.random.default_rng(1).standard_normal((2, 2, HEIGHT * WIDTH, HEADS, 12))
    rotation = rope_rotations(jnp.asarray([[4], [9]], jnp.int32), HEIGHT, WIDTH, 12)
    got = apply_rope(jnp.asarray(x, jnp.float32), rotation)
    want = [[rotate(x[b, c], positions((f,), HEIGHT, WIDTH)) for c, f in enumerate((4, 9))]
            for b in range(2)]  # fmt: skip
    assert relative_error(got, want) < 2e-6


@pytest.mark.usefixtures("float32_matmuls")
@pytest.mark.parametrize("shift", [1, 40, 3000])
def test_products_depend_on_the_distance_in_time_alone(shift):
    q, k = random_heads(2, (0, 1), 32), random_heads(3, (0, 1), 32)

    def products(first):
        rotated = (rope(x, (first, first + 1)) for x in (q, k))
        return jnp.einsum("snk,tnk->nst", *rotated)

    assert relative_error(products(shift), products(0)) < 1e-6 + 1e-7 * shift
    moved = jnp.einsum("snk,tnk->nst", rope(q, (0, 1)), rope(k, (shift, shift + 1)))
    assert relative_error(moved, products(0)) > 0.1


def test_rotation_keeps_type_and_length():
    x = jnp.asarray(random_heads(4, (7,), 16), jnp.bfloat16)
    rotation = rope_rotations(jnp.asarray([[7]], jnp.int32), HEIGHT, WIDTH, 16)
    rotated = apply_rope(x[None, None], rotation)[0, 0]
    assert rotated.dtype == jnp.bfloat16
    want = rotate(np.asarray(x, np.float64), positions((7,), HEIGHT, WIDTH))
    assert relative_error(rotated, want) < 4e-3
    norms = [np.linalg.norm(np.asarray(y, np.float64), axis=-1) for y in (rotated, x)]
    np.testing.assert_allclose(*norms, rtol=1e-2)
