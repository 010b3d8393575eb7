"""Frames -> video files and pictures, each file whole or not at all.

Legend: T frames, H height, W width; frames are RGB `uint8` (T, H, W, 3).
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import imageio.v3 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont


@contextlib.contextmanager
def replacing(path: os.PathLike | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it takes `path`'s place in one step.

    A reader (or a process killed at any moment) sees the old file or the whole new one. On an
    error the temporary file is removed and the error goes on.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class VideoWriter:
    """Takes the frames of one video piece by piece; comes from `open_video`."""

    def __init__(self, path: Path, container: av.container.OutputContainer, fps: float,
                 options: dict[str, str]):  # fmt: skip
        self._path, self._container, self._fps, self._options = path, container, fps, options
        self._stream = None
        self.num_frames = 0

    def write(self, frames_THW3: np.ndarray) -> None:
        """Encodes uint8 (T, H, W, 3); T may be 0.

        Raises ValueError for another type or shape, an odd size, or one that changes.
        """
        frames_THW3 = np.asarray(frames_THW3)
        if frames_THW3.dtype != np.uint8 or frames_THW3.ndim != 4 or frames_THW3.shape[-1] != 3:
            raise ValueError(
                f"{self._path}: frames must be uint8 (T, H, W, 3), got "
                f"{frames_THW3.dtype} {frames_THW3.shape}"
            )
        height, width = frames_THW3.shape[1:3]
        if self._stream is None:
            self._stream = self._new_stream(height, width)
        if (height, width) != (self._stream.height, self._stream.width):
            raise ValueError(
                f"{self._path}: frames of {height}x{width} after frames of "
                f"{self._stream.height}x{self._stream.width} in one video"
            )
        for image in frames_THW3:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            self._container.mux(self._stream.encode(frame))
        self.num_frames += len(frames_THW3)

    def _new_stream(self, height: int, width: int):
        if height % 2 or width % 2 or height * width == 0:
            raise ValueError(f"{self._path}: yuv420p needs even sizes, got {height}x{width}")
        rate = Fraction(self._fps).limit_denominator(1001)
        stream = self._container.add_stream("libx264", rate=rate, options=self._options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1  # the same bytes whatever machine writes them
        return stream

    def finish(self) -> None:
        """Encodes what the codec still holds back; ValueError if there was no frame at all."""
        if not self.num_frames:
            raise ValueError(f"{self._path}: a video needs at least one frame")
        self._container.mux(self._stream.encode())


@contextlib.contextmanager
def open_video(
    path: os.PathLike | str, *, fps: float = 16.0, crf: int = 17, preset: str = "medium"
) -> Iterator[VideoWriter]:
    """A writer for an H.264 (yuv420p) mp4 that browsers play.

    Frames go to a temporary file beside `path` as they come, which takes its place at the end, all
    or nothing (`replacing`); memory does not grow with the video.

    Args:
      path: ends in .mp4; its folder is made if missing.
      fps: frames a second.
      crf: x264 quality, lower is better; 17 is visually lossless.
      preset: x264's trade of time for size.
    """
    # The index before the pictures: a browser can start at once, a cut is seen from the header.
    layout = {"movflags": "+faststart"}
    with (
        replacing(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options=layout) as container,
    ):
        writer = VideoWriter(Path(path), container, fps, {"crf": str(crf), "preset": preset})
        yield writer
        writer.finish()


def write_video(path: os.PathLike | str, frames_THW3: np.ndarray, **options: Any) -> None:
    """Writes a whole video, uint8 (T, H, W, 3); options and errors as `open_video`."""
    with open_video(path, **options) as writer:
        writer.write(frames_THW3)


def write_png(path: os.PathLike | str, image_HW3: np.ndarray) -> None:
    """Writes one uint8 (H, W, 3) picture as PNG, all or nothing."""
    with replacing(path) as temporary:
        imageio.imwrite(temporary, np.asarray(image_HW3), extension=".png")


def contact_sheet(
    clips: Sequence[np.ndarray], labels: Sequence[str], *, columns: int = 9, cell_height: int = 96
) -> np.ndarray:
    """One picture of several clips: a row a clip, `columns` frames evenly spaced, label above.

    Args:
      clips: uint8 (T, H, W, 3) each; lengths and sizes may differ.
      labels: one text a clip.
      columns: frames shown of each clip (a shorter clip shows all of its frames).
      cell_height: height in pixels that every frame is scaled to.

    Returns:
      uint8 (H, W, 3).

    Raises:
      ValueError: no clips, or another number of labels.
    """
    if not clips or len(clips) != len(labels):
        raise ValueError(f"{len(clips)} clips and {len(labels)} labels: need one label a clip")
    font = ImageFont.load_default(size=14)
    gap, title = 3, 20
    rows = []
    for clip_THW3 in clips:
        picked = np.linspace(0, len(clip_THW3) - 1, min(columns, len(clip_THW3))).round()
        cell_width = round(clip_THW3.shape[2] * cell_height / clip_THW3.shape[1])
        rows.append([
            Image.fromarray(clip_THW3[int(i)]).resize((cell_width, cell_height),
                                                      Image.Resampling.BICUBIC)
            for i in picked
        ])
    row_height = title + cell_height + gap
    sheet_width = max(gap + sum(cell.width + gap for cell in row) for row in rows)
    sheet = Image.new("RGB", (sheet_width, row_height * len(rows) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        draw.text((gap, index * row_height + 2), label, fill="black", font=font)
        left = gap
        for cell in row:
            sheet.paste(cell, (left, index * row_height + title))
            left += cell.width + gap
    return np.asarray(sheet)
