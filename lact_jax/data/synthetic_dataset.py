"""The embedded data: a folder of synthetic clips, written at the first start, then read."""

from __future__ import annotations

import dataclasses
from typing import Any

import grain

from lact_jax.data import video_folder
from lact_jax.data.synthetic import Settings, write_folder

DEFAULT_PATH = "runs/data/synthetic"


def make(options: video_folder.Options, settings: Settings) -> grain.IterDataset:
    """Writes the folder if it isn't there whole, and reads it as `video_folder` does.

    Args:
      options: `path` and how to read.
      settings: what to write.

    Raises:
      FileExistsError: the folder holds something else or clips of other settings.
    """
    write_folder(options.path, settings)
    return video_folder.make(options)


def from_config(config: Any, codec: Any, text: Any) -> grain.IterDataset:
    """`make` for a run; `data.options` may set clip counts, seed and split."""
    del text
    data = config.data
    options = video_folder.options_from_config(config, codec)
    options = dataclasses.replace(options, path=data.path or DEFAULT_PATH)
    known = {"num_shapes", "num_rings", "seed", "split"}
    if unknown := sorted(set(data.options) - known):
        raise ValueError(
            f"data.options of 'synthetic': unknown {unknown}; it takes {sorted(known)}"
        )
    if data.height != data.width:
        raise ValueError(
            f"data.height={data.height}, data.width={data.width}: synthetic clips are square"
        )
    settings = Settings(
        num_frames=data.num_frames,
        size=data.height,
        fps=round(data.fps),
        chunk_frames=config.objective.frames_per_chunk,
        **data.options,
    )
    return make(options, settings)
