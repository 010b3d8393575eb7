"""Videos of the kinds that are found in the wild, written with PyAV for the tests.

A clip's pictures tell what they are: the column in which a bright bar stands is the time, and the
top left corner is red.
"""

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from lact_jax.video_io import reading

HEIGHT, WIDTH, BAR = 32, 48, 4
FPS = 10  # GIF counts hundredths of a second
RED, DARK, BRIGHT = (220, 30, 30), (40, 40, 40), (220, 220, 220)
TURNS = {  # what a display matrix [[a, b], [c, d]] does to a coded picture, in NumPy
    "90 clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1, (-3, -2))),
    "90 counterclockwise": ((0, -1, 1, 0), lambda x: np.rot90(x, 1, (-3, -2))),
    "180": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2, (-3, -2))),
    "mirrored": ((-1, 0, 0, 1), lambda x: x[..., ::-1, :]),
    "transposed": ((0, 1, 1, 0), lambda x: np.swapaxes(x, -3, -2)),
}


def pictures(count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 (count, H, W, 3): the bar of picture i stands in column i % (W / 4), red above left."""
    frames = np.full((count, height, width, 3), DARK, np.uint8)
    for number, frame in enumerate(frames):
        left = BAR * (number % (width // BAR))
        frame[height // 2 :, left : left + BAR] = BRIGHT
        frame[: height // 4, : width // 4] = RED
    return frames


def times(frames: np.ndarray) -> list[int]:
    """The column in which each picture's bar stands."""
    columns = frames[:, frames.shape[1] // 2 + 2 :].astype(float).mean((1, 3))
    bars = columns[:, : columns.shape[1] // BAR * BAR].reshape(len(frames), -1, BAR).mean(2)
    return bars.argmax(1).tolist()


def write(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    fps: int = FPS,
    times_s: Sequence[float] | None = None,
    key_every: int = 12,
    pixel_aspect: Fraction | None = None,
    sound: bool = False,
    options: dict[str, str] | None = None,
) -> Path:
    """Writes uint8 (T, H, W, 3), shown at `times_s` or at a constant rate; sound comes first."""
    given = {"crf": "5", "sc_threshold": "0"} if codec == "libx264" else {}
    with av.open(str(path), "w") as container:
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        rate = 1000 if times_s is not None else fps
        stream = container.add_stream(codec, rate=rate, options=given | (options or {}))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.codec_context.gop_size = key_every
        stream.codec_context.thread_count = 1
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if times_s is not None:
                frame.pts, frame.time_base = round(times_s[number] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio:  # longer than the pictures
            seconds = len(frames) / fps + 2
            wave = np.zeros((1, int(16000 * seconds)), np.float32)
            samples = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            samples.sample_rate = 16000
            container.mux(audio.encode(samples))
            container.mux(audio.encode())
    return path


def write_turned(path: Path, frames: np.ndarray, turn: str) -> Path:
    """An mp4 with a display matrix of TURNS."""
    write(path, frames)
    data = bytearray(path.read_bytes())
    begin = data.index(b"tkhd") + 4 + 40  # of the matrix in the track's header
    (a, b, c, d), _ = TURNS[turn]
    one, height, width = 1 << 16, frames.shape[1] << 16, frames.shape[2] << 16
    moved = [max(0, -a) * width + max(0, -c) * height, max(0, -b) * width + max(0, -d) * height]
    matrix = [a * one, b * one, 0, c * one, d * one, 0, *moved, 1 << 30]
    data[begin : begin + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(data)
    return path


def write_still(path: Path, image: np.ndarray, orientation: int = 1) -> Path:
    """A PNG, JPEG or WebP of uint8 (H, W, 3), with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"lossless": True}}
    Image.fromarray(image).save(path, exif=exif.tobytes(), **how.get(path.suffix, {}))
    return path


def without_length(path: Path) -> Path:
    """Makes an mkv or webm one as a browser records it: nothing says how long it is."""
    data = path.read_bytes()
    assert data.count(b"\x44\x89\x88") == data.count(b"DURATION") == 1
    data = data.replace(b"\x44\x89\x88", b"\xec\x89\x88")  # the segment's length: now padding
    path.write_bytes(data.replace(b"DURATION", b"COMMENTS"))  # the track's
    return path


def garble(path: Path, keep: float = 0.0) -> Path:
    """Damages an mp4's pictures after a part to keep, but not its header or index."""
    data = bytearray(path.read_bytes())
    begin = data.index(b"mdat") + 4
    end = begin - 8 + int.from_bytes(data[begin - 8 : begin - 4])
    begin += int((end - begin) * keep)
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)
    return path


def mistitled(path: Path) -> Path:
    """Puts a title in no encoding that Unicode knows in place of the encoder's name."""
    data = path.read_bytes()
    assert b"Lavf" in data
    path.write_bytes(data.replace(b"Lavf", b"\xff\xe9\xec\xff"))
    return path


def note_decoded(monkeypatch) -> list:
    """The pictures that FFmpeg decodes from here on, as they come."""
    decoded, real = [], reading._decoded

    def noting(*args):
        for item in real(*args):
            decoded.append(item)
            yield item

    monkeypatch.setattr(reading, "_decoded", noting)
    return decoded


KINDS: dict[str, Callable[[Path, np.ndarray], Path]] = {
    "h264.mp4": lambda path, x: write(path, x),
    "h264_10bit.mp4": lambda path, x: write(path, x, pixels="yuv420p10le"),
    "mistitled.mp4": lambda path, x: mistitled(write(path, x)),
    "prores_10bit.mov": lambda path, x: write(path, x, codec="prores_ks", pixels="yuv422p10le"),
    "vp9.webm": lambda path, x: write(path, x, codec="libvpx-vp9", options={"cpu-used": "8"}),
    "recorded.webm": lambda path, x: without_length(
        write(path, x, codec="libvpx", options={"cpu-used": "8"})),
    "mpeg4.avi": lambda path, x: write(path, x, codec="mpeg4", options={"qscale": "2"}),
    "b_frames.avi": lambda path, x: write(path, x, options={"bf": "3"}),
    "mjpeg.avi": lambda path, x: write(path, x, codec="mjpeg", pixels="yuvj420p"),
    "plain.gif": lambda path, x: write(path, x, codec="gif", pixels="rgb8"),
    "sound.mkv": lambda path, x: write(path, x, sound=True),
    "sound.mp4": lambda path, x: write(path, x, sound=True),
}  # fmt: skip
