"""Prompt -> embedding -> sampler -> codec -> frames, chunk by chunk.

Letters: B prompts, W chunks, f latent frames of a chunk, h, w latent size, c channels, L text
tokens, Q text width, T video frames.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lact_jax import distributed
from lact_jax.config import Config
from lact_jax.diffusion.flow import MODEL_TIME_SCALE, add_noise
from lact_jax.diffusion.sampler import (
    Progress,
    chunk_noise,
    context_noise,
    guide,
    sample_chunks,
)
from lact_jax.encoders import TextEncoder, VideoCodec
from lact_jax.models.dit import bind
from lact_jax.sharding import make_mesh, on_mesh, replicated
from lact_jax.sizes import check_shares

# With guidance the batch is doubled, [text; negative]; each half has a cache of its own.


def _branches(config: Config, x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, x]) if config.sample.guided else x


def denoise_branches(config: Config, params, text_kv, x, timestep, cache) -> jax.Array:
    """The (guided) velocity of a noisy chunk x (B, f, h, w, c) at timestep (B,), shaped like x."""
    both = _branches(config, x), _branches(config, timestep)
    velocity = bind(config.model, params).denoise(*both, text_kv, cache)
    return guide(velocity, config.sample.guidance_scale) if config.sample.guided else velocity


def commit_branches(config: Config, params, text_kv, x, cache):
    """The cache after a finished chunk x (B, f, h, w, c), which all branches take in."""
    timestep = MODEL_TIME_SCALE * config.sample.context_noise
    model = bind(config.model, params)
    return model.commit(_branches(config, x), text_kv, cache, timestep)


class Pipeline:
    """A model with its codec and text encoder, ready to sample. Functions are compiled once.

    The devices of `config.mesh` share prompts over data and fsdp, where they divide (with guidance
    there are two for each), and a clip's tokens over seq. Codec and text encoder use one device.

    Several processes sample a batch together, each called with the same arguments; `own_rows` says
    whose frames each of them decodes.

    Attributes:
      batch_size: prompts to sample together: `config.sample.batch_size`, made a multiple of
      together: what the size of a batch must be a multiple of.
    """

    def __init__(self, config: Config, params: dict, codec: VideoCodec, text: TextEncoder):
        """`params` is the model's nested dict, cut over the mesh where that has more than one
        device; raises ValueError where sizes don't fit."""
        mesh = make_mesh(config.mesh)
        check_shares(config, codec, mesh)
        sample, data, frames = config.sample, config.data, config.objective.frames_per_chunk
        if sample.num_latent_frames % frames:
            raise ValueError(
                f"sample.num_latent_frames={sample.num_latent_frames} is not a multiple of "
                f"objective.frames_per_chunk={frames}"
            )
        self.config, self.params, self.codec, self.text = config, params, codec, text
        stride = codec.spatial_stride
        self.chunk_shape = (
            frames, data.height // stride, data.width // stride, codec.latent_channels,
        )  # fmt: skip
        self.num_chunks = sample.num_latent_frames // frames
        self._whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))
        # Of several processes each gets as many prompts; and a batch that devices don't share
        # evenly, each of them would compute whole.
        replicas = mesh.shape["data"] * mesh.shape["fsdp"]
        processes = jax.process_count()
        self.together = math.lcm(processes, replicas) if processes > 1 else 1
        self.batch_size = -(-sample.batch_size // self.together) * self.together
        self._schedule = sample.schedule
        self._solve = jax.jit(self._schedule.solver.step)
        model = partial(bind, config.model)
        self._text_kv = jax.jit(on_mesh(mesh, lambda params, text: model(params).text_kv(text)))
        self._init_cache = jax.jit(
            on_mesh(mesh, lambda params, batch: model(params).init_cache(batch)), static_argnums=1
        )
        self._denoise = jax.jit(on_mesh(mesh, partial(denoise_branches, config)))
        # Full attention's cache grows: its old buffers are of no use for the new ones. Every length
        # is a program of its own, which costs compilations and spares masks.
        grows = any(mixer == "full" for mixer, _ in config.model.layer_specs)
        self._commit = jax.jit(
            on_mesh(mesh, partial(commit_branches, config)), donate_argnums=() if grows else 3
        )

    def _as_context(self, indices: Sequence[int]) -> Callable[[int, jax.Array], jax.Array]:
        """What is committed of a finished chunk: itself, noised where the config says so."""
        sample = self.config.sample

        def noised(chunk, x):
            noise = context_noise(sample.seed, indices, chunk, self.chunk_shape)
            return add_noise(x, noise, jnp.float32(sample.context_noise))

        return noised if sample.context_noise else lambda chunk, x: x

    def latent_chunks(
        self,
        prompts: Sequence[str],
        indices: Sequence[int],
        progress: Callable[[int], Progress] = lambda chunk: lambda step, steps: None,
    ) -> Iterator[jax.Array]:
        """Yields finished latent chunks (B, f, h, w, c) of a batch of prompts.

        `indices` are the prompts' places in the whole list: they seed the noise.
        """
        sample = self.config.sample
        captions = list(prompts)
        if sample.guided:
            captions += [sample.negative_prompt] * len(prompts)
        text_kv = self._text_kv(self.params, jnp.asarray(self.text.encode(captions)))
        noise = (
            chunk_noise(sample.seed, indices, i, self.chunk_shape) for i in range(self.num_chunks)
        )
        return sample_chunks(
            lambda x, t, cache: self._denoise(self.params, text_kv, x, t, cache),
            lambda x, cache: self._commit(self.params, text_kv, x, cache),
            self._init_cache(self.params, len(captions)),
            noise,
            self._schedule,
            progress,
            solver_step=self._solve,
            as_context=self._as_context(indices),
        )

    def own_rows(self, batch: int) -> range:
        """The rows of a batch, a multiple of `together`, that this process decodes."""
        own = batch // jax.process_count()
        return range(jax.process_index() * own, (jax.process_index() + 1) * own)

    def frame_chunks(self, prompts, indices, progress=None) -> Iterator[np.ndarray]:
        """Yields decoded frames (B, T, H, W, 3) uint8 of this process's rows as chunks finish;
        arguments as above."""
        progress = progress or (lambda chunk: lambda step, steps: None)
        data, rows = self.config.data, self.own_rows(len(prompts))
        carry = self.codec.init_decode(len(rows), data.height, data.width)
        for latent in self.latent_chunks(prompts, indices, progress):
            if distributed.several():
                latent = np.asarray(self._whole(latent))[rows.start : rows.stop]
            latent = jax.device_put(latent, jax.local_devices()[0])
            carry, frames = self.codec.decode_chunk(carry, latent)
            yield np.asarray(frames)
