"""Datasets, one a file and one line in the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from lact_jax.data import (
    data_module,
    encoded,
    mixture,
    random_latents,
    synthetic_dataset,
    video_folder,
)
from lact_jax.data.batch import SPLITS

# Name -> function of (config, codec, text encoder, split).
DATASETS: dict[str, Callable[..., grain.IterDataset]] = {
    "encoded": encoded.from_config,
    "mixture": lambda *args: mixture.from_config(make_dataset, *args),
    "module": data_module.from_config,
    "random": random_latents.from_config,
    "synthetic": synthetic_dataset.from_config,
    "video_folder": video_folder.from_config,
}

# Those whose position is a number of batches of the whole run: it fits any number of processes.
COUNT_BATCHES = {"encoded", "random", "synthetic", "video_folder"}


def make_dataset(
    name: str, config: Any, codec: Any, text: Any, split: str = "train"
) -> grain.IterDataset:
    """The dataset of that name, for the sizes in a run's config.

    Args:
      name: a key of DATASETS.
      config: `lact_jax.config.Config`; its seed and its `data` and `model` sections are read.
      codec, text: as in `lact_jax.encoders`; "encoded" compares them with those of the data set,
        others read their sizes.
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


def empty_text(name: str, config: Any, text: Any) -> np.ndarray:
    """The empty caption's embedding, float32 (text_len, text_dim).

    Out of an encoded data set, where the run has one: a text encoder of gigabytes is not loaded
    for a single caption.

    Args:
      name, config, text: as for `make_dataset`.
    """
    if name == "encoded":
        return encoded.empty_text(config.data.path, text.text_len)
    if name == "mixture":
        for _, section in mixture.parts(config.data).values():
            if section.name == "encoded":
                return encoded.empty_text(section.path, text.text_len)
    return np.asarray(text.encode([""])[0], np.float32)
