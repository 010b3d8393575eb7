"""The loss at fixed noise, against one chunk at a time; what it depends on; its picture."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_twins import relative_error
from run_fixtures import tiny_config

from lact_jax import encoders
from lact_jax.batch_encoder import BatchEncoder
from lact_jax.data import make_dataset
from lact_jax.diffusion import flow
from lact_jax.models.dit import bind, init_params
from lact_jax.optim import split_trainable
from lact_jax.sharding import MeshConfig, batch_sharding, make_mesh
from lact_jax.validation import (
    NOISE_LEVELS,
    Validator,
    heat_map,
    summary,
    validation_config,
    write_heat_map,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

LATENT = (6, 4, 4, 16)  # F, h, w, c: two chunks
TEXT = (4, 8)


@pytest.fixture(scope="module")
def config():
    return tiny_config(validation__every=1, validation__num_clips=3, validation__seed=5)


@pytest.fixture(scope="module")
def params(config):
    rng = np.random.default_rng(0)
    params = jax.jit(lambda: init_params(config.model, jax.random.key(0)))()
    # Away from where it starts: the head and the gate are zero there, and every prediction with it.
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32), params
    )


@pytest.fixture(scope="module")
def weights(params):
    """(trained, frozen), as a run that trains the attention alone has them."""
    return split_trainable(params, "attn_only")


@pytest.fixture(scope="module")
def clips():
    """Five, of which three are asked for."""
    return random_clips(5)


@pytest.fixture(scope="module")
def validator(config, clips):
    return make_validator(config, *clips)


def one_at_a_time(config, params, latents, texts):
    """(V, W): every level of every chunk of every clip on its own, by what the sampler runs."""
    model = bind(config.model, params)
    commit, denoise = jax.jit(model.commit), jax.jit(model.denoise)
    text_kv = jax.jit(model.text_kv)
    total = np.zeros((len(NOISE_LEVELS), LATENT[0] // 3))
    for clip, (latent, text) in enumerate(zip(latents, texts, strict=True)):
        key = jax.random.fold_in(jax.random.key(config.validation.seed), clip)
        chunks = latent.reshape(-1, 3, *latent.shape[1:])
        noise = np.asarray(jax.random.normal(key, (1, *chunks.shape), jnp.float32))[0]
        kv, cache = text_kv(text[None]), model.init_cache(1)
        for i, (clean, eps) in enumerate(zip(chunks, noise, strict=True)):
            for j, level in enumerate(NOISE_LEVELS):
                noisy = (1 - level) * clean + level * eps
                timestep = jnp.full((1,), level * flow.MODEL_TIME_SCALE, jnp.float32)
                velocity = denoise(jnp.asarray(noisy, jnp.float32)[None], timestep, kv, cache)
                total[j, i] += np.mean(np.square(np.asarray(velocity)[0] - (eps - clean)))
            cache = commit(jnp.asarray(clean)[None], kv, cache)
    return total / len(latents)


def random_clips(count):
    rng = np.random.default_rng()
    return (
        rng.standard_normal((count, *LATENT), np.float32),
        rng.standard_normal((count, *TEXT), np.float32),
    )


def make_validator(config, latents, texts, **options):
    """A validator on these clips, which come in one batch."""
    codec = encoders.make_codec("pca")
    text = encoders.make_text_encoder("words", text_len=4, text_dim=8)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    encoder = BatchEncoder(codec, text, batch_sharding(mesh))
    batches = [{"latent": latents, "text": texts}]
    return Validator(config, batches, encoder, mesh, **options)


def test_it_is_the_loss_of_each_chunk_denoised_behind_its_clean_past(
    config, params, weights, clips, validator
):
    latents, texts = clips
    assert validator.num_clips == 3  # the first ones
    loss_VW = validator(*weights)
    twin_VW = one_at_a_time(config, params, latents[:3], texts[:3])
    assert loss_VW.shape == (10, 2) and loss_VW.dtype == np.float64
    assert relative_error(loss_VW, twin_VW) < 1e-5
    np.testing.assert_allclose(loss_VW, twin_VW, rtol=1e-4)


def test_same_weights_same_numbers_other_weights_others_and_one_program(weights, validator):
    first = validator(*weights)
    other = validator(*jax.tree.map(lambda x: 0.9 * x, weights))
    assert np.array_equal(validator(*weights), first)
    assert relative_error(other, first) > 1e-3
    assert validator._evaluate._cache_size() == 1


def test_a_clip_does_not_depend_on_those_beside_it_nor_on_the_padding(
    config, weights, clips, validator
):
    alone = validator(*weights)
    pairs = make_validator(config, *clips, together=2)
    assert relative_error(pairs(*weights), alone) < 1e-6
    evaluate, (latents, texts) = pairs._evaluate, clips
    same = [x[:1].repeat(2, axis=0) for x in (latents, texts)]
    first, second = np.moveaxis(evaluate(*weights, *same, jnp.asarray([0, 1], jnp.int32)), 1, 0)
    assert relative_error(second, first) > 1e-3  # every clip has noise of its own


def test_too_few_clips_are_an_error_but_for_debugging(config):
    latents, texts = random_clips(2)
    with pytest.raises(ValueError, match=r"num_clips=3, but .* has 2 clips: hold out more"):
        make_validator(config, latents, texts)
    assert make_validator(config, latents, texts, fewer=True).num_clips == 2


def test_clips_of_several_sizes_are_taken_by_size(config, weights, clips, validator):
    latents, texts = clips
    wide = random_clips(1)[0].repeat(2, axis=3)
    batches = [
        {"latent": latents[:1], "text": texts[:1]},
        {"latent": wide, "text": texts[3:4]},
        {"latent": latents[2:3], "text": texts[2:3]},
    ]
    mixed = Validator(config, batches, validator._encoder, make_mesh(MeshConfig()), together=2)
    assert [numbers for *_, numbers in mixed._groups] == [[0, 2], [1]]
    assert [latent.shape[:4] for latent, *_ in mixed._groups] == [(2, 6, 4, 4), (2, 6, 4, 8)]
    np.testing.assert_array_equal(mixed._groups[0][0], latents[[0, 2]])


def test_it_stops_between_clips(weights, validator):
    asked = iter([False, True])
    assert validator(*weights, lambda: next(asked)) is None
    assert next(asked, "none left") == "none left"


def test_the_clips_do_not_depend_on_the_batch_size_of_the_training(config):
    codec = types.SimpleNamespace(spatial_stride=8, temporal_stride=4, latent_channels=16)
    text = types.SimpleNamespace(text_len=4, text_dim=8)

    def clips(batch_size):
        data = dataclasses.replace(config.data, batch_size=batch_size)
        changed = validation_config(dataclasses.replace(config, data=data))
        return list(make_dataset("random", changed, codec, text, split="validation"))

    for one, other in zip(clips(1), clips(4), strict=True):
        assert np.array_equal(one["latent"], other["latent"])


def test_the_row_has_the_means_by_noise_by_chunk_and_by_both():
    loss_VW = np.random.default_rng().random((10, 7))
    row = summary(loss_VW, 16)
    assert row["loss"] == pytest.approx(loss_VW.mean())
    np.testing.assert_allclose(row["loss_by_noise"], [np.mean(x) for x in loss_VW])
    np.testing.assert_allclose(row["loss_by_chunk"], [np.mean(x) for x in loss_VW.T])
    assert row["loss_by_noise_and_chunk"] is loss_VW and row["num_clips"] == 16


def test_the_heat_map_has_chunks_to_the_right_and_noise_upwards():
    loss_VW = np.random.default_rng().random((10, 3)) + 0.1
    loss_VW[9, 2] = np.nan
    axes = heat_map(loss_VW, "step 5").axes[0]
    image = axes.images[0]
    np.testing.assert_array_equal(image.get_array().filled(np.nan), loss_VW)
    assert image.origin == "lower"  # row 0, the least noise, is at the bottom
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("chunk", "noise level")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]
    levels = [float(label.get_text()) for label in axes.get_yticklabels()]
    assert levels == list(NOISE_LEVELS)
    written = {text.get_position(): text.get_text() for text in axes.texts}
    for (level, chunk), value in np.ndenumerate(loss_VW):
        assert written[chunk, level] == f"{value:.3g}"


def test_the_picture_is_replaced(tmp_path):
    path = write_heat_map(tmp_path, np.full((10, 2), 0.5), 3)
    first = path.read_bytes()
    assert write_heat_map(tmp_path, np.full((10, 2), np.nan), 6) == path
    assert path.read_bytes()[:4] == b"\x89PNG" and path.read_bytes() != first
    assert [file.name for file in tmp_path.iterdir()] == ["validation.png"]
