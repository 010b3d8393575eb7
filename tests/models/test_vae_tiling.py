"""Spatial tiles of the VAE: cover, blending, seams, exactness with one tile, streaming."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from vae_fixtures import (
    TINY,
    bind,
    golden_params,
    random_array,
    read_golden,
    relative_error,
    shifted_params,
    stream,
)

from lact_jax.models.vae_tiling import Tiling, blend_weights, tile_starts, tiled

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize(
    "size, tile, overlap", [(60, 32, 8), (104, 32, 9), (33, 32, 1), (32, 32, 8)]
)
def test_tiles_cover_an_axis_and_their_weights_sum_to_one(size, tile, overlap):
    starts = tile_starts(size, tile, overlap)
    assert starts[0] == 0 and starts[-1] + tile == size
    assert all(b - a <= tile - overlap for a, b in zip(starts, starts[1:], strict=False))
    total = np.zeros(size)
    for start, weights in zip(starts, blend_weights(starts, size, tile, overlap), strict=True):
        assert weights.min() >= 0
        total[start : start + tile] += weights
    np.testing.assert_allclose(total, 1.0, atol=1e-6)


def waves(seed, frames, height, width, channels):
    """Smooth content: per channel a plane wave of about one period a frame, moving slowly."""
    rng = np.random.default_rng(seed)
    frequency = rng.uniform(-1.5, 1.5, (channels, 2)) / max(height, width)
    rows_HW, columns_HW = np.mgrid[:height, :width]
    place_HWC = np.multiply.outer(rows_HW, frequency[:, 0])
    place_HWC += np.multiply.outer(columns_HW, frequency[:, 1]) + rng.uniform(size=channels)
    time_T = 0.05 * np.arange(frames)[:, None, None, None]
    return jnp.asarray(np.sin(2 * np.pi * (place_HWC + time_T))[None], jnp.float32)


@pytest.fixture(scope="module")
def local():
    """Encode and decode steps of the golden VAE with attention that gives 0.

    Random attention averages over all that it sees, and a tile's average is another. What is left
    are the tiles' edges.
    """
    config, tensors = read_golden()
    flat = traverse_util.flatten_dict(golden_params(config, tensors), sep="/")
    silent = {k: 0 * v if "middle/1/proj" in k else v for k, v in flat.items()}
    return bind(traverse_util.unflatten_dict(silent, sep="/"), config)


def test_decoding_in_tiles_shows_no_seam(local):
    latent = waves(1, 1, 12, 36, 16)
    whole = np.asarray(local[1](None, latent)[1])
    step = jax.jit(tiled(local[1], Tiling(tile=(24, 24), overlap=12), 1, 8))
    got = np.asarray(step(None, latent)[1])
    assert relative_error(got, whole) < 5e-3
    # A seam is a step between neighbouring columns that the whole frame does not have.
    step_W = np.abs(np.diff(got - whole, axis=3)).mean(axis=(0, 1, 2, 4))
    own_step = np.abs(np.diff(whole, axis=3)).mean()
    assert 0 < step_W.max() < 0.1 * own_step


def test_encoding_in_tiles_is_close_to_the_whole(local):
    video = waves(2, 1, 96, 288, 3)
    whole = local[0](None, video)[1]
    step = jax.jit(tiled(local[0], Tiling(tile=(24, 24), overlap=12), 8, 1))
    assert 0 < relative_error(step(None, video)[1], whole) < 5e-3


def test_one_tile_is_the_whole():
    # To the last bits: a card chooses its convolutions for each program anew.
    encode, decode = bind(shifted_params(), TINY)
    latent = random_array(70, 1, 2, 3, 4, 16)
    step = jax.jit(tiled(decode, Tiling(tile=(4, 4), overlap=2), 1, 8))
    assert relative_error(step(None, latent)[1], decode(None, latent)[1]) < 2e-6
    video = random_array(71, 1, 5, 24, 32, 3)
    step = jax.jit(tiled(encode, Tiling(tile=(4, 4), overlap=2), 8, 1))
    assert relative_error(step(None, video)[1], encode(None, video)[1]) < 2e-6


def test_tiles_carry_their_own_past():
    def running_sum(carry, x_BTHWC):
        """A step whose result, pixel by pixel, is the sum of all so far; twice as large."""
        past = 0 * x_BTHWC[:, 0] if carry is None else carry
        sums_BTHWC = jnp.cumsum(x_BTHWC, axis=1) + past[:, None]
        return sums_BTHWC[:, -1], jnp.repeat(jnp.repeat(sums_BTHWC, 2, axis=2), 2, axis=3)

    x = random_array(72, 2, 5, 7, 11, 3)
    step = tiled(running_sum, Tiling(tile=(4, 6), overlap=2), 1, 2)
    assert relative_error(stream(step, x, (1, 2, 2)), running_sum(None, x)[1]) < 1e-6


@pytest.mark.parametrize("tile, overlap", [((16, 32), 9), ((16, 16), 0)])
def test_an_overlap_too_large_or_too_small_is_refused(tile, overlap):
    with pytest.raises(ValueError, match="at least 1 and at most half a tile"):
        Tiling(tile=tile, overlap=overlap)
