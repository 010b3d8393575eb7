"""From a batch of latents to the loss: teacher-forced flow matching (REFERENCE.md 3).

Letters: B batch, F latent frames of the clip, h, w latent size, c channels, W chunks of the video,
R noise repeats, C chunks of the sequence, f latent frames of a chunk, L text tokens, Q text width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from lact_jax.diffusion import flow
from lact_jax.models.dit import DiT
from lact_jax.ops.sequence import SequenceLayout, frame_positions, pack, unpack_noise

_CONTEXT_KEY = 3  # a sample's key splits into three; this folds in what none of them is made of


@dataclass(frozen=True)
class ObjectiveConfig:
    """The training objective.

    Attributes:
      frames_per_chunk: latent frames of a chunk.
      num_repeat: R, noise copies of every chunk.
      timestep_shift: s of the shifted time.
      adjust_timestep_shift: take s from the tokens of a chunk instead (`resolution_shift`).
      time_sampling: 'uniform' or 'logit_normal'.
      logit_normal_weighting: weigh the loss by the logit-normal mass of the unshifted time.
      logit_normal_std: its standard deviation.
      drop_text_prob: probability that a sample trains on the empty caption.
      context_noise: the highest noise level of clean context chunks; 0 leaves them clean. Each
        draws its level uniformly up to it and the model is told, so that it learns to make do with
        context like its own samples. As in Cascaded Diffusion Models (Ho et al. 2021,
        arXiv:2106.15282) and, for frames before, in GameNGen (Valevski et al. 2024,
        arXiv:2408.14837).
    """

    frames_per_chunk: int = 3
    num_repeat: int = 1
    timestep_shift: float = 3.0
    adjust_timestep_shift: bool = False
    time_sampling: str = "uniform"
    logit_normal_weighting: bool = True
    logit_normal_std: float = 1.0
    drop_text_prob: float = 0.1
    context_noise: float = 0.0

    def __post_init__(self):
        if self.time_sampling not in flow.TIME_SAMPLERS:
            raise ValueError(
                f"objective.time_sampling={self.time_sampling!r}: choose one of "
                f"{sorted(flow.TIME_SAMPLERS)}"
            )
        if not 0 <= self.drop_text_prob <= 1:
            raise ValueError(f"objective.drop_text_prob={self.drop_text_prob}: must be in [0, 1]")
        if not 0 <= self.context_noise < 1:
            raise ValueError(f"objective.context_noise={self.context_noise}: must be in [0, 1)")
        for name in ("frames_per_chunk", "num_repeat"):
            if getattr(self, name) < 1:
                raise ValueError(f"objective.{name}={getattr(self, name)}: must be at least 1")

    def shift(self, latent_hw: tuple[int, int], patch: tuple[int, int, int]) -> float:
        """The time shift s for latents of this size."""
        if not self.adjust_timestep_shift:
            return self.timestep_shift
        tokens = self.frames_per_chunk * latent_hw[0] * latent_hw[1]
        return flow.resolution_shift(tokens // (patch[0] * patch[1] * patch[2]))


class Context(NamedTuple):
    """What the clean chunks that stand in the sequence, all W but the last, are noised with: noise
    (B, W-1, f, h, w, c) and its level t (B, W-1)."""

    noise: jax.Array
    t_BW: jax.Array


class Draws(NamedTuple):
    """All that is random in a step: noise like the chunks (B, R, W, f, h, w, c), time u (B, R, W),
    whether a sample loses its caption (B,), and the context's noise where it has some."""

    noise: jax.Array
    u_BRW: jax.Array
    drop_text_B: jax.Array
    context: Context | None = None


class Loss(NamedTuple):
    """loss: the weighted mean; by_chunk: unweighted mean for each video chunk (W,)."""

    loss: jax.Array
    by_chunk_W: jax.Array


def split_chunks(latent_BFhwc: jax.Array, frames_per_chunk: int) -> jax.Array:
    """(B, F, h, w, c) to (B, W, f, h, w, c); raises ValueError unless F is whole chunks."""
    frames = latent_BFhwc.shape[1]
    if frames % frames_per_chunk:
        raise ValueError(
            f"{frames} latent frames are not whole chunks of {frames_per_chunk}: use "
            f"1 + 4 * ({frames_per_chunk} * k - 1) video frames"
        )
    return rearrange(latent_BFhwc, "b (w f) ... -> b w f ...", f=frames_per_chunk)


