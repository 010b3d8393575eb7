"""Autoregressive sampling on random weights: time of a guided denoise step, of a commit, of a clip.

    python -m benchmarks.sampling --config=configs/ar_chunk3f.py --chunks=7 --steps=4
    python -m benchmarks.sampling --steps=50 --far=120    # 81 frames; does a step grow with them?
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from benchmarks import common
from lact_jax.config import parse
from lact_jax.diffusion.sampler import chunk_noise, guide
from lact_jax.flops import count_flops
from lact_jax.models.dit import bind, init_params

CONFIG = config_flags.DEFINE_config_file("config", "configs/ar_chunk3f.py")
CHUNKS = flags.DEFINE_integer("chunks", 7, "Chunks to sample.")
STEPS = flags.DEFINE_integer("steps", 4, "Solver steps a chunk.")
FAR = flags.DEFINE_integer("far", 0, "Commit up to this chunk and time a denoise step there too.")
SMALL = flags.DEFINE_bool("small", False, "A toy model, to see that the script runs.")
JSON = flags.DEFINE_string("json", None, "Also write the result here.")


class Place(NamedTuple):
    """What sampling takes behind so many chunks."""

    denoise: float  # seconds of a guided step
    chunk: float  # seconds of all its steps
    cache: int  # bytes
    held: float | None  # GB in use on the device


def growth(near: Place, far: Place) -> dict:
    """What is measured at chunk FAR, over the same at the last of the sampled chunks."""
    there = f"at chunk {FAR.value} over here"
    ratios = {f"time {there}": far.denoise / near.denoise,
              f"time of a whole chunk {there}": far.chunk / near.chunk,
              f"cache {there}": far.cache / near.cache}  # fmt: skip
    return ratios | ({f"memory in use {there}": far.held / near.held} if near.held else {})


def cache_bytes(cache) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


class Sampling:
    """A model of random weights, and its programs compiled on first use, for the flags above."""

    def __init__(self):
        config = parse(CONFIG.value)
        latent_hw = config.data.height // 8, config.data.width // 8
        if SMALL.value:
            lact = dataclasses.replace(config.model.lact[0], fw_head_dim=32)
            model = dataclasses.replace(config.model, **common.SMALL_MODEL, lact=(lact,))
            config, latent_hw = dataclasses.replace(config, model=model), (4, 4)
        self.model = model = config.model
        self.shape = (config.objective.frames_per_chunk, *latent_hw, model.latent_channels)
        self._schedule = dataclasses.replace(config.sample, steps=STEPS.value).schedule
        self._solver_step = jax.jit(self._schedule.solver.step)
        self._params = params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
        params["head"]["head"]["kernel"] = params["patch_embedding"]["kernel"].T  # not its zeros
        text_BLQ = jax.random.normal(
            jax.random.key(1), (2, model.text_len, model.text_dim), jnp.float32
        )
        self._text_kv = jax.jit(lambda p, t: bind(model, p).text_kv(t))(params, text_BLQ)
        scale = config.sample.guidance_scale

        def denoise(params, text_kv, x, timestep, cache):
            both = jnp.concatenate([x, x]), jnp.concatenate([timestep, timestep])
            return guide(bind(model, params).denoise(*both, text_kv, cache), scale)

        def commit(params, text_kv, x, cache):
            return bind(model, params).commit(jnp.concatenate([x, x]), text_kv, cache)

        self._denoise, self._commit = jax.jit(denoise), jax.jit(commit)

    def first_cache(self):
        """The cache of both branches before anything is committed."""
        return jax.jit(lambda p: bind(self.model, p).init_cache(2))(self._params)

    def denoise(self, x, timestep, cache):
        """A guided denoise step: the velocity."""
        time = jnp.full((1,), timestep, jnp.float32)
        return self._denoise(self._params, self._text_kv, x, time, cache)

    def commit(self, x, cache):
        """The cache behind chunk x."""
        return self._commit(self._params, self._text_kv, x, cache)

    def noise(self, chunk: int):
        """What sampling of a chunk starts from."""
        return chunk_noise(0, [0], chunk, self.shape)

    def sample(self, chunk: int, cache, steps: int | None = None):
        """A chunk by all its steps, or by the first of them."""
        schedule = self._schedule
        state = schedule.solver.init(self.noise(chunk))
        for i in range(schedule.steps if steps is None else steps):
            velocity = self.denoise(state.x, schedule.timesteps[i], cache)
            state = self._solver_step(state, velocity, schedule.coefficients_at(i))
        return state.x

    def place(self, chunk: int, x, cache) -> Place:
        """Measures a step and a chunk behind what is committed."""
        return Place(
            common.median_seconds(lambda: self.denoise(x, 500, cache), 10),
            common.median_seconds(lambda: self.sample(chunk, cache), 1),
            cache_bytes(cache),
            common.held_gigabytes(),
        )

    def flops(self, x, cache) -> int:
        """Of a guided denoise step."""
        return count_flops(lambda x, cache: self.denoise(x, 500, cache), x, cache)


def main(_):
    model, per_chunk, sizes, x = Sampling(), [], [], None
    cache = model.first_cache()
    for chunk in range(CHUNKS.value):
        if x is not None:
            cache = model.commit(x, cache)
        sample = partial(model.sample, chunk, cache)
        if chunk < 2:  # the first caches of their shapes
            start = model.noise(chunk)
            jax.block_until_ready(
                common.at_once(partial(sample, steps=1), partial(model.commit, start, cache))
            )
        x, seconds = common.first_call_seconds(sample)
        per_chunk.append(seconds)
        sizes.append(cache_bytes(cache))
    del sample  # it holds this chunk's cache, which is not part of what is in use at a later one
    near = model.place(chunk, x, cache)
    commit_seconds = common.median_seconds(lambda: model.commit(x, cache), 5)
    flops = model.flops(x, cache)
    far = {}
    if FAR.value:
        for _ in range(int(cache.num_committed), FAR.value - 1):
            cache = model.commit(x, cache)
        far = growth(near, model.place(FAR.value - 1, x, cache))
    peak = common.peak_gigabytes()
    rate = common.measured_matmul_rate(model.model.dtype, 256 if SMALL.value else 8192)
    common.report(
        "sampling",
        {
            "chunk latent": str(model.shape),
            "chunks": CHUNKS.value,
            "steps a chunk": STEPS.value,
            "TFLOP per guided denoise step": flops / 1e12,
            "ms per guided denoise step": 1e3 * near.denoise,
            "matmul TFLOP/s": rate / 1e12,
            "share of the matmul rate": flops / near.denoise / rate,
            "ms per commit": 1e3 * commit_seconds,
            "seconds per chunk": str([round(s, 3) for s in per_chunk]),
            "cache GB per chunk": str([round(b / 1e9, 3) for b in sizes]),
            "seconds for all chunks": sum(per_chunk) + (CHUNKS.value - 1) * commit_seconds,
            **far,
            "finite": bool(jnp.isfinite(x).all()),
            "peak GB": peak,
        },
        JSON.value,
    )


if __name__ == "__main__":
    app.run(main)
