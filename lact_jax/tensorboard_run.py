"""TensorBoard event files under <workdir>/tensorboard: `tensorboard --logdir=WORKDIR`.

They are written by the package `tensorboard` itself, which needs no TensorFlow. A resumed run
begins another file, whose first event tells TensorBoard to forget the steps that the run computes
again.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from lact_jax.run_protocol import NoRun, Run, by_element

FOLDER = "tensorboard"


@dataclasses.dataclass(frozen=True)
class TensorboardOptions:
    """Whether to write event files."""

    enabled: bool = True


class TensorboardRun:
    """Appends to an event file of its own; a step's values are one event."""

    def __init__(self, folder: Path, step: int):
        # Imported here: it takes a third of a second, and a run without it should not need it.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(folder), flush_secs=10)
        if step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step + 1, session_log=start)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Records the values of one step; arrays as one curve an element ("name/0", …)."""
        self._add_values(step, [
            self._summary.Value(tag=name, simple_value=float(value))
            for name, value in by_element(values).items()
        ])  # fmt: skip

    def show(self, step: int, images: Mapping[str, Path], videos: Mapping[str, Path]) -> None:
        """Records pictures; TensorBoard has no player for clips."""
        del videos
        self._add_values(step, [
            self._summary.Value(tag=name, image=self._image(path)) for name, path in images.items()
        ])  # fmt: skip

    def finish(self) -> None:
        """Writes what is left."""
        self._writer.close()

    def _image(self, path: Path):
        with Image.open(path) as image:
            width, height = image.size
        return self._summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes()
        )

    def _add_values(self, step: int, values: list) -> None:
        self._add(step, summary=self._summary(value=values))

    def _add(self, step: int, **what: Any) -> None:
        self._writer.add_event(self._event(step=step, wall_time=time.time(), **what))


def start_run(options: TensorboardOptions, workdir: Path, step: int) -> Run:
    """Starts an event file for a run that is at `step` (0, or where it is resumed)."""
    return TensorboardRun(workdir / FOLDER, step) if options.enabled else NoRun()
