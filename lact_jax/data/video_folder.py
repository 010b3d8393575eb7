"""A folder of video files with captions beside them (see `lact_jax.data.listing`).

Which clips are used: at the start every file's header is read. Files that are no video, are cut
off or too short are skipped, counted and named in one warning. Damage that only decoding finds is
warned of when it is met, and the next usable clip of the same bucket stands in: which clip that is
depends on the files alone, so order and content of batches stay the same from run to run. More
unreadable files than `max_bad_files` stop the run.

Which part of a clip is shown: its first frames and the centre, or in training a part drawn from
the seed, the epoch and the clip's name.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from lact_jax.data.batch import RawBatch, check_clip_count, process_share, stack_raw
from lact_jax.data.buckets import Draw, Order, check_buckets, nearest
from lact_jax.data.listing import (
    BadFiles,
    Clip,
    enumerate_some,
    list_clips,
    split_clips,
    usable_clips,
    warn_of_stills,
)
from lact_jax.video_io import VideoError, read_video

_log = logging.getLogger(__name__)
_BATCHES = 2**31  # of a training run; none sees the end


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the clips are and how they come out.

    Attributes:
      path: the folder.
      num_frames: frames a clip, 1 + 4k; with 1, still images are clips too.
      height, width: in pixels, multiples of `size_multiple`; scaled to cover and cropped.
      buckets: several (height, width) in place of that one (see `lact_jax.data.buckets`).
      fps: rate that clips are resampled to.
      batch_size: clips a batch in this process.
      seed, shuffle: another order in every epoch, drawn from the seed; or the order of the names.
      random_crop_time, random_crop_space: in training, another window and another part of the
        picture in every epoch; otherwise the first frames and the centre.
      num_threads: decoding threads; 0 decodes in the caller's.
      cache_in_memory: keep decoded clips, for folders that fit in memory.
      process_index, process_count: which rows of the batch of all processes this one reads.
      split: "train" is endless, "validation" one pass in the order of the names.
      holdout: clips that only "validation" shows; with 0 any split shows all.
      max_bad_files: this many unreadable files are skipped.
      size_multiple: codec stride times patch.
      temporal_stride: of the codec.
    """

    path: str
    num_frames: int = 81
    height: int = 64
    width: int = 64
    buckets: tuple[tuple[int, int], ...] = ()
    fps: float = 16.0
    batch_size: int = 1
    seed: int = 0
    shuffle: bool = True
    random_crop_time: bool = False
    random_crop_space: bool = False
    num_threads: int = 4
    cache_in_memory: bool = False
    process_index: int = 0
    process_count: int = 1
    split: str = "train"
    holdout: int = 0
    max_bad_files: int = 100
    size_multiple: int = 16
    temporal_stride: int = 4

    def __post_init__(self):
        check_buckets(self.buckets, (self.size_multiple, self.size_multiple))
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
        if self.fps <= 0 or self.batch_size < 1 or self.num_threads < 0 or self.max_bad_files < 0:
            raise ValueError(
                f"fps={self.fps}, batch_size={self.batch_size}, num_threads={self.num_threads}, "
                f"max_bad_files={self.max_bad_files}: out of range"
            )
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index={self.process_index}: must be below process_count="
                f"{self.process_count}"
            )
        if self.cache_in_memory and (self.random_crop_time or self.random_crop_space):
            raise ValueError(
                "data.cache_in_memory keeps one part of every clip, data.random_crop_time and "
                "data.random_crop_space show another in every epoch: switch either off"
            )

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each bucket."""
        return self.buckets or ((self.height, self.width),)


def make(options: Options) -> grain.IterDataset:
    """A dataset of RawBatch.

    Raises:
      FileNotFoundError, ValueError: as `list_clips`; also where no clip can be used, or there are
        too many bad files, nothing left by `holdout`, or too few clips for a validation batch.
    """
    path = Path(options.path)
    clips = list_clips(path, stills=options.num_frames == 1)
    if options.holdout:
        clips = split_clips(clips, options.holdout)[options.split]
    bad = BadFiles(path, options.max_bad_files)
    clips = _look_at(clips, options, bad)
    places = [nearest(clip.size, options.sizes) if clip.size else 0 for clip in clips]
    members = [[i for i, at in enumerate(places) if at == bucket]
               for bucket in range(len(options.sizes))]  # fmt: skip
    together = options.batch_size * options.process_count
    order = Order(members, together, options.seed if options.shuffle else None)
    decoder = _Decoder(clips, members, options, bad)
    if options.split == "train":
        check_clip_count(path, len(clips), options.process_count)
        batches = grain.MapDataset.range(_BATCHES)
        find = order.training_batch
    else:
        single_pass = order.single_pass()
        if not single_pass:
            raise ValueError(
                f"{path}: {len(clips)} validation clips don't fill a batch of {together}"
                f"{' of one bucket' if options.buckets else ''}; hold out more, or make "
                "data.batch_size smaller"
            )
        batches = grain.MapDataset.range(len(single_pass))
        find = single_pass.__getitem__
    threads = options.num_threads
    return batches.map(_reader(find, decoder, options)).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )


def _reader(find: Callable, decoder: _Decoder, options: Options) -> Callable[[int], RawBatch]:
    """Number of a batch -> this process's rows of it."""
    begin = options.process_index * options.batch_size

    def read(number: int) -> RawBatch:
        bucket, draws = find(int(number))
        rows = draws[begin : begin + options.batch_size]
        return stack_raw([decoder.decode(bucket, draw) for draw in rows])

    return read


