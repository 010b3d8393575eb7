"""Batches read ahead by threads or worker processes, with a position that fits either."""

from __future__ import annotations

import signal
import weakref
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

_AHEAD = 2  # batches that each worker process has ready


class IndexedDataset(grain.IterDataset):
    """The batches of a MapDataset in order.

    Batch i depends on i alone, so the position is a number: how many processes or threads read,
    and whether that changes from one start of a run to the next, changes no batch. (Grain's own
    position of worker processes fits only the same number of them.)

    Args:
      batches: a Grain MapDataset.
      num_threads: reading threads; 0 reads in the caller's.
      num_workers: reading processes, in place of the threads; 0 starts none.
    """

    def __init__(self, batches: grain.MapDataset, *, num_threads: int, num_workers: int):
        super().__init__(batches)
        self._batches, self._num_threads, self._num_workers = batches, num_threads, num_workers

    def __iter__(self) -> grain.DatasetIterator:
        return _Iterator(self)

    def read_from(self, index: int) -> grain.DatasetIterator:
        """Starts reading at batch `index`."""
        threads = 0 if self._num_workers else self._num_threads
        read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        dataset = self._batches[index:].to_iter_dataset(read)
        if self._num_workers:
            if not flags.FLAGS.is_parsed():  # a notebook or a test: Grain reads flags of its own
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=_AHEAD)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_leave_signals_to_the_parent)
        return iter(dataset)


def _leave_signals_to_the_parent(worker_index: int, worker_count: int) -> None:
    """Ctrl-C reaches every process of a terminal; the run still reads while it saves and leaves."""
    del worker_index, worker_count
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Iterator(grain.DatasetIterator):
    """Reading starts with the first batch asked for, so that a restored position costs nothing."""

    def __init__(self, dataset: IndexedDataset):
        super().__init__()
        self._dataset = dataset
        self._next_index = 0
        self._reader: grain.DatasetIterator | None = None
        self._stop_reader = lambda: None

    def __next__(self) -> Any:
        if self._reader is None:
            self._reader = self._dataset.read_from(self._next_index)
            # Worker processes are ended before the interpreter takes down what ending them needs.
            self._stop_reader = weakref.finalize(self, self._reader.close)
        batch = next(self._reader)
        self._next_index += 1
        return _owned(batch)

    def get_state(self) -> dict[str, int]:
        """The position, for JSON."""
        return {"next_index": self._next_index}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes on at a position that `get_state` gave."""
        self._stop_reader()
        self._reader, self._next_index = None, int(state["next_index"])

    def close(self) -> None:
        """Ends the reading threads and processes."""
        self._stop_reader()
        self._reader = None
        super().close()


def _owned(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Plain arrays in place of those in memory shared with a worker, which gets it back."""
    return {
        key: np.array(value, copy=type(value) is not np.ndarray)
        if isinstance(value, np.ndarray)
        else value
        for key, value in batch.items()
    }
