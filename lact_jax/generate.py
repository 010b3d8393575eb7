"""From a trained workdir and prompts to a gallery of clips."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from lact_jax import distributed, encoders
from lact_jax.checkpoint import complete_steps, restore_params
from lact_jax.config import Config
from lact_jax.convert.load import load_dit, missing_parameters
from lact_jax.diffusion.sampler import Progress
from lact_jax.gallery import Gallery
from lact_jax.models.dit import abstract_params
from lact_jax.models.vae import TEMPORAL_STRIDE
from lact_jax.pipeline import Pipeline
from lact_jax.sharding import make_mesh, state_shardings
from lact_jax.sizes import check_sizes
from lact_jax.workdir import flat_config

# What a checkpoint was trained with must be what it is sampled with.
MUST_AGREE = ("model", "codec", "text", "objective.frames_per_chunk")
MAY_DIFFER = (
    "model.remat", "model.unroll_layers", "model.last_layers", "model.last_remat", "model.dtype",
    "codec.options.path", "text.options.path",
)  # fmt: skip


def as_full(config: Config) -> Config:
    """The same run as plain Wan: full attention, and the whole clip as one chunk."""
    frames = config.sample.num_latent_frames
    replace = dataclasses.replace
    return replace(
        config,
        model=replace(config.model, mixer="full"),
        objective=replace(config.objective, frames_per_chunk=frames),
        data=replace(config.data, num_frames=1 + TEMPORAL_STRIDE * (frames - 1)),
    )


# How sample.py reads a config: as it is, or as plain Wan.
MODES = {"ar": lambda config: config, "full": as_full}


def generate(
    config: Config, workdir: str | Path | None, prompts: Sequence[str], out: str | Path,
    checkpoint_step: int | None = None,
) -> Path:  # fmt: skip
    """Samples every prompt and writes the gallery; returns the path of its page.

    Several processes share the prompts; all write into one folder, and process 0 the page.

    Args:
      config: the run; `config.sample` says how to sample.
      workdir: where it was trained. None samples the converted checkpoint `config.init_from`.
      prompts: one clip each.
      out: the gallery's folder.
      checkpoint_step: of the workdir; the newest complete checkpoint by default.

    Raises:
      FileNotFoundError: no workdir or checkpoint. ValueError: the workdir has another config, or
        neither it nor `init_from` is given.
    """
    distributed.start(config.distributed)
    source = _converted(config) if workdir is None else _trained(config, workdir, checkpoint_step)
    codec = encoders.make_codec(config.codec.name, **config.codec.options)
    text = encoders.make_text_encoder(config.text.name, **config.text.options)
    check_sizes(config, codec, text)
    abstract = abstract_params(config.model)
    params, origin = source(state_shardings(make_mesh(config.mesh), abstract, abstract))
    pipeline = Pipeline(config, params, codec, text)
    settings = dataclasses.asdict(config.sample) | origin
    with Gallery(out, settings, fps=config.data.fps, lists=distributed.is_main()) as gallery:
        with _progress_bar(pipeline, prompts) as progress:
            sample_batches(pipeline, prompts, gallery, progress)
    distributed.wait_for_all("gallery")
    return Path(out) / "index.html"


def _trained(config: Config, workdir: str | Path, step: int | None):
    """Checks the workdir; returns a function that reads (parameters, what to say of them) to the
    given shardings."""
    folder = Path(workdir) / "checkpoints"
    check_trained_with(config, Path(workdir))
    if not complete_steps(folder):
        raise FileNotFoundError(f"{folder} holds no complete checkpoint: train first")
    step = complete_steps(folder)[-1] if step is None else step
    abstract, weights = abstract_params(config.model), config.sample.weights
    origin = {"checkpoint_step": step}

    def read(shardings):
        placed = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        return restore_params(folder, step, weights, placed), origin

    return read


def _converted(config: Config):
    """As `_trained`, for the folder `config.init_from`."""
    if not config.init_from:
        raise ValueError(
            "nothing to sample from: give --workdir=RUN, or --config.init_from=FOLDER for a "
            "converted checkpoint"
        )
    missing = missing_parameters(config.init_from, config.model)
    if missing:
        raise ValueError(
            f"{config.init_from} holds no LaCT parameters ({len(missing)} are missing, the first "
            f"is {missing[0]}): train from it, or sample it as plain Wan with --mode=full"
        )
    origin = {"converted": str(config.init_from)}
    return lambda shardings: (load_dit(config.init_from, config.model, shardings), origin)


def sample_batches(
    pipeline: Pipeline,
    prompts: Sequence[str],
    gallery: Gallery,
    progress: Callable[[range, int], Progress],
) -> None:
    """Samples a clip for every prompt into the gallery, `pipeline.batch_size` at a time.

    `progress(clips, chunk)` gives the callback (step, steps) for a chunk of these clips; what it
    raises ends the sampling, and the clips that are not finished leave nothing.
    """
    sample = pipeline.config.sample
    num_frames = 1 + (sample.num_latent_frames - 1) * pipeline.codec.temporal_stride
    for start in range(0, len(prompts), pipeline.batch_size):
        clips = range(start, min(start + pipeline.batch_size, len(prompts)))
        _sample_batch(pipeline, prompts, clips, num_frames, gallery, partial(progress, clips))


def _sample_batch(pipeline, prompts, clips: range, num_frames: int, gallery, progress) -> None:
    """One batch. Several processes fill it up with the last prompt; each writes its own clips."""
    filled = [*clips, *[clips[-1]] * (-len(clips) % pipeline.together)]
    batch = [prompts[i] for i in filled]
    own = pipeline.own_rows(len(batch))
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(gallery.open_clip(prompts[i], num_frames, i))
            for i in clips[own.start : own.stop]
        ]
        for frames_BTHW3 in pipeline.frame_chunks(batch, filled, progress):
            # The rows that fill up come last, and have no writer.
            for writer, frames_THW3 in zip(writers, frames_BTHW3, strict=False):
                writer.write(frames_THW3)
    if distributed.several():
        stills = [writer.stills() for writer in writers]
        _list_clips_of_all(stills, own, prompts, clips, num_frames, gallery, pipeline)


def _list_clips_of_all(stills, own, prompts, clips, num_frames, gallery, pipeline) -> None:
    """Every process's gallery hears of the clips of all, whose files are in place."""
    data = pipeline.config.data
    shape = min(gallery.columns, num_frames), data.height, data.width, 3
    mine_BTHW3 = np.zeros((len(own), *shape), np.uint8)
    for row, still_THW3 in enumerate(stills):
        mine_BTHW3[row] = still_THW3
    for i, stills_THW3 in zip(clips, distributed.rows_of_all(mine_BTHW3), strict=False):
        gallery.add_finished(i, prompts[i], num_frames, stills_THW3)


