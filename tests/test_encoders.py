import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lact_jax import encoders
from lact_jax.data.synthetic import Settings, draw_clip
from lact_jax.models import block_codec
from lact_jax.models.word_text import WordTextEncoder, words

HELD_OUT = Settings(seed=11, split="held_out")


@pytest.fixture(scope="module")
def codec():
    return encoders.make_codec("pca")


def psnr(first, second):
    error = np.mean((np.asarray(first, np.float64) - np.asarray(second, np.float64)) ** 2)
    return 10 * np.log10(255**2 / error)


def clips(family, count, num_frames=81):
    frames = [draw_clip(HELD_OUT, family, i)[0][:num_frames] for i in range(count)]
    return np.stack(frames)


def test_sizes_are_those_of_the_wan_vae(codec):
    assert (codec.temporal_stride, codec.spatial_stride, codec.latent_channels) == (4, 8, 16)
    frames = np.random.default_rng(0).integers(0, 256, (2, 9, 32, 48, 3), np.uint8)
    latent = codec.encode(frames)
    assert latent.shape == (2, 3, 4, 6, 16) and latent.dtype == jnp.float32
    decoded = codec.decode(latent)
    assert decoded.shape == frames.shape and decoded.dtype == jnp.uint8


# What the shipped fits reach on other clips, less a margin.
@pytest.mark.parametrize("channels, family, at_least", [
    (16, "shapes", 32.0), (16, "ring", 25.5), (32, "shapes", 33.5), (32, "ring", 27.5),
])
def test_quality_on_held_out_clips(channels, family, at_least):
    codec = encoders.make_codec("pca", channels=channels)
    frames = clips(family, 6)
    decoded = np.asarray(codec.decode(codec.encode(frames)))
    assert np.mean([psnr(a, b) for a, b in zip(decoded, frames, strict=True)]) > at_least


def test_decoder_is_better_than_the_basis_and_better_yet_under_noise(codec):
    frames = clips("shapes", 4)
    params = codec._params
    latent = np.asarray(codec.encode(frames))
    gain = []
    for level in (0.0, 0.2):
        noisy = latent + level * np.random.default_rng(0).standard_normal(latent.shape, np.float32)
        block = (noisy / params["scale"]) @ params["basis"][:, :16].T + params["mean"]
        plain = np.asarray(block_codec.pixels(block)).reshape(4, -1, 64, 64, 3)[:, 3:]
        plain = np.clip(np.rint((plain + 1) * 127.5), 0, 255)
        gain.append(psnr(codec.decode(noisy), frames) - psnr(plain, frames))
    assert gain[0] > 2 and gain[1] > gain[0] + 1


def test_latents_have_unit_variance_over_both_families(codec):
    variances = []
    for family in ("shapes", "ring"):
        latent = np.asarray(codec.encode(clips(family, 16)), np.float64)
        variances.append(np.mean(latent**2))
    assert 0.7 < np.mean(variances) < 1.4


@pytest.mark.parametrize("split", [[1, 1, 1, 1, 1, 1], [3, 3], [1, 5], [4, 2]])
def test_any_split_in_time_gives_the_same_video(codec, split):
    latent = np.random.default_rng(0).standard_normal((2, 6, 4, 4, 16), np.float32)
    whole = np.asarray(codec.decode(latent)).astype(int)
    carry, parts = codec.init_decode(2, 32, 32), []
    for piece in np.split(latent, np.cumsum(split)[:-1], axis=1):
        carry, frames = codec.decode_chunk(carry, piece)
        parts.append(np.asarray(frames).astype(int))
    assert [p.shape[1] for p in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(split)]
    difference = np.abs(np.concatenate(parts, 1) - whole)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3  # only rounding


def test_frames_depend_on_no_later_latent(codec):
    latent = np.random.default_rng(0).standard_normal((1, 4, 4, 4, 16), np.float32)
    changed = latent.copy()
    changed[:, 2:] += 1
    first, second = np.asarray(codec.decode(latent)), np.asarray(codec.decode(changed))
    assert np.abs(first[:, :5].astype(int) - second[:, :5]).max() <= 1
    assert psnr(first[:, 5:], second[:, 5:]) < 30


def test_latents_depend_on_their_own_frames_alone(codec):
    frames = clips("ring", 1, 13)
    changed = frames.copy()
    changed[:, 5:9] = 255 - changed[:, 5:9]  # the frames of latent 2
    first, second = np.asarray(codec.encode(frames)), np.asarray(codec.encode(changed))
    np.testing.assert_allclose(first[:, [0, 1, 3]], second[:, [0, 1, 3]], atol=1e-5)
    assert np.abs(first[:, 2] - second[:, 2]).mean() > 0.1


def test_a_still_video_has_one_latent(codec):
    frames = np.repeat(clips("ring", 1, 1), 9, axis=1)
    latent = np.asarray(codec.encode(frames))
    np.testing.assert_allclose(latent, np.repeat(latent[:, :1], 3, axis=1), atol=1e-5)


def test_each_video_of_a_batch_is_its_own(codec):
    frames = np.concatenate([clips("shapes", 1, 9), clips("ring", 1, 9)])
    latent = codec.encode(frames)
    for i in range(2):
        alone = codec.encode(frames[i : i + 1])
        np.testing.assert_allclose(latent[i : i + 1], alone, atol=1e-5)
        decoded = np.asarray(codec.decode(latent))[i].astype(int)
        assert np.abs(decoded - np.asarray(codec.decode(alone))[0]).max() <= 1


