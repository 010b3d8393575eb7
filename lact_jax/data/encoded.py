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

from lact_jax.data import encoded_format as layout
from lact_jax.data.batch import EncodedBatch, check_clip_count, process_share
from lact_jax.data.buckets import Order
from lact_jax.data.indexed import IndexedDataset

_BATCHES = 2**31  # of a training run; none sees the end


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
      process_index, process_count: which rows of the batch of all processes this one reads.
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
    shards = _shards(path, layout.read_manifest(path), options.split)
    reader = _Reader(options, [bucket for shard in shards for bucket in shard["buckets"]])
    if options.split == "train":
        check_clip_count(path, len(reader), options.process_count)
        numbers = grain.MapDataset.range(_BATCHES)
    elif whole := reader.count_validation_batches():
        numbers = grain.MapDataset.range(whole)
    else:
        raise ValueError(
            f"{path}: {sum(shard['clips'] for shard in shards)} validation clips, fewer than the "
            f"{options.batch_size * options.process_count} of one batch; hold out more, or make "
            "data.batch_size smaller"
        )
    return IndexedDataset(
        numbers.map(reader), num_threads=options.num_threads, num_workers=options.num_workers
    )


class _Reader:
    """Number of a batch -> this process's rows of it; can be sent to a worker process.

    Args:
      options: where and how.
      buckets: of each clip; those of one batch have the same.
    """

    def __init__(self, options: Options, buckets: Sequence[int]):
        self._options = options
        self._members = [np.flatnonzero(np.equal(buckets, b)) for b in sorted(set(buckets))]
        self._open()

    def _open(self) -> None:
        import tensorflow_datasets as tfds  # over a second, which only encoded data needs

        options = self._options
        try:
            builder = tfds.builder_from_directory(options.path)
            self._source = builder.as_data_source(options.split)
        except Exception as error:  # of many kinds, and few name the file
            raise ValueError(
                f"{options.path}: dataset_info.json or features.json is missing or damaged "
                f"({type(error).__name__}: {error}); copy the data set again, or encode it again"
            ) from error
        self._order = Order(
            self._members,
            options.batch_size * options.process_count,
            options.seed if options.split == "train" else None,
        )

    def __getstate__(self) -> tuple:
        return self._options, self._members

    def __setstate__(self, state: tuple) -> None:
        self._options, self._members = state
        self._open()

    @functools.cached_property
    def _single_pass(self):
        return self._order.single_pass()

    def __len__(self) -> int:
        return sum(map(len, self._members))

    def count_validation_batches(self) -> int:
        return len(self._single_pass)

    def __call__(self, number: int) -> EncodedBatch:
        options = self._options
        if options.split == "train":
            _, draws = self._order.training_batch(int(number))
        else:
            _, draws = self._single_pass[int(number)]
        begin = options.process_index * options.batch_size
        rows = [int(draw.clip) for draw in draws[begin : begin + options.batch_size]]
        try:
            clips = self._source.__getitems__(rows)
        except RuntimeError as error:
            raise ValueError(
                f"{options.path}: clips {rows} of split {options.split!r} can't be read, their "
                f"shards are damaged ({error}); copy the data set again, or encode it again"
            ) from error
        return stack(clips, text_len=options.text_len)


def stack(clips: Sequence[Mapping[str, Any]], *, text_len: int) -> EncodedBatch:
    """Records, by `encoded_format.features`, -> a batch."""
    return EncodedBatch(
        latent=np.stack([clip["latent"].astype(np.float32) for clip in clips]),
        text=np.stack([layout.pad_text(clip["text"], text_len) for clip in clips]),
        caption=[clip["caption"].decode() for clip in clips],
        name=[clip["name"].decode() for clip in clips],
    )


def _shards(path: Path, manifest: Mapping[str, Any], split: str) -> list[dict[str, Any]]:
    """The shards of a split, in order, after a look at whether they are whole."""
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
    return splits[split]


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
    file = Path(path) / layout.read_manifest(Path(path))["empty_text"]
    try:
        return layout.pad_text(np.load(file), text_len)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file}: damaged ({error}); copy the data set again") from error


def from_config(config: Any, codec: Any, text: Any, split: str = "train") -> grain.IterDataset:
    """`make` for a run, whose config must be what the data set was encoded with.

    `data.options` stay those of the videos that were encoded: one config file serves both.
    """
    data = config.data
    if not data.path:
        raise ValueError("data.path is empty: give the folder of the encoded data set")
    check_config(Path(data.path), config, codec, text)
    batch_size, process_index, process_count = process_share(data)
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
