"""Where the numbers and pictures of a run go, all from one place."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lact_jax import flops, tensorboard_run, wandb_run
from lact_jax.config import Config
from lact_jax.run_logging import MetricsWriter, ProgressBar, write_curves

BAR = ("loss", "lr", "grad_norm")


class StepWork(NamedTuple):
    """What one step does: tokens of its sequences, FLOPs of forward and backward pass, and the
    FLOP/s of all its devices together (None where they are not known)."""

    tokens: int
    flops: int
    peak: float | None


def step_work(
    config: Config, latent_Fhw: tuple[int, int, int], devices: np.ndarray
) -> StepWork:
    """The work of a step of `config` with latents of this size, shared by `devices`."""
    clips, model, objective = config.data.batch_size, config.model, config.objective
    layout, tokens = flops.sequence_sizes(model, objective, latent_Fhw)
    done = flops.step_flops(model, objective, latent_Fhw, config.train.trainable)
    peak = flops.peak_flops(devices.flat[0].device_kind)
    return StepWork(
        clips * layout.length * tokens, clips * done, peak and peak * devices.size
    )


LatentSize = tuple[int, int, int]  # F, h, w of a batch


class Log:
    """Every step's metrics to metrics.jsonl, the curves, the progress bar, TensorBoard and wandb.

    Metrics stay on the device until `flush`, so that logging does not make the step wait.

    Args:
      config: the run. workdir: its folder. step: where it starts.
      work: of a step on latents of a size; batches may have several (`data.buckets`).
    """

    def __init__(
        self, config: Config, workdir: Path, step: int, work: Callable[[LatentSize], StepWork]
    ):
        self._train, self._workdir, self._work = config.train, workdir, work
        self._writer = MetricsWriter(workdir, step)
        self._bar = ProgressBar(config.train.steps, step)
        self._runs = [
            # First the one that may fail: nothing shall be there of a run that did not start.
            wandb_run.start_run(config.wandb, workdir, dataclasses.asdict(config)),
            tensorboard_run.start_run(config.tensorboard, workdir, step),
        ]
        self._waiting: list[tuple[int, Any, StepWork]] = []
        self._since = time.monotonic()  # what waits was done

    def push(self, step: int, metrics: Mapping[str, Any], latent_Fhw: LatentSize) -> None:
        """Takes the metrics of a step on latents of this size, as device arrays."""
        self._waiting.append((step, metrics, self._work(latent_Fhw)))
        if step % self._train.log_every == 0:
            self.flush()
        if step % self._train.plot_every == 0:
            self.flush()
            write_curves(self._workdir)

    def flush(self) -> None:
        """Writes all that waits."""
        for step, metrics in jax.device_get([waiting[:2] for waiting in self._waiting]):
            layers = metrics.pop("layers")
            row = metrics | {f"layers/{name}": value for name, value in layers.items()}
            self._writer.write(step, row)
            self._bar.update(step, {name: metrics[name] for name in BAR})
            self._log(step, row)
        if self._waiting:
            step, now = self._waiting[-1][0], time.monotonic()
            row = _rates([work for *_, work in self._waiting], max(now - self._since, 1e-9))
            self._writer.write_throughput(step, row)
            self._log(step, {f"throughput/{name}": value for name, value in row.items()})
            self._since = now
        self._waiting = []

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Writes all that waits; what the block takes does not count against steps a second."""
        self.flush()
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    @property
    def validated(self) -> int:
        """The last step that `validation` wrote a row for, 0 if there is none."""
        return self._writer.validated

    def validation(self, step: int, row: Mapping[str, Any], picture: Path) -> None:
        """A row of validation.jsonl, and its heat-map."""
        scalars = {
            f"validation/{name}": value for name, value in row.items() if np.ndim(value) < 2
        }
        self._log(step, scalars)
        self._show(step, {"validation/heat_map": picture}, {})
        # The row last: a run that dies before it validates this step again when it is resumed.
        self._writer.write_validation(step, row)

    def samples(self, step: int, sheet: Path, videos: Mapping[str, Path]) -> None:
        """A contact sheet and the clips (caption -> mp4) on it."""
        self._show(step, {"samples": sheet}, videos)

    def close(self) -> None:
        """Writes what waits, draws the curves, and closes everything, whatever of it fails."""
        with contextlib.ExitStack() as stack:  # last in, first out
            for run in reversed(self._runs):
                stack.callback(run.finish)
            stack.callback(self._writer.close)
            stack.callback(self._bar.close)
            stack.callback(write_curves, self._workdir)
            self.flush()

    def _log(self, step: int, row: Mapping[str, Any]) -> None:
        for run in self._runs:
            run.log(step, row)

    def _show(self, step: int, images: Mapping[str, Path], videos: Mapping[str, Path]) -> None:
        for run in self._runs:
            run.show(step, images, videos)


def _rates(steps: Sequence[StepWork], seconds: float) -> dict[str, float]:
    """Of so many steps in so many seconds, each with the work of its own batch."""
    flops_per_second = sum(work.flops for work in steps) / seconds
    rates = {
        "steps_per_second": len(steps) / seconds,
        "tokens_per_second": sum(work.tokens for work in steps) / seconds,
        "tflops_per_second": flops_per_second / 1e12,
    }
    peak = steps[0].peak
    return rates | ({"mfu": flops_per_second / peak} if peak else {})


class NoLog:
    """The log of a process that is not the main one: the same calls, and nothing written."""

    validated = 0

    def push(self, step: int, metrics: Mapping[str, Any], latent_Fhw: LatentSize) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def untimed(self) -> contextlib.AbstractContextManager:
        """A block like any other."""
        return contextlib.nullcontext()

    def validation(self, step: int, row: Mapping[str, Any], picture: Path) -> None:
        """Nothing."""

    def samples(self, step: int, sheet: Path, videos: Mapping[str, Path]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
