"""Small models trained from several seeds at once, on clips that stay on the device.

Letters: N clips, B clips of a batch, F latent frames, h, w latent size, c channels, W chunks,
L text tokens, Q text width, G seeds, K steps, V noise levels.

Config, objective, optimiser, train step and validation are those of `train.py`. What is not: the
seeds run side by side under `vmap`, and many steps in one program, because models this small wait
for the launch of each kernel; and there are no checkpoints.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lact_jax.config import Config
from lact_jax.train_state import TrainState, init_state, make_train_step
from lact_jax.validation import make_evaluate

STEPS_AT_A_TIME = 50
CLIPS_AT_A_TIME = 32


def first_states(config: Config, seeds: tuple[int, ...]) -> TrainState:
    """Train states with a leading axis over `seeds`, each as `init_state` makes it."""
    states = [init_state(dataclasses.replace(config, seed=seed)) for seed in seeds]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def batch_indices(seed: int, num_clips: int, batch_size: int, steps: int) -> np.ndarray:
    """Clips of every batch, (steps, B) int32: one random order of all clips after another."""
    rng = np.random.default_rng(seed)
    laps = -(-steps * batch_size // num_clips)
    order = np.concatenate([rng.permutation(num_clips) for _ in range(laps)])
    return order[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


def train_seeds(
    config: Config,
    latent_NFhwc: jax.Array,
    text_LQ: jax.Array,
    seeds: tuple[int, ...],
    progress: Callable[[int, np.ndarray], None] = lambda step, loss_G: None,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Trains a model from each seed for `config.train.steps` steps.

    Args:
      config: the run; `data.batch_size` and all of `model`, `objective` and `train` hold.
      latent_NFhwc: the training clips.
      text_LQ: their caption.
      seeds: of the parameters, the noise and the order of the clips.
      progress: called with (step, mean loss by seed) every STEPS_AT_A_TIME steps.

    Returns:
      The final states (leading axis G), and by step (K, G) the `loss` and whether the update was
      `skipped` because it was not finite or too large.
    """
    step_fn = jax.vmap(make_train_step(config), in_axes=(0, 0, None, None))
    batch, steps = config.data.batch_size, config.train.steps
    text_BLQ = jnp.broadcast_to(text_LQ, (batch, *text_LQ.shape))

    @partial(jax.jit, donate_argnums=0)
    def run(states, index_KGB, latent_NFhwc):
        def body(states, index_GB):
            states, metrics = step_fn(states, latent_NFhwc[index_GB], text_BLQ, text_LQ)
            return states, {name: metrics[name] for name in ("loss", "skipped")}

        return jax.lax.scan(body, states, index_KGB)

    order = [batch_indices(seed, latent_NFhwc.shape[0], batch, steps) for seed in seeds]
    index_KGB = np.stack(order, axis=1)
    states, parts = first_states(config, seeds), []
    for start in range(0, steps, STEPS_AT_A_TIME):
        states, part = run(states, index_KGB[start : start + STEPS_AT_A_TIME], latent_NFhwc)
        parts.append(jax.tree.map(np.asarray, part))
        progress(min(start + STEPS_AT_A_TIME, steps), parts[-1]["loss"].mean(0))
    return states, jax.tree.map(lambda *x: np.concatenate(x), *parts)


def validation_losses(
    config: Config, states: TrainState, latent_NFhwc: jax.Array, text_LQ: jax.Array
) -> np.ndarray:
    """Mean loss of the averaged parameters by seed, noise level and chunk: (G, V, W).

    Levels and noise are those of lact_jax/validation.py: a clip's noise depends on its place among
    the clips alone, so that all models are measured on the same.
    """
    evaluate = jax.jit(make_evaluate(config))
    num_clips = latent_NFhwc.shape[0]
    clips = jnp.arange(num_clips, dtype=jnp.int32)

    def of_seed(state):
        parts = []
        for start in range(0, num_clips, CLIPS_AT_A_TIME):
            part = slice(start, start + CLIPS_AT_A_TIME)
            text_BLQ = jnp.broadcast_to(text_LQ, (len(clips[part]), *text_LQ.shape))
            parts.append(
                evaluate(state.ema, state.frozen, latent_NFhwc[part], text_BLQ, clips[part])
            )
        return np.concatenate(parts, axis=1).mean(axis=1)

    by_seed = (jax.tree.map(lambda x, g=g: x[g], states) for g in range(states.step.shape[0]))
    return np.stack([of_seed(state) for state in by_seed])
