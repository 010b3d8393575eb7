"""Whether the sizes in a config fit each other, and those that follow from them."""

import math

import numpy as np
from jax.sharding import Mesh

from lact_jax.config import Config
from lact_jax.data.buckets import check_buckets
from lact_jax.encoders import TextEncoder, VideoCodec
from lact_jax.objective import split_chunks
from lact_jax.ops.parallel import check_tokens


def latent_size(config: Config, codec: VideoCodec) -> tuple[int, int, int]:
    """Latent frames, height and width of a training clip."""
    data = config.data
    frames = 1 + (data.num_frames - 1) // codec.temporal_stride
    return frames, data.height // codec.spatial_stride, data.width // codec.spatial_stride


def latent_sizes(config: Config, codec: VideoCodec) -> list[tuple[int, int, int]]:
    """The size that clips are sampled in, and those of the buckets that they are trained in."""
    frames, height, width = latent_size(config, codec)
    stride = codec.spatial_stride
    buckets = [(frames, h // stride, w // stride) for h, w in config.data.buckets]
    return [(frames, height, width), *buckets]


def check_shares(config: Config, codec: VideoCodec, mesh: Mesh) -> None:
    """Raises ValueError unless the devices of mesh.seq can share the tokens of a chunk evenly."""
    for _, height, width in latent_sizes(config, codec):
        sizes = config.objective.frames_per_chunk, height, width
        tokens = math.prod(n // p for n, p in zip(sizes, config.model.patch_size, strict=True))
        check_tokens(tokens, mesh.shape["seq"])


def check_sizes(config: Config, codec: VideoCodec, text: TextEncoder) -> None:
    """Raises ValueError unless frames, chunks, patches, codec and text encoder fit each other."""
    data, model, frames = config.data, config.model, config.objective.frames_per_chunk
    stride, time_stride = codec.spatial_stride, codec.temporal_stride
    for side, patch in zip(("height", "width"), model.patch_size[1:], strict=True):
        size, multiple = getattr(data, side), stride * patch
        if size % multiple:
            below, above = size // multiple * multiple, (size // multiple + 1) * multiple
            raise ValueError(
                f"data.{side}={size} is not a multiple of {multiple} (codec stride {stride} x "
                f"patch {patch}): use {f'{below} or ' if below else ''}{above}"
            )
    check_buckets(data.buckets, (stride * model.patch_size[1], stride * model.patch_size[2]))
    if (data.num_frames - 1) % time_stride:
        raise ValueError(
            f"data.num_frames={data.num_frames} is not 1 + {time_stride}k: use "
            f"{1 + (data.num_frames - 1) // time_stride * time_stride}"
        )
    split_chunks(np.zeros((1, latent_size(config, codec)[0], 1, 1, 1)), frames)
    if frames % model.patch_size[0]:
        raise ValueError(
            f"objective.frames_per_chunk={frames} is not a multiple of model.patch_size[0]="
            f"{model.patch_size[0]}"
        )
    if codec.latent_channels != model.latent_channels:
        raise ValueError(
            f"model.latent_channels={model.latent_channels}, but codec {config.codec.name!r} makes "
            f"{codec.latent_channels} channels"
        )
    if text.text_dim != model.text_dim or text.text_len > model.text_len:
        raise ValueError(
            f"model.text_len={model.text_len}, model.text_dim={model.text_dim}, but text encoder "
            f"{config.text.name!r} makes {text.text_len} tokens of width {text.text_dim}"
        )
