"""Datasets, one a file and one line in the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grain

from lact_jax.data import random_latents, synthetic_dataset, video_folder
from lact_jax.data.batch import SPLITS

# Name -> function of (config, codec, text encoder, split).
DATASETS: dict[str, Callable[..., grain.IterDataset]] = {
    "random": random_latents.from_config,
    "synthetic": synthetic_dataset.from_config,
    "video_folder": video_folder.from_config,
}


def make_dataset(
    name: str, config: Any, codec: Any, text: Any, split: str = "train"
) -> grain.IterDataset:
    """The dataset of that name, for the sizes in a run's config.

    Args:
      name: a key of DATASETS.
      config: `lact_jax.config.Config`; its seed and its `data` and `model` sections are read.
      codec, text: as in `lact_jax.encoders`; only their sizes are read.
      split: one of `lact_jax.data.batch.SPLITS`.

    Returns:
      A Grain dataset of this process's share of batches (see `lact_jax.data.batch`). Split "train"
      is endless and shuffled; "validation" is one pass over the clips that are held out, in a fixed
      order, whole batches of data.batch_size only (what is left over is not read).
      The iterator's `get_state()` can be saved as JSON; after `set_state` the same batches follow.

    Raises:
      ValueError: an unknown name or split, a dataset without that split, or what the dataset says
        of its folder or options.
    """
    if name not in DATASETS:
        raise ValueError(f"data.name={name!r}: unknown, choose one of {sorted(DATASETS)}")
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: unknown, choose one of {list(SPLITS)}")
    return DATASETS[name](config, codec, text, split)
