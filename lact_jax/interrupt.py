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
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
