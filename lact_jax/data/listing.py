"""Which videos and captions a folder holds, and which of them can be used.

Captions come in one of three ways, never mixed:
    clip.mp4 + clip.txt   one text file beside each video, in the folder or below it
    captions.jsonl        {"file": "clip.mp4", "caption": "…"} a line; files relative to the folder
    captions.csv          the columns file,caption
Files whose name begins with a dot are not looked at. Still images are clips of one frame: where
clips are longer, those in the folder (covers, thumbnails) need no caption.
"""

from __future__ import annotations

import concurrent.futures
import csv
import dataclasses
import hashlib
import io
import json
import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from lact_jax.video_io import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    VideoError,
    probe_video,
    shown_size,
)

_log = logging.getLogger(__name__)
_NAMED = 10  # files named in a message before the rest is only counted


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video file.

    Attributes:
      file: where it is.
      caption: one line; None where there is none (see `list_clips`).
      name: the path below the folder.
      length: frames at the rate that was asked for; None where the file doesn't say, or before
        `usable_clips` looked.
      size: (height, width) as shown; None unless `usable_clips` was to look.
    """

    file: Path
    caption: str | None
    name: str
    length: int | None = None
    size: tuple[int, int] | None = None


class UnsuitableError(Exception):
    """A clip is whole, but too short for what is asked for; the message names the file."""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Why clips can't be used, a line each that names the file.

    Attributes:
      unreadable: no videos, cut off, damaged.
      unsuitable: too short for what is asked for.
    """

    unreadable: list[str]
    unsuitable: list[str]


class BadFiles:
    """Counts the files that can't be read; thread-safe.

    Args:
      path: their folder, for messages.
      limit: how many may be met.
    """

    def __init__(self, path: Path, limit: int):
        self._path, self._limit = path, limit
        self._reasons: dict[str, None] = {}
        self._lock = threading.Lock()

    def add(self, reasons: Sequence[str]) -> bool:
        """Takes a line for each file, which names it; True if one of them is new.

        Raises ValueError that names them where there are more than the limit.
        """
        with self._lock:
            before = len(self._reasons)
            self._reasons.update(dict.fromkeys(reasons))
            known = list(self._reasons)
        if len(known) > self._limit:
            raise ValueError(
                f"{self._path}: {len(known)} files can't be read, more than data.max_bad_files="
                f"{self._limit}: {enumerate_some(known)}"
            )
        return len(known) > before


