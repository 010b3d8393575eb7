"""Ctrl-C and SIGTERM: finish the step, save, leave; the second one of a kind ends at once.

    with leave_on_signal() as interrupt:
        while step < steps and not interrupt.requested:
            …
        checkpointer.save(step, …, force=True)
    sys.exit(interrupt.exit_code)

Exit codes are the shell's: 0 when nothing came, 128 + the signal's number when the run was cut
short and saved (130 for Ctrl-C, 143 for SIGTERM), so that a script or a scheduler can tell
"finished" from "run me again". A run ended by the second signal dies of that signal (the shell
shows the same number), and goes on later from its newest complete checkpoint.

In a run of several processes all poll together, and what reached one is seen by all at the same
poll, so that they save the same step and leave together.
"""

import contextlib
import os
import signal
from collections import deque
from collections.abc import Iterator
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lact_jax import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_POLLS_LATER = 2  # by then the answer is there, and reading it does not make the step wait


class Interrupt:
    """What the training loop polls. `signal` is the first that came, None before that."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        """Whether to save and leave."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal's number."""
        return 0 if self.signal is None else 128 + self.signal


class SharedInterrupt(Interrupt):
    """The interrupt of all processes. Each must read `requested` as often as the others, at the
    same places: every time is an all-reduce of one number, answered two times later.

    Args:
      own: this process's.
    """

    def __init__(self, own: Interrupt) -> None:
        super().__init__()
        self._own = own
        devices = np.asarray(jax.devices())
        self._cut = NamedSharding(Mesh(devices, ("all",)), PartitionSpec("all"))
        whole = NamedSharding(self._cut.mesh, PartitionSpec())
        self._largest = jax.jit(jnp.max, out_shardings=whole)
        self._waiting: deque[jax.Array] = deque()

    @property
    def requested(self) -> bool:
        """Whether to save and leave."""
        if self.signal is None:
            number = np.full((jax.local_device_count(),), self._own.signal or 0, np.int32)
            votes = jax.make_array_from_process_local_data(self._cut, number)
            self._waiting.append(self._largest(votes))
            if len(self._waiting) > _POLLS_LATER:
                agreed = int(self._waiting.popleft())
                self.signal = signal.Signals(agreed) if agreed else None
        return self.signal is not None


def of_all_processes(own: Interrupt) -> Interrupt:
    """The interrupt that the processes of a run poll together; of one process, its own."""
    return SharedInterrupt(own) if distributed.several() else own


@contextlib.contextmanager
def leave_on_signal() -> Iterator[Interrupt]:
    """Catches SIGINT and SIGTERM inside the block; the handlers before it return at its end.

    The second signal of a kind meets the system's default action rather than a Python handler, for
    Python runs its handlers only between bytecodes: a step that hangs in compiled code would never
    let one in. Raises ValueError outside the main thread (Python allows handlers only there).
    """
    interrupt = Interrupt()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        name = signal.Signals(number).name
        interrupt.signal = interrupt.signal or signal.Signals(number)
        # os.write: print is not safe in a handler that may have interrupted a print. A terminal
        # that is gone must not cost the checkpoint.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: saving and leaving; once more to leave at once\n".encode())

    before = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            # None stands for a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
