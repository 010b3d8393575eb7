"""A folder of video files with captions beside them (see `lact_jax.data.listing`).

Which clips are used: at the start every file's header is read. Files that are no video, are cut
off or too short are skipped, counted and named in one warning. Damage that only decoding finds is
warned of when it is met, and the next usable clip of the list stands in: which clip that is depends
on the files alone, so order and content of batches stay the same from run to run.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain

from lact_jax.data.batch import process_share, share_of_batches, stack_raw
from lact_jax.data.listing import Clip, enumerate_some, list_clips, usable_clips
from lact_jax.video_io import VideoError, read_video

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the clips are and how they come out.

    Attributes:
      path: the folder.
      num_frames: frames a clip, its first ones, 1 + 4k.
      height, width: in pixels, multiples of `size_multiple`; scaled to cover, centre-cropped.
      fps: rate that clips are resampled to.
      batch_size: clips a batch in this process.
      seed, shuffle: another order in every epoch, drawn from the seed; or the order of the names.
      num_threads: decoding threads; 0 decodes in the caller's.
      cache_in_memory: keep decoded clips, for folders that fit in memory.
      process_index, process_count: of all clips this process reads each process_count-th.
      split: "train" is endless, "validation" one pass in the order of the names.
      size_multiple: codec stride times patch.
      temporal_stride: of the codec.
    """

    path: str
    num_frames: int = 81
    height: int = 64
    width: int = 64
    fps: float = 16.0
    batch_size: int = 1
    seed: int = 0
    shuffle: bool = True
    num_threads: int = 4
    cache_in_memory: bool = False
    process_index: int = 0
    process_count: int = 1
    split: str = "train"
    size_multiple: int = 16
    temporal_stride: int = 4

    def __post_init__(self):
        for name in ("height", "width"):
            value, multiple = getattr(self, name), self.size_multiple
            if value < 1 or value % multiple:
                raise ValueError(
                    f"{name}={value}: must be a multiple of {multiple} (codec stride x patch), "
                    f"such as {max(1, value // multiple) * multiple}"
                )
        if self.num_frames < 1 or (self.num_frames - 1) % self.temporal_stride:
            good = 1 + max(0, self.num_frames - 1) // self.temporal_stride * self.temporal_stride
            raise ValueError(
                f"num_frames={self.num_frames}: must be 1 + {self.temporal_stride}k, such as {good}"
            )
        if self.fps <= 0 or self.batch_size < 1 or self.num_threads < 0:
            raise ValueError(
                f"fps={self.fps}, batch_size={self.batch_size}, num_threads={self.num_threads}: "
                "out of range"
            )
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index={self.process_index}: must be below process_count="
                f"{self.process_count}"
            )


def make(options: Options) -> grain.IterDataset:
    """A dataset of RawBatch.

    Raises:
      FileNotFoundError, ValueError: as `list_clips`; also where no clip can be used, or there are
        fewer than processes.
    """
    path = Path(options.path)
    clips, reasons = usable_clips(
        list_clips(path),
        num_frames=options.num_frames,
        fps=options.fps,
        num_threads=options.num_threads,
    )
    if not clips:
        raise ValueError(
            f"{path}: none of the {len(reasons)} clips can be used: {enumerate_some(reasons)}"
        )
    if reasons:
        _log.warning(
            "%s: %d of %d clips skipped: %s",
            path, len(reasons), len(reasons) + len(clips), enumerate_some(reasons),
        )  # fmt: skip
    dataset = share_of_batches(
        grain.MapDataset.source(_Decoder(clips, options)),
        stack_raw,
        split=options.split,
        batch_size=options.batch_size,
        seed=options.seed if options.shuffle else None,
        process_index=options.process_index,
        process_count=options.process_count,
        where=str(path),
    )
    threads = options.num_threads
    return dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )


class _Decoder:
    """Random access to decoded clips {frames (T, H, W, 3) uint8, caption, name}; thread-safe."""

    def __init__(self, clips: Sequence[Clip], options: Options):
        self._clips, self._options = clips, options
        self._cache: dict[int, dict[str, Any]] = {}
        self._warned: set[int] = set()

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        errors = []
        for step in range(len(self._clips)):
            place = (int(index) + step) % len(self._clips)
            try:
                return self._decoded(place)
            except VideoError as error:
                errors.append(str(error))
                if place not in self._warned:
                    self._warned.add(place)
                    _log.warning("%s; the next clip stands in for it", error)
        raise ValueError(f"none of the clips can be decoded: {enumerate_some(errors)}")

    def _decoded(self, place: int) -> dict[str, Any]:
        if place in self._cache:
            return self._cache[place]
        clip, options = self._clips[place], self._options
        frames = read_video(
            clip.file, fps=options.fps, height=options.height, width=options.width,
            num_frames=options.num_frames,
        )  # fmt: skip
        item = {"frames": frames, "caption": clip.caption, "name": clip.name}
        if options.cache_in_memory:
            self._cache[place] = item
        return item


def options_from_config(config: Any, codec: Any) -> Options:
    """The Options that a run's config asks for (without `data.options`)."""
    data = config.data
    batch_size, process_index, process_count = process_share(data.batch_size)
    return Options(
        path=data.path,
        num_frames=data.num_frames,
        height=data.height,
        width=data.width,
        fps=data.fps,
        batch_size=batch_size,
        seed=config.seed,
        num_threads=data.num_threads,
        cache_in_memory=data.cache_in_memory,
        process_index=process_index,
        process_count=process_count,
        size_multiple=codec.spatial_stride * max(config.model.patch_size[1:]),
        temporal_stride=codec.temporal_stride,
    )


def from_config(config: Any, codec: Any, text: Any, split: str = "train") -> grain.IterDataset:
    """`make` for a run; `data.options` may set shuffle. ValueError names an unknown option."""
    del text
    if split == "validation":
        raise ValueError(f"{config.data.path}: no clips are held out (data.holdout)")
    options = dict(config.data.options)
    if unknown := sorted(set(options) - {"shuffle"}):
        raise ValueError(f"data.options of 'video_folder': unknown {unknown}; it takes ['shuffle']")
    if not config.data.path:
        raise ValueError("data.path is empty: give the folder of videos")
    return make(dataclasses.replace(options_from_config(config, codec), **options))
