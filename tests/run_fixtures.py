"""Whole runs of `tiny_run` for the tests: their config, their scripts, what they leave.

The runs are compiled without optimisation (compiling is most of what they cost), in the process
and in scripts started from it, so that both run the same program.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import tiny_run

from lact_jax.checkpoint import Checkpointer
from lact_jax.config import Config, parse
from lact_jax.trainer import train

ROOT = Path(__file__).resolve().parents[1]
CONFIG_FILE = ROOT / "tests" / "tiny_run.py"
SWITCH = "jax_disable_most_optimizations"


def tiny_config(data: Path | str = "", **changes) -> Config:
    """The config of `tiny_run`; changes by dotted key with "__" for the dots."""
    config = tiny_run.get_config()
    config.data.path = str(data)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return parse(config)


@contextlib.contextmanager
def quickly_compiled() -> Iterator[None]:
    before = jax.config.read(SWITCH)
    jax.config.update(SWITCH, True)
    try:
        yield
    finally:
        jax.config.update(SWITCH, before)


def quick_train(config: Config, workdir: Path, **options) -> int:
    with quickly_compiled():
        return train(config, workdir, **options)


def script_env(**more: str) -> dict[str, str]:
    """The environment of a script that shall compute what this process does."""
    return os.environ | {"PYTHONPATH": str(ROOT), SWITCH.upper(): "1"} | more


def run_script(name: str, *arguments: str, largest_file_kb: int | None = None):
    """Runs train.py, sample.py … to its end, with `tiny_run` unless --config names another.

    `largest_file_kb`: writing more than that to one file fails, as on a full disk.
    """
    given = list(arguments)
    if not any(argument.startswith("--config=") for argument in given):
        given.insert(0, f"--config={CONFIG_FILE}")
    command = [sys.executable, str(ROOT / name), *given]
    if largest_file_kb:
        command = ["bash", "-c", f'ulimit -f {largest_file_kb}; exec "$@"', "bash", *command]
    return subprocess.run(
        command, env=script_env(), cwd=ROOT, capture_output=True, text=True, check=False
    )


def restore(workdir: Path, step: int | None = None):
    """(state as nested dicts of numpy arrays, data position, meta) of a checkpoint."""
    with Checkpointer(workdir / "checkpoints", 1, None) as checkpointer:
        return checkpointer.restore(step=step)


def assert_same_bits(actual, expected) -> None:
    paths = jax.tree_util.tree_leaves_with_path(expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, want), got in zip(paths, jax.tree.leaves(actual), strict=True):
        want, got = np.asarray(want), np.asarray(got)
        assert (want.dtype, want.shape) == (got.dtype, got.shape), path
        assert want.tobytes() == got.tobytes(), path


def assert_same_end(workdir: Path, reference: Path) -> None:
    """The newest checkpoints and the metrics of two runs are equal, bit for bit."""
    assert_same_bits(restore(workdir), restore(reference))
    assert (workdir / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
