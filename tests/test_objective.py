"""The objective against a slow loop over samples, repeats and chunks; what its draws depend on."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_twins import relative_error

from lact_jax.diffusion import flow
from lact_jax.objective import ObjectiveConfig, compute_loss, draw, split_chunks

B, W, F, HEIGHT, WIDTH, CHANNELS = 3, 3, 2, 2, 4, 2
EMPTY = jnp.full((4, 5), 9.0, jnp.float32)


class Model:
    """Stands for the DiT: a velocity that depends on all a chunk is given, and a memory of it."""

    config = SimpleNamespace(patch_size=(1, 2, 2))

    def sequence(self, x, timestep_BC, text_BLQ, frame_CF, layout):
        self.given = SimpleNamespace(
            x=x, timestep=timestep_BC, text=text_BLQ, frame=frame_CF, layout=layout
        )
        return self.velocity(x, timestep_BC, text_BLQ.mean((1, 2))[:, None], frame_CF), {}

    @staticmethod
    def velocity(x, timestep, text, frame):
        shift = timestep / 500 + text
        return 0.5 * x + shift[..., None, None, None, None] + 0.1 * frame[..., None, None, None]


def random_batch(batch=B, chunks=W, seed=0):
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((batch, chunks * F, HEIGHT, WIDTH, CHANNELS))
    text = rng.standard_normal((batch, 4, 5))
    return jnp.asarray(latent, jnp.float32), jnp.asarray(text, jnp.float32)


def config(**options):
    return ObjectiveConfig(**{"frames_per_chunk": F, "drop_text_prob": 0.0, **options})


def run(objective, batch=None, seed=0):
    """(loss, what the model was given, the draws)."""
    latent, text = batch or random_batch()
    model, key = Model(), jax.random.key(seed)
    loss, _ = compute_loss(model, latent, text, EMPTY, key, objective)
    return loss, model.given, draw(key, split_chunks(latent, F), objective)


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("weighting", [True, False])
@pytest.mark.parametrize("time_sampling", ["uniform", "logit_normal"])
def test_loss_is_a_loop_over_samples_repeats_and_chunks(repeats, weighting, time_sampling):
    objective = config(
        num_repeat=repeats,
        logit_normal_weighting=weighting,
        time_sampling=time_sampling,
        timestep_shift=2.5,
        logit_normal_std=0.8,
        drop_text_prob=0.5,
    )
    latent, text = random_batch()
    loss, given, draws = run(objective)
    weights = np.asarray(flow.logit_normal_weight(draws.u_BRW, 0.8), np.float64)
    losses, by_chunk = [], np.zeros((W, B, repeats))
    for b in range(B):
        caption = np.asarray(EMPTY if draws.drop_text_B[b] else text[b], np.float64)
        for r in range(repeats):
            for i in range(W):
                x0 = np.asarray(latent[b, i * F : (i + 1) * F], np.float64)
                eps = np.asarray(draws.noise[b, r, i], np.float64)
                u = float(draws.u_BRW[b, r, i])
                t = 2.5 * u / (1 + 1.5 * u)
                frame = np.arange(i * F, (i + 1) * F)
                x_t = (1 - t) * x0 + t * eps
                v = Model.velocity(x_t, np.array(1000 * t), caption.mean(), frame)
                error = np.mean((v - (eps - x0)) ** 2)
                by_chunk[i, b, r] = error
                losses.append(error * (weights[b, r, i] if weighting else 1))
    np.testing.assert_allclose(loss.loss, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(loss.by_chunk_W, by_chunk.mean((1, 2)), rtol=1e-5)
    if not weighting:
        np.testing.assert_allclose(loss.loss, loss.by_chunk_W.mean(), rtol=1e-6)


@pytest.mark.parametrize("repeats", [1, 3])
def test_clean_chunks_are_the_data_at_time_zero(repeats):
    batch = random_batch()
    _, given, draws = run(config(num_repeat=repeats), batch)
    clean = given.layout.clean
    assert given.layout.num_chunks == W and given.layout.num_repeat == repeats
    assert np.all(given.timestep[:, clean] == 0)
    assert np.array_equal(given.x[:, clean], split_chunks(batch[0], F)[:, :-1])
    noisy = np.delete(given.timestep, np.arange(clean.start, clean.stop), axis=1)
    want = 1000 * flow.shift_time(draws.u_BRW, 3.0)
    assert np.array_equal(np.sort(noisy, axis=None), np.sort(want, axis=None))
    assert len(np.unique(want)) == want.size  # every copy has its own time


@pytest.mark.parametrize("context_noise", [0.0, 0.2])
def test_draws_of_a_sample_do_not_depend_on_its_batch(context_noise):
    chunks = split_chunks(random_batch(8)[0], F)
    objective = config(num_repeat=2, drop_text_prob=0.5, context_noise=context_noise)
    key = jax.random.key(1)
    whole = draw(key, chunks, objective)
    for size in (1, 3):
        part = draw(key, chunks[:size], objective)
        pairs = zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True)
        for mine, all_of_them in pairs:
            assert np.array_equal(mine, all_of_them[:size])
    assert whole.noise.shape == (8, 2, *chunks.shape[1:])
    assert len(np.unique(whole.noise)) > 0.99 * whole.noise.size
    assert len(np.unique(whole.u_BRW)) == whole.u_BRW.size
    other = draw(jax.random.key(2), chunks, objective)
    assert not np.any(other.u_BRW == whole.u_BRW)


# Noise on context chunks.


def test_context_noise_changes_no_other_draw():
    chunks, key = split_chunks(random_batch()[0], F), jax.random.key(4)
    off, on = (draw(key, chunks, config(context_noise=level)) for level in (0.0, 0.3))
    assert off.context is None and on.context is not None
    for name in ("noise", "u_BRW", "drop_text_B"):
        assert np.array_equal(getattr(off, name), getattr(on, name))
    assert not np.any(np.isin(on.context.noise, on.noise))


@pytest.mark.parametrize("repeats", [1, 2])
def test_context_chunks_are_noised_and_the_model_is_told_how_much(repeats):
    batch = random_batch()
    loss, given, draws = run(config(num_repeat=repeats, context_noise=0.3), batch)
    chunks, context = np.asarray(split_chunks(batch[0], F), np.float64), draws.context
    clean = given.layout.clean
    assert np.array_equal(given.timestep[:, clean], 1000 * context.t_BW)
    for b in range(B):
        for i in range(W - 1):
            t = float(context.t_BW[b, i])
            want = (1 - t) * chunks[b, i] + t * np.asarray(context.noise[b, i], np.float64)
            assert relative_error(given.x[b, clean][i], want) < 1e-6
    without_loss, without, _ = run(config(num_repeat=repeats), batch)
    for part in (given.layout.first, given.layout.later):  # noise copies are as ever
        assert np.array_equal(given.x[:, part], without.x[:, part])
        assert np.array_equal(given.timestep[:, part], without.timestep[:, part])
    assert np.array_equal(loss.loss, without_loss.loss)  # of a model without a memory


def test_context_levels_are_uniform_up_to_the_highest():
    latent, _ = random_batch(400)
    context = draw(jax.random.key(3), split_chunks(latent, F), config(context_noise=0.3)).context
    assert context.t_BW.shape == (400, W - 1) and len(np.unique(context.t_BW)) == 800
    assert np.all((context.t_BW >= 0) & (context.t_BW < 0.3))
    assert abs(float(context.t_BW.mean()) - 0.15) < 0.01
    assert abs(float(context.t_BW.std()) - 0.3 * 12**-0.5) < 0.006
    assert abs(float(context.noise.mean())) < 0.03 and abs(float(context.noise.std()) - 1) < 0.03


def test_a_clip_of_one_chunk_has_no_context_to_noise():
    loss, given, draws = run(config(context_noise=0.3), random_batch(chunks=1))
    assert draws.context.t_BW.shape == (B, 0) and given.layout.length == 1
    assert np.isfinite(loss.loss)


def test_noise_is_standard_normal_and_time_uniform():
    latent, _ = random_batch(400)
    draws = draw(jax.random.key(3), split_chunks(latent, F), config(num_repeat=2))
    assert abs(float(draws.noise.mean())) < 0.02
    assert abs(float(draws.noise.std()) - 1) < 0.02
    assert abs(float(draws.u_BRW.mean()) - 0.5) < 0.03
    assert abs(float(draws.u_BRW.std()) - 12**-0.5) < 0.02


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_text_dropout_replaces_whole_captions_at_its_rate(probability):
    batch = random_batch(1000, chunks=1)
    _, given, _ = run(config(drop_text_prob=probability), batch)
    empty = np.all(given.text == EMPTY, axis=(1, 2))
    kept = np.all(given.text == batch[1], axis=(1, 2))
    assert np.all(empty ^ kept)
    spread = 4 * math.sqrt(probability * (1 - probability) / 1000)
    assert abs(empty.mean() - probability) <= spread


def test_shift_is_fixed_or_by_the_tokens_of_a_chunk():
    wan = (60, 104), (1, 2, 2)
    assert ObjectiveConfig(timestep_shift=4.0).shift(*wan) == 4.0
    by_size = ObjectiveConfig(timestep_shift=4.0, adjust_timestep_shift=True)
    assert by_size.shift(*wan) == pytest.approx(2.1135, abs=1e-4)
    half = ObjectiveConfig(frames_per_chunk=6, adjust_timestep_shift=True)
    slope = math.log(5 / 3) / (73710 - 32760)
    assert half.shift(*wan) == pytest.approx(3 * math.exp(slope * (9360 - 32760)))


def test_adjusted_shift_is_the_one_used():
    objective = config(adjust_timestep_shift=True, timestep_shift=50.0)
    _, given, draws = run(objective)
    tokens = F * HEIGHT * WIDTH // 4
    want = 1000 * flow.shift_time(draws.u_BRW, flow.resolution_shift(tokens))
    first = given.timestep[:, given.layout.first]
    assert relative_error(first, want[:, :, 0]) < 1e-6


def test_a_clip_of_one_chunk_has_a_loss():
    loss, given, _ = run(config(num_repeat=2), random_batch(chunks=1))
    assert given.layout.length == 2
    assert loss.by_chunk_W.shape == (1,) and np.isfinite(loss.loss)


def test_bfloat16_latents_are_noised_in_float32():
    latent, text = random_batch()
    half = latent.astype(jnp.bfloat16)
    _, given, _ = run(config(), (half, text))
    _, want, _ = run(config(), (half.astype(jnp.float32), text))
    assert given.x.dtype == jnp.float32
    assert np.array_equal(given.x, want.x)


def test_frames_that_are_not_whole_chunks_are_refused():
    with pytest.raises(ValueError, match=r"20 latent frames are not whole chunks of 3.*4 \* "):
        split_chunks(jnp.zeros((1, 20, 2, 2, 1), jnp.float32), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_sampling": "normal"}, r"objective\.time_sampling='normal'.*logit_normal.*uniform"),
        ({"drop_text_prob": 1.5}, r"objective\.drop_text_prob=1\.5"),
        ({"frames_per_chunk": 0}, r"objective\.frames_per_chunk=0"),
        ({"num_repeat": 0}, r"objective\.num_repeat=0"),
        ({"context_noise": 1.0}, r"objective\.context_noise=1\.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**options)
