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


def process_share(data: Any) -> tuple[int, int, int]:
    """(clips of a batch that this process reads, which part of it they are, number of parts).

    Args:
      data: a config's `data` section.

    Raises ValueError unless the batch divides by the parts.
    """
    index, count = data.share or (jax.process_index(), jax.process_count())
    if data.batch_size % count:
        raise ValueError(
            f"data.batch_size={data.batch_size}: must be a multiple of {count}, as so many "
            "processes read different clips of it"
        )
    return data.batch_size // count, index, count


def check_clip_count(path: Any, clips: int, count: int) -> None:
    """Raises ValueError where `count` processes read different clips of fewer."""
    if clips < count:
        raise ValueError(
            f"{path}: {clips} clips, but {count} processes read different ones: use at most so "
            "many processes, or add clips"
        )