def draw(
    key: jax.Array, chunks: jax.Array, config: ObjectiveConfig, first_sample: jax.Array | int = 0
) -> Draws:
    """Draws for every sample from its own key, so a sample does not depend on its batch.

    `first_sample` is the place of this microbatch's first sample in the whole batch.
    """
    repeats = config.num_repeat

    def one(index, x_Wfhwc):
        sample_key = jax.random.fold_in(key, index)
        noise_key, time_key, text_key = jax.random.split(sample_key, 3)
        noise = jax.random.normal(noise_key, (repeats, *x_Wfhwc.shape), jnp.float32)
        sampler = flow.TIME_SAMPLERS[config.time_sampling]
        u_RW = sampler(time_key, (repeats, x_Wfhwc.shape[0]))
        drop_text = jax.random.bernoulli(text_key, config.drop_text_prob)
        return Draws(noise, u_RW, drop_text, _draw_context(sample_key, x_Wfhwc, config))

    return jax.vmap(one)(first_sample + jnp.arange(chunks.shape[0]), chunks)


def _draw_context(
    sample_key: jax.Array, x_Wfhwc: jax.Array, config: ObjectiveConfig
) -> Context | None:
    """The context's draws of one sample. A key of its own: all other draws are as without it."""
    if config.context_noise == 0:
        return None
    noise_key, time_key = jax.random.split(jax.random.fold_in(sample_key, _CONTEXT_KEY))
    noise = jax.random.normal(noise_key, x_Wfhwc[1:].shape, jnp.float32)
    maxval = jnp.float32(config.context_noise)
    return Context(noise, jax.random.uniform(time_key, noise.shape[:1], jnp.float32, 0, maxval))


def build_sequence(chunks: jax.Array, draws: Draws, shift: float, layout: SequenceLayout):
    """Noises the chunks (B, W, f, h, w, c) and packs the sequence.

    Returns:
      x (B, C, f, h, w, c) and timesteps (B, C) in [0, 1000].
    """
    t_BRW = flow.shift_time(draws.u_BRW, shift)
    noisy = flow.add_noise(chunks[:, None], draws.noise, t_BRW)
    clean, t_BW = chunks[:, : layout.num_clean], jnp.zeros(chunks.shape[:2], jnp.float32)
    if draws.context is not None:
        t_BW = draws.context.t_BW
        clean = flow.add_noise(clean, draws.context.noise, t_BW)
    x = pack(noisy, clean, layout)
    timestep_BRW, timestep_BW = (flow.MODEL_TIME_SCALE * t for t in (t_BRW, t_BW))
    return x, pack(timestep_BRW, timestep_BW, layout)


def loss_from_prediction(
    prediction: jax.Array, chunks: jax.Array, draws: Draws, config: ObjectiveConfig
) -> Loss:
    """The loss of predicted velocities (B, R, W, f, h, w, c) of the noise copies."""
    target = flow.velocity_target(chunks[:, None], draws.noise)
    error_BRW = reduce(jnp.square(prediction - target), "b r w ... -> b r w", "mean")
    weight_BRW = (
        flow.logit_normal_weight(draws.u_BRW, config.logit_normal_std)
        if config.logit_normal_weighting
        else jnp.ones_like(draws.u_BRW)
    )
    return Loss(jnp.mean(weight_BRW * error_BRW), jnp.mean(error_BRW, axis=(0, 1)))


def compute_loss(
    model: DiT,
    latent_BFhwc: jax.Array,
    text_BLQ: jax.Array,
    empty_text_LQ: jax.Array,
    key: jax.Array,
    config: ObjectiveConfig,
    first_sample: jax.Array | int = 0,
) -> tuple[Loss, dict[str, jax.Array]]:
    """Loss of a batch, and the model's statistics by layer.

    Args:
      model: the bound model.
      latent_BFhwc: clean latents, whole chunks.
      text_BLQ: text embeddings; empty_text_LQ: those of "", which replace dropped captions.
      key: random key of this step.
      config: the objective.
      first_sample: place of the first sample in the whole batch (see `draw`).
    """
    chunks = split_chunks(latent_BFhwc.astype(jnp.float32), config.frames_per_chunk)
    layout = SequenceLayout(chunks.shape[1], config.num_repeat)
    draws = draw(key, chunks, config, first_sample)
    text_BLQ = jnp.where(draws.drop_text_B[:, None, None], empty_text_LQ, text_BLQ)
    shift = config.shift(chunks.shape[3:5], model.config.patch_size)
    x, timestep_BC = build_sequence(chunks, draws, shift, layout)
    frame_CF = jnp.asarray(frame_positions(layout, config.frames_per_chunk))
    velocity, stats = model.sequence(x, timestep_BC, text_BLQ, frame_CF, layout)
    prediction = unpack_noise(velocity, layout)
    return loss_from_prediction(prediction, chunks, draws, config), stats
