"""The training run: data in, checkpoints and metrics out, and a resume that changes nothing."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lact_jax import encoders
from lact_jax.checkpoint import Checkpointer
from lact_jax.checkpoint_tree import CheckpointError
from lact_jax.config import Config
from lact_jax.convert.load import load_dit
from lact_jax.data import empty_text, make_dataset
from lact_jax.interrupt import leave_on_signal
from lact_jax.models.dit import abstract_params
from lact_jax.objective import split_chunks
from lact_jax.optim import merge
from lact_jax.run_logging import MetricsWriter, ProgressBar, write_curves
from lact_jax.sharding import batch_sharding, make_mesh, replicated, state_shardings
from lact_jax.train_state import TrainState, init_state, make_train_step
from lact_jax.wandb_run import start_run
from lact_jax.workdir import open_workdir

# What may change between two starts of one run without making it another run.
MAY_DIFFER = (
    "train.steps", "train.save_every", "train.keep_last", "train.log_every", "train.plot_every",
    "data.num_threads", "data.num_workers", "data.cache_in_memory", "data.path", "sample.*",
    "wandb.*", "mesh.*", "init_from", "codec.options.path", "text.options.path",
    "text.options.cache_dir",
)  # fmt: skip
BAR = ("loss", "lr", "grad_norm")


class BatchEncoder:
    """Turns a loader's batch into latents and text embeddings on the devices.

    Raw batches hold `frames` (B, T, H, W, 3) uint8 and `caption`; encoded ones `latent`
    (B, F, h, w, c) and `text` (B, L, Q).
    """

    def __init__(self, codec: encoders.VideoCodec, text: encoders.TextEncoder, sharding):
        self._codec, self._text, self._sharding = codec, text, sharding

    def __call__(self, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        if "frames" in batch:
            latent = self._codec.encode(batch["frames"])
            text = self._text.encode(list(batch["caption"]))
        else:
            latent, text = batch["latent"], batch["text"]
        return self._place(latent), self._place(text)

    def _place(self, x) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(jnp.asarray(x, jnp.float32), self._sharding)
        return jax.make_array_from_process_local_data(self._sharding, np.asarray(x, np.float32))


class Log:
    """Every step's metrics to metrics.jsonl, the curves, the progress bar and wandb.

    Metrics stay on the device until `flush`, so that logging does not make the step wait.
    """

    def __init__(self, config: Config, workdir: Path, step: int):
        self._train, self._workdir = config.train, workdir
        self._writer = MetricsWriter(workdir, step)
        self._bar = ProgressBar(config.train.steps, step)
        self._wandb = start_run(config.wandb, workdir, dataclasses.asdict(config))
        self._waiting: list[tuple[int, Any]] = []
        self._flushed = (step, time.monotonic())

    def push(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a step, as device arrays."""
        self._waiting.append((step, metrics))
        if step % self._train.log_every == 0:
            self.flush()
        if step % self._train.plot_every == 0:
            self.flush()
            write_curves(self._workdir)

    def flush(self) -> None:
        """Writes all that waits."""
        for step, metrics in jax.device_get(self._waiting):
            layers = metrics.pop("layers")
            row = metrics | {f"layers/{name}": value for name, value in layers.items()}
            self._writer.write(step, row)
            self._wandb.log(step, row)
            self._bar.update(step, {name: metrics[name] for name in BAR})
        if self._waiting:
            step, now = self._waiting[-1][0], time.monotonic()
            rate = (step - self._flushed[0]) / max(now - self._flushed[1], 1e-9)
            self._writer.write_throughput(step, {"steps_per_second": rate})
            self._flushed = (step, now)
        self._waiting = []

    def close(self) -> None:
        """Writes what waits, draws the curves, and closes everything, whatever of it fails."""
        with contextlib.ExitStack() as stack:  # last in, first out
            stack.callback(self._wandb.finish)
            stack.callback(self._writer.close)
            stack.callback(self._bar.close)
            stack.callback(write_curves, self._workdir)
            self.flush()


def train(config: Config, workdir: str | Path, *, debug: bool = False) -> int:
    """Trains, or goes on training, in `workdir`.

    Args:
      config: the run.
      workdir: its folder: config.json, metrics, curves and checkpoints.
      debug: random latents and text of the configured shapes in place of the data set.

    Returns:
      0 when all steps are done; 128 + the signal's number when Ctrl-C or SIGTERM ended the run,
      which is saved then.

    Raises:
      ValueError, OSError and the errors of checkpoint.py and workdir.py, each saying what to do.
    """
    stored = dataclasses.asdict(config) | {"debug": debug}
    with leave_on_signal() as interrupt:
        # First what can be wrong with the config: a workdir belongs to the config that opened it.
        parts = make_parts(config)
        with open_workdir(workdir, stored, MAY_DIFFER) as folder:
            run = _Run(config, parts, folder, debug)
            try:
                run.loop(interrupt)
            except BaseException as error:
                # The disk that was too full for a checkpoint is too full for the curves: the error
                # that ended the run is the one to tell.
                with contextlib.suppress(OSError, CheckpointError):
                    run.close()
                raise error
            run.close()
        return interrupt.exit_code


class _Parts(NamedTuple):
    """What a config names, made."""

    codec: encoders.VideoCodec
    text: encoders.TextEncoder
    mesh: jax.sharding.Mesh


