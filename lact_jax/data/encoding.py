"""Encodes a folder of videos once, shard by shard, into what `encoded` reads.

Each process takes every process_count-th shard. A shard takes its name when all its clips are
encoded, and its report, which says what is in it, is written after it; a run that was killed goes
on with the first shard that has no report. The process that finds the reports of all shards makes
the data set of them (see `encoding_merge`). Clips are encoded one at a time, so that the result is
the same, bit for bit, however the work is divided.

Clips that can't be used are skipped, counted and named with the reason: videos without a caption,
too short ones, files that can't be read. More than `data.max_bad_files` of the last end the work:
then it is more likely a disk that is broken. Finished shards stay, and a larger limit goes on.

Legend: T frames, F latent frames, h, w latent cells, C latent channels, L text tokens, D text
width.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tqdm import tqdm

from lact_jax.data import encoded_format as layout
from lact_jax.data.buckets import nearest
from lact_jax.data.encoding_merge import merge, record_file, report_file, unreadable
from lact_jax.data.encoding_source import Shard, cut_shards, find_clips, fingerprint
from lact_jax.data.listing import BadFiles, Clip, UnsuitableError, look_at
from lact_jax.video_io import VideoError, read_video, replacing

PLAN = "plan.json"
SHARD_SIZE = 64
_CAPTIONS_KEPT = 1024  # embeddings of the last captions, for clips that share them


def encode_dataset(
    config: Any,
    codec: Any,
    text: Any,
    *,
    dst: str | os.PathLike,
    src: str | None = None,
    holdout: int = 0,
    shard_size: int = SHARD_SIZE,
    process_index: int = 0,
    process_count: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Encodes this process's share of the shards that are missing, and merges if it is the last.

    Args:
      config: `lact_jax.config.Config`; `data` says how clips are read.
      codec, text: as in `lact_jax.encoders`.
      dst: the data set's folder; made if missing, gone on with if it was begun.
      src: a folder of videos with captions; None for the data set that the config names.
      holdout: clips of the folder that make the validation split, chosen by hashes of their names.
      shard_size: clips a file.
      process_index, process_count: of this process among those that encode together.
      stop: asked before each clip; once it is true, the work ends, and finished shards stay.

    Returns:
      The summary of the finished data set, or None while shards are missing: this run was
      stopped, or other processes have not finished theirs.

    Raises:
      FileExistsError: dst holds something else, or was begun with other settings or videos (every
        difference is listed).
      FileNotFoundError, ValueError: the videos can't be listed, none of them can be used, or more
        than `data.max_bad_files` can't be read.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index}: must be from 0 to below {process_count}")
    dst = Path(dst)
    clips = find_clips(config, codec, src, holdout)
    shards = cut_shards(clips, shard_size)
    plan = {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        **layout.describe(config, codec, text),
        "source": {
            "clips": {split: len(members) for split, members in clips.items()},
            "fingerprint": fingerprint(clips),
            "shard_size": shard_size,
        },
    }
    bad = BadFiles(Path(src or config.data.path), config.data.max_bad_files)
    if _begin(dst, plan):
        work = dst / layout.UNFINISHED
        mine = [
            s for s in shards[process_index::process_count] if not report_file(work, s).exists()
        ]
        bad.add(unreadable(work, shards))
        clips = [clip for shard in mine for clip in shard.clips]
        outcomes = _outcomes(clips, config.data, _Encoder(config, codec, text), bad)
        _encode_shards(work, mine, outcomes, process_index, stop)
    if stop():
        return None
    return merge(dst, plan, shards, text, bad)


def _begin(dst: Path, plan: dict[str, Any]) -> bool:
    """Whether there is anything to encode; FileExistsError if dst is not for this plan."""
    finished, begun = dst / layout.MANIFEST, dst / layout.UNFINISHED / PLAN
    found = next((path for path in (finished, begun) if path.exists()), None)
    if found is None:
        if dst.is_dir() and (strangers := [p.name for p in dst.iterdir() if p.name[0] != "."]):
            raise FileExistsError(
                f"{dst}: holds files ({', '.join(sorted(strangers)[:3])}, …) but no data set that "
                "was begun here; give another folder"
            )
        with replacing(begun) as temporary:
            temporary.write_text(json.dumps(plan, indent=1) + "\n")
        return True
    if lines := layout.differences(layout.read_json(found), plan):
        raise FileExistsError(
            f"{dst}: was encoded with other settings or other videos:\n  "
            + "\n  ".join(lines)
            + "\nGive the settings it was begun with, or another --dst"
        )
    return found == begun


class _Encoder:
    """Frames and a caption -> a serialised record."""

    def __init__(self, config: Any, codec: Any, text: Any):
        self._fps, self._codec = config.data.fps, codec
        self._features = layout.features(codec.latent_channels, text.text_dim)
        self._serializer = tfds.core.ExampleSerializer(self._features.get_serialized_info())
        self._text = functools.lru_cache(_CAPTIONS_KEPT)(
            lambda caption: layout.cut_text(np.asarray(text.encode([caption])[0], np.float32))
        )

    def __call__(self, clip: Clip, frames_THW3: np.ndarray) -> bytes | None:
        """None where the latent is not finite."""
        latent_FhwC = np.asarray(self._codec.encode(frames_THW3[None])[0], np.float32)
        if not np.isfinite(latent_FhwC).all():
            return None
        time, height, width, _ = frames_THW3.shape
        example = self._features.encode_example({
            "latent": latent_FhwC.astype(ml_dtypes.bfloat16),
            "text": self._text(clip.caption),
            "caption": clip.caption,
            "name": clip.name,
            "fps": self._fps,
            "size": np.array([height, width, time], np.int32),
        })  # fmt: skip
        # TFDS itself writes a record's fields in another order in every process.
        return self._serializer.get_tf_example(example).SerializeToString(deterministic=True)


def _encode_shards(
    work: Path,
    shards: list[Shard],
    outcomes: Iterator[_Outcome],
    process_index: int,
    stop: Callable[[], bool],
) -> None:
    """Writes what became of the shards' clips until all are written or `stop()`."""
    for leftover in work.glob(f".writing-{process_index}-*"):  # of a run that was killed
        leftover.unlink()
    total = sum(len(shard.clips) for shard in shards)
    with tqdm(total=total, unit="clip", desc="encoding") as bar:
        for shard in shards:
            temporary = work / f".writing-{process_index}-{shard.name}"
            report = _write_shard(temporary, len(shard.clips), outcomes, stop, bar)
            if report is None:
                temporary.unlink()
                return
            os.replace(temporary, record_file(work, shard))
            with replacing(report_file(work, shard)) as file:
                file.write_text(json.dumps(report) + "\n")