def enumerate_some(names: Sequence[str]) -> str:
    """Up to ten names, and how many more."""
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def list_clips(
    path: Path, *, stills: bool = False, uncaptioned: bool = False
) -> list[Clip]:
    """All videos of a folder with their captions, sorted by name.

    Args:
      path: the folder.
      stills: list still images too, as clips of one frame.
      uncaptioned: list videos without caption too, for the caller to skip.

    Raises:
      FileNotFoundError: no such folder, or no video in it.
      ValueError: videos without caption unless asked for, captions without video (all listed),
        two kinds of captions, or a line that can't be read.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder of videos")
    pictures = list_stills(path)
    known = {_name(path, file): file for file in [*_visible(path, VIDEO_SUFFIXES), *pictures]}
    wanted = set(known) if stills else set(known) - {_name(path, file) for file in pictures}
    if not wanted:
        looked_for = (*VIDEO_SUFFIXES, *(IMAGE_SUFFIXES if stills else ()))
        also = f"; its {len(pictures)} still images are clips of one frame" if pictures else ""
        raise FileNotFoundError(
            f"{path}: no videos in this folder ({', '.join(looked_for)} are looked for){also}"
        )
    captions = _read_captions(path, known)
    problems = []
    bare = sorted(wanted - set(captions))
    if bare and not uncaptioned:
        problems.append(f"{len(bare)} videos without caption: {enumerate_some(bare)}")
    if lost := sorted(set(captions) - set(known)):
        problems.append(f"{len(lost)} captions without video: {enumerate_some(lost)}")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return [Clip(known[name], captions.get(name), name) for name in sorted(wanted)]


def list_stills(path: Path) -> list[Path]:
    """The still images of a folder, sorted."""
    return sorted(_visible(path, IMAGE_SUFFIXES))


def warn_of_stills(path: Path, num_frames: int) -> None:
    """Names the still images of a folder whose clips have more than one frame."""
    if num_frames > 1 and (stills := [file.name for file in list_stills(path)]):
        _log.warning(
            "%s: %d still images skipped, clips have %d frames: %s",
            path, len(stills), num_frames, enumerate_some(stills),
        )  # fmt: skip


def split_clips(clips: Sequence[Clip], holdout: int) -> dict[str, list[Clip]]:
    """The clips of the splits "train" and "validation", each in the order given.

    The clips whose names have the smallest hashes are held out: a clip that is held out stays so
    when others come or go, unless more with smaller hashes come.

    Raises ValueError if nothing would be left to train on.
    """
    if holdout < 0:
        raise ValueError(f"data.holdout={holdout}: must be 0 or more")
    if holdout >= len(clips):
        raise ValueError(
            f"data.holdout={holdout}: of {len(clips)} clips at least one must be left to train on; "
            "hold out fewer"
        )
    by_hash = sorted(clips, key=lambda clip: hashlib.sha256(clip.name.encode()).digest())
    held_out = {clip.name for clip in by_hash[:holdout]}
    return {
        "train": [clip for clip in clips if clip.name not in held_out],
        "validation": [clip for clip in clips if clip.name in held_out],
    }


def look_at(clip: Clip, *, num_frames: int, fps: float, sizes: bool) -> Clip:
    """The clip with the length that its header tells, and with its size if that is asked for.

    Args:
      clip: what to look at.
      num_frames, fps: frames that are needed, and at which rate.
      sizes: find out the size, at the first picture.

    Raises:
      VideoError: no video, or damaged.
      UnsuitableError: shorter than is needed.
    """
    length = probe_video(clip.file).num_frames(fps)
    if length is not None and length < num_frames:
        raise UnsuitableError(f"{clip.file}: {length} frames at {fps:g} fps, {num_frames} needed")
    size = shown_size(clip.file) if sizes else None
    return dataclasses.replace(clip, length=length, size=size)


def usable_clips(
    clips: Sequence[Clip], *, num_frames: int, fps: float, num_threads: int, sizes: bool = False
) -> tuple[list[Clip], Skipped]:
    """Looks at the header of every clip, and for its size at the first picture.

    Args:
      clips: what to look at.
      num_frames, fps: clips shorter than this many frames at this rate can't be used.
      num_threads: files looked at together.
      sizes: find out each clip's size.

    Returns:
      (usable clips in the same order, with their lengths; the reasons for the others).
    """

    def look(clip: Clip) -> tuple[Clip | None, str, str]:
        try:
            return look_at(clip, num_frames=num_frames, fps=fps, sizes=sizes), "", ""
        except (VideoError, FileNotFoundError) as error:  # a link to nothing, for example
            return None, str(error), ""
        except UnsuitableError as error:
            return None, "", str(error)

    with concurrent.futures.ThreadPoolExecutor(max(1, num_threads)) as pool:
        found, unreadable, unsuitable = zip(*pool.map(look, clips), strict=True)
    skipped = Skipped([x for x in unreadable if x], [x for x in unsuitable if x])
    return [clip for clip in found if clip], skipped


def _visible(path: Path, suffixes: Iterable[str]) -> list[Path]:
    return [
        file
        for file in path.rglob("*")
        if file.suffix.lower() in suffixes
        and not file.is_dir()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]


def _name(path: Path, file: Path) -> str:
    name = file.relative_to(path).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}: the file name {name!r} is not UTF-8: rename it") from error
    return name


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error}); save it as UTF-8") from error


def _read_captions(path: Path, videos: dict[str, Path]) -> dict[str, str]:
    """Caption by video name; a caption without video is there under the name it asks for."""
    tables = [path / name for name in _TABLES if (path / name).is_file()]
    if len(tables) > 1:
        raise ValueError(f"{path}: has both {' and '.join(t.name for t in tables)}; keep one")
    captions: dict[str, str] = {} if tables else _read_texts(path, videos)
    if not tables:
        return {name: caption for name, caption in captions.items() if caption}
    for number, file, caption in _TABLES[tables[0].name](tables[0]):
        if not isinstance(file, str) or not isinstance(caption, str):
            raise ValueError(f"{tables[0]}, line {number}: needs a file and a caption, both texts")
        name = Path(file).as_posix()
        if name in captions:
            raise ValueError(f"{tables[0]}, line {number}: {name} has a caption already")
        captions[name] = _one_line(caption)
    return {name: caption for name, caption in captions.items() if caption}


def _read_texts(path: Path, videos: dict[str, Path]) -> dict[str, str]:
    by_stem: dict[Path, list[str]] = {}
    for name, file in videos.items():
        by_stem.setdefault(file.with_suffix(""), []).append(name)
    captions = {}
    for text in _visible(path, [".txt"]):
        caption = _one_line(_text(text))
        for name in by_stem.get(text.with_suffix(""), [_name(path, text)]):
            captions[name] = caption
    return captions


def _read_jsonl(table: Path):
    for number, line in enumerate(_text(table).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{table}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{table}, line {number}: must be an object, such as "
                             '{"file": "clip.mp4", "caption": "a cat"}')
        yield number, row.get("file"), row.get("caption")


def _read_csv(table: Path):
    rows = csv.DictReader(io.StringIO(_text(table), newline=""))
    if not {"file", "caption"} <= set(rows.fieldnames or ()):
        raise ValueError(f"{table}: its first line must name the columns file,caption")
    for row in rows:
        if None in row:
            raise ValueError(
                f"{table}, line {rows.line_num}: more values than columns; a caption with commas "
                "needs quotes around it"
            )
        yield rows.line_num, row["file"], row["caption"]


def _one_line(caption: str) -> str:
    return " ".join(caption.split())


_TABLES = {"captions.jsonl": _read_jsonl, "captions.csv": _read_csv}
