"""Clips sampled during training: the same prompts and noise every time.

    <workdir>/samples/index.html             the steps, newest first, with their contact sheets
    <workdir>/samples/step_000123/           a gallery (see gallery.py)

A step's folder appears when all of its clips are there.
"""

import dataclasses
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template

from lact_jax import distributed
from lact_jax.config import Config
from lact_jax.encoders import TextEncoder, VideoCodec
from lact_jax.gallery import Gallery, read_prompts
from lact_jax.generate import sample_batches
from lact_jax.pipeline import Pipeline
from lact_jax.workdir import write_atomically

FOLDER, SHEET, UNFINISHED = "samples", "contact_sheet.png", "unfinished"

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Samples during training</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 15px/1.45 system-ui, sans-serif; margin: auto; max-width: 90rem; padding: 1rem; }
  img { height: auto; max-width: 100%; }
</style>
</head>
<body>
<h1>Samples during training</h1>
$steps
</body>
</html>
""")

_STEP = Template("""<h2><a href="$folder/index.html">Step $step</a></h2>
<a href="$folder/index.html"><img src="$folder/$sheet" loading="lazy" alt="clips at step $step"></a>
""")


class _Stopped(Exception):
    """Raised by the progress callback to leave the sampler."""


class LoopSampler:
    """Samples the prompts of `config.validation` with other weights each time; compiled once.

    Args:
      config: the run; `config.sample` says how to sample.
      workdir: of the run.
      step: where the run starts: 0, or the checkpoint's step on a resume. Folders of later steps
        are removed, and so is what a kill left unfinished.

    Raises:
      FileNotFoundError, ValueError: of the prompt file. ValueError: sizes that do not fit.
    """

    def __init__(
        self, config: Config, codec: VideoCodec, text: TextEncoder, workdir: Path, step: int
    ):
        validation = config.validation
        from_file = read_prompts(validation.prompts_file) if validation.prompts_file else []
        self.prompts = [*validation.prompts, *from_file]
        self._pipeline = Pipeline(config, {}, codec, text)
        self._folder = workdir / FOLDER
        if distributed.is_main():
            for later in [s for s in finished_steps(self._folder) if s > step]:
                shutil.rmtree(self._folder / _name(later))
            shutil.rmtree(self._folder / UNFINISHED, ignore_errors=True)
            if self._folder.is_dir():
                self._write_page()
        distributed.wait_for_all("samples cleared")

    def done(self, step: int) -> bool:
        """Whether the clips of this step are there."""
        return (self._folder / _name(step)).is_dir()

    def __call__(self, step: int, params: dict, stop: Callable[[], bool]) -> Path | None:
        """Samples into the step's folder and returns it; None if `stop` said so on the way.

        Of several processes all call this, and process 0 puts the folder in its place.
        """

        def progress(clips, chunk):
            def on_step(i, steps):
                if stop():
                    raise _Stopped

            return on_step

        config, unfinished = self._pipeline.config, self._folder / UNFINISHED
        settings = dataclasses.asdict(config.sample) | {"training_step": step}
        self._pipeline.params = params
        try:
            lists = distributed.is_main()
            with Gallery(unfinished, settings, fps=config.data.fps, lists=lists) as gallery:
                sample_batches(self._pipeline, self.prompts, gallery, progress)
        except _Stopped:
            distributed.wait_for_all("samples stopped")
            shutil.rmtree(unfinished, ignore_errors=not distributed.is_main())
            return None
        finally:
            self._pipeline.params = {}  # the train state's arrays must not outlive their step
        folder = self._folder / _name(step)
        if distributed.is_main():
            unfinished.rename(folder)
            self._write_page()
        return folder

    def videos(self, folder: Path) -> dict[str, Path]:
        """Prompt -> clip of a finished step."""
        files = sorted(folder.glob("*.mp4"))
        return dict(zip(self.prompts, files, strict=True))

    def _write_page(self) -> None:
        write_atomically(self._folder / "index.html", page(finished_steps(self._folder)))


def page(steps: Sequence[int]) -> str:
    """The page that shows the contact sheets of these steps, the last one first."""
    shown = [
        _STEP.substitute(step=step, folder=_name(step), sheet=SHEET) for step in reversed(steps)
    ]
    return _PAGE.substitute(steps="\n".join(shown))


def finished_steps(folder: Path) -> list[int]:
    """The steps whose clips are there, in order."""
    names = [path.name for path in folder.glob("step_*")]
    return sorted(int(m[1]) for m in map(re.compile(r"step_(\d+)").fullmatch, names) if m)


def _name(step: int) -> str:
    return f"step_{step:06d}"
