"""The Wan VAE as a `VideoCodec`: uint8 frames in, uint8 frames out, compiled, bounded in memory.

Letters: B batch, T frames, H, W pixels, F latent frames, h, w latent pixels, C latent channels.
"""

import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from lact_jax.models.vae import (
    SPATIAL_STRIDE,
    TEMPORAL_STRIDE,
    VAEConfig,
    WanVAE,
    check_latent_shape,
    check_video_shape,
    over_chunks,
)
from lact_jax.models.vae_tiling import Tiling, tiled

# Left to itself XLA gives cuDNN every 3-D convolution channels-first, with a transpose before and
# after it; tensor cores want channels last. Other backends don't take the option.
GPU_COMPILER_OPTIONS = {"xla_gpu_force_conv_nhwc": True}

# Elements of one activation. Indices of 32 bits end at 2**31, and a latent frame's share of the
# time stops falling long before that.
MAX_ACTIVATION = 5 * 2**28


def compiler_options() -> dict[str, bool] | None:
    """What to pass `jax.jit` as compiler_options for a program that holds this VAE."""
    return GPU_COMPILER_OPTIONS if jax.default_backend() == "gpu" else None


def to_unit_range(frames_BTHW3):
    """uint8 frames to float32 in [-1, 1]."""
    return frames_BTHW3.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video_BTHW3):
    """Float video to uint8: clamped to [-1, 1], rounded to the nearest of the 256 levels."""
    return jnp.round((jnp.clip(video_BTHW3, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def default_latents_per_call(config: VAEConfig, height: int, width: int) -> int:
    """How many latent frames of one clip go through at a time: 4 at 480x832, and at least 1.

    So many that the widest activation, the decoder's frames at full resolution before their
    channels are halved, stays within MAX_ACTIVATION elements.
    """
    widest = TEMPORAL_STRIDE * height * width * config.widths[1]
    return max(1, MAX_ACTIVATION // widest)


@lru_cache
def _split(config: VAEConfig):
    return nnx.split(nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0))))


def abstract_vae(config: VAEConfig):
    """(graphdef, nested dict of `jax.ShapeDtypeStruct`) of a WanVAE, with nothing allocated."""
    graphdef, state = _split(config)
    return graphdef, nnx.to_pure_dict(state)


def random_params(config: VAEConfig, seed: int) -> dict:
    """Random float32 weights to try things with: kernels of variance 1/fan-in, biases 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key != "kernel":
            return jnp.full(leaf.shape, float(path[-1].key == "scale"), jnp.float32)
        fan_in = math.prod(leaf.shape[:-1])
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / fan_in**0.5)

    return jax.tree_util.tree_map_with_path(draw, abstract_vae(config)[1])


def check_params(params: dict, config: VAEConfig) -> None:
    """Raises a ValueError that lists every missing, unknown or misshapen parameter, if any is."""
    want = traverse_util.flatten_dict(abstract_vae(config)[1], sep="/")
    have = traverse_util.flatten_dict(params, sep="/")
    wrong = [f"missing {path}" for path in want.keys() - have.keys()]
    wrong += [f"unknown {path}" for path in have.keys() - want.keys()]
    wrong += [
        f"{path}: shape {have[path].shape}, need {want[path].shape}"
        for path in want.keys() & have.keys()
        if have[path].shape != want[path].shape
    ]
    if wrong:
        raise ValueError(f"parameters do not fit {config}:\n  " + "\n  ".join(sorted(wrong)))


class WanCodec:
    """Encodes and decodes uint8 video with the Wan VAE; a whole clip, or piece by piece.

    Args:
      params: nested dict of the WanVAE's arrays, as `nnx.to_pure_dict` gives it.
      config: sizes and dtype.
      latents_per_call: latent frames that go through the network at a time when a whole clip is
        coded. More take more memory, for the same result. None for `default_latents_per_call`,
        shared among the clips of a batch; clips that are too many for that go one by one.
      tiling: cut frames into tiles (of the default size with `Tiling()`); None for whole frames.

    Raises:
      ValueError: when the parameters do not fit the config; the message lists all that do not.
    """

    temporal_stride = TEMPORAL_STRIDE
    spatial_stride = SPATIAL_STRIDE

    def __init__(
        self,
        params: dict,
        config: VAEConfig | None = None,
        *,
        latents_per_call: int | None = None,
        tiling: Tiling | None = None,
    ):
        self.config = config or VAEConfig()
        check_params(params, self.config)
        self.latent_channels = self.config.z_dim
        self._latents_per_call = latents_per_call
        self._params = jax.tree.map(jnp.asarray, params)
        self._graphdef, _ = abstract_vae(self.config)
        self._tiling = tiling
        jit = partial(jax.jit, compiler_options=compiler_options())
        self._encode_chunk = jit(lambda params, *args: self._steps(params)[0](*args))
        self._decode_chunk = jit(lambda params, *args: self._steps(params)[1](*args))
        self._encode = jit(partial(self._whole, 0, TEMPORAL_STRIDE), static_argnums=(2, 3))
        self._decode = jit(partial(self._whole, 1, 1), static_argnums=(2, 3))

    def _steps(self, params):
        """The two streaming steps, on uint8 frames, with these parameters."""
        vae = nnx.merge(self._graphdef, params)
        encode, decode = vae.encode_chunk, vae.decode_chunk
        if self._tiling is not None:
            encode = tiled(encode, self._tiling, SPATIAL_STRIDE, 1)
            decode = tiled(decode, self._tiling, 1, SPATIAL_STRIDE)

        def encode_uint8(carry, frames_BTHW3):
            return encode(carry, to_unit_range(frames_BTHW3))

        def decode_uint8(carry, latent_BFhwC):
            carry, video_BTHW3 = decode(carry, latent_BFhwC)
            return carry, to_uint8(video_BTHW3)

        return encode_uint8, decode_uint8

    def _whole(self, which, stride, params, x_BT, latents_per_call, one_by_one):
        step = self._steps(params)[which]
        run = partial(over_chunks, step, latents_per_call=latents_per_call, stride=stride)
        if not one_by_one:
            return run(x_BT)
        return jax.lax.map(lambda x_T: run(x_T[None])[0], x_BT)

    def _cut(self, batch: int, height: int, width: int) -> tuple[int, bool]:
        """(latent frames a call, whether clips go one by one) for clips of these many pixels."""
        if self._latents_per_call is not None:
            return self._latents_per_call, False
        if self._tiling is not None:
            tile = (SPATIAL_STRIDE * side for side in self._tiling.tile)
            height, width = map(min, (height, width), tile)
        fitting = default_latents_per_call(self.config, height, width)
        return (fitting // batch, False) if batch <= fitting else (fitting, True)

    def encode(self, frames_BTHW3) -> jax.Array:
        """The normalised latent (B,F,H/8,W/8,C) float32 of whole clips, uint8 with T = 1 + 4k."""
        self._check_frames(frames_BTHW3, first=True)
        batch, _, height, width, _ = frames_BTHW3.shape
        return self._encode(self._params, frames_BTHW3, *self._cut(batch, height, width))

    def decode(self, latent_BFhwC) -> jax.Array:
        """The uint8 frames (B,1+4(F-1),8h,8w,3) of whole clips."""
        self._check_latent(latent_BFhwC)
        batch, _, *sides, _ = latent_BFhwC.shape
        cut = self._cut(batch, *(SPATIAL_STRIDE * side for side in sides))
        return self._decode(self._params, latent_BFhwC, *cut)

    def init_encode(self, batch: int, height: int, width: int) -> None:
        """The carry at the start of a video of these pixel sizes: None, whatever they are."""
        return None

    def encode_chunk(self, carry, frames_BTHW3):
        """Encodes the next uint8 frames, 1 + 4k in the first call, then 4k: (carry, latent)."""
        self._check_frames(frames_BTHW3, first=carry is None)
        return self._encode_chunk(self._params, carry, frames_BTHW3)

    def init_decode(self, batch: int, height: int, width: int) -> None:
        """The carry at the start of a video of these pixel sizes: None, whatever they are."""
        return None

    def decode_chunk(self, carry, latent_BFhwC):
        """Decodes the next latents, 1 frame for the first, 4 for all others: (carry, frames)."""
        self._check_latent(latent_BFhwC)
        return self._decode_chunk(self._params, carry, latent_BFhwC)

    def _check_latent(self, latent_BFhwC):
        check_latent_shape(latent_BFhwC.shape, self.latent_channels)

    def _check_frames(self, frames_BTHW3, *, first):
        if frames_BTHW3.dtype != jnp.uint8:
            raise ValueError(f"frames are {frames_BTHW3.dtype}: the codec takes uint8, 0 to 255")
        check_video_shape(frames_BTHW3.shape, first=first)
