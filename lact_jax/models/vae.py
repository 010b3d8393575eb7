"""The Wan2.1 video VAE (REFERENCE.md 7): causal in time, streaming, channels-last.

A video of 1 + 4k RGB frames of (H, W) becomes 1 + k latent frames of (H/8, W/8, 16). Both
directions are pure functions over pieces of time,

    carry, latent = vae.encode_chunk(carry, video)    first call: carry None, 1 + 4k frames
    carry, video = vae.decode_chunk(carry, latent)    first call: carry None, 1 frame for latent 0

and any cut in time gives the same result. `over_chunks` runs either over a whole clip in one jit.

Letters: B batch, T frames, H, W pixels, F latent frames, h, w latent pixels, C latent channels.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lact_jax.models.layers import linear
from lact_jax.models.vae_layers import (
    Downsample,
    FrameAttention,
    NormSiluConv,
    ResidualBlock,
    Upsample,
    causal,
    causal_conv,
    run_layers,
)

TEMPORAL_STRIDE = 4
SPATIAL_STRIDE = 8
WAN_LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE; the defaults are Wan2.1's.

    Attributes:
      dim: width the encoder starts with; level i, from full resolution down, is
        dim * dim_mult[i] wide.
      z_dim: latent channels; `latent_mean` and `latent_std` hold one value for each.
      num_res_blocks: residual blocks of an encoder level; a decoder level has one more.
      temporal_downsample: for each of the three halvings, from full resolution down, whether it
        halves time as well. Two do.
      dtype: type of convolutions and matmuls, 'bfloat16' or 'float32'. Parameters are float32.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = WAN_LATENT_MEAN
    latent_std: tuple[float, ...] = WAN_LATENT_STD
    dtype: str = "bfloat16"

    def __post_init__(self):
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"VAEConfig.dtype={self.dtype!r}: choose 'bfloat16' or 'float32'")
        halvings = len(self.temporal_downsample)
        if 2**halvings != SPATIAL_STRIDE or 2 ** sum(self.temporal_downsample) != TEMPORAL_STRIDE:
            raise ValueError(
                f"VAEConfig.temporal_downsample={self.temporal_downsample}: give three, two of "
                f"them true, for strides of {SPATIAL_STRIDE} in space and {TEMPORAL_STRIDE} in time"
            )
        if len(self.dim_mult) != halvings + 1:
            raise ValueError(
                f"VAEConfig.dim_mult={self.dim_mult}: give one multiplier for each of "
                f"{halvings + 1} levels"
            )
        if {len(self.latent_mean), len(self.latent_std)} != {self.z_dim}:
            raise ValueError(
                f"VAEConfig: z_dim={self.z_dim} but {len(self.latent_mean)} latent_mean and "
                f"{len(self.latent_std)} latent_std values: give one for each latent channel"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from full resolution down."""
        return tuple(self.dim * multiplier for multiplier in self.dim_mult)


class BlockSpec(NamedTuple):
    """One block of the encoder or decoder; `place` counts the residual blocks of a level."""

    kind: str  # 'residual', 'halve' or 'double' (of height and width)
    level: int
    place: int
    in_channels: int
    out_channels: int
    temporal: bool = False


def encoder_plan(config: VAEConfig) -> tuple[BlockSpec, ...]:
    """The encoder's blocks in order: residual blocks level by level, a halving between levels."""
    plan, width = [], config.dim
    for level, out_width in enumerate(config.widths):
        for place in range(config.num_res_blocks):
            plan.append(BlockSpec("residual", level, place, width, out_width))
            width = out_width
        if level < len(config.temporal_downsample):
            temporal = config.temporal_downsample[level]
            plan.append(BlockSpec("halve", level, 0, width, width, temporal))
    return tuple(plan)


