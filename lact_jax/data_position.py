"""Where a run is in its data, as a checkpoint keeps it, for any number of processes."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from lact_jax import distributed
from lact_jax.data import COUNT_BATCHES

_log = logging.getLogger(__name__)
_PARTS = "parts"


def gather(state: Mapping[str, Any], share: tuple[int, int]) -> dict[str, Any]:
    """The position of all processes, from each one's `get_state()`; every process calls this.

    Args:
      share: (index, count) of the part of a batch that this process reads.

    Returns:
      The state itself where it is the same for every part, as that of a batch's number is.
    """
    states = {index: s for index, s in distributed.from_all([share[0], state])}
    parts = [states[index] for index in range(share[1])]
    same = all(part == parts[0] for part in parts)
    return dict(parts[0]) if same else {_PARTS: parts}


def restore(
    batches: Iterator, saved: Mapping[str, Any], readers: int, step: int, name: str,
    share: tuple[int, int],
) -> None:  # fmt: skip
    """Brings a fresh iterator to where a run was.

    With another number of parts than the run had, a data set that counts batches goes on at the
    same one. Others keep positions that mean nothing to another number of processes: they are read
    anew from the beginning of their order, and the batches of all steps done are dropped. The log
    says so.

    Args:
      batches: of the data set `name`.
      saved: what `gather` returned, `readers` parts.
      step: steps done; each takes a batch.
      share: (index, count) of this process's part now.
    """
    index, count = share
    if count == readers:
        batches.set_state(saved[_PARTS][index] if _PARTS in saved else saved)
        return
    if name in COUNT_BATCHES:
        if distributed.is_main():
            _log.warning(
                "the run was saved with %d parts of a batch read apart, and goes on with %d: the "
                "data go on at batch %d, the next one, of the same order", readers, count, step,
            )  # fmt: skip
        batches.set_state(saved)
        return
    if distributed.is_main():
        _log.warning(
            "the run was saved with %d parts of a batch read apart, and goes on with %d: the "
            "position in data.name=%r does not fit these, so its data are read from the beginning "
            "of their order for this number, and %d batches are dropped; that may take a while",
            readers, count, name, step,
        )  # fmt: skip
    for _ in range(step):
        next(batches)

