"""The training run: data in, checkpoints and metrics out, and a resume that changes nothing."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lact_jax import data_position, distributed, encoders, wandb_run
from lact_jax.batch_encoder import BatchEncoder
from lact_jax.checkpoint import Checkpointer
from lact_jax.checkpoint_tree import CheckpointError
from lact_jax.config import Config
from lact_jax.convert.load import load_dit
from lact_jax.data import empty_text, make_dataset
from lact_jax.interrupt import leave_on_signal, of_all_processes
from lact_jax.models.dit import abstract_params
from lact_jax.optim import merge
from lact_jax.sharding import batch_sharding, make_mesh, replicated, state_shardings
from lact_jax.sizes import check_shares, check_sizes
from lact_jax.train_state import TrainState, init_state, jit_train_step
from lact_jax.training_log import Log, NoLog, step_work
from lact_jax.watch import Watch
from lact_jax.workdir import open_workdir

# What may change between two starts of one run without making it another run.
MAY_DIFFER = (
    "train.steps", "train.save_every", "train.keep_last", "train.log_every", "train.plot_every",
    "data.num_threads", "data.num_workers", "data.cache_in_memory", "data.path",
    "data.max_bad_files", "sample.*", "validation.every", "validation.sample_every",
    "validation.prompts*", "tensorboard.*", "wandb.*", "mesh.*", "distributed.*", "init_from",
    "codec.options.path", "text.options.path", "text.options.cache_dir",
)  # fmt: skip


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
    with leave_on_signal() as own:
        distributed.start(config.distributed)
        interrupt = of_all_processes(own)
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
                    run.close_after_error()
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
    wandb_run.check(config.wandb)
    mesh = make_mesh(config.mesh)
    check_shares(config, codec, mesh)
    if config.model.unroll_layers and mesh.size > 1:
        raise ValueError(
            f"model.unroll_layers=True trains on one device, the mesh has {mesh.size}: set it to "
            "False, or let JAX see one (CUDA_VISIBLE_DEVICES=0)"
        )
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
        codec, text, self.mesh = parts
        cut, replicas = batch_sharding(self.mesh), self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        self.share = distributed.share_of_batch(cut, replicas)
        shared = dataclasses.replace(config.data, share=self.share)
        self.config = config = dataclasses.replace(config, data=shared)
        self.encode = BatchEncoder(codec, text, cut)
        self.data = data = "random" if debug else config.data.name
        self.batches = iter(make_dataset(data, config, codec, text))
        empty = jax.device_put(empty_text(data, config, text), replicated(self.mesh))
        self.checkpoints = Checkpointer(
            folder / "checkpoints", config.train.save_every, config.train.keep_last
        )
        self.state = self._restore_or_init()
        self.step = int(self.state.step)
        self.watch = Watch(
            config, data, codec, text, self.encode, self.mesh, folder, self.step, debug=debug
        )
        work = functools.cache(lambda size: step_work(config, size, self.mesh.devices))
        self.log = Log(config, folder, self.step, work) if distributed.is_main() else NoLog()
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        step_fn = jit_train_step(config, self.mesh, (shardings, replicated(self.mesh)))
        self.train_step = lambda state, latent, text: step_fn(state, latent, text, empty)

    def _restore_or_init(self) -> TrainState:
        config = self.config
        init = functools.partial(init_state, config)  # one function: traced once
        abstract = jax.eval_shape(init)
        shardings = state_shardings(self.mesh, abstract, abstract_params(config.model))
        if self.checkpoints.latest_step() is None:
            return self._first_state(init, shardings)
        wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        state, data_state, meta = self.checkpoints.restore(wanted)
        readers, step = meta.get("readers", 1), meta["step"]
        data_position.restore(self.batches, data_state, readers, step, self.data, self.share)
        return state

    def _first_state(self, init: Callable[..., TrainState], shardings: TrainState) -> TrainState:
        """The state at step 0, from `init_from` where it is given; LaCT's new parameters, which a
        plain Wan does not have, are drawn from the run's seed."""
        config = self.config
        if not config.init_from:
            return jax.jit(init, out_shardings=shardings)()
        placed = merge(shardings.params, shardings.frozen)
        key = jax.random.key(config.seed)
        params = load_dit(config.init_from, config.model, placed, key)
        return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)

    def loop(self, interrupt) -> None:
        """Steps until done or interrupted; saves on the way and at the end."""
        steps = self.config.train.steps
        if self.step and distributed.is_main():
            done = "is the last: a larger train.steps goes on"
            rest = f"of {steps}" if self.step < steps else done
            print(f"found a checkpoint: step {self.step} {rest}", flush=True)
        self._look(interrupt)  # at what a kill or Ctrl-C left to do
        if self.step < steps and distributed.is_main():
            print("compiling the training step: minutes for a large model", flush=True)
        for batch in self._until(steps, interrupt):
            latent, text = self.encode(batch)
            self.state, metrics = self.train_step(self.state, latent, text)
            self.step += 1
            self.log.push(self.step, metrics, latent.shape[1:4])
            self._save(force=self.step == steps)
            self._look(interrupt)
        self._save(force=True)

    def _until(self, steps: int, interrupt) -> Iterator[Mapping[str, Any]]:
        while self.step < steps and not interrupt.requested:
            yield next(self.batches)

    def _look(self, interrupt) -> None:
        self.watch.look(self.step, self.state, self.log, lambda: interrupt.requested)

    def _save(self, force: bool) -> None:
        if not (force or self.checkpoints.should_save(self.step)):
            self.checkpoints.check()
            return
        self.log.flush()  # a resume keeps the metrics up to the checkpoint's step
        readers = self.share[1]
        meta = {"step": self.step} | ({"readers": readers} if readers > 1 else {})
        position = data_position.gather(self.batches.get_state(), self.share)
        self.checkpoints.save(self.step, self.state, position, meta, force=True)

    def close(self) -> None:
        """Lets the last checkpoint finish and closes the log."""
        try:
            self.checkpoints.close()
        finally:
            self.log.close()

    def close_after_error(self) -> None:
        """As `close`; with other processes it does not wait for them, who may be gone: a checkpoint
        that is not complete yet won't be."""
        self.log.close() if distributed.several() else self.close()
