"""Random latents and embeddings of the configured shapes, to debug a run without any data."""

from __future__ import annotations

import dataclasses
from typing import Any

import grain
import numpy as np

from lact_jax.data.batch import EncodedBatch, process_share

# Batches of one epoch: no training run sees the end.
_BATCHES = {"train": 2**31, "validation": 4}


@dataclasses.dataclass(frozen=True)
class Options:
    """Shapes of the batches.

    Attributes:
      batch_size: clips a batch in this process.
      latent_shape: (F, h, w, C) of one clip.
      text_shape: (L, D) of one clip.
      seed: batch i is drawn from (seed, process_index, i), in validation from other numbers.
      num_threads: drawing threads; 0 draws in the caller's.
      process_index: of this process.
      split: "train" never ends, "validation" is four batches.
    """

    batch_size: int
    latent_shape: tuple[int, int, int, int]
    text_shape: tuple[int, int]
    seed: int = 0
    num_threads: int = 1
    process_index: int = 0
    split: str = "train"


def make(options: Options) -> grain.IterDataset:
    """A dataset of normal EncodedBatch: other numbers in every batch."""
    words = (options.seed, options.process_index)

    def draw(index: int) -> EncodedBatch:
        split = () if options.split == "train" else tuple(options.split.encode())
        rng = np.random.default_rng((*words, index, *split))
        latent = rng.standard_normal((options.batch_size, *options.latent_shape), np.float32)
        text = rng.standard_normal((options.batch_size, *options.text_shape), np.float32)
        return EncodedBatch(latent=latent, text=text)

    read = grain.ReadOptions(
        num_threads=options.num_threads, prefetch_buffer_size=2 * options.num_threads
    )
    return grain.MapDataset.range(_BATCHES[options.split]).map(draw).to_iter_dataset(read)


def from_config(config: Any, codec: Any, text: Any, split: str = "train") -> grain.IterDataset:
    """`make` with the shapes that the codec and the text encoder would give; no data is read."""
    data = config.data
    batch_size, process_index, _ = process_share(data)
    stride = codec.spatial_stride
    return make(Options(
        batch_size=batch_size,
        latent_shape=(
            1 + (data.num_frames - 1) // codec.temporal_stride,
            data.height // stride,
            data.width // stride,
            codec.latent_channels,
        ),
        text_shape=(text.text_len, text.text_dim),
        seed=config.seed,
        process_index=process_index,
        split=split,
    ))  # fmt: skip
