"""Runs every benchmark, each in a process of its own, and keeps the results in one file.

    python -m benchmarks.all                      # every row
    python -m benchmarks.all --rows=layer,train_all
    python -m benchmarks.table --readme=README.md # the README's table from all results

The file is benchmarks/results/DEVICE_COMMIT.json. It is written after every row; a row that is run
again at the same commit replaces what stood there, the others stay.
"""

import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

from lact_jax.planning.cards import USABLE

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SECONDS_PER_ROW = 600
# Of a card, where PyTorch needs none of it; JAX takes three quarters unless it is told.
MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(USABLE)}


class Benchmark(NamedTuple):
    """A module of this folder with its arguments; `beside_torch` where it has a --torch form."""

    module: str
    arguments: tuple[str, ...] = ()
    beside_torch: bool = False
    default: bool = True


_ALL, _SELECTIVE = "--config.train.trainable=all", "--config.model.remat=selective"
_DOTS, _UNROLLED = "--config.model.remat=dots", "--config.model.unroll_layers=True"
# Without a moving average, which leaves room for what the last layers keep more.
_NO_AVERAGE = (
    "--config.train.ema_decay=0.0",
    "--config.sample.weights=params", "--config.validation.weights=params",
)  # fmt: skip
_NINE_DOTS = "--config.model.last_layers=9", "--config.model.last_remat=dots"
_TWELVE_ALL_DOTS = "--config.model.last_layers=12", "--config.model.last_remat=all_dots"

ROWS = {
    "lact_operation": Benchmark("lact_operation", (), beside_torch=True),
    "window_attention": Benchmark("window_attention", (), beside_torch=True),
    "layer": Benchmark("layer"),
    "train_all_unrolled": Benchmark(
        "train_step", (_ALL, _SELECTIVE, _UNROLLED, *_NINE_DOTS, *_NO_AVERAGE)
    ),
    "train_attn_only_unrolled": Benchmark(
        "train_step", (_DOTS, _UNROLLED, *_TWELVE_ALL_DOTS, *_NO_AVERAGE)
    ),
    "sampling": Benchmark("sampling", ("--steps=50", "--far=120")),
    "vae": Benchmark("vae", (), beside_torch=True),
    # Only where they are named.
    "train_all": Benchmark("train_step", (_ALL, _SELECTIVE), default=False),
    "train_attn_only_dots": Benchmark("train_step", (_DOTS,), default=False),
    "train_attn_only": Benchmark("train_step", (_SELECTIVE,), default=False),
    "umt5": Benchmark("umt5", (), beside_torch=True, default=False),
    "train_all_full_remat": Benchmark("train_step", (_ALL,), default=False),
    "train_attn_only_full_remat": Benchmark("train_step", default=False),
    "train_all_xla": Benchmark(
        "train_step", (_ALL, _SELECTIVE, "--config.model.kernels=xla"), default=False
    ),
    "profile_step": Benchmark("profile_step", (_ALL, _SELECTIVE), default=False),
}

_DEFAULT = [name for name, row in ROWS.items() if row.default]
ONLY = flags.DEFINE_list("rows", _DEFAULT, f"Which to run, of: {', '.join(ROWS)}.")
OUT = flags.DEFINE_string("out", None, "The file; default: benchmarks/results/DEVICE_COMMIT.json.")
COMMIT = flags.DEFINE_string("commit", None, "What is measured; default: what git says.")
NOTE = flags.DEFINE_string("note", "random weights and inputs", "A line to keep beside them.")
SMALL = flags.DEFINE_bool("small", False, "Tiny shapes, to see that the scripts run.")


def current_commit() -> str:
    """The short name of the commit, with '-dirty' behind it where tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise ValueError(f"git can't tell the commit ({run.stderr.strip()}): give --commit=NAME")
    return run.stdout.strip()


def run_row(name: str, small: bool) -> dict:
    """Runs one row and returns its result, with the row's name; raises where it fails."""
    row = ROWS[name]
    command = [sys.executable, "-m", f"benchmarks.{row.module}", *row.arguments]
    if small:
        command.append("--small")
    elif row.beside_torch and importlib.util.find_spec("torch"):
        command.append("--torch")
    env = os.environ if "--torch" in command else MEMORY | os.environ
    run = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=SECONDS_PER_ROW,
    )  # fmt: skip
    print(run.stdout, flush=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{run.stderr[-2000:]}")
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"row": name, "measured": now, **json.loads(run.stdout.strip().splitlines()[-1])}


def keep(path: Path, commit: str, note: str, result: dict) -> None:
    """Puts one result into the file, in the place of an older one of the same row."""
    kept = json.loads(path.read_text()) if path.exists() else {"commit": commit, "runs": []}
    if kept["commit"] != commit:
        raise ValueError(f"{path} is of commit {kept['commit']}, not {commit}: name another --out")
    runs = [run for run in kept["runs"] if run["row"] != result["row"]]
    whole = {**kept, "python": platform.python_version(), "note": note, "runs": [*runs, result]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=2) + "\n")


def default_path(device: str, commit: str) -> Path:
    """benchmarks/results/DEVICE_COMMIT.json; 'NVIDIA H200' is h200."""
    name = device.removeprefix("NVIDIA ").lower().replace(" ", "-")
    return RESULTS / f"{name}_{commit}.json"


def main(_):
    if unknown := set(ONLY.value) - set(ROWS):
        names = ", ".join(sorted(unknown))
        raise app.UsageError(f"--rows: there is no {names}; choose of {', '.join(ROWS)}")
    commit, failed, begin = COMMIT.value or current_commit(), [], time.perf_counter()
    for name in ONLY.value:
        start = time.perf_counter()
        try:
            result = run_row(name, SMALL.value)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            failed.append(name)
            print(error, file=sys.stderr, flush=True)
            continue
        path = Path(OUT.value) if OUT.value else default_path(result["device"], commit)
        keep(path, commit, NOTE.value, result)
        print(f"{name}: {time.perf_counter() - start:.0f} s, kept in {path}", flush=True)
    print(f"{len(ONLY.value)} rows: {time.perf_counter() - begin:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    app.run(main)
