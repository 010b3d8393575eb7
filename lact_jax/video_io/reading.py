"""Video files and still images -> uint8 frames, as a player shows them.

Legend: T frames, H height, W width; frames are RGB `uint8` (T, H, W, 3).

Time: a file's own timestamps are believed, not its nominal rate. Frame k of a clip read at
`fps` is the picture that a player shows at k / fps seconds after the file's first picture, so
variable rates, dropped frames and other rates all come out at the right speed.

Space: pictures come out upright and with square pixels, as the file's rotation (a display matrix,
or EXIF in a still image) and its sample aspect ratio ask for. FFmpeg converts the colours, from any
bit depth. Of several streams the first video that is no cover picture is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

# Containers round timestamps (Matroska to 1 ms): a picture this little late counts as on time.
_LATE_S = Fraction(1, 1000)
_LONGEST_S = 600  # that a single picture is believed to be shown
_UNREADABLE = "can't be read as a video, it is cut off or of another type"
# AVI knows the order in which pictures are decoded and no time to show them at. They leave the
# decoder in the order of showing, and their decoding times are as evenly spaced.
_TIMESTAMP = {"avi": "dts"}
# Titles come in any encoding and nobody needs them. PyAV 19 reads them all, and dropped the option.
_ANY_TITLE = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
_DURATION_TAG = re.compile(r"(\d+):(\d+):(\d+\.\d+)")
# Quarter turns counterclockwise -> what `_orientation` returns.
_TURNS = ((False, False, False), (True, True, False), (False, True, True), (True, False, True))


class VideoError(ValueError):
    """A video file that can't be used; the message names the file and the reason."""


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a file's container says of its video stream, before anything is decoded.

    Attributes:
      path: the file.
      height, width: coded size in pixels, before any rotation the file asks for.
      duration_s: length in seconds, or None where the container doesn't say.
      still: one picture and no time, as in a PNG.
    """

    path: Path
    height: int
    width: int
    duration_s: float | None
    still: bool = False

    def num_frames(self, fps: float) -> int | None:
        """Frames that reading at `fps` gives, or None where the container doesn't say."""
        if self.still:
            return 1
        return None if self.duration_s is None else _count(Fraction(self.duration_s), fps)


def probe_video(path: os.PathLike | str) -> VideoInfo:
    """Reads the container's header and index, decoding nothing.

    Where they don't say how long the file is (a recording by a browser), its packets are read too.

    Raises:
      FileNotFoundError: no such file.
      VideoError: not a video, no video stream (an audio file), no frames, or an index that
        points past the end of the file (cut off).
    """
    path = Path(path)
    with _open(path) as (container, stream):
        _check_index(path, stream)
        duration = _duration(container, stream)
        if duration is None and not _is_still(container):
            duration = _scanned_duration(container, stream)
        return VideoInfo(
            path=path,
            height=stream.codec_context.height,
            width=stream.codec_context.width,
            duration_s=None if duration is None else float(duration),
            still=_is_still(container),
        )


def shown_size(path: os.PathLike | str) -> tuple[int, int]:
    """(height, width) of a file's pictures as they are shown: upright, with square pixels.

    Decodes the first picture, which is where a rotation is written. Errors as `read_video`.
    """
    _, height, width, _ = read_video(path, num_frames=1).shape
    return height, width


