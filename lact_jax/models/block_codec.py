"""A small fixed video codec with the Wan VAE's time layout, for the demo's 64x64 clips.

Legend: B batch, T frames, F latent frames, H, W pixels, h, w cells of 8x8 pixels, C latent
channels, K coefficients of a cell, P = 4*8*8*3 samples of a cell.

A cell is 8x8 pixels of 4 frames. Frame 0 stands alone: it is taken as four equal frames, so that
a still clip has the same latent at every time. A principal basis turns a cell into K coefficients;
the latent is the first C of them, each divided by its standard deviation to a power, all by one
factor that makes their overall variance 1.

Keeping C of the P numbers and going back through the basis shows every cell's border. So decoding
first lets a few 3x3 convolutions over the cells of this latent frame and the one before it
predict all K coefficients. They were fitted, with noise on the latents, by
`python -m lact_jax.fit_block_codec`, which writes the file that `load` reads.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

TEMPORAL_STRIDE = 4
SPATIAL_STRIDE = 8
SAMPLES = TEMPORAL_STRIDE * SPATIAL_STRIDE**2 * 3

_ASSETS = Path(__file__).parent.parent / "assets"
_EXACT = jax.lax.Precision.HIGHEST
Params = Mapping[str, jax.Array]


def asset_path(channels: int) -> Path:
    """Where the fitted numbers of a codec with this many latent channels lie."""
    return _ASSETS / f"block_codec_{channels}.npz"


def save(path: os.PathLike | str, params: Params, notes: Mapping[str, object]) -> None:
    """Writes parameters, halved to float16, and notes on how they were fitted."""
    arrays = {name: np.asarray(value, np.float16) for name, value in params.items()}
    np.savez_compressed(path, notes=np.array(json.dumps(dict(notes))), **arrays)


def load(path: os.PathLike | str) -> tuple[dict[str, jax.Array], dict]:
    """Reads (parameters as float32, notes); FileNotFoundError says how to fit them."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no fitted codec; write it with `python -m lact_jax.fit_block_codec`"
        )
    with np.load(path) as file:
        params = {
            name: jnp.asarray(file[name], jnp.float32) for name in file.files if name != "notes"
        }
        return params, json.loads(str(file["notes"]))


