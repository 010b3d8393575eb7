"""Video files <-> uint8 frames, and pictures of them.

Legend: T frames, H height, W width; frames are RGB `uint8` (T, H, W, 3).

Time: a file's own timestamps are believed, not its nominal rate. Frame k of a clip read at
`fps` is the picture that a player shows at k / fps seconds after the file's first picture, so
variable rates, dropped frames and other rates all come out at the right speed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import uuid
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import imageio.v3 as imageio
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image, ImageDraw, ImageFont

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")

# Containers round timestamps (Matroska to 1 ms): a picture this little late counts as on time.
_LATE_S = Fraction(1, 1000)
_UNREADABLE = "can't be read as a video, it is cut off or of another type"


class VideoError(ValueError):
    """A video file that can't be used; the message names the file and the reason."""


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a file's container says of its first video stream, before anything is decoded.

    Attributes:
      path: the file.
      height, width: coded size in pixels, before any rotation the file asks for.
      duration_s: length in seconds, or None where the container doesn't say.
    """

    path: Path
    height: int
    width: int
    duration_s: float | None

    def num_frames(self, fps: float) -> int | None:
        """Frames that reading at `fps` gives, or None where the container doesn't say."""
        return None if self.duration_s is None else _count(Fraction(self.duration_s), fps)


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


def probe_video(path: os.PathLike | str) -> VideoInfo:
    """Reads the container's header and index, decoding nothing.

    Raises:
      FileNotFoundError: no such file.
      VideoError: not a video, no video stream (an audio file), no frames, or an index that
        points past the end of the file (cut off).
    """
    path = Path(path)
    with _open(path) as container:
        stream = container.streams.video[0]
        _check_index(path, stream)
        duration = _duration(container, stream)
        return VideoInfo(
            path=path,
            height=stream.codec_context.height,
            width=stream.codec_context.width,
            duration_s=None if duration is None else float(duration),
        )


def read_video(
    path: os.PathLike | str,
    *,
    fps: float = 16.0,
    height: int | None = None,
    width: int | None = None,
    start: int = 0,
    num_frames: int | None = None,
) -> np.ndarray:
    """Decodes a clip, resampled in time, resized to cover (height, width) and centre-cropped.

    Args:
      path: any file FFmpeg can read.
      fps: rate of the result.
      height, width: size of the result; both None keep the file's size.
      start: first frame of the result, counted at `fps`. Decoding begins at the key frame
        before it.
      num_frames: frames of the result, None for all; decoding stops at the last.

    Returns:
      uint8 (T, H, W, 3).

    Raises:
      FileNotFoundError: no such file.
      VideoError: not a video, audio only, cut off, no frames, or fewer frames than asked for.
    """
    path = Path(path)
    if (height is None) != (width is None):
        raise ValueError(f"height={height}, width={width}: give both or neither")
    if fps <= 0 or start < 0 or (num_frames is not None and num_frames < 1):
        raise ValueError(f"fps={fps}, start={start}, num_frames={num_frames}: out of range")
    step = 1 / Fraction(fps)
    frames: list[np.ndarray] = []
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # loaders run one clip a thread
        scaler = VideoReformatter()  # keeps its tables from frame to frame
        for shown, until in _pictures(path, container, stream, start * step):
            image = None
            while (start + len(frames)) * step + _LATE_S < until and len(frames) != num_frames:
                if image is None:
                    image = _to_rgb(shown, scaler, height, width)
                frames.append(image)
            if len(frames) == num_frames:
                break
        if num_frames is None:
            _check_whole(path, container, stream, until)
    if not frames or (num_frames is not None and len(frames) < num_frames):
        wanted = 1 if num_frames is None else num_frames
        raise VideoError(
            f"{path}: {len(frames)} frames at {fps:g} fps from frame {start} on, "
            f"{wanted} asked for: the clip is too short or cut off"
        )
    return np.stack(frames)


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


