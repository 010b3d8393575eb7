"""A data module of one's own: squares of one colour that wander over a dark ground.

    python train.py --config=configs/tiny.py --workdir=runs/mine \\
        --config.data.module=examples.my_data

The trainer calls `get_data_module`. What it must return, and how a run that is resumed comes back
to its place in the data, is told in `lact_jax/data/data_module.py`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from lact_jax.data.batch import process_share

COLOURS = {"red": (1.0, 0.1, 0.1), "green": (0.1, 0.9, 0.2), "blue": (0.2, 0.3, 1.0)}
BATCHES = {"train": 64, "validation": 2}  # of an epoch


class Squares:
    """An epoch of batches: {"frames": float32 (B, 3, F, H, W) in [0, 1], "caption": B strings}."""

    def __init__(self, data: Any, batches: int, seed: int):
        self.data, self.batches, self.seed, self.epoch = data, batches, seed, 0
        self.clips, *_ = process_share(data)  # this process's part of a batch

    def set_epoch(self, epoch: int) -> None:
        """Told by the trainer before each epoch, so that every epoch has clips of its own."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.batches):
            rng = np.random.default_rng((self.seed, self.epoch, number))
            names = rng.choice(list(COLOURS), self.clips)
            yield {
                "frames": np.stack([self.draw(rng, COLOURS[name]) for name in names]),
                "caption": [f"a {name} square" for name in names],
            }

    def draw(self, rng: np.random.Generator, colour: tuple[float, ...]) -> np.ndarray:
        """One clip (3, F, H, W)."""
        frames, height, width = self.data.num_frames, self.data.height, self.data.width
        side = min(height, width) // 3
        clip = np.full((3, frames, height, width), 0.1, np.float32)
        begin, end = rng.random((2, 2)) * (height - side, width - side)
        for frame, way in enumerate(np.linspace(0, 1, frames)):
            top, left = (begin + way * (end - begin)).astype(int)
            clip[:, frame, top : top + side, left : left + side] = np.reshape(colour, (3, 1, 1))
        return clip


class MyData:
    """What the trainer asks for loaders."""

    def __init__(self, config: Any, data_seed: int):
        self.data, self.seed = config.data, data_seed

    def train_dataloader(self) -> Squares:
        """Batches to train on, an epoch at a time."""
        return Squares(self.data, BATCHES["train"], self.seed)

    def val_dataloader(self) -> Squares:
        """Batches to validate on; clips that training never sees."""
        return Squares(self.data, BATCHES["validation"], self.seed + 10**6)


def get_data_module(config: Any, data_seed: int) -> MyData:
    """Called by the trainer with the whole config and a seed of this process's own."""
    return MyData(config, data_seed)
