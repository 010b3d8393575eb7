"""The chunk loop of autoregressive sampling, over a denoise and a commit function (REFERENCE.md 6).

Letters: B samples (both guidance branches, where there are two, are the caller's affair),
W chunks, f latent frames of a chunk, h, w latent size, c channels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lact_jax.diffusion.solvers import SOLVERS, Schedule, make_schedule

# denoise(x, timestep, cache) -> velocity;  commit(x, cache) -> cache
Denoise = Callable[[jax.Array, jax.Array, Any], jax.Array]
Commit = Callable[[jax.Array, Any], Any]
Progress = Callable[[int, int], None]

_CONTEXT_KEY = 2**32 - 1  # no prompt has this index


@dataclass(frozen=True)
class SamplerConfig:
    """How to sample.

    Attributes:
      solver: 'euler', 'unipc' or 'dpm++'.
      steps: solver steps a chunk.
      shift: time shift of the noise levels.
      guidance_scale: classifier-free guidance; 1 is none and costs one branch.
      context_noise: noise level at which finished chunks are committed, at most that of the
        training (objective.context_noise); 0 commits them as they are.
    """

    solver: str = "unipc"
    steps: int = 50
    shift: float = 3.0
    guidance_scale: float = 5.0
    context_noise: float = 0.0

    def __post_init__(self):
        if self.solver not in SOLVERS:
            raise ValueError(f"sample.solver={self.solver!r}: choose one of {sorted(SOLVERS)}")
        if self.steps < 1:
            raise ValueError(f"sample.steps={self.steps}: must be at least 1")
        if self.shift <= 0:
            raise ValueError(f"sample.shift={self.shift}: must be positive")
        if not 0 <= self.context_noise < 1:
            raise ValueError(f"sample.context_noise={self.context_noise}: must be in [0, 1)")

    @property
    def schedule(self) -> Schedule:
        return make_schedule(self.solver, self.steps, self.shift)

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1


def chunk_noise(seed: int, indices: Sequence[int], chunk: int, shape: tuple) -> jax.Array:
    """Initial noise (B, *shape) of a chunk: each prompt's from its own index in the list, so that
    it does not depend on which prompts are sampled beside it."""
    return _noise(jax.random.fold_in(jax.random.key(seed), chunk), indices, shape)


def context_noise(seed: int, indices: Sequence[int], chunk: int, shape: tuple) -> jax.Array:
    """Noise (B, *shape) for a finished chunk that is committed: like `chunk_noise`, and another."""
    key = jax.random.fold_in(jax.random.key(seed), chunk)
    return _noise(jax.random.fold_in(key, _CONTEXT_KEY), indices, shape)


def _noise(key: jax.Array, indices: Sequence[int], shape: tuple) -> jax.Array:
    def one(index):
        return jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)

    return jax.vmap(one)(jnp.asarray(indices, jnp.uint32))


def guide(velocity_GB: jax.Array, guidance_scale: float) -> jax.Array:
    """v_neg + g (v_text - v_neg) from a doubled batch [text; negative] (2B, ...): (B, ...)."""
    v_text, v_neg = jnp.split(velocity_GB, 2)
    return v_neg + guidance_scale * (v_text - v_neg)


def solve_chunk(
    denoise: Denoise,
    noise: jax.Array,
    cache: Any,
    schedule: Schedule,
    progress: Progress,
    solver_step: Callable,
) -> jax.Array:
    """Takes a chunk (B, f, h, w, c) from noise to data; the cache is only read."""
    state = schedule.solver.init(noise)
    for i in range(schedule.steps):
        timestep = jnp.full((noise.shape[0],), schedule.timesteps[i], jnp.float32)
        velocity = denoise(state.x, timestep, cache)
        state = solver_step(state, velocity, schedule.coefficients_at(i))
        progress(i + 1, schedule.steps)
    return state.x


def sample_chunks(
    denoise: Denoise,
    commit: Commit,
    cache: Any,
    noise_W: Iterator[jax.Array],
    schedule: Schedule,
    progress: Callable[[int], Progress] = lambda chunk: lambda step, steps: None,
    solver_step: Callable | None = None,
    as_context: Callable[[int, jax.Array], jax.Array] = lambda chunk, x: x,
) -> Iterator[jax.Array]:
    """Yields finished chunks (B, f, h, w, c), one for each of `noise_W`.

    A chunk is committed when the next one is asked for, so the last one never is. Solver state is
    new for each chunk. `progress(chunk)` gives the callback (step, steps) of that chunk.
    `solver_step` is the solver's own step unless a compiled one is given. `as_context(chunk, x)` is
    what is committed of finished chunk number `chunk`.
    """
    solver_step = solver_step or schedule.solver.step
    finished = None
    for i, noise in enumerate(noise_W):
        if finished is not None:
            cache = commit(as_context(i - 1, finished), cache)
        finished = solve_chunk(denoise, noise, cache, schedule, progress(i), solver_step)
        yield finished
