"""Which videos and captions a folder holds, and which of them can be used.

Captions come in one of three ways, never mixed:
    clip.mp4 + clip.txt   one text file beside each video, in the folder or below it
    captions.jsonl        {"file": "clip.mp4", "caption": "…"} a line; files relative to the folder
    captions.csv          the columns file,caption
Files whose name begins with a dot are not looked at.
"""

from __future__ import annotations

import concurrent.futures
import csv
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from lact_jax.video_io import VIDEO_SUFFIXES, VideoError, probe_video

_NAMED = 10  # files named in a message before the rest is only counted


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video file, its caption, and its name: the path below the folder."""

    file: Path
    caption: str
    name: str


def enumerate_some(names: Sequence[str]) -> str:
    """Up to ten names, and how many more."""
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def list_clips(path: Path) -> list[Clip]:
    """All videos of a folder with their captions, sorted by name.

    Raises:
      FileNotFoundError: no such folder, or no video in it.
      ValueError: videos without caption, captions without video (all listed), two kinds of
        captions, or a line that can't be read.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder of videos")
    videos = {_name(path, file): file for file in _visible(path, VIDEO_SUFFIXES)}
    if not videos:
        raise FileNotFoundError(
            f"{path}: no videos in this folder ({', '.join(VIDEO_SUFFIXES)} are looked for)"
        )
    captions = _read_captions(path, videos)
    problems = []
    if bare := sorted(set(videos) - set(captions)):
        problems.append(f"{len(bare)} videos without caption: {enumerate_some(bare)}")
    if lost := sorted(set(captions) - set(videos)):
        problems.append(f"{len(lost)} captions without video: {enumerate_some(lost)}")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return [Clip(videos[name], captions[name], name) for name in sorted(videos)]


def usable_clips(
    clips: Sequence[Clip], *, num_frames: int, fps: float, num_threads: int
) -> tuple[list[Clip], list[str]]:
    """Looks at the header of every clip, decoding none.

    Args:
      clips: what to look at.
      num_frames, fps: clips shorter than this many frames at this rate can't be used.
      num_threads: files looked at together.

    Returns:
      (usable clips in the same order, a reason for each of the others that names it).
    """

    def look(clip: Clip) -> str | None:
        try:
            length = probe_video(clip.file).num_frames(fps)
        except VideoError as error:
            return str(error)
        if length is not None and length < num_frames:
            return f"{clip.file}: {length} frames at {fps:g} fps, {num_frames} needed"
        return None

    with concurrent.futures.ThreadPoolExecutor(max(1, num_threads)) as pool:
        reasons = list(pool.map(look, clips))
    usable = [clip for clip, reason in zip(clips, reasons, strict=True) if reason is None]
    return usable, [reason for reason in reasons if reason is not None]


def _visible(path: Path, suffixes: Iterable[str]) -> list[Path]:
    return [
        file
        for file in path.rglob("*")
        if file.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]


def _name(path: Path, file: Path) -> str:
    return file.relative_to(path).as_posix()


def _read_captions(path: Path, videos: dict[str, Path]) -> dict[str, str]:
    """Caption by video name; a caption without video is there under the name it asks for."""
    tables = [path / name for name in _TABLES if (path / name).is_file()]
    if len(tables) > 1:
        raise ValueError(f"{path}: has both {' and '.join(t.name for t in tables)}; keep one")
    if not tables:
        return _read_texts(path, videos)
    captions: dict[str, str] = {}
    for number, file, caption in _TABLES[tables[0].name](tables[0]):
        if not isinstance(file, str) or not isinstance(caption, str):
            raise ValueError(f"{tables[0]}, line {number}: needs a file and a caption, both texts")
        name = Path(file).as_posix()
        if name in captions:
            raise ValueError(f"{tables[0]}, line {number}: {name} has a caption already")
        captions[name] = _one_line(caption)
    return captions


def _read_texts(path: Path, videos: dict[str, Path]) -> dict[str, str]:
    by_stem: dict[Path, list[str]] = {}
    for name, file in videos.items():
        by_stem.setdefault(file.with_suffix(""), []).append(name)
    captions = {}
    for text in _visible(path, [".txt"]):
        caption = _one_line(text.read_text(encoding="utf-8-sig"))
        for name in by_stem.get(text.with_suffix(""), [_name(path, text)]):
            captions[name] = caption
    return captions


def _read_jsonl(table: Path):
    with table.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
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
    with table.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        if not {"file", "caption"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{table}: its first line must name the columns file,caption")
        for row in rows:
            yield rows.line_num, row["file"], row["caption"]


def _one_line(caption: str) -> str:
    return " ".join(caption.split())


_TABLES = {"captions.jsonl": _read_jsonl, "captions.csv": _read_csv}
