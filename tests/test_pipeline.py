"""Prompts to frames: the branches of guidance, and what a prompt's clip may depend on."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from model_fixtures import (
    CHANNELS,
    FRAMES,
    HEIGHT,
    MODELS,
    TEXT_DIM,
    TEXT_LEN,
    WIDTH,
    compiled,
    random_params,
)
from numpy_twins import relative_error

from lact_jax.config import Config, DataConfig, SampleConfig
from lact_jax.diffusion.sampler import chunk_noise, sample_chunks
from lact_jax.objective import ObjectiveConfig
from lact_jax.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("quick_compile")

MODEL = MODELS["two sets cycled"]
PROMPTS = ["a red square", "a ring", "waves"]
NEGATIVE = "blurred"


class Text:
    """Embeds a caption by its letters, and remembers what it was asked for."""

    text_len, text_dim = TEXT_LEN, TEXT_DIM

    def __init__(self):
        self.captions = []

    def encode(self, captions):
        self.captions += captions
        seeds = [sum(map(ord, caption)) for caption in captions]
        normals = [np.random.default_rng(s).standard_normal((TEXT_LEN, TEXT_DIM)) for s in seeds]
        return np.stack(normals).astype(np.float32)


class Codec:
    """Latents as frames, plus what the carry says: the size asked for, and chunks so far."""

    temporal_stride, spatial_stride, latent_channels = 4, 8, CHANNELS

    def init_decode(self, batch, height, width):
        return (batch, height, width, 0)

    def decode_chunk(self, carry, latent):
        return (*carry[:3], carry[3] + 1), latent + self.mark(*carry)

    @staticmethod
    def mark(batch, height, width, chunk):
        return batch + 10 * height + 1000 * width + 1e6 * chunk


def make_pipeline(guidance=5.0, chunks=2, **sample):
    sample = SampleConfig(
        solver="unipc", steps=2, guidance_scale=guidance, num_latent_frames=chunks * FRAMES,
        negative_prompt=NEGATIVE, seed=3, **sample,
    )  # fmt: skip
    config = Config(
        model=MODEL,
        objective=ObjectiveConfig(frames_per_chunk=FRAMES),
        data=DataConfig(height=8 * HEIGHT, width=8 * WIDTH),
        sample=sample,
    )
    return Pipeline(config, random_params(MODEL), Codec(), Text())


def twin(pipeline, prompts, indices):
    """Sampling with one cache for each branch, and one run of the model for each."""
    run, params, sample = compiled(MODEL), random_params(MODEL), pipeline.config.sample
    captions = [prompts, [NEGATIVE] * len(prompts)][: 2 if sample.guided else 1]
    text_kv = [run.text_kv(params, jnp.asarray(Text().encode(list(c)))) for c in captions]

    def denoise(x, timestep, caches):
        v = [run.denoise(params, x, timestep, kv, c)
             for kv, c in zip(text_kv, caches, strict=True)]  # fmt: skip
        return v[-1] + sample.guidance_scale * (v[0] - v[-1]) if sample.guided else v[0]

    def commit(x, caches):
        return [run.commit(params, x, kv, c) for kv, c in zip(text_kv, caches, strict=True)]

    caches = [run.init_cache(params, len(prompts)) for _ in text_kv]
    shape = (FRAMES, HEIGHT, WIDTH, CHANNELS)
    chunks = sample.num_latent_frames // FRAMES
    noise = [chunk_noise(sample.seed, indices, i, shape) for i in range(chunks)]
    return list(sample_chunks(denoise, commit, caches, noise, sample.schedule))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_latents_are_those_of_separate_branches(guidance):
    pipeline = make_pipeline(guidance)
    got = list(pipeline.latent_chunks(PROMPTS[:2], [0, 1]))
    for mine, plain in zip(got, twin(pipeline, PROMPTS[:2], [0, 1]), strict=True):
        assert relative_error(mine, plain) < 2e-5


def test_guidance_of_one_asks_for_no_negative_branch():
    free, guided = make_pipeline(1.0), make_pipeline(3.0)
    for pipeline in (free, guided):
        next(pipeline.latent_chunks(PROMPTS[:2], [0, 1]))
    assert free.text.captions == PROMPTS[:2]
    assert guided.text.captions == PROMPTS[:2] + [NEGATIVE] * 2


def test_clip_of_a_prompt_does_not_depend_on_those_beside_it():
    pipeline = make_pipeline()
    both = list(pipeline.latent_chunks(PROMPTS[:2], [0, 1]))
    other = list(pipeline.latent_chunks([PROMPTS[2], PROMPTS[1]], [7, 1]))
    for mine, same in zip(both, other, strict=True):
        assert relative_error(mine[1], same[1]) < 1e-5
        assert relative_error(mine[0], same[0]) > 0.1


def test_frames_are_decoded_chunk_by_chunk_with_a_carry():
    pipeline = make_pipeline(1.0, chunks=3)
    latents = list(pipeline.latent_chunks(PROMPTS[:2], [0, 1]))
    assert len(latents) == 3
    frames = pipeline.frame_chunks(PROMPTS[:2], [0, 1])
    for i, (got, latent) in enumerate(zip(frames, latents, strict=True)):
        assert np.array_equal(got, latent + Codec.mark(2, 8 * HEIGHT, 8 * WIDTH, i))


def test_frames_that_are_not_whole_chunks_are_refused():
    config = make_pipeline().config
    config = replace(config, sample=replace(config.sample, num_latent_frames=FRAMES + 1))
    with pytest.raises(ValueError, match=r"num_latent_frames=3 .*frames_per_chunk=2"):
        Pipeline(config, random_params(MODEL), Codec(), Text())
