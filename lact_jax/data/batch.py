"""What comes out of a dataset.

Legend: B clips of this process, T video frames, H, W pixels, F latent frames, h, w latent cells,
C latent channels, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

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
