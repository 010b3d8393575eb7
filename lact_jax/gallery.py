"""What sampling leaves behind: clips as mp4, a contact sheet, a page to look at, a list to measure.

    with Gallery(out, {"seed": 0, "solver": "unipc"}) as gallery:
        with gallery.open_clip("a red circle moving left", num_frames=81) as clip:
            for frames_THW3 in chunks:
                clip.write(frames_THW3)

The folder then holds

    000-a-red-circle-moving-left.mp4
    index.html          the clips, playing in a loop under their prompts, and the settings
    contact_sheet.png   a row of frames for each clip
    prompts.json        {"settings": {...}, "clips": [{"file": ..., "prompt": ...}, ...]}

and the page and the list are whole, and name finished clips only, at any moment.

Legend: T frames, H height, W width; frames are RGB uint8 (T, H, W, 3).
"""

import contextlib
import dataclasses
import html
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from lact_jax import video_io

_SLUG_CHARS = 48  # of a prompt, in a file name
_LABEL_CHARS = 100  # of a prompt, on the contact sheet

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 15px/1.45 system-ui, sans-serif; margin: auto; max-width: 90rem; padding: 1rem; }
  h1 { font-size: 1.4rem; }
  table { border-collapse: collapse; margin: 1rem 0 2rem; }
  th, td { padding: .15rem 1.2rem .15rem 0; text-align: left; vertical-align: top; }
  th { font-weight: 500; opacity: .7; }
  main { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
  figure { margin: 0; }
  video { background: #0002; border-radius: 4px; display: block; height: auto; width: 100%; }
  figcaption { margin-top: .4rem; overflow-wrap: anywhere; }
  small { display: block; opacity: .7; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$summary</p>
<table>
$settings
</table>
<main>
$clips
</main>
</body>
</html>
""")

_SETTING = Template("<tr><th>$name</th><td>$value</td></tr>")

_CLIP = Template("""<figure>
<video src="$file" width="$width" height="$height" autoplay loop muted playsinline controls></video>
<figcaption>$prompt<small>$details</small></figcaption>
</figure>""")


def read_prompts(path: os.PathLike | str) -> list[str]:
    """Prompts from a UTF-8 text file, one a line, without blank lines and lines that begin with #.

    Raises FileNotFoundError where there is no such file, ValueError where it holds no prompt or is
    not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such prompt file; it should be a text file with one prompt a line"
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the prompt file is not UTF-8 text ({error})") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path}: no prompts in it; write one a line (# begins a comment)")
    return prompts


def clip_name(index: int, prompt: str) -> str:
    """A file name that is safe anywhere and says which clip it is: 007-a-red-circle.mp4."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = "-".join(re.findall(r"[a-z0-9]+", plain))[:_SLUG_CHARS].strip("-")
    return f"{index:03d}-{slug or 'clip'}.mp4"


@dataclasses.dataclass(frozen=True)
class Clip:
    """A finished clip: its file's name, prompt and length, and frames for the contact sheet."""

    file: str
    prompt: str
    num_frames: int
    stills_THW3: np.ndarray


class ClipWriter:
    """Takes the frames of one clip piece by piece; comes from `Gallery.open_clip`."""

    def __init__(self, video: video_io.VideoWriter, stills: Sequence[int]) -> None:
        self._video, self._wanted = video, frozenset(stills)
        self._stills: list[np.ndarray] = []

    def write(self, frames_THW3: np.ndarray) -> None:
        """Encodes uint8 (T, H, W, 3); T may be 0. Errors as `VideoWriter.write`."""
        first = self._video.num_frames
        self._video.write(frames_THW3)
        picked = [i for i in range(len(frames_THW3)) if first + i in self._wanted]
        self._stills += [np.array(frames_THW3[i]) for i in picked]

    @property
    def num_frames(self) -> int:
        """How many frames were written so far."""
        return self._video.num_frames

    def stills(self) -> np.ndarray:
        """The frames for the contact sheet, uint8 (n, H, W, 3)."""
        return np.stack(self._stills)


class Gallery:
    """A folder of sampled clips that grows clip by clip (see the module's docstring).

    Args:
      out: the folder, made if missing; a gallery already there is replaced, file by file.
      settings: what the clips were made with (seed, solver, steps ...), shown and saved: names to
        values that JSON can hold.
      fps: frames a second.
      columns: frames of each clip on the contact sheet.
      lists: write page, list and contact sheet; of several processes that write clips into one
        folder one does, and is told of the others' clips (`add_finished`).

    Entering it writes the empty page and list, so that a folder that can't be written to is an
    error before any sampling; leaving it, by an error too, writes the contact sheet.

    Raises ValueError for settings that are not JSON, OSError where the folder can't be written.
    """

    def __init__(
        self,
        out: os.PathLike | str,
        settings: Mapping[str, Any],
        *,
        fps: float = 16.0,
        columns: int = 8,
        lists: bool = True,
    ) -> None:
        try:
            json.dumps(dict(settings))
        except TypeError as error:
            raise ValueError(f"gallery settings must be plain JSON values: {error}") from error
        self.out = Path(out)
        self.settings = dict(settings)
        self.fps = fps
        self.columns = columns
        self._lists = lists
        self._clips: dict[int, Clip] = {}
        self._opened = 0

    def __enter__(self) -> "Gallery":
        self._write_lists()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._clips and self._lists:
            clips = self._finished()
            sheet = video_io.contact_sheet(
                [clip.stills_THW3 for clip in clips],
                [_label(clip.prompt) for clip in clips],
                columns=self.columns,
            )
            video_io.write_png(self.out / "contact_sheet.png", sheet)

    @contextlib.contextmanager
    def open_clip(
        self, prompt: str, num_frames: int, index: int | None = None
    ) -> Iterator[ClipWriter]:
        """A writer for a clip of `num_frames` frames; several may be open at once.

        The clip's place in the gallery is `index`, by default the order of opening. On leaving, the
        file is put in place whole and the page and list name it; after an error inside, nothing is
        written.

        Raises ValueError for num_frames < 1, where another number of frames was written, and for
        frames that `video_io.write_video` refuses.
        """
        if num_frames < 1:
            raise ValueError(f"a clip has at least one frame, got num_frames={num_frames}")
        index = self._opened if index is None else index
        self._opened += 1
        name = clip_name(index, prompt)
        shown = np.linspace(0, num_frames - 1, min(self.columns, num_frames)).round().astype(int)
        with video_io.open_video(self.out / name, fps=self.fps) as video:
            writer = ClipWriter(video, shown.tolist())
            yield writer
            if writer.num_frames != num_frames:
                raise ValueError(
                    f"{name}: {writer.num_frames} frames written, {num_frames} announced"
                )
        self.add_finished(index, prompt, num_frames, writer.stills())

    def add_finished(
        self, index: int, prompt: str, num_frames: int, stills_THW3: np.ndarray
    ) -> None:
        """Lists a clip whose file is in place, at `index`; `stills_THW3` as `ClipWriter.stills`."""
        self._clips[index] = Clip(clip_name(index, prompt), prompt, num_frames, stills_THW3)
        self._write_lists()

    def add(self, prompt: str, frames_THW3: np.ndarray) -> None:
        """Writes a whole clip, uint8 (T, H, W, 3)."""
        with self.open_clip(prompt, len(frames_THW3)) as clip:
            clip.write(frames_THW3)

    def _finished(self) -> list[Clip]:
        return [self._clips[index] for index in sorted(self._clips)]

    def _write_lists(self) -> None:
        if not self._lists:
            return
        clips = self._finished()
        listed = [{"file": clip.file, "prompt": clip.prompt} for clip in clips]
        listing = {"settings": self.settings, "clips": listed}
        _write_text(
            self.out / "prompts.json", json.dumps(listing, indent=2, ensure_ascii=False) + "\n"
        )
        _write_text(self.out / "index.html", _page(clips, self.settings, self.fps))


def write_gallery(
    out: os.PathLike | str,
    clips: Iterable[tuple[str, np.ndarray]],
    settings: Mapping[str, Any],
    *,
    fps: float = 16.0,
) -> Path:
    """Writes (prompt, frames uint8 (T, H, W, 3)) pairs as they come; returns the page's path."""
    with Gallery(out, settings, fps=fps) as gallery:
        for prompt, frames_THW3 in clips:
            gallery.add(prompt, frames_THW3)
    return gallery.out / "index.html"


def _page(clips: list[Clip], settings: Mapping[str, Any], fps: float) -> str:
    """The HTML page; every text from outside is escaped."""
    figures = []
    for clip in clips:
        _, height, width, _ = clip.stills_THW3.shape
        seconds = clip.num_frames / fps
        figures.append(
            _CLIP.substitute(
                file=clip.file,
                width=width,
                height=height,
                prompt=html.escape(clip.prompt),
                details=f"{clip.num_frames} frames, {seconds:.1f} s, {width}×{height}",
            )
        )
    rows = [
        _SETTING.substitute(name=html.escape(str(name)), value=html.escape(str(value)))
        for name, value in settings.items()
    ]
    return _PAGE.substitute(
        title="Sampled clips",
        summary=f"Clips: {len(clips)}, at {fps:g} frames a second",
        settings="\n".join(rows),
        clips="\n".join(figures),
    )


def _label(prompt: str) -> str:
    """The prompt in one line that fits over a row of eight square frames."""
    line = " ".join(prompt.split())
    return line if len(line) <= _LABEL_CHARS else line[: _LABEL_CHARS - 3].rstrip() + "..."


def _write_text(path: Path, text: str) -> None:
    with video_io.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
