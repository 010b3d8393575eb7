"""Writes, once, a folder of synthetic clips with captions: a video folder like any other.

    FOLDER/manifest.json        the settings and whether all is written
    FOLDER/shapes_00000.mp4 …   family (a), `lact_jax.data.shapes`
    FOLDER/ring_00000.mp4 …     family (b), `lact_jax.data.ring`
    FOLDER/captions.jsonl       one {"file", "caption"} a line; written when all clips are there

Everything is drawn from (seed, split, family, index), so a killed run is finished by the next one
with the same settings, and the result is the same.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import fcntl
import json
import os
from pathlib import Path

import numpy as np

from lact_jax.data import ring, shapes
from lact_jax.video_io import replacing, write_video

SPLITS = ("train", "held_out")
MANIFEST = "manifest.json"
CAPTIONS = "captions.jsonl"
_VERSION = 2  # of the drawing: a folder of another version is not taken for this one


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is in the folder.

    Attributes:
      num_shapes, num_rings: clips of each family.
      num_frames: frames a clip, 1 + 4k.
      size: height and width in pixels.
      fps: frames a second.
      chunk_frames: latent frames in a chunk (the ring's camera moves on once a chunk).
      seed: of everything drawn.
      split: one of SPLITS; the same seed gives other clips in the other split.
    """

    num_shapes: int = 288
    num_rings: int = 96
    num_frames: int = 81
    size: int = 64
    fps: int = 16
    chunk_frames: int = 3
    seed: int = 0
    split: str = "train"

    def __post_init__(self):
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r}: must be one of {', '.join(SPLITS)}")
        if self.num_frames < 1 or self.num_frames % 4 != 1:
            raise ValueError(f"num_frames={self.num_frames}: must be 1 + 4k, such as 81")
        if self.size < 16 or self.size % 2:
            raise ValueError(f"size={self.size}: must be even and at least 16")
        if min(self.num_shapes, self.num_rings) < 0 or self.num_shapes + self.num_rings == 0:
            raise ValueError(
                f"num_shapes={self.num_shapes}, num_rings={self.num_rings}: need at least one clip"
            )


def draw_clip(settings: Settings, family: str, index: int) -> tuple[np.ndarray, str]:
    """Draws one clip.

    Args:
      settings: sizes and seed.
      family: "shapes" or "ring".
      index: number of the clip in its family.

    Returns:
      (frames uint8 (T, size, size, 3), caption).
    """
    return _FAMILIES[family](settings, index)


def write_folder(
    path: os.PathLike | str, settings: Settings, *, workers: int | None = None
) -> Path:
    """Makes sure that the folder holds all clips of `settings`, writing those that are missing.

    Args:
      path: the folder; made if missing.
      settings: what to write.
      workers: threads, None for one a CPU.

    Returns:
      The folder.

    Raises:
      FileExistsError: the folder was written with other settings, or holds files and no manifest.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if not _is_complete(path, settings):
        with (path / ".lock").open("w") as lock:  # processes that start together write it once
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_complete(path, settings):
                _write_all(path, settings, workers)
    return path


def _write_all(path: Path, settings: Settings, workers: int | None) -> None:
    for leftover in path.glob(".*.tmp*"):  # of a run that was killed
        leftover.unlink(missing_ok=True)
    _write_manifest(path, settings, complete=False)
    names = clip_names(settings)
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        captions = list(pool.map(lambda name: _write_clip(path, settings, *name), names))
    lines = [
        json.dumps({"file": _file(family, index), "caption": text})
        for (family, index), text in zip(names, captions, strict=True)
    ]
    _write_text(path / CAPTIONS, "\n".join(lines) + "\n")
    _write_manifest(path, settings, complete=True)


def clip_names(settings: Settings) -> list[tuple[str, int]]:
    """(family, index) of every clip in the folder."""
    return [("shapes", i) for i in range(settings.num_shapes)] + [
        ("ring", i) for i in range(settings.num_rings)
    ]


def _draw_shapes(settings: Settings, index: int) -> tuple[np.ndarray, str]:
    # Every combination comes once before any comes again.
    table = shapes.combinations()
    lap, place = divmod(index, len(table))
    order = _rng(settings, "shapes order", lap).permutation(len(table))
    what = table[order[place]]
    rng = _rng(settings, "shapes", index)
    frames = shapes.draw(rng, *what, num_frames=settings.num_frames, size=settings.size)
    return frames, shapes.caption(*what)


def _draw_ring(settings: Settings, index: int) -> tuple[np.ndarray, str]:
    frames = ring.draw(
        _rng(settings, "ring", index),
        num_frames=settings.num_frames,
        size=settings.size,
        chunk_frames=settings.chunk_frames,
    )
    return frames, ring.CAPTION


_FAMILIES = {"shapes": _draw_shapes, "ring": _draw_ring}


def _rng(settings: Settings, purpose: str, index: int) -> np.random.Generator:
    words = (settings.seed, SPLITS.index(settings.split), *purpose.encode(), index)
    return np.random.default_rng(words)


def _file(family: str, index: int) -> str:
    return f"{family}_{index:05d}.mp4"


def _write_clip(path: Path, settings: Settings, family: str, index: int) -> str:
    frames, text = draw_clip(settings, family, index)
    file = path / _file(family, index)
    if not file.exists():  # files appear whole or not at all
        write_video(file, frames, fps=settings.fps, preset="veryfast")
    return text


def _is_complete(path: Path, settings: Settings) -> bool:
    """Whether all clips are there; a folder that is not for these settings is an error."""
    file = path / MANIFEST
    if not file.exists():
        strangers = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
        if strangers:
            raise FileExistsError(
                f"{path}: holds files ({', '.join(strangers[:3])}, …) but no {MANIFEST}, so it is "
                "not a folder of synthetic clips; give another folder"
            )
        return False
    manifest = json.loads(file.read_text())
    wanted = {"version": _VERSION, **dataclasses.asdict(settings)}
    found = {key: manifest.get(key) for key in wanted}
    if found != wanted:
        differences = [f"{k}: {found[k]!r} there, {v!r} asked for" for k, v in wanted.items()
                       if found[k] != v]
        raise FileExistsError(
            f"{path}: holds synthetic clips of other settings ({'; '.join(differences)}); "
            "give another folder or delete this one"
        )
    return manifest["complete"]


def _write_manifest(path: Path, settings: Settings, complete: bool) -> None:
    manifest = {"version": _VERSION, **dataclasses.asdict(settings), "complete": complete}
    _write_text(path / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def main(argv: list[str] | None = None) -> None:
    """python -m lact_jax.data.synthetic FOLDER [--num_shapes=288 …]"""
    parser = argparse.ArgumentParser(description="Write a folder of synthetic clips.")
    parser.add_argument("folder")
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    args = vars(parser.parse_args(argv))
    folder = write_folder(args.pop("folder"), settings := Settings(**args))
    print(f"{folder}: {settings.num_shapes + settings.num_rings} clips")


if __name__ == "__main__":
    main()