def decoder_plan(config: VAEConfig) -> tuple[BlockSpec, ...]:
    """The decoder's blocks in order, levels counted from the smallest frames up."""
    plan, width = [], config.widths[-1]
    for level, out_width in enumerate(config.widths[::-1]):
        for place in range(config.num_res_blocks + 1):
            plan.append(BlockSpec("residual", level, place, width, out_width))
            width = out_width
        if level < len(config.temporal_downsample):
            temporal = config.temporal_downsample[::-1][level]
            plan.append(BlockSpec("double", level, 0, width, width // 2, temporal))
            width = width // 2
    return tuple(plan)


def _build(spec: BlockSpec, **make):
    if spec.kind == "residual":
        return ResidualBlock(spec.in_channels, spec.out_channels, **make)
    resample = {"halve": Downsample, "double": Upsample}[spec.kind]
    return resample(spec.in_channels, temporal=spec.temporal, **make)


def _numbered(layers):
    return nnx.Dict({str(i): layer for i, layer in enumerate(layers)})


def _in_order(numbered):
    """The layers by number: a merged Dict lists its keys by the alphabet, 10 before 2."""
    return [numbered[str(i)] for i in range(len(numbered))]


def _middle(width, *, dtype, rngs):
    block = partial(ResidualBlock, width, width, dtype=dtype, rngs=rngs)
    return _numbered([block(), FrameAttention(width, dtype=dtype, rngs=rngs), block()])


class Encoder(nnx.Module):
    """Video to the latent's mean and log variance, before normalisation."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        make = dict(dtype=config.dtype, rngs=rngs)
        self.conv_in = causal_conv(3, config.dim, **make)
        self.blocks = _numbered(_build(spec, **make) for spec in encoder_plan(config))
        self.middle = _middle(config.widths[-1], **make)
        self.head = NormSiluConv(config.widths[-1], 2 * config.z_dim, **make)
        self.moments = linear(2 * config.z_dim, 2 * config.z_dim, **make)

    def __call__(self, carry, video_BTHW3):
        layers = (
            partial(causal, self.conv_in),
            *_in_order(self.blocks),
            *_in_order(self.middle),
            self.head,
        )
        carry, h_BFhwC = run_layers(layers, carry, video_BTHW3)
        return carry, self.moments(h_BFhwC)


class Decoder(nnx.Module):
    """Latent (unnormalised) to video."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        make = dict(dtype=config.dtype, rngs=rngs)
        self.latent_in = linear(config.z_dim, config.z_dim, **make)
        self.conv_in = causal_conv(config.z_dim, config.widths[-1], **make)
        self.middle = _middle(config.widths[-1], **make)
        self.blocks = _numbered(_build(spec, **make) for spec in decoder_plan(config))
        self.head = NormSiluConv(config.widths[0], 3, **make)

    def __call__(self, carry, z_BFhwC):
        layers = (
            partial(causal, self.conv_in),
            *_in_order(self.middle),
            *_in_order(self.blocks),
            self.head,
        )
        return run_layers(layers, carry, self.latent_in(z_BFhwC))


class WanVAE(nnx.Module):
    """Encoder and decoder between video in [-1, 1] and the normalised latent."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode_chunk(self, carry, video_BTHW3):
        """Encodes the next frames.

        Args:
          carry: None at the start of a video, else what the call before returned.
          video_BTHW3: float in [-1, 1]; T = 1 + 4k with carry None, else 4k; H, W multiples of 8.

        Returns:
          (carry, latent (B,F,H/8,W/8,C) float32): the mean, less `latent_mean`, over `latent_std`.

        Raises:
          ValueError: for a shape that is none of these.
        """
        check_video_shape(video_BTHW3.shape, first=carry is None)
        carry, moments = self.encoder(carry, video_BTHW3.astype(self.config.dtype))
        mean, std = self._statistics()
        return carry, (moments[..., : self.config.z_dim].astype(jnp.float32) - mean) / std

    def decode_chunk(self, carry, latent_BFhwC):
        """Decodes the next latent frames.

        Args:
          carry: None at the start of a video, else what the call before returned.
          latent_BFhwC: normalised latent, any F ≥ 1.

        Returns:
          (carry, video (B,T,8h,8w,3) float32): T = 1 + 4(F-1) with carry None, else 4F. Nominally
          in [-1, 1], not clamped.

        Raises:
          ValueError: when the latent has another rank or another number of channels.
        """
        check_latent_shape(latent_BFhwC.shape, self.config.z_dim)
        mean, std = self._statistics()
        z_BFhwC = (latent_BFhwC.astype(jnp.float32) * std + mean).astype(self.config.dtype)
        carry, video_BTHW3 = self.decoder(carry, z_BFhwC)
        return carry, video_BTHW3.astype(jnp.float32)

    def _statistics(self):
        tables = self.config.latent_mean, self.config.latent_std
        return tuple(jnp.asarray(table, jnp.float32) for table in tables)


def check_video_shape(shape, *, first):
    """Raises a ValueError that says what to change unless (B,T,H,W,3) can be encoded.

    `first`: the piece starts the video, so that T = 1 + 4k; otherwise T = 4k.
    """
    if len(shape) != 5 or shape[-1] != 3:
        raise ValueError(f"video of shape {tuple(shape)}: need (B, T, H, W, 3)")
    frames, height, width = shape[1:4]
    if frames % TEMPORAL_STRIDE != int(first) or not frames:
        need = "1 + 4k frames at the start of a video" if first else "4k frames after its start"
        raise ValueError(f"{frames} frames: the Wan VAE encodes {need}; cut or pad the video")
    if height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
        raise ValueError(
            f"frames of {height}x{width}: height and width must be multiples of {SPATIAL_STRIDE}; "
            "crop or resize the video"
        )


def check_latent_shape(shape, channels):
    """Raises a ValueError unless the shape is (B, F ≥ 1, h, w, channels)."""
    if len(shape) != 5 or shape[-1] != channels or shape[1] < 1:
        raise ValueError(
            f"latent of shape {tuple(shape)}: need (B, F, h, w, {channels}), channels last, with "
            "one latent frame or more"
        )


def over_chunks(step, x_BT, latents_per_call, *, stride):
    """Runs a streaming step over a whole clip: one call for the start, a scan over the rest.

    What does not divide evenly goes into the first call, so that all others are alike and the
    program holds two copies of the network whatever the clip's length.

    Args:
      step: (carry, piece) -> (carry, result), as `encode_chunk` and `decode_chunk`.
      x_BT: the clip, (B, T, ...); T = 1 + stride·(F-1).
      latents_per_call: latent frames F of a call, which bounds the memory.
      stride: entries of x for each latent frame but the first: 4 where x is video, 1 for latents.

    Returns:
      The results, joined on axis 1.
    """
    if latents_per_call < 1:
        raise ValueError(f"latents_per_call={latents_per_call}: must be at least 1")
    later = (x_BT.shape[1] - 1) // stride
    calls = later // latents_per_call
    first = x_BT.shape[1] - calls * latents_per_call * stride
    carry, head_BT = step(None, x_BT[:, :first])
    if not calls:
        return head_BT
    rest = x_BT[:, first:].reshape(x_BT.shape[0], calls, latents_per_call * stride, *x_BT.shape[2:])
    _, tail_KBT = jax.lax.scan(step, carry, jnp.moveaxis(rest, 1, 0))
    tail_BT = jnp.moveaxis(tail_KBT, 0, 1)
    return jnp.concatenate([head_BT, tail_BT.reshape(tail_BT.shape[0], -1, *tail_BT.shape[3:])], 1)
