"""Batches of one size each from clips of several aspect ratios, in an order that is computed.

Every clip belongs to the bucket (height, width) whose aspect ratio is nearest to its own, and a
batch is filled from one bucket. Which clips make up batch g depends on g, the seed and the list of
clips alone, so the position in the data is one number, any number of threads gives the same order,
and every process finds the same bucket at the same step: all compute the batch of all processes,
from the same folder, and each decodes its own rows of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Size = tuple[int, int]


class Draw(NamedTuple):
    """A clip's place in the list, and how often the whole bucket was seen before."""

    clip: int
    epoch: int


def check_buckets(buckets: Sequence[Size], multiples: Size) -> None:
    """Raises ValueError that names the bucket unless all fit the model and differ.

    Args:
      buckets: (height, width) in pixels.
      multiples: of what height and width must be multiples: codec stride x patch.
    """
    for place, bucket in enumerate(buckets):
        for side, value, multiple in zip(("height", "width"), bucket, multiples, strict=True):
            if value < 1 or value % multiple:
                below = value // multiple * multiple
                raise ValueError(
                    f"data.buckets[{place}]={tuple(bucket)}: its {side} is not a multiple of "
                    f"{multiple} (codec stride x patch): use {f'{below} or ' if below > 0 else ''}"
                    f"{max(0, below) + multiple}"
                )
    if len(set(map(tuple, buckets))) < len(buckets):
        raise ValueError(f"data.buckets={tuple(buckets)}: names a size twice")


def nearest(size: Size, buckets: Sequence[Size]) -> int:
    """Index of the bucket nearest in aspect ratio (by its logarithm, so wide and tall alike).

    Of buckets equally near, the one nearest in area.
    """
    height, width = size

    def distance(bucket: Size) -> tuple[float, float]:
        tall, wide = bucket[0] / height, bucket[1] / width
        return round(abs(math.log(wide / tall)), 6), abs(math.log(wide * tall))

    return min(range(len(buckets)), key=lambda i: distance(buckets[i]))


class Order:
    """The batches of all processes.

    In training, buckets come up in proportion to their clips: a cycle of as many batches as there
    are clips holds, in an order of its own, as many batches of each bucket as that has clips. A
    bucket's clips go round without end, each time in another order, so every clip is seen equally
    often, and batches may reach from one epoch into the next.

    Args:
      members: the clips' places in the list, by bucket.
      batch_size: clips of a batch, over all processes.
      seed: of the order; None takes buckets and clips as they stand.
    """

    def __init__(self, members: Sequence[Sequence[int]], batch_size: int, seed: int | None):
        self._members = [list(m) for m in members]
        self._batch_size, self._seed = batch_size, seed
        self._clips = sum(map(len, members))
        self._cycle = functools.lru_cache(2)(self._new_cycle)
        self._permutation = functools.lru_cache(4 * len(members))(self._new_permutation)

    def training_batch(self, number: int) -> tuple[int, list[Draw]]:
        """(bucket, clips) of batch `number`, from 0 on without end."""
        cycle, place = divmod(number, self._clips)
        buckets, turns = self._cycle(cycle)
        bucket = int(buckets[place])
        members = self._members[bucket]
        first = (cycle * len(members) + int(turns[place])) * self._batch_size
        draws = []
        for position in range(first, first + self._batch_size):
            epoch, at = divmod(position, len(members))
            draws.append(Draw(members[self._permutation(bucket, epoch)[at]], epoch))
        return bucket, draws

    def single_pass(self) -> list[tuple[int, list[Draw]]]:
        """(bucket, clips) of every whole batch, bucket after bucket in the order of the list."""
        return [
            (bucket, [Draw(clip, 0) for clip in members[start : start + self._batch_size]])
            for bucket, members in enumerate(self._members)
            for start in range(0, len(members) - self._batch_size + 1, self._batch_size)
        ]

    def _new_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """The bucket of each batch of a cycle, and how many of that bucket's came before it."""
        counts = [len(m) for m in self._members]
        buckets = np.repeat(np.arange(len(counts)), counts)
        if self._seed is not None:
            buckets = np.random.default_rng((self._seed, 0, cycle)).permutation(buckets)
        turns = np.empty_like(buckets)
        for bucket, count in enumerate(counts):
            turns[buckets == bucket] = np.arange(count)
        return buckets, turns

    def _new_permutation(self, bucket: int, epoch: int) -> np.ndarray:
        count = len(self._members[bucket])
        if self._seed is None:
            return np.arange(count)
        return np.random.default_rng((self._seed, 1, bucket, epoch)).permutation(count)
