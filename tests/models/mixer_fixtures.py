"""One sequence mixer with random parameters, its inputs, and what its float64 twin makes of them.

Letters: B batch, R noise repeats, W chunks, S tokens, D width.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from model_fixtures import FRAMES, HEAD_DIM, HEIGHT, NUM_CHUNKS, TOKENS, WIDTH, randomise
from numpy_twins import positions

from lact_jax.ops.rope import rope_rotations
from lact_jax.ops.sequence import SequenceLayout, frame_positions, pack, unpack_noise

GRID = HEIGHT // 2, WIDTH // 2


def make_mixer(mixer, config, options):
    """A mixer's `params` and functions of them, whose outputs have the bias that a block adds.

    sequence(params, noise_BRWSD, clean_BWSD) -> ((noise out, clean out), stats), compiled
    denoise, commit(params, x_BSD, chunk, cache), init_cache(params, batch), operation by operation
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: mixer(config, options, rngs=nnx.Rngs(0))))

    def bind(params):
        copy = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(copy, params)
        return nnx.merge(graph, copy)

    def cast(x):
        return x.astype(config.dtype)

    def with_bias(params, y, *rest):
        y = y + params["o"]["bias"].astype(y.dtype)
        return (y, *rest) if rest else y

    def sequence(params, noise_BRWSD, clean_BWSD):
        layout = SequenceLayout(noise_BRWSD.shape[2], noise_BRWSD.shape[1])
        frames = jnp.asarray(frame_positions(layout, FRAMES))
        angle = rope_rotations(frames, *GRID, HEAD_DIM)
        x = cast(pack(noise_BRWSD, clean_BWSD, layout))
        y, stats = with_bias(params, *bind(params).sequence(x, angle, layout))
        return (unpack_noise(y, layout), y[:, layout.clean]), stats

    def angle_of(chunk):
        frames = chunk * FRAMES + jnp.arange(FRAMES, dtype=jnp.int32)
        return rope_rotations(frames[None], *GRID, HEAD_DIM)[0]

    def denoise(params, x, i, cache):
        return with_bias(params, bind(params).denoise(cast(x), angle_of(i), cache))

    def commit(params, x, i, cache):
        return with_bias(params, *bind(params).commit(cast(x), angle_of(i), cache))

    return SimpleNamespace(
        params=randomise(nnx.to_pure_dict(state), np.random.default_rng(0)),
        sequence=jax.jit(sequence),
        init_cache=lambda params, batch: bind(params).init_cache(batch),
        denoise=denoise,
        commit=commit,
    )


def random_stream(batch, repeats, dim, seed=0):
    """noise (B, R, W, S, D) and clean (B, W, S, D)."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((batch, repeats, NUM_CHUNKS, TOKENS, dim))
    clean = rng.standard_normal((batch, NUM_CHUNKS, TOKENS, dim))
    return jnp.asarray(noise, jnp.float32), jnp.asarray(clean, jnp.float32)


def token_positions():
    """(frame, row, column) of every token of every chunk: (W, S, 3)."""
    return np.stack(
        [positions(range(i * FRAMES, (i + 1) * FRAMES), *GRID) for i in range(NUM_CHUNKS)]
    )


def run_twin(twin, noise_BRWSD, clean_BWSD):
    """The twin sample by sample: (noise out, clean out)."""
    samples = [
        twin(np.asarray(noise, np.float64), np.asarray(clean, np.float64), token_positions())
        for noise, clean in zip(noise_BRWSD, clean_BWSD, strict=True)
    ]
    return tuple(np.stack(outputs) for outputs in zip(*samples, strict=True))
