"""What comes out of a dataset.

Legend: B clips of this process, T video frames, H, W pixels, F latent frames, h, w latent cells,
C latent channels, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import grain
import jax
import numpy as np

SPLITS = ("train", "validation")


class RawBatch(TypedDict):
    """Clips as they are watched and read: encoded by the trainer."""

    frames: np.ndarray  # uint8 (B, T, H, W, 3)
    caption: list[str]
    name: list[str]  # of the files, for messages


class EncodedBatch(TypedDict):
    """Clips as the model sees them."""

    latent: np.ndarray  # float32 (B, F, h, w, C)
    text: np.ndarray  # float32 (B, L, D), zero after each text's end
    caption: NotRequired[list[str]]
    name: NotRequired[list[str]]


def stack_raw(clips: Sequence[Mapping[str, Any]]) -> RawBatch:
    """Single clips {frames (T, H, W, 3), caption, name} -> a batch."""
    return RawBatch(
        frames=np.stack([clip["frames"] for clip in clips]),
        caption=[clip["caption"] for clip in clips],
        name=[clip["name"] for clip in clips],
    )


def process_share(batch_size: int) -> tuple[int, int, int]:
    """(clips of a batch in this process, its index, number of processes).

    Raises ValueError unless the batch divides by the processes.
    """
    index, count = jax.process_index(), jax.process_count()
    if batch_size % count:
        raise ValueError(
            f"data.batch_size={batch_size}: must be a multiple of the {count} processes"
        )
    return batch_size // count, index, count


def share_of_batches(
    clips: grain.MapDataset,
    batch_fn: Callable[[Sequence[Any]], Any],
    *,
    split: str,
    batch_size: int,
    seed: int | None,
    process_index: int,
    process_count: int,
    where: str,
) -> grain.MapDataset:
    """Single clips -> the batches of one process, in the order that a split asks for.

    Args:
      clips: all clips of the split, the same in every process.
      batch_fn: makes a batch of a list of clips.
      split: "train" goes round for ever; "validation" is one pass of whole batches, in the order
        of `clips`.
      batch_size: clips a batch in this process.
      seed: of the training order, another one in every epoch; None keeps the order of `clips`.
      process_index, process_count: of every process_count clips this process takes one.
      where: the data set, for messages.

    Raises:
      ValueError: fewer clips than processes, or for validation than one batch of all processes.
    """
    together = batch_size * process_count
    if split == "validation" and len(clips) < together:
        raise ValueError(
            f"{where}: {len(clips)} validation clips, fewer than the {together} of one batch; hold "
            "out more, or make data.batch_size smaller"
        )
    if len(clips) < process_count:
        raise ValueError(
            f"{where}: {len(clips)} usable clips for {process_count} processes; "
            "each needs at least one"
        )
    if split == "validation":
        clips = clips[: len(clips) // together * together]
    elif seed is not None:
        clips = clips.shuffle(seed)
    if process_count > 1:
        clips = clips[process_index::process_count]
    if split == "train":
        clips = clips.repeat()
    return clips.batch(batch_size, drop_remainder=True, batch_fn=batch_fn)
