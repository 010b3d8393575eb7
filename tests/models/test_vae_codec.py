"""The uint8 codec around the VAE: levels, streaming, compilations, tiles, and what it refuses."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from vae_fixtures import TINY, bind, random_array, relative_error

from lact_jax.models.vae import VAEConfig
from lact_jax.models.vae_codec import (
    WanCodec,
    default_latents_per_call,
    random_params,
    to_uint8,
    to_unit_range,
)
from lact_jax.models.vae_tiling import Tiling

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def codec():
    return WanCodec(random_params(TINY, 4), TINY, latents_per_call=1)


def random_frames(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_codec_is_the_vae_between_unit_range_and_clamped_levels(codec):
    frames = random_frames(1, 1, 9, 16, 16, 3)
    encode, decode = bind(random_params(TINY, 4), TINY)
    _, latent = encode(None, frames / np.float32(127.5) - 1)
    assert relative_error(codec.encode(frames), latent) < 1e-5
    _, video = decode(None, 3 * latent)
    want = np.rint((np.clip(video, -1, 1) + 1) * 127.5)
    got = np.asarray(codec.decode(3 * latent))
    assert got.dtype == np.uint8
    assert np.abs(got - want).max() <= 1  # a value on the edge between two levels
    assert np.mean(got != want) < 1e-3
    assert codec.latent_channels == 16


def test_uint8_survives_the_unit_range():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(to_unit_range(jnp.asarray(levels))), levels)
    np.testing.assert_array_equal(to_uint8(jnp.array([-7.0, 7.0], jnp.float32)), [0, 255])


def test_codec_streams_with_two_compilations(codec):
    frames = random_frames(2, 1, 9, 16, 16, 3)
    latent = codec.encode(frames)
    carry, latents = codec.init_encode(1, 16, 16), []
    for piece in np.split(frames, [1, 5], axis=1):
        carry, part = codec.encode_chunk(carry, piece)
        latents.append(part)
    assert relative_error(np.concatenate(latents, axis=1), latent) < 1e-6
    carry, pieces = codec.init_decode(1, 16, 16), []
    for part in latents:
        carry, piece = codec.decode_chunk(carry, part)
        pieces.append(piece)
    assert [piece.shape[1] for piece in pieces] == [1, 4, 4]
    difference = np.concatenate(pieces, axis=1).astype(int) - np.asarray(codec.decode(latent))
    assert np.abs(difference).max() <= 1 and np.mean(difference != 0) < 1e-3
    assert codec._encode_chunk._cache_size() == codec._decode_chunk._cache_size() == 2


def test_codec_tiles_when_asked():
    codec = WanCodec(random_params(TINY, 4), TINY, tiling=Tiling(tile=(2, 2), overlap=1))
    latent = random_array(80, 1, 1, 2, 4, 16)
    frames = codec.decode(latent)
    changed = codec.decode(latent.at[:, :, :, :1].add(1.0))
    # Without tiles every pixel would see the change through the attention.
    np.testing.assert_array_equal(changed[:, :, :, 16:], frames[:, :, :, 16:])
    assert np.mean(changed[:, :, :, :8] != frames[:, :, :, :8]) > 0.5
    assert codec.encode(random_frames(3, 1, 1, 16, 32, 3)).shape == (1, 1, 2, 4, 16)


def test_default_latents_per_call_bounds_the_widest_activation():
    pick = partial(default_latents_per_call, VAEConfig())
    assert pick(480, 832) == 4
    assert pick(2160, 3840) == 1
    assert 4 * 240 * 416 * 192 * pick(240, 416) < 2**31


def test_clips_too_many_for_one_call_go_one_by_one(monkeypatch):
    latent = random_array(81, 3, 2, 2, 2, 16)
    together = WanCodec(random_params(TINY, 4), TINY, latents_per_call=2).decode(latent)
    monkeypatch.setattr("lact_jax.models.vae_codec.MAX_ACTIVATION", 2 * 4 * 16 * 16 * 8)
    alone = WanCodec(random_params(TINY, 4), TINY)
    assert alone._cut(2, 16, 16) == (1, False) and alone._cut(3, 16, 16) == (2, True)
    difference = np.asarray(alone.decode(latent), int) - np.asarray(together)
    assert np.abs(difference).max() <= 1 and np.mean(difference != 0) < 1e-3


@pytest.mark.parametrize(
    "frames, message",
    [
        (np.zeros((1, 5, 16, 16, 3), np.float32), "float32: the codec takes uint8"),
        (np.zeros((1, 6, 16, 16, 3), np.uint8), r"6 frames: .* 1 \+ 4k frames at the start"),
        (np.zeros((1, 5, 16, 20, 3), np.uint8), "16x20: height and width must be multiples of 8"),
        (np.zeros((5, 16, 16, 3), np.uint8), r"need \(B, T, H, W, 3\)"),
    ],
)
def test_frames_that_cannot_be_encoded_are_refused(codec, frames, message):
    with pytest.raises(ValueError, match=message):
        codec.encode(frames)


def test_a_continued_video_takes_whole_groups_of_four(codec):
    carry, _ = codec.encode_chunk(None, random_frames(4, 1, 1, 16, 16, 3))
    with pytest.raises(ValueError, match="5 frames: .* 4k frames after its start"):
        codec.encode_chunk(carry, random_frames(5, 1, 5, 16, 16, 3))


@pytest.mark.parametrize("shape", [(1, 16, 2, 2, 2), (2, 2, 2, 16), (1, 0, 2, 2, 16)])
def test_a_latent_of_another_layout_is_refused(codec, shape):
    with pytest.raises(ValueError, match=r"need \(B, F, h, w, 16\), channels last"):
        codec.decode(np.zeros(shape, np.float32))


def test_parameters_that_do_not_fit_are_all_listed():
    flat = traverse_util.flatten_dict(random_params(TINY, 0), sep="/")
    flat["decoder/extra"] = flat.pop("decoder/conv_in/bias")
    flat["encoder/conv_in/kernel"] = flat["encoder/conv_in/kernel"].T
    with pytest.raises(ValueError) as caught:
        WanCodec(traverse_util.unflatten_dict(flat, sep="/"), TINY)
    for line in ("missing decoder/conv_in/bias", "unknown decoder/extra", "encoder/conv_in/kernel"):
        assert line in str(caught.value)