def cells(frames_BTHW3: jax.Array) -> jax.Array:
    """uint8 frames -> cells (B, F, h, w, P) in [-1, 1]; frame 0 makes a cell of its own."""
    first_B1HW3 = jnp.repeat(frames_BTHW3[:, :1], TEMPORAL_STRIDE - 1, axis=1)
    x = jnp.concatenate([first_B1HW3, frames_BTHW3], axis=1).astype(jnp.float32) / 127.5 - 1
    batch, time, height, width, _ = x.shape
    s, t = SPATIAL_STRIDE, TEMPORAL_STRIDE
    x = x.reshape(batch, time // t, t, height // s, s, width // s, s, 3)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(*x.shape[:2], height // s, width // s, -1)


def pixels(cell_BFhwP: jax.Array) -> jax.Array:
    """Cells -> float pictures (B, F, 4, H, W, 3) in [-1, 1], each cell's four frames apart."""
    batch, frames, h, w, _ = cell_BFhwP.shape
    s, t = SPATIAL_STRIDE, TEMPORAL_STRIDE
    x = cell_BFhwP.reshape(batch, frames, h, w, t, s, s, 3).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(batch, frames, t, h * s, w * s, 3)


def refine(params: Params, latent: jax.Array, before: jax.Array) -> jax.Array:
    """All coefficients from the latents.

    Args:
      params: as in the file.
      latent: (N, h, w, C), the frame to decode.
      before: (N, h, w, C), the frame before it (itself, where it is the first).

    Returns:
      (N, h, w, K): latent / scale in the first C, plus what the convolutions add.
    """
    x = jnp.concatenate([latent, before], axis=-1)
    for layer in range(sum(name.startswith("kernel") for name in params)):
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        y = jax.lax.conv_general_dilated(
            padded, params[f"kernel{layer}"], (1, 1), "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=_EXACT,
        )  # fmt: skip
        y = jax.nn.silu(y + params[f"bias{layer}"])
        x = y if layer == 0 else x + y
    added = (jnp.dot(x, params["out"], precision=_EXACT) + params["out_bias"]) * params["std"]
    channels = latent.shape[-1]
    return added.at[..., :channels].add(latent / params["scale"])


@jax.jit
def encode(params: Params, frames_BTHW3: jax.Array) -> jax.Array:
    """uint8 frames (B, 1 + 4k, H, W, 3) -> latents (B, 1 + k, h, w, C) float32."""
    basis_PC = params["basis"][:, : params["scale"].size]
    centred = cells(frames_BTHW3) - params["mean"]
    return jnp.dot(centred, basis_PC, precision=_EXACT) * params["scale"]


@functools.partial(jax.jit, static_argnames="begins")
def decode(params: Params, latent_BFhwC: jax.Array, before_B1hwC: jax.Array, *, begins: bool):
    """Latents -> uint8 frames.

    Args:
      params: as in the file.
      latent_BFhwC: a stretch of latent frames.
      before_B1hwC: the latent frame before the stretch (ignored where it begins the video).
      begins: whether the first latent frame is frame 0, which gives one frame instead of four.

    Returns:
      (B, 4F or 4F - 3, H, W, 3).
    """
    if begins:
        before_B1hwC = latent_BFhwC[:, :1]
    before_BFhwC = jnp.concatenate([before_B1hwC, latent_BFhwC[:, :-1]], axis=1)
    flat = (-1, *latent_BFhwC.shape[2:])
    coef = refine(params, latent_BFhwC.reshape(flat), before_BFhwC.reshape(flat))
    cell = jnp.dot(coef, params["basis"].T, precision=_EXACT) + params["mean"]
    picture = pixels(cell.reshape(*latent_BFhwC.shape[:-1], SAMPLES))
    picture = jnp.clip(jnp.rint((picture + 1) * 127.5), 0, 255)
    batch, frames, _, height, width, _ = picture.shape
    video = picture.reshape(batch, frames * TEMPORAL_STRIDE, height, width, 3)
    if begins:  # the four frames of cell 0 are one
        first = jnp.rint(jnp.mean(picture[:, 0], axis=1, keepdims=True))
        video = jnp.concatenate([first, video[:, TEMPORAL_STRIDE:]], axis=1)
    return video.astype(jnp.uint8)


class BlockCodec:
    """The codec as `lact_jax.encoders.VideoCodec`."""

    temporal_stride = TEMPORAL_STRIDE
    spatial_stride = SPATIAL_STRIDE

    def __init__(self, *, channels: int = 16, path: os.PathLike | str | None = None):
        """Loads the shipped codec of `channels` (16 or 32), or a file that the fit wrote.

        Raises FileNotFoundError where there is no such file, ValueError where it holds another
        number of channels.
        """
        file = asset_path(channels) if path is None else Path(path)
        self._params, self.notes = load(file)
        self.latent_channels = self._params["scale"].size
        if self.latent_channels != channels:
            raise ValueError(f"{file}: has {self.latent_channels} channels, not {channels}")

    def encode(self, frames_BTHW3) -> jax.Array:
        """uint8 (B, 1 + 4k, H, W, 3) -> float32 (B, 1 + k, H/8, W/8, C).

        Raises ValueError for another dtype, or sizes that the strides don't divide.
        """
        shape = tuple(frames_BTHW3.shape)
        if frames_BTHW3.dtype != np.uint8 or len(shape) != 5 or shape[-1] != 3:
            raise ValueError(
                f"frames must be uint8 (B, T, H, W, 3), got {frames_BTHW3.dtype} {shape}"
            )
        time, height, width = shape[1:4]
        if time % TEMPORAL_STRIDE != 1:
            raise ValueError(f"{time} frames: must be 1 + {TEMPORAL_STRIDE}k")
        if height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
            raise ValueError(f"frames of {height}x{width}: {SPATIAL_STRIDE} must divide both")
        return encode(self._params, jnp.asarray(frames_BTHW3))

    def decode(self, latent_BFhwC) -> jax.Array:
        """A whole video: float (B, F, h, w, C) -> uint8 (B, 4F - 3, 8h, 8w, 3)."""
        return self.decode_chunk(None, latent_BFhwC)[1]

    def init_decode(self, batch: int, height: int, width: int) -> None:
        """The carry before the first chunk of a video; it needs no memory yet."""
        del batch, height, width

    def decode_chunk(self, carry: jax.Array | None, latent_BFhwC):
        """Decodes the next latent frames of a video; any split gives the same video.

        Args:
          carry: of `init_decode` or the call before: the last latent frame (B, 1, h, w, C).
          latent_BFhwC: float32, at least one latent frame.

        Returns:
          (carry, uint8 frames): 4F - 3 frames in the first call, 4F in all others.

        Raises:
          ValueError: another number of channels, or no latent frame.
        """
        latent = jnp.asarray(latent_BFhwC, jnp.float32)
        if latent.ndim != 5 or latent.shape[-1] != self.latent_channels or latent.shape[1] < 1:
            raise ValueError(
                f"latents must be (B, F, h, w, {self.latent_channels}) with F >= 1, "
                f"got {latent.shape}"
            )
        before = latent[:, :1] if carry is None else carry
        return latent[:, -1:], decode(self._params, latent, before, begins=carry is None)