def read_video(
    path: os.PathLike | str,
    *,
    fps: float = 16.0,
    height: int | None = None,
    width: int | None = None,
    start: int = 0,
    num_frames: int | None = None,
    crop: tuple[float, float] = (0.5, 0.5),
) -> np.ndarray:
    """Decodes a clip, resampled in time, resized to cover (height, width) and cropped.

    Args:
      path: any file FFmpeg can read; a still image is a clip of one frame.
      fps: rate of the result.
      height, width: size of the result; both None keep the file's size.
      start: first frame of the result, counted at `fps`. Decoding begins at the key frame
        before it.
      num_frames: frames of the result, None for all; decoding stops at the last.
      crop: where to cut what is too much, down and to the right: 0 keeps the top (left), 1 the
        bottom (right), 0.5 the centre.

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
    size = None if height is None or width is None else (height, width)
    step = 1 / Fraction(fps)
    frames: list[np.ndarray] = []
    with _open(path) as (container, stream):
        most = 1 if _is_still(container) else num_frames
        stream.codec_context.thread_count = 1  # loaders run one clip a thread
        scaler = VideoReformatter()  # keeps its tables from frame to frame
        for shown, until in _pictures(path, container, stream, start * step):
            image = None
            while (start + len(frames)) * step + _LATE_S < until and len(frames) != most:
                if image is None:
                    image = _to_rgb(shown, scaler, _pixel_aspect(stream), size, crop)
                    size = image.shape[:2]  # some streams change theirs on the way
                frames.append(image)
            if len(frames) == most:
                break
        if most is None:
            _check_whole(path, container, stream, until)
    if len(frames) < (num_frames or 1):
        raise VideoError(
            f"{path}: {len(frames)} frames at {fps:g} fps from frame {start} on, "
            f"{num_frames or 1} asked for: the clip is too short or cut off"
        )
    return np.stack(frames)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a file and finds its video; FFmpeg's errors come out as VideoError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such video file")
    try:
        with av.open(str(path), **_ANY_TITLE) as container:
            # A song's cover picture is a video stream too, of one frame.
            streams = [s for s in container.streams.video
                       if not s.disposition & Disposition.attached_pic]
            if not streams:
                kinds = sorted({s.type for s in container.streams})
                if not kinds:
                    raise VideoError(f"{path}: {_UNREADABLE}")
                raise VideoError(
                    f"{path}: no video stream but {', '.join(kinds)}; "
                    "an audio file under a video's name?"
                )
            if streams[0].codec_context is None:
                raise VideoError(f"{path}: its video is in a codec that FFmpeg doesn't know here")
            yield container, streams[0]
    except av.FFmpegError as error:
        raise VideoError(f"{path}: {_UNREADABLE} ({error.strerror or error})") from error


def _is_still(container) -> bool:
    """Whether FFmpeg reads the file as one image (png_pipe, jpeg_pipe, …)."""
    return container.format.name.endswith("_pipe")


def _check_index(path: Path, stream: av.VideoStream) -> None:
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
    """Seconds from the first picture to the end, as far as the container says."""
    if stream.duration is not None:
        return stream.duration * stream.time_base
    # Matroska and WebM say when the file ends, counted from 0; a track's own end is a tag.
    begin = (stream.start_time or 0) * stream.time_base
    if tag := _DURATION_TAG.match(stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(Fraction, tag.groups())
        return 3600 * hours + 60 * minutes + seconds - begin
    end = container.duration
    return None if end is None else Fraction(end, av.time_base) - begin


def _scanned_duration(container, stream) -> Fraction | None:
    """Seconds from the first packet's picture to the end of the last, or None without times."""
    times = [(packet.pts, packet.duration or 0) for packet in container.demux(stream)
             if packet.pts is not None]  # fmt: skip
    if not times:
        return None
    return (max(pts + lasts for pts, lasts in times) - min(times)[0]) * stream.time_base


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
    frames = _decoded(container, stream)
    first, origin = next(frames, (None, None))
    if first is None:
        raise VideoError(f"{path}: has a video stream but no frame in it")
    frames = itertools.chain([(first, origin)], frames)
    if begin > 0 and origin is not None:
        frames = _from_key_frame(container, stream, origin, origin + begin)
    held, held_time = None, -frame_time
    for frame, stamp in frames:
        time = held_time + frame_time if stamp is None else stamp - origin
        if held is not None:
            if time - held_time > _LONGEST_S:
                raise VideoError(
                    f"{path}: a picture shown for {float(time - held_time):.0f} s; are its "
                    "timestamps damaged?"
                )
            yield held, time
        held, held_time = frame, time
    if held is not None:
        lasting = Fraction(held.duration or 0) * (held.time_base or 0) or frame_time
        yield held, held_time + min(max(lasting, 2 * _LATE_S), _LONGEST_S)


def _from_key_frame(container, stream, origin: Fraction, begin: Fraction) -> Iterator:
    """Frames from the last key frame at or before the timestamp `begin`, else from the first."""
    for target in (begin, origin):
        container.seek(math.floor(target / stream.time_base), stream=stream, backward=True)
        frames = _decoded(container, stream)
        first, stamp = next(frames, (None, None))
        if first is not None and (target == origin or (stamp or begin) <= begin):
            return itertools.chain([(first, stamp)], frames)
    return iter(())


def _decoded(container, stream) -> Iterator[tuple[av.VideoFrame, Fraction | None]]:
    """Yields (frame, its timestamp in seconds or None) from where the container stands."""
    clock = _TIMESTAMP.get(container.format.name, "pts")
    for frame in container.decode(stream):
        stamp = getattr(frame, clock)
        yield frame, None if stamp is None else stamp * frame.time_base


def _pixel_aspect(stream) -> Fraction:
    """Width over height of a pixel; 1 where the file doesn't say."""
    return Fraction(stream.sample_aspect_ratio or 1)


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How to make a picture upright: (swap its sides, then flip its rows, flip its columns).

    A display matrix [[a, b], [c, d]] puts the pixel (x, y) at (a x + c y, b x + d y).
    """
    try:
        data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    except ValueError:  # PyAV before 19 stops at kinds of side data it doesn't know, such as EXIF
        return _TURNS[round(frame.rotation / 90) % 4]
    if data is None:
        return _TURNS[0]
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5]
    return (True, b < 0, c < 0) if abs(b) > abs(a) else (False, d < 0, a < 0)


def _to_rgb(
    frame: av.VideoFrame,
    scaler: VideoReformatter,
    pixel_aspect: Fraction,
    size: tuple[int, int] | None,
    crop: tuple[float, float],
) -> np.ndarray:
    """One decoded frame -> uint8 (H, W, 3): square pixels, upright, scaled to cover, cropped."""
    swap, flip_rows, flip_columns = _orientation(frame)
    height, width = Fraction(frame.height), frame.width * pixel_aspect
    if size is not None:
        cover_height, cover_width = size[::-1] if swap else size
        scale = max(cover_height / height, cover_width / width)
        height, width = height * scale, width * scale
    image = scaler.reformat(
        frame, width=round(width), height=round(height), format="rgb24",
        interpolation=Interpolation.BICUBIC,
    ).to_ndarray()  # fmt: skip
    image = image.swapaxes(0, 1) if swap else image
    image = image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    if size is None:
        return image
    top, left = (int((image.shape[i] - size[i]) * crop[i]) for i in (0, 1))
    return image[top : top + size[0], left : left + size[1]]
