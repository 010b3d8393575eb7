"""Which clips go into an encoded data set, and into which shard each goes.

All of it depends on names and settings alone: any process, at any time, finds the same shards.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lact_jax.data import synthetic_dataset
from lact_jax.data.listing import Clip, list_clips, split_clips, warn_of_stills


@dataclasses.dataclass(frozen=True)
class Shard:
    """The clips of one file, some of which may turn out to be of no use."""

    split: str
    index: int
    clips: tuple[Clip, ...]

    @property
    def name(self) -> str:
        """Of its files, while others are missing."""
        return f"{self.split}-{self.index:05d}"


def find_clips(config: Any, codec: Any, src: str | None, holdout: int) -> dict[str, list[Clip]]:
    """The clips of each split, sorted by name; those of a folder with or without caption.

    Args:
      config: `lact_jax.config.Config`.
      codec: as in `lact_jax.encoders`.
      src: a folder of videos with captions; None for the data set that the config names.
      holdout: clips of the folder for validation.

    Raises:
      ValueError: a data set that has no videos.
      FileNotFoundError, ValueError: as `list_clips` and `split_clips`.
    """
    data = config.data
    if src is None and data.name == "synthetic":
        if holdout:
            raise ValueError(
                f"--holdout={holdout}: the synthetic data set has validation clips of its own; "
                "data.options.num_validation_shapes and num_validation_rings say how many"
            )
        folders = synthetic_dataset.write_folders(config, codec)
        return {split: list_clips(Path(path)) for split, path in folders.items()}
    if src is None and (data.name != "video_folder" or not data.path):
        raise ValueError(
            f"nothing to encode: give --src=VIDEOS (data.name={data.name!r}, data.path="
            f"{data.path!r} is neither a folder of videos nor the synthetic data set)"
        )
    folder = Path(src or data.path)
    clips = list_clips(folder, stills=data.num_frames == 1, uncaptioned=True)
    warn_of_stills(folder, data.num_frames)
    return split_clips(clips, holdout)


def cut_shards(clips: Mapping[str, Sequence[Clip]], shard_size: int) -> list[Shard]:
    """`shard_size` clips a shard, in order; ValueError unless that is positive."""
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size}: must be at least 1")
    return [
        Shard(split, index, tuple(members[start : start + shard_size]))
        for split, members in clips.items()
        for index, start in enumerate(range(0, len(members), shard_size))
    ]


def fingerprint(clips: Mapping[str, Sequence[Clip]]) -> str:
    """Changes with any name, caption or split of a clip."""
    digest = hashlib.sha256()
    for split, members in clips.items():
        for clip in members:
            caption = "\n" if clip.caption is None else clip.caption  # a caption is one line
            digest.update(f"{split}\0{clip.name}\0{caption}\0".encode())
    return digest.hexdigest()
