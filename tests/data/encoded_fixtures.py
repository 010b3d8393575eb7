"""What the tests of encoded data share: six clips of 9 frames at 32 x 32, and what encodes them."""

import dataclasses
from pathlib import Path

import numpy as np
from run_fixtures import tiny_config

from lact_jax.data.encoding import encode_dataset
from lact_jax.data.synthetic import Settings, write_folder
from lact_jax.encoders import make_codec

SETTINGS = Settings(num_shapes=4, num_rings=2, num_frames=9, size=32, chunk_frames=3)


class CountingCodec:
    """The demo's codec; counts the clips that it encodes, and calls `on_clip` before each."""

    temporal_stride, spatial_stride, latent_channels = 4, 8, 16

    def __init__(self, on_clip=lambda: None):
        self._codec, self._on_clip = make_codec("pca"), on_clip
        self.clips = 0

    def encode(self, frames_BTHW3):
        if frames_BTHW3.shape[1] > 5:  # otherwise it is the probe of the codec's identity
            self._on_clip()
            self.clips += len(frames_BTHW3)
        return self._codec.encode(frames_BTHW3)


class EndedText:
    """A text encoder whose captions end in a token of their own, so that '' is not zero."""

    text_len, text_dim = 4, 8

    def encode(self, captions):
        embedding_BLD = np.zeros((len(captions), 4, 8), np.float32)
        for row, caption in zip(embedding_BLD, captions, strict=True):
            length = 1 + len(caption) % 3
            seed = sum(caption.encode())
            row[:length] = np.random.default_rng(seed).standard_normal((length, 8))
        return embedding_BLD


def write_videos(folder: Path) -> Path:
    return write_folder(folder, SETTINGS)


def small_config(path="", **changes):
    return tiny_config(path, **{"data__num_frames": 9, "data__options": {}, **changes})


def encode(dst, src, *, codec=None, text=None, config=None, **options):
    """Encodes a folder in shards of two clips, two clips held out."""
    options = {"holdout": 2, "shard_size": 2} | options
    return encode_dataset(
        config or small_config(), codec or CountingCodec(), text or EndedText(),
        src=str(src), dst=dst, **options,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a data set but the lock, by name."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != ".lock"]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def replace_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