class _Outcome(NamedTuple):
    """What became of a clip: its record and size bucket, or the reason why it has none."""

    name: str
    record: bytes | None = None
    bucket: int = 0
    reason: str = ""
    readable: bool = True


class _Decoded(NamedTuple):
    frames_THW3: np.ndarray
    bucket: int


def _decode(clip: Clip, data: Any) -> _Decoded | _Outcome:
    """Each clip's first frames and its centre, whatever training on the videos would draw."""
    if clip.caption is None:
        return _Outcome(clip.name, reason=f"{clip.file}: no caption")
    sizes, what = layout.sizes(data), {"num_frames": data.num_frames, "fps": data.fps}
    try:
        clip = look_at(clip, **what, sizes=len(sizes) > 1)
        bucket = nearest(clip.size, sizes) if clip.size else 0
        height, width = sizes[bucket]
        return _Decoded(read_video(clip.file, height=height, width=width, **what), bucket)
    except UnsuitableError as error:
        return _Outcome(clip.name, reason=str(error))
    except (VideoError, FileNotFoundError) as error:
        return _Outcome(clip.name, reason=str(error), readable=False)


def _outcomes(
    clips: list[Clip], data: Any, encode: _Encoder, bad: BadFiles
) -> Iterator[_Outcome]:
    """Decodes ahead in threads, across shards, and encodes when asked; raises as `bad.add`."""
    if not clips:
        return
    threads = data.num_threads
    decode = functools.partial(_decode, data=data)
    decoded = grain.MapDataset.source(clips).map(decode).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )  # fmt: skip
    for clip, found in zip(clips, decoded, strict=True):
        if isinstance(found, _Decoded):
            record = encode(clip, found.frames_THW3)
            reason = f"{clip.file}: its latent has NaN or infinity" if record is None else ""
            yield _Outcome(clip.name, record, found.bucket, reason)
            continue
        if not found.readable:
            bad.add([found.reason])
        yield found


class _RecordFile:
    """An ArrayRecord file of records that are read one by one.

    Raises OSError where it can't be written, and then leaves none.
    """

    def __init__(self, path: Path):
        self._path = path
        self._writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")

    def write(self, record: bytes) -> None:
        self._do(self._writer.write, record)

    def close(self) -> None:
        self._do(self._writer.close)

    def _do(self, call: Callable[..., Any], *args: Any) -> None:
        try:
            call(*args)
        except RuntimeError as error:  # of whatever kind the trouble is
            self._path.unlink(missing_ok=True)
            raise OSError(
                f"{self._path} can't be written: {error}. Make room and run the same command "
                "again; finished shards stay"
            ) from error


def _write_shard(
    path: Path, count: int, outcomes: Iterator[_Outcome], stop: Callable[[], bool], bar: tqdm
) -> dict[str, Any] | None:
    """Writes the records. Returns what was kept, and why other clips were not; None if stopped."""
    kept, buckets, skipped, not_read = [], [], {}, []
    with contextlib.closing(_RecordFile(path)) as file:
        for _ in range(count):
            if stop():
                return None
            outcome = next(outcomes)
            if outcome.record is None:
                skipped[outcome.name] = outcome.reason
                not_read += [] if outcome.readable else [outcome.name]
            else:
                file.write(outcome.record)
                kept.append(outcome.name)
                buckets.append(outcome.bucket)
            bar.update()
    return {"kept": kept, "buckets": buckets, "skipped": skipped, "unreadable": not_read}
