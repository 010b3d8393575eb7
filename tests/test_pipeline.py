"""Sampling: batches, guidance, seeds, length, and frames that are the decoded latents.

Letters: B prompts, F latent frames, h, w latent size, c channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_fixtures import tiny_config

from lact_jax.diffusion.flow import add_noise
from lact_jax.diffusion.sampler import chunk_noise, context_noise, solve_chunk
from lact_jax.models.dit import DiT, abstract_params, bind
from lact_jax.pipeline import Pipeline
from lact_jax.trainer import make_parts

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = tiny_config()
PROMPTS = ["a red circle", "a blue square moving left"]


def random_params(config) -> dict:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32),
        abstract_params(config.model),
    )


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


_PIPELINES: dict = {}


def pipeline(params, **sample) -> Pipeline:
    """Made once for each set of sampling options: that is one compilation."""
    key = tuple(sorted(sample.items()))
    if key not in _PIPELINES:
        config = dataclasses.replace(CONFIG, sample=dataclasses.replace(CONFIG.sample, **sample))
        codec, text, _ = make_parts(config)
        _PIPELINES[key] = Pipeline(config, params, codec, text)
    return _PIPELINES[key]


def latents(sampler: Pipeline, prompts, indices) -> np.ndarray:
    """(B, F, h, w, c)"""
    return np.concatenate(list(sampler.latent_chunks(prompts, indices)), axis=1)


def error(actual, expected) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def test_prompts_in_one_batch_are_their_single_runs(params):
    sampler = pipeline(params)
    together = latents(sampler, PROMPTS, [0, 1])
    assert together.shape == (2, 6, 4, 4, 16) and np.isfinite(together).all()
    for i, prompt in enumerate(PROMPTS):
        assert error(latents(sampler, [prompt], [i]), together[i : i + 1]) < 1e-5
    assert error(together[0], together[1]) > 0.1


def test_noise_depends_on_seed_and_place_alone(params):
    sampler = pipeline(params)
    first = latents(sampler, PROMPTS, [0, 1])
    np.testing.assert_array_equal(latents(sampler, PROMPTS, [0, 1]), first)
    assert error(latents(sampler, PROMPTS, [2, 3]), first) > 0.1
    assert error(latents(pipeline(params, seed=1), PROMPTS, [0, 1]), first) > 0.1


def record_batches(monkeypatch, name: str) -> list[int]:
    """The batch size of every call of a DiT method: under jit, of every compilation."""
    seen, original = [], getattr(DiT, name)

    def recording(self, x, *args):
        seen.append(x.shape[0])
        return original(self, x, *args)

    monkeypatch.setattr(DiT, name, recording)
    return seen


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 2), (4.0, 4)])
def test_guidance_one_costs_one_branch_and_nothing_is_compiled_for_later_chunks(
    params, monkeypatch, guidance, rows
):
    denoised, committed = (record_batches(monkeypatch, name) for name in ("denoise", "commit"))
    sampler = pipeline(params, guidance_scale=guidance, num_latent_frames=12)
    latents(sampler, PROMPTS, [0, 1])
    # Once for the first chunk, which has no window before it, and once for all others.
    assert denoised == committed == [rows, rows]


@pytest.mark.filterwarnings("error")  # of buffers given away in vain, for one
@pytest.mark.parametrize("mixer", ["full", "window", "gla"])
def test_other_mixers_sample(monkeypatch, mixer):
    """A cache that grows is compiled for at every length, others once without and once with it."""
    denoised, committed = (record_batches(monkeypatch, name) for name in ("denoise", "commit"))
    config = tiny_config(model__mixer=mixer, sample__num_latent_frames=12)
    codec, text, _ = make_parts(config)
    sampler = Pipeline(config, random_params(config), codec, text)
    together = latents(sampler, PROMPTS, [0, 1])
    assert together.shape[1] == 12 and np.isfinite(together).all()
    lengths = {"full": (4, 3), "window": (2, 2), "gla": (2, 2)}[mixer]
    assert (len(denoised), len(committed)) == lengths
    assert error(latents(sampler, PROMPTS[1:], [1]), together[1:]) < 1e-5


def test_finished_chunks_are_committed_with_the_noise_that_the_config_asks_for(params):
    """The second chunk, once more by the model's own functions."""
    level = 0.25
    config = tiny_config(
        sample__context_noise=level, objective__context_noise=0.3, sample__guidance_scale=1.0
    )
    codec, text, _ = make_parts(config)
    sampler = Pipeline(config, params, codec, text)
    first, second = (np.asarray(x) for x in sampler.latent_chunks(PROMPTS, [0, 1]))
    clean = latents(pipeline(params, guidance_scale=1.0), PROMPTS, [0, 1])
    assert np.array_equal(first, clean[:, :3])
    assert error(second, clean[:, 3:]) > 1e-3

    @jax.jit
    def by_hand(params, first, text_BLQ):
        model = bind(config.model, params)
        text_kv = model.text_kv(text_BLQ)
        noise = context_noise(config.sample.seed, [0, 1], 0, first.shape[1:])
        context = add_noise(first, noise, jnp.float32(level))
        cache = model.commit(context, text_kv, model.init_cache(2), 1000 * level)
        start = chunk_noise(config.sample.seed, [0, 1], 1, first.shape[1:])
        schedule = config.sample.schedule
        return solve_chunk(
            lambda x, t, cache: model.denoise(x, t, text_kv, cache),
            start, cache, schedule, lambda *_: None, schedule.solver.step,
        )  # fmt: skip

    assert error(second, by_hand(params, first, text.encode(PROMPTS))) < 1e-4


def test_guidance_pushes_away_from_the_negative_prompt(params):
    plain = latents(pipeline(params, guidance_scale=1.0), PROMPTS[:1], [0])
    same = pipeline(params, guidance_scale=4.0, negative_prompt=PROMPTS[0])
    assert error(latents(same, PROMPTS[:1], [0]), plain) < 1e-5
    other = pipeline(params, guidance_scale=4.0)
    assert error(latents(other, PROMPTS[:1], [0]), plain) > 1e-3


def test_longer_clips_begin_like_shorter_ones(params):
    short = latents(pipeline(params), PROMPTS, [0, 1])
    long = latents(pipeline(params, num_latent_frames=15), PROMPTS, [0, 1])
    assert long.shape[1] == 15 and np.isfinite(long).all()
    assert error(long[:, :6], short) < 1e-5


def test_frames_are_the_decoded_latents_chunk_by_chunk(params):
    sampler = pipeline(params)
    chunks = list(sampler.frame_chunks(PROMPTS, [0, 1]))
    assert [chunk.shape for chunk in chunks] == [(2, 9, 32, 32, 3), (2, 12, 32, 32, 3)]
    whole = np.asarray(sampler.codec.decode(latents(sampler, PROMPTS, [0, 1])))
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), whole)


def test_progress_is_told_for_every_chunk_and_step(params):
    told = []
    list(pipeline(params).frame_chunks(PROMPTS, [0, 1], lambda c: lambda *s: told.append((c, *s))))
    assert told == [(0, 1, 2), (0, 2, 2), (1, 1, 2), (1, 2, 2)]


def test_frames_that_are_not_whole_chunks(params):
    with pytest.raises(ValueError, match=r"sample\.num_latent_frames=7 .*frames_per_chunk=3"):
        pipeline(params, num_latent_frames=7)