def _look_at(clips: list[Clip], options: Options, bad: BadFiles) -> list[Clip]:
    """The clips that can be used; warns of the others, and raises where none is left."""
    path, total = Path(options.path), len(clips)
    usable, skipped = usable_clips(
        clips,
        num_frames=options.num_frames,
        fps=options.fps,
        num_threads=options.num_threads,
        sizes=len(options.sizes) > 1,
    )
    reasons = [*skipped.unreadable, *skipped.unsuitable]
    if not usable:
        named = enumerate_some(reasons)
        raise ValueError(f"{path}: none of the {total} clips can be used: {named}")
    bad.add(skipped.unreadable)
    if reasons:
        _log.warning(
            "%s: %d of %d clips skipped: %s", path, len(reasons), total, enumerate_some(reasons)
        )
    warn_of_stills(path, options.num_frames)
    return usable


class _Decoder:
    """Draws -> decoded clips {frames (T, H, W, 3) uint8, caption, name}; thread-safe."""

    def __init__(
        self, clips: Sequence[Clip], members: list[list[int]], options: Options, bad: BadFiles
    ):
        self._clips, self._members, self._options, self._bad = clips, members, options, bad
        self._rank = {clip: rank for m in members for rank, clip in enumerate(m)}
        self._cache: dict[int, dict[str, Any]] = {}

    def decode(self, bucket: int, draw: Draw) -> dict[str, Any]:
        """The clip, or the next of its bucket that can be decoded.

        Raises ValueError where none can be, or too many files are bad.
        """
        members, errors = self._members[bucket], []
        for rank in range(self._rank[draw.clip], self._rank[draw.clip] + len(members)):
            try:
                return self._decoded(bucket, Draw(members[rank % len(members)], draw.epoch))
            except (VideoError, FileNotFoundError) as error:
                errors.append(str(error))
                if self._bad.add([str(error)]):
                    _log.warning("%s; the next clip stands in for it", error)
        raise ValueError(
            f"{self._options.path}: none of the clips"
            f"{' of a bucket' if self._options.buckets else ''} can be decoded: "
            f"{enumerate_some(errors)}"
        )

    def _decoded(self, bucket: int, draw: Draw) -> dict[str, Any]:
        if draw.clip in self._cache:
            return self._cache[draw.clip]
        clip = self._clips[draw.clip]
        frames = self._frames(clip, self._options.sizes[bucket], draw.epoch)
        item = {"frames": frames, "caption": clip.caption, "name": clip.name}
        if self._options.cache_in_memory:
            self._cache[draw.clip] = item
        return item

    def _frames(self, clip: Clip, size: tuple[int, int], epoch: int) -> np.ndarray:
        options = self._options
        start, crop = 0, (0.5, 0.5)
        if options.split == "train":
            rng = np.random.default_rng((options.seed, epoch, *clip.name.encode()))
            last = max(0, (clip.length or 0) - options.num_frames)
            start = int(rng.integers(last + 1)) if options.random_crop_time else 0
            crop = tuple(rng.random(2)) if options.random_crop_space else crop
        what = {"fps": options.fps, "num_frames": options.num_frames, "crop": crop,
                "height": size[0], "width": size[1]}  # fmt: skip
        try:
            return read_video(clip.file, start=start, **what)
        except VideoError:
            if start == 0:
                raise
            # Where a container promises more than there is, the first frames still are.
            return read_video(clip.file, **what)


def options_from_config(config: Any, codec: Any) -> Options:
    """The Options that a run's config asks for (without `data.options` and `data.holdout`)."""
    data = config.data
    batch_size, process_index, process_count = process_share(data)
    same = ("path", "num_frames", "height", "width", "buckets", "fps", "random_crop_time",
            "random_crop_space", "num_threads", "cache_in_memory", "max_bad_files")  # fmt: skip
    return Options(
        **{name: getattr(data, name) for name in same},
        batch_size=batch_size,
        seed=config.seed,
        process_index=process_index,
        process_count=process_count,
        size_multiple=codec.spatial_stride * max(config.model.patch_size[1:]),
        temporal_stride=codec.temporal_stride,
    )


def from_config(config: Any, codec: Any, text: Any, split: str = "train") -> grain.IterDataset:
    """`make` for a run; `data.options` may set shuffle.

    Raises ValueError for an unknown option, no path, or validation without `data.holdout`.
    """
    del text
    data = config.data
    if not data.path:
        raise ValueError("data.path is empty: give the folder of videos")
    if split == "validation" and not data.holdout:
        raise ValueError(
            f"{data.path}: no clips are held out for validation (data.holdout=0): say how many, "
            "such as --config.data.holdout=16"
        )
    options = dict(data.options)
    if unknown := sorted(set(options) - {"shuffle"}):
        raise ValueError(f"data.options of 'video_folder': unknown {unknown}; it takes ['shuffle']")
    asked = dataclasses.replace(options_from_config(config, codec), **options)
    return make(dataclasses.replace(asked, split=split, holdout=data.holdout))
