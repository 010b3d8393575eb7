"""The first signal asks, the second ends.

Run as a script it is a training loop: `python test_interrupt.py polls|hangs`.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lact_jax.interrupt import leave_on_signal

ROOT = Path(__file__).resolve().parents[1]
CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


def start(mode: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__)), mode],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "training\n"
    return process


@pytest.mark.parametrize(("number", "code"), CODES)
def test_the_first_signal_sets_the_flag_and_the_exit_code(number, code):
    before = signal.getsignal(number)
    with leave_on_signal() as interrupt:
        assert not interrupt.requested and interrupt.exit_code == 0
        signal.raise_signal(number)
        assert interrupt.requested and interrupt.signal is number
        assert interrupt.exit_code == code
        assert signal.getsignal(number) is signal.SIG_DFL
    assert signal.getsignal(number) is before


def test_another_kind_of_signal_after_the_first_changes_nothing():
    with leave_on_signal() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert interrupt.exit_code == 143


def test_handlers_come_back_after_an_error():
    before = [signal.getsignal(number) for number, _ in CODES]
    with pytest.raises(RuntimeError, match="step failed"):
        with leave_on_signal():
            raise RuntimeError("step failed")
    assert [signal.getsignal(number) for number, _ in CODES] == before


def test_a_closed_terminal_does_not_cost_the_checkpoint(monkeypatch):
    def broken(_descriptor, _data):
        raise BrokenPipeError

    with leave_on_signal() as interrupt:
        monkeypatch.setattr(os, "write", broken)
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested


def test_outside_the_main_thread_it_says_so():
    errors = []

    def use():
        try:
            with leave_on_signal():
                errors.append(None)
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "main thread" in errors[0]


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_process_saves_and_leaves_with_the_code(number, code):
    process = start("polls")
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == code
    assert output == "saved\n"
    assert f"{number.name}: saving and leaving" in errors


def test_the_second_ctrl_c_ends_a_hanging_process():
    process = start("hangs")
    process.send_signal(signal.SIGINT)
    assert "once more" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGINT
    assert output == ""


def _train(mode: str) -> None:
    with leave_on_signal() as interrupt:
        print("training", flush=True)
        while mode == "hangs" or not interrupt.requested:
            time.sleep(0.01)
        print("saved", flush=True)
    sys.exit(interrupt.exit_code)


if __name__ == "__main__":
    _train(sys.argv[1])
