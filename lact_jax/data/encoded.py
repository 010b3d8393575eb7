"""An encoded data set (see `encoded_format`), as `python encode_dataset.py` writes it.

Legend: B clips of this process, F latent frames, h, w latent cells, C latent channels, L text
tokens, D text width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

from lact_jax.data import encoded_format as layout
from lact_jax.data.batch import EncodedBatch, process_share, share_of_batches
from lact_jax.data.indexed import IndexedDataset


@dataclasses.dataclass(frozen=True)
class Options:
    """Which clips, and how they come out.

    Attributes:
      path: the data set's folder.
      text_len: tokens that text embeddings are padded to.
      split: "train" is endless, in another order in every epoch; "validation" is one pass.
      batch_size: clips a batch in this process.
      seed: of the order.
      num_threads, num_workers: reading threads, or processes in place of them.
      process_index, process_count: of all clips this process reads each process_count-th.
    """

    path: str
    text_len: int
    split: str = "train"
    batch_size: int = 1
    seed: int = 0
    num_threads: int = 1
    num_workers: int = 0
    process_index: int = 0
    process_count: int = 1


def make(options: Options) -> grain.IterDataset:
    """A dataset of EncodedBatch.

    Raises:
      FileNotFoundError: no finished data set there, or a shard is missing.
      ValueError: another version, a shard that is cut off, no such split, or too few clips.
    """
    path = Path(options.path)
    _check_shards(path, layout.read_manifest(path), options.split)
    source = tfds.builder_from_directory(path).as_data_source(options.split)
    batches = share_of_batches(
        grain.MapDataset.source(source),
        functools.partial(stack, text_len=options.text_len),
        split=options.split,
        batch_size=options.batch_size,
        seed=options.seed,
        process_index=options.process_index,
        process_count=options.process_count,
        where=str(path),
    )
    return IndexedDataset(batches, num_threads=options.num_threads, num_workers=options.num_workers)


def stack(clips: Sequence[Mapping[str, Any]], *, text_len: int) -> EncodedBatch:
    """Records, by `encoded_format.features`, -> a batch."""
    return EncodedBatch(
        latent=np.stack([clip["latent"].astype(np.float32) for clip in clips]),
        text=np.stack([layout.pad_text(clip["text"], text_len) for clip in clips]),
        caption=[clip["caption"].decode() for clip in clips],
        name=[clip["name"].decode() for clip in clips],
    )


def _check_shards(path: Path, manifest: Mapping[str, Any], split: str) -> None:
    splits = manifest["splits"]
    if split not in splits:
        hint = "; encode the videos with --holdout=N" if split == "validation" else ""
        raise ValueError(f"{path}: has no split {split!r}, only {sorted(splits)}{hint}")
    for shard in splits[split]:
        file = path / shard["file"]
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing; copy the data set again, or encode it again")
        if (found := file.stat().st_size) != shard["bytes"]:
            raise ValueError(
                f"{file}: {found} bytes, {shard['bytes']} when it was written; copy the data set "
                "again, or encode it again"
            )


def check_config(path: Path, config: Any, codec: Any, text: Any) -> None:
    """Raises ValueError that lists all in which a config differs from what a data set was made by.

    Args:
      path: the data set's folder.
      config: `lact_jax.config.Config`.
      codec, text: as in `lact_jax.encoders`.
    """
    manifest = layout.read_manifest(path)
    lines = layout.differences(manifest, layout.describe(config, codec, text))
    frames, chunk = manifest["clip"]["num_frames"], config.objective.frames_per_chunk
    latent_frames = 1 + (frames - 1) // manifest["codec"]["temporal_stride"]
    if latent_frames % chunk:
        lines.append(
            f"objective.frames_per_chunk: {latent_frames} latent frames there are not whole chunks "
            f"of {chunk}"
        )
    if lines:
        raise ValueError(
            f"{path}: was encoded for another config:\n  "
            + "\n  ".join(lines)
            + "\nTrain with the config it was encoded with, or encode the videos with this one: "
            "python encode_dataset.py --config=CONFIG --src=VIDEOS --dst=ANOTHER"
        )


def empty_text(path: str, text_len: int) -> np.ndarray:
    """The empty caption's embedding that a data set keeps: float32 (L, D)."""
    folder = Path(path)
    return layout.pad_text(np.load(folder / layout.read_manifest(folder)["empty_text"]), text_len)


def from_config(config: Any, codec: Any, text: Any, split: str = "train") -> grain.IterDataset:
    """`make` for a run, whose config must be what the data set was encoded with.

    `data.options` stay those of the videos that were encoded: one config file serves both.
    """
    data = config.data
    if not data.path:
        raise ValueError("data.path is empty: give the folder of the encoded data set")
    check_config(Path(data.path), config, codec, text)
    batch_size, process_index, process_count = process_share(data.batch_size)
    return make(Options(
        path=data.path,
        text_len=text.text_len,
        split=split,
        batch_size=batch_size,
        seed=config.seed,
        num_threads=data.num_threads,
        num_workers=data.num_workers,
        process_index=process_index,
        process_count=process_count,
    ))  # fmt: skip