def test_one_compilation_a_shape(codec):
    frames = clips("shapes", 1, 9)
    before = block_codec.encode._cache_size()
    for _ in range(3):
        carry, _ = codec.decode_chunk(codec.init_decode(1, 64, 64), codec.encode(frames))
        for _ in range(2):
            carry, _ = codec.decode_chunk(carry, codec.encode(frames))
    assert block_codec.encode._cache_size() <= before + 1


@pytest.mark.parametrize("frames, match", [
    (np.zeros((1, 8, 16, 16, 3), np.uint8), "8 frames: must be 1 \\+ 4k"),
    (np.zeros((1, 9, 20, 16, 3), np.uint8), "20x16: 8 must divide"),
    (np.zeros((1, 9, 16, 16, 3), np.float32), "must be uint8"),
    (np.zeros((9, 16, 16, 3), np.uint8), "must be uint8 \\(B, T, H, W, 3\\)"),
])
def test_frames_that_do_not_fit(codec, frames, match):
    with pytest.raises(ValueError, match=match):
        codec.encode(frames)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4, 8), (1, 0, 4, 4, 16), (3, 4, 4, 16)])
def test_latents_that_do_not_fit(codec, shape):
    with pytest.raises(ValueError, match="latents must be"):
        codec.decode(np.zeros(shape, np.float32))


def test_codec_files(tmp_path, codec):
    with pytest.raises(FileNotFoundError, match="block_codec_7.npz.*fit_block_codec"):
        encoders.make_codec("pca", channels=7)
    path = tmp_path / "mine.npz"
    block_codec.save(path, codec._params, {"power": 0.5})
    mine = encoders.make_codec("pca", path=path)
    frames = clips("shapes", 1, 5)
    np.testing.assert_array_equal(mine.encode(frames), codec.encode(frames))
    assert mine.notes == {"power": 0.5}
    with pytest.raises(ValueError, match="has 16 channels, not 32"):
        encoders.make_codec("pca", channels=32, path=path)


def test_a_fit_from_scratch(tmp_path):
    from lact_jax import fit_block_codec

    path = tmp_path / "small.npz"
    fit_block_codec.main([
        f"--out={path}", "--channels=4", "--coefficients=24", "--clips=2", "--width=16",
        "--layers=1", "--steps=60", "--batch=8", "--power=0.25", "--measured_clips=1",
    ])  # fmt: skip
    codec = encoders.make_codec("pca", channels=4, path=path)
    assert codec.notes["power"] == 0.25 and codec.notes["shapes"] > codec.notes["shapes block"]
    latent = np.asarray(codec.encode(clips("shapes", 2)))
    spread = latent.std((0, 1, 2, 3))
    assert spread[0] == spread.max()  # a small power leaves the first channel the loudest


@pytest.mark.parametrize("make, match", [
    (lambda: encoders.make_codec("vqgan"), "codec.name='vqgan': unknown, choose one of"),
    (lambda: encoders.make_codec("pca", chanels=16), "codec.options of 'pca'.*chanels.*channels"),
    (lambda: encoders.make_text_encoder("bert"), "text.name='bert': unknown"),
    (lambda: encoders.make_text_encoder("words", dim=4), "unknown dim.*text_dim"),
    (lambda: encoders.make_text_encoder("words", text_len=0), "text_len=0"),
])
def test_unknown_names_and_options(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_words_have_unit_scale_and_zeros_after_the_end():
    text = encoders.make_text_encoder("words")
    embedding = text.encode(["a red circle moving left", "", "...!", "one"])
    assert embedding.shape == (4, text.text_len, text.text_dim) == (4, 12, 64)
    assert embedding.dtype == np.float32
    assert abs(embedding[0, :5].std() - 1) < 0.1
    assert not embedding[0, 5:].any() and not embedding[1:3].any() and not embedding[3, 1:].any()


def test_words_and_their_places_count():
    text = WordTextEncoder()
    a, b, c, d = text.encode(["red circle", "Red, CIRCLE!", "circle red", "red flurbwort"])
    np.testing.assert_array_equal(a, b)
    cosine = np.sum(a[0] * c[1]) / np.linalg.norm(a[0]) / np.linalg.norm(c[1])
    assert 0.5 < cosine < 0.95  # the same word at another place
    assert np.linalg.norm(a[1] - d[1]) > 0.5 * np.linalg.norm(a[1])  # an unknown word is a word
    np.testing.assert_array_equal(a[0], d[0])


def test_long_captions_lose_their_end():
    text = WordTextEncoder(text_len=3)
    np.testing.assert_array_equal(*text.encode(["one two three four five", "one two three"]))


def test_words_of_any_script():
    assert words("Größe, it's 3-fold: 猫 и кот") == ["größe", "it's", "3", "fold", "猫", "и", "кот"]


def test_embedding_is_the_same_in_every_process():
    script = (
        "import sys; from lact_jax.models.word_text import WordTextEncoder as W; "
        "sys.stdout.buffer.write(W().encode(['a red circle']).tobytes())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert outputs == {WordTextEncoder().encode(["a red circle"]).tobytes()}


def test_encoding_runs_under_jit(codec):
    frames = clips("shapes", 1, 5)
    jitted = jax.jit(lambda x: codec.decode(codec.encode(x)))(jnp.asarray(frames))
    outside = codec.decode(codec.encode(frames))
    assert np.abs(np.asarray(jitted).astype(int) - np.asarray(outside)).max() <= 1
