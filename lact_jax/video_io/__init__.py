"""Video files <-> uint8 frames, and pictures of them."""

from lact_jax.video_io.reading import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    VideoError,
    VideoInfo,
    probe_video,
    read_video,
    shown_size,
)
from lact_jax.video_io.writing import (
    VideoWriter,
    contact_sheet,
    open_video,
    replacing,
    write_png,
    write_video,
)

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "VideoError",
    "VideoInfo",
    "VideoWriter",
    "contact_sheet",
    "open_video",
    "probe_video",
    "read_video",
    "replacing",
    "shown_size",
    "write_png",
    "write_video",
]