@contextlib.contextmanager
def _progress_bar(pipeline: Pipeline, prompts: Sequence[str]):
    """A bar over all solver steps; yields what `sample_batches` takes."""
    sample, chunks = pipeline.config.sample, pipeline.num_chunks
    total = -(-len(prompts) // pipeline.batch_size) * chunks * sample.steps
    silent = not distributed.is_main()
    with tqdm(total=total, unit="step", dynamic_ncols=True, disable=silent) as bar:

        def progress(clips, chunk):
            names = f"{clips.start + 1}-{clips.stop}"
            bar.set_description(f"clips {names} chunk {chunk + 1}/{chunks}")
            return lambda step, steps: bar.update()

        yield progress


def check_trained_with(config: Config, workdir: Path) -> None:
    """Raises ValueError listing the keys where `config` is not what `workdir` was trained with."""
    file = workdir / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {workdir} is not the workdir of a run")
    try:
        trained = flat_config(json.loads(file.read_text()))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): restore it, or train again") from error
    asked = flat_config(json.loads(json.dumps(dataclasses.asdict(config))))
    differing = [
        f"{key}: trained with {trained.get(key)!r}, asked for {asked.get(key)!r}"
        for key in sorted(trained.keys() | asked.keys())
        if key.startswith(MUST_AGREE)
        and not key.startswith(MAY_DIFFER)
        and trained.get(key) != asked.get(key)
    ]
    if differing:
        raise ValueError(
            f"{workdir} was trained with another config; give the same --config and overrides:\n  "
            + "\n  ".join(differing)
        )
