"""What a run leaves to look at: metrics, their curves, and a progress line.

    <workdir>/metrics.jsonl      one JSON object a line: {"step": 3, "loss": 0.52, …}
    <workdir>/throughput.jsonl   the same for anything timed
    <workdir>/validation.jsonl   the same for the steps at which the run was validated
    <workdir>/loss.png           curves of loss, gradient norm and learning rate

metrics.jsonl holds no clock and no host name, and floats with all their digits: two runs that
computed the same have the same bytes. Step s is the s-th update, the one that leaves the train
state at step s; it must be written before checkpoint s is saved, since a resume from s keeps the
lines up to s. NaN and the infinities, which JSON has no numbers for, are the strings "NaN",
"Infinity" and "-Infinity"; `read_metrics` turns them back into floats.
"""

import io
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from lact_jax.workdir import write_atomically

METRICS, THROUGHPUT, VALIDATION = "metrics.jsonl", "throughput.jsonl", "validation.jsonl"
CURVES = "loss.png"
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
PANELS = {"loss": "loss", "grad_norm": "gradient norm", "lr": "learning rate"}


class MetricsWriter:
    """Appends to metrics.jsonl and its sisters, a line written whole at each call.

    Args:
      workdir: an existing folder.
      step: where the run starts: 0, or the checkpoint's step on a resume. Entries of later steps
        (written after that checkpoint) are dropped from the files, and so is a last line that a
        kill cut off.

    Raises:
      ValueError: a line before the last one is no JSON object with a step (names file and line).
    """

    def __init__(self, workdir: str | Path, step: int = 0):
        self._workdir = Path(workdir)
        self._files: dict[str, TextIO] = {}
        self._last = {METRICS: step, THROUGHPUT: step, VALIDATION: 0}
        for name in self._last:
            path = self._workdir / name
            rows = [row for row in _read_rows(path) if row["step"] <= step]
            if name == VALIDATION:
                if not path.exists():  # it comes with its first row, for most runs never
                    continue
                # The row of the step that the run resumes from may still be missing.
                self._last[name] = rows[-1]["step"] if rows else 0
            write_atomically(path, "".join(_line(row) for row in rows))
            self._open(path)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends to metrics.jsonl. Values: numbers or arrays (numpy, jax), floats of any width.

        Raises ValueError if `step` is not after the one before, or a value is no number.
        """
        self._append(METRICS, step, values)

    def write_throughput(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends to throughput.jsonl: seconds, steps a second, memory. As `write` otherwise."""
        self._append(THROUGHPUT, step, values)

    def write_validation(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends to validation.jsonl. As `write` otherwise."""
        self._append(VALIDATION, step, values)

    @property
    def validated(self) -> int:
        """The step of the last row of validation.jsonl, 0 if there is none."""
        return self._last[VALIDATION]

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()

    def _open(self, path: Path) -> None:
        # Line buffered: at a kill, at most the line being written is cut off.
        self._files[path.name] = open(path, "a", buffering=1)

    def _append(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        if step <= self._last[name]:
            raise ValueError(f"{name}: step {step} after step {self._last[name]}")
        if name not in self._files:
            self._open(self._workdir / name)
        line = _line({"step": step} | {key: _number(key, value) for key, value in values.items()})
        try:
            self._files[name].write(line)
        except OSError as err:
            raise OSError(err.errno, err.strerror, self._files[name].name) from err
        self._last[name] = step


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, floats as they were written (NaN and infinities too).

    A cut-off last line is left out. Raises FileNotFoundError, and ValueError as MetricsWriter.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no metrics at {path}: has this run written any?")
    return [{key: _decoded(value) for key, value in row.items()} for row in _read_rows(path)]


def write_curves(workdir: str | Path) -> Path:
    """Draws loss.png from metrics.jsonl, replacing the old one whole; returns its path.

    One panel each for loss, gradient norm (log scale) and learning rate: every step in a light
    colour, a running mean in a dark one, and a red mark on the axis where a value is not finite.
    """
    # Imported here: it takes half a second, and reading metrics should not need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(Path(workdir) / METRICS)
    figure = Figure(figsize=(8, 9), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(3, sharex=True), PANELS.items(), strict=True):
        present = [(row["step"], row[key]) for row in rows if key in row]
        steps, values = np.asarray(present, np.float64).reshape(-1, 2).T
        finite = np.isfinite(values)
        if key == "lr":
            axes.plot(steps[finite], values[finite], "C0")
        else:
            mean = running_mean(values[finite])
            axes.plot(steps[finite], values[finite], "C0", alpha=0.35, lw=0.8, label="each step")
            axes.plot(steps[finite], mean, "C0", lw=1.8, label="mean of the last tenth")
            axes.legend(loc="upper right")
            axes.set_yscale("log" if (values[finite] > 0).any() else "linear")
        bottom = axes.get_xaxis_transform()  # x in steps, y from 0 to 1
        axes.plot(
            steps[~finite], np.zeros((~finite).sum()), "|", color="C3", ms=14, transform=bottom
        )
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    write_atomically(Path(workdir) / CURVES, png.getvalue())
    return Path(workdir) / CURVES


def running_mean(values_N: np.ndarray) -> np.ndarray:
    """Mean of the last tenth of the points seen so far (at most 100): no lag at the start. (N,)."""
    count_N = np.arange(1, len(values_N) + 1)
    start_N = count_N - np.clip(count_N // 10, 1, 100)
    sums = np.concatenate([[0.0], np.cumsum(values_N, dtype=np.float64)])
    return (sums[count_N] - sums[start_N]) / (count_N - start_N)


class ProgressBar:
    """Loss, learning rate, gradient norm and steps/s: a bar on a terminal, lines in a log file.

    Args:
      total: the step the run ends at; `step` the one it starts from.
      seconds: pause between lines where the stream is no terminal.
      clock: seconds, for the pause (tests give their own).
    """

    def __init__(
        self,
        total: int,
        step: int = 0,
        stream: TextIO | None = None,
        seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = stream or sys.stderr
        self._seconds, self._clock = seconds, clock
        self._total, self._step = total, step
        self._shown_step, self._shown_at = step, clock()
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=step, unit="step", file=self._stream, dynamic_ncols=True
            )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the values (by name, four digits) at `step`, at most as often as is readable."""
        text = " ".join(f"{name} {float(value):.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._step)
        elif self._clock() - self._shown_at >= self._seconds or step == self._total:
            now = self._clock()
            rate = (step - self._shown_step) / max(now - self._shown_at, 1e-9)
            print(f"step {step}/{self._total} {text} {rate:.2f} steps/s", file=self._stream)
            self._stream.flush()
            self._shown_step, self._shown_at = step, now
        self._step = step

    def close(self) -> None:
        """Leaves the last state of the bar on the terminal."""
        if self._bar is not None:
            self._bar.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _number(key: str, value: Any) -> Any:
    """Python numbers (lists of them for arrays), the non-finite ones as strings."""
    array = np.asarray(value)
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise ValueError(f"metric {key} = {value!r} is no number")
    if array.dtype.kind in "biu":
        return array.tolist()
    return _encoded(array.astype(np.float64).tolist())


def _encoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows as stored; [] if there is no file; the last line is left out if it is cut off."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, TypeError, KeyError) as err:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number} is damaged ({type(err).__name__}: {err}): remove that "
                f"line, or the file, and start again"
            ) from err
        rows.append(row)
    return rows
