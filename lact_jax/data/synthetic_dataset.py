"""The embedded data: a folder of synthetic clips, written at the first start, then read.

The validation clips lie in the folder's `.validation`, which the training clips' reader passes
over; they are drawn from other seeds, and written when they are first asked for.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import grain

from lact_jax import distributed
from lact_jax.data import video_folder
from lact_jax.data.synthetic import SPLITS, Settings, write_folder

DEFAULT_PATH = "runs/data/synthetic"
VALIDATION = ".validation"
_VALIDATION_CLIPS = {"num_validation_shapes": 16, "num_validation_rings": 16}


def make(options: video_folder.Options, settings: Settings) -> grain.IterDataset:
    """Writes the folder if it isn't there whole, and reads it as `video_folder` does.

    Args:
      options: `path` and how to read.
      settings: what to write.

    Raises:
      FileExistsError: the folder holds something else or clips of other settings.
    """
    with distributed.main_first("synthetic data"):
        write_folder(options.path, settings)
    return video_folder.make(options)


def folders(config: Any, codec: Any) -> dict[str, tuple[video_folder.Options, Settings]]:
    """For each split, how to read its folder and what to write into it.

    `data.options` may set clip counts of both splits, seed and split.

    Raises ValueError for an unknown option, or sizes that are not square.
    """
    data = config.data
    known = {"num_shapes", "num_rings", "seed", "split", *_VALIDATION_CLIPS}
    if unknown := sorted(set(data.options) - known):
        raise ValueError(
            f"data.options of 'synthetic': unknown {unknown}; it takes {sorted(known)}"
        )
    if data.height != data.width:
        raise ValueError(
            f"data.height={data.height}, data.width={data.width}: synthetic clips are square"
        )
    counts = _VALIDATION_CLIPS | data.options
    held_out = {f"num_{name}": counts.pop(f"num_validation_{name}") for name in ("shapes", "rings")}
    settings = Settings(
        num_frames=data.num_frames,
        size=data.height,
        fps=round(data.fps),
        chunk_frames=config.objective.frames_per_chunk,
        **counts,
    )
    other = SPLITS[1 - SPLITS.index(settings.split)]
    path = Path(data.path or DEFAULT_PATH)
    options = dataclasses.replace(
        video_folder.options_from_config(config, codec), path=str(path), split="train"
    )
    return {
        "train": (options, settings),
        "validation": (
            dataclasses.replace(options, path=str(path / VALIDATION), split="validation"),
            dataclasses.replace(settings, split=other, **held_out),
        ),
    }


def write_folders(config: Any, codec: Any) -> dict[str, str]:
    """Writes the clips of both splits where they aren't there; returns their folders."""
    found = folders(config, codec)
    for options, settings in found.values():
        write_folder(options.path, settings)
    return {split: options.path for split, (options, _) in found.items()}


def from_config(config: Any, codec: Any, text: Any, split: str = "train") -> grain.IterDataset:
    """`make` for a run; raises as `folders`."""
    del text
    return make(*folders(config, codec)[split])