def make_parts(config: Config) -> _Parts:
    """Codec, text encoder and mesh; raises ValueError where they or the sizes don't fit."""
    codec = encoders.make_codec(config.codec.name, **config.codec.options)
    text = encoders.make_text_encoder(config.text.name, **config.text.options)
    check_sizes(config, codec, text)
    mesh = make_mesh(config.mesh)
    microbatch = config.data.batch_size // config.train.accumulation
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    if microbatch % replicas:
        raise ValueError(
            f"data.batch_size={config.data.batch_size} over train.accumulation="
            f"{config.train.accumulation} makes {microbatch} clips at a time, which the {replicas} "
            "devices of mesh.data x mesh.fsdp can't share evenly"
        )
    return _Parts(codec, text, mesh)


class _Run:
    """The state of a run, made or restored, and what it works with."""

    def __init__(self, config: Config, parts: _Parts, folder: Path, debug: bool):
        self.config = config
        codec, text, self.mesh = parts
        self.encode = BatchEncoder(codec, text, batch_sharding(self.mesh))
        data = "random" if debug else config.data.name
        self.batches = iter(make_dataset(data, config, codec, text))
        empty = jax.device_put(empty_text(data, config, text), replicated(self.mesh))
        self.checkpoints = Checkpointer(
            folder / "checkpoints", config.train.save_every, config.train.keep_last
        )
        self.state = self._restore_or_init()
        self.step = int(self.state.step)
        self.log = Log(config, folder, self.step)
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        step_fn = jax.jit(
            make_train_step(config),
            donate_argnums=0,
            out_shardings=(shardings, replicated(self.mesh)),
        )
        self.train_step = lambda state, latent, text: step_fn(state, latent, text, empty)

    def _restore_or_init(self) -> TrainState:
        config = self.config
        abstract = jax.eval_shape(lambda: init_state(config))
        shardings = state_shardings(self.mesh, abstract, abstract_params(config.model))
        if self.checkpoints.latest_step() is None:
            return self._first_state(shardings)
        wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        state, data_state, _ = self.checkpoints.restore(wanted)
        self.batches.set_state(data_state)
        return state

    def _first_state(self, shardings: TrainState) -> TrainState:
        """The state at step 0, from `init_from` where it is given; LaCT's new parameters, which a
        plain Wan does not have, are drawn from the run's seed."""
        config = self.config
        if not config.init_from:
            return jax.jit(lambda: init_state(config), out_shardings=shardings)()
        placed = merge(shardings.params, shardings.frozen)
        key = jax.random.key(config.seed)
        params = load_dit(config.init_from, config.model, placed, key)
        make = jax.jit(lambda p: init_state(config, p), out_shardings=shardings, donate_argnums=0)
        return make(params)

    def loop(self, interrupt) -> None:
        """Steps until done or interrupted; saves on the way and at the end."""
        steps = self.config.train.steps
        for batch in self._until(steps, interrupt):
            self.state, metrics = self.train_step(self.state, *self.encode(batch))
            self.step += 1
            self.log.push(self.step, metrics)
            self._save(force=self.step == steps)
        self._save(force=True)

    def _until(self, steps: int, interrupt) -> Iterator[Mapping[str, Any]]:
        while self.step < steps and not interrupt.requested:
            yield next(self.batches)

    def _save(self, force: bool) -> None:
        if not (force or self.checkpoints.should_save(self.step)):
            self.checkpoints.check()
            return
        self.log.flush()  # a resume keeps the metrics up to the checkpoint's step
        meta = {"step": self.step}
        self.checkpoints.save(self.step, self.state, self.batches.get_state(), meta, force=True)

    def close(self) -> None:
        """Lets the last checkpoint finish and closes the log."""
        try:
            self.checkpoints.close()
        finally:
            self.log.close()


def check_sizes(config: Config, codec: encoders.VideoCodec, text: encoders.TextEncoder) -> None:
    """Raises ValueError unless frames, chunks, patches, codec and text encoder fit each other."""
    data, model, frames = config.data, config.model, config.objective.frames_per_chunk
    stride, time_stride = codec.spatial_stride, codec.temporal_stride
    for side, patch in zip(("height", "width"), model.patch_size[1:], strict=True):
        size, multiple = getattr(data, side), stride * patch
        if size % multiple:
            below, above = size // multiple * multiple, (size // multiple + 1) * multiple
            raise ValueError(
                f"data.{side}={size} is not a multiple of {multiple} (codec stride {stride} x "
                f"patch {patch}): use {f'{below} or ' if below else ''}{above}"
            )
    if (data.num_frames - 1) % time_stride:
        raise ValueError(
            f"data.num_frames={data.num_frames} is not 1 + {time_stride}k: use "
            f"{1 + (data.num_frames - 1) // time_stride * time_stride}"
        )
    latent_frames = 1 + (data.num_frames - 1) // time_stride
    split_chunks(np.zeros((1, latent_frames, 1, 1, 1)), frames)
    if frames % model.patch_size[0]:
        raise ValueError(
            f"objective.frames_per_chunk={frames} is not a multiple of model.patch_size[0]="
            f"{model.patch_size[0]}"
        )
    if codec.latent_channels != model.latent_channels:
        raise ValueError(
            f"model.latent_channels={model.latent_channels}, but codec {config.codec.name!r} makes "
            f"{codec.latent_channels} channels"
        )
    if text.text_dim != model.text_dim or text.text_len > model.text_len:
        raise ValueError(
            f"model.text_len={model.text_len}, model.text_dim={model.text_dim}, but text encoder "
            f"{config.text.name!r} makes {text.text_len} tokens of width {text.text_dim}"
        )