@contextlib.contextmanager
def _open(path: Path) -> Iterator[av.container.InputContainer]:
    """Opens a file that has a video stream; FFmpeg's errors come out as VideoError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such video file")
    try:
        with av.open(str(path)) as container:
            # A song's cover picture is a video stream too, of one frame.
            attached = [s for s in container.streams.video
                        if s.disposition & Disposition.attached_pic]
            if len(container.streams.video) == len(attached):
                kinds = sorted({s.type for s in container.streams})
                if not kinds:
                    raise VideoError(f"{path}: {_UNREADABLE}")
                raise VideoError(
                    f"{path}: no video stream but {', '.join(kinds)}; "
                    "an audio file under a video's name?"
                )
            yield container
    except av.FFmpegError as error:
        raise VideoError(f"{path}: {_UNREADABLE} ({error.strerror or error})") from error


def _check_index(path: Path, stream: av.video.stream.VideoStream) -> None:
    entries = stream.index_entries
    if len(entries) == 0:
        return  # this container keeps no index; decoding will tell
    last = max((entries[i] for i in range(len(entries))), key=lambda entry: entry.pos)
    size = path.stat().st_size
    if last.pos + last.size > size:
        raise VideoError(
            f"{path}: cut off: its index reaches to byte {last.pos + last.size}, "
            f"the file ends at {size}"
        )


def _duration(container, stream) -> Fraction | None:
    if stream.duration is not None:
        return stream.duration * stream.time_base
    return None if container.duration is None else Fraction(container.duration, av.time_base)


def _check_whole(path: Path, container, stream, end: Fraction) -> None:
    """The container's own length against what was decoded: two frames' slack, or 0.1 s."""
    duration = _duration(container, stream)
    slack = max(2 / Fraction(stream.average_rate or 10), Fraction(1, 10))
    if duration is not None and end + slack < duration:
        raise VideoError(
            f"{path}: cut off: {float(end):.2f} s of {float(duration):.2f} s could be decoded"
        )


def _count(duration: Fraction, fps: float) -> int:
    """Frames k with k / fps before the end."""
    return max(0, math.ceil((duration - _LATE_S) * Fraction(fps)))


def _pictures(path: Path, container, stream, begin: Fraction) -> Iterator:
    """Yields (decoded frame, time until which it is shown), times counted from the first frame.

    The first pair may lie before `begin`, by up to a key frame's distance. A file's last picture
    is shown for its own duration (one step of the nominal rate if the file doesn't say).
    """
    frame_time = 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
    frames = container.decode(stream)
    first = next(frames, None)
    if first is None:
        raise VideoError(f"{path}: has a video stream but no frame in it")
    origin = _timestamp(first)
    frames = itertools.chain([first], frames)
    if begin > 0 and origin is not None:
        frames = _from_key_frame(container, stream, origin, origin + begin)
    held, held_time = None, -frame_time
    for frame in frames:
        stamp = _timestamp(frame)
        time = held_time + frame_time if stamp is None else stamp - origin
        if held is not None:
            yield held, time
        held, held_time = frame, time
    lasting = Fraction(held.duration or 0) * (held.time_base or 0)
    yield held, held_time + max(lasting or frame_time, 2 * _LATE_S)


def _from_key_frame(container, stream, origin: Fraction, begin: Fraction) -> Iterator:
    """Frames from the last key frame at or before the timestamp `begin`, else from the first."""
    for target in (begin, origin):
        container.seek(math.floor(target / stream.time_base), stream=stream, backward=True)
        frames = container.decode(stream)
        first = next(frames, None)
        if first is not None and (target == origin or (_timestamp(first) or begin) <= begin):
            return itertools.chain([first], frames)
    return iter(())


def _timestamp(frame: av.VideoFrame) -> Fraction | None:
    return None if frame.pts is None else frame.pts * frame.time_base


def _to_rgb(
    frame: av.VideoFrame, scaler: VideoReformatter, height: int | None, width: int | None
) -> np.ndarray:
    """One decoded frame -> uint8 (H, W, 3): upright, scaled to cover, centre-cropped."""
    quarter_turns = round(frame.rotation / 90) % 4
    if height is None:
        height, width = frame.height, frame.width
        scaled_height, scaled_width = height, width
    else:
        if quarter_turns % 2:  # crop as it is coded, turn afterwards
            height, width = width, height
        scale = max(Fraction(height, frame.height), Fraction(width, frame.width))
        scaled_height, scaled_width = round(frame.height * scale), round(frame.width * scale)
    image = scaler.reformat(
        frame, width=scaled_width, height=scaled_height, format="rgb24",
        interpolation=Interpolation.BICUBIC,
    ).to_ndarray()  # fmt: skip
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    return np.rot90(image[top:top + height, left:left + width], quarter_turns)
