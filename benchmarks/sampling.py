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


def main(_):
    config = parse(CONFIG.value)
    latent_hw = config.data.height // 8, config.data.width // 8
    if SMALL.value:
        lact = dataclasses.replace(config.model.lact[0], fw_head_dim=32)
        model = dataclasses.replace(config.model, **common.SMALL_MODEL, lact=(lact,))
        config, latent_hw = dataclasses.replace(config, model=model), (4, 4)
    model, scale = config.model, config.sample.guidance_scale
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    params["head"]["head"]["kernel"] = params["patch_embedding"]["kernel"].T  # not its zeros
    text = jax.random.normal(jax.random.key(1), (2, model.text_len, model.text_dim), jnp.float32)
    shape = (config.objective.frames_per_chunk, *latent_hw, model.latent_channels)

    @jax.jit
    def denoise(params, text_kv, x, timestep, cache):
        both = jnp.concatenate([x, x]), jnp.concatenate([timestep, timestep])
        return guide(bind(model, params).denoise(*both, text_kv, cache), scale)

    commit = jax.jit(
        lambda params, text_kv, x, cache: bind(model, params).commit(
            jnp.concatenate([x, x]), text_kv, cache
        )
    )
    text_kv = jax.jit(lambda p, t: bind(model, p).text_kv(t))(params, text)
    cache = jax.jit(lambda p: bind(model, p).init_cache(2))(params)
    schedule = dataclasses.replace(config.sample, steps=STEPS.value).schedule
    solver_step = jax.jit(schedule.solver.step)

    def sample(chunk, cache):
        state = schedule.solver.init(chunk_noise(0, [0], chunk, shape))
        for i in range(schedule.steps):
            timestep = jnp.full((1,), schedule.timesteps[i], jnp.float32)
            velocity = denoise(params, text_kv, state.x, timestep, cache)
            state = solver_step(state, velocity, schedule.coefficients_at(i))
        return state.x

    def place(chunk, x, cache):
        timestep = jnp.full((1,), 500, jnp.float32)
        return Place(
            common.median_seconds(lambda: denoise(params, text_kv, x, timestep, cache), 10),
            common.median_seconds(lambda: sample(chunk, cache), 2),
            sum(leaf.nbytes for leaf in jax.tree.leaves(cache)),
            common.held_gigabytes(),
        )

    per_chunk, cache_bytes, x = [], [], None
    for chunk in range(CHUNKS.value):
        if x is not None:
            cache = commit(params, text_kv, x, cache)
        x, first = common.first_call_seconds(partial(sample, chunk, cache))
        again = partial(common.median_seconds, partial(sample, chunk, cache), 1)
        per_chunk.append(first if chunk > 1 else again())
        cache_bytes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(cache)))
    near = place(chunk, x, cache)
    commit_seconds = common.median_seconds(lambda: commit(params, text_kv, x, cache), 5)
    whole = sum(per_chunk) + (CHUNKS.value - 1) * commit_seconds
    flops = count_flops(denoise, params, text_kv, x, jnp.zeros(1, jnp.float32), cache)
    rate = common.measured_matmul_rate(model.dtype, 256 if SMALL.value else 8192)
    result = {}
    if FAR.value:
        for _ in range(int(cache.num_committed), FAR.value - 1):
            cache = commit(params, text_kv, x, cache)
        result = growth(near, place(FAR.value - 1, x, cache))
    common.report(
        "sampling",
        {
            "chunk latent": str(shape),
            "chunks": CHUNKS.value,
            "steps a chunk": STEPS.value,
            "TFLOP per guided denoise step": flops / 1e12,
            "ms per guided denoise step": 1e3 * near.denoise,
            "matmul TFLOP/s": rate / 1e12,
            "share of the matmul rate": flops / near.denoise / rate,
            "ms per commit": 1e3 * commit_seconds,
            "seconds per chunk": str([round(s, 3) for s in per_chunk]),
            "cache GB per chunk": str([round(b / 1e9, 3) for b in cache_bytes]),
            "seconds for all chunks": whole,
            **result,
            "finite": bool(jnp.isfinite(x).all()),
            "peak GB": common.peak_gigabytes(),
        },
        JSON.value,
    )


if __name__ == "__main__":
    app.run(main)
