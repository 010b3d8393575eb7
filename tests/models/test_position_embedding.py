"""The option that tells a token its row and column: what it adds, and that it is there everywhere.

That sampling adds what training does is in test_dit.py, with the other ways to build a model, and
that devices which share tokens add each its own in test_sharded_layers.py.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from model_fixtures import compiled, random_inputs, random_params, tiny
from numpy_twins import relative_error

from lact_jax.models.layers import position_embedding

WITH = tiny(mixer="window", position_embedding=True)
WITHOUT = replace(WITH, position_embedding=False)


def by_place(frames, height, width, dim):
    embedding = position_embedding(frames, height, width, dim)
    return np.asarray(embedding).reshape(frames, height, width, dim)


def test_every_place_of_a_large_picture_has_an_embedding_of_its_own():
    embedding = by_place(1, 30, 52, 96).reshape(-1, 96)
    squares = np.sum(np.square(embedding), axis=1)
    np.testing.assert_allclose(squares, 48, rtol=1e-5)
    distance = squares[:, None] + squares - 2 * embedding @ embedding.T
    np.fill_diagonal(distance, np.inf)
    assert distance.min() > 0.1 * 48


def test_a_place_has_the_same_embedding_in_every_frame_and_in_pictures_of_every_size():
    large, small = by_place(3, 5, 7, 16), by_place(2, 2, 6, 16)
    assert np.all(large == large[:1])
    np.testing.assert_array_equal(small[0], large[0, :2, :6])


def told_apart(config, axis):
    """How much the patches of the first chunk's prediction differ along an axis of its grid (rows
    1, columns 2), where the chunk is one colour."""
    x = random_inputs(1, 1)
    alike = jnp.broadcast_to(x.noise[:, :, :, :1, :1, :1], x.noise.shape)
    out, _ = compiled(config).sequence(random_params(config), x.clean, alike, x.timestep, x.text)
    patches = rearrange(out[0, 0, 0], "f (h ph) (w pw) c -> f h w (ph pw c)", ph=2, pw=2)
    first = np.take(patches, [0], axis=axis)
    return relative_error(np.broadcast_to(first, patches.shape), patches)


@pytest.mark.parametrize("axis", [1, 2])
def test_parts_of_a_picture_that_look_alike_are_told_apart(axis):
    assert told_apart(WITHOUT, axis) < 1e-5
    assert told_apart(WITH, axis) > 1e-2
