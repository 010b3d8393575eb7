"""Checkpoints: everything a resume needs, written in the background, each step whole or absent.

On Orbax's `CheckpointManager`. A checkpoint directory holds a folder per step with three items:

    <directory>/<step>/state   the arrays of the train state, by tree path (checkpoint_tree.py)
    <directory>/<step>/data    JSON: the position in the data
    <directory>/<step>/meta    JSON: whatever else the run wants back

A step is written to `<step>.orbax-checkpoint-tmp` and renamed when complete: what a killed process
leaves behind is never taken for a checkpoint and is removed at the next start.
"""

import contextlib
import dataclasses
import errno
import gc
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from lact_jax import checkpoint_tree as tree
from lact_jax import distributed
from lact_jax.checkpoint_tree import CheckpointError, CheckpointMismatchError, PyTree


class CheckpointSaveError(CheckpointError):
    """Writing failed (disk full, permission…); the checkpoints before it are untouched."""


class CheckpointUnreadableError(CheckpointError):
    """A step's folder is there but its files are cut off, missing or damaged."""


@dataclasses.dataclass(frozen=True)
class KeepLastIterations(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the steps in (newest - iterations, newest], and the newest in any case.

    With a save every 1000 steps and `iterations=2000`, two checkpoints stay: the newest, and one to
    fall back on.
    """

    iterations: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """One bool per checkpoint."""
        newest = max((info.step for info in checkpoints), default=0)
        return [info.step > newest - max(self.iterations, 1) for info in checkpoints]


class Checkpointer:
    """Saves and restores train states in one directory.

    Args:
      directory: made if it is not there. For one process (or one multi-process job) at a time.
      save_every: steps between saves; `save` does nothing at other steps unless forced.
      keep_last_iterations: see `KeepLastIterations`; None keeps every checkpoint.
      async_: write in a background thread. `save` then returns once the arrays are copied to host
        memory (so the caller may donate them to its next step), and a failure to write is raised by
        the next `save`, `check`, `wait` or `close`.
    """

    def __init__(
        self,
        directory: str | Path,
        save_every: int,
        keep_last_iterations: int | None,
        async_: bool = True,
    ):
        if save_every < 1:
            raise ValueError(f"save_every is {save_every}: it is a number of steps, at least 1")
        self.directory = Path(directory).absolute()
        self.save_every = save_every
        keeps_all = keep_last_iterations is None
        self._manager = tree.open_manager(
            self.directory,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=async_,
            preservation_policy=None if keeps_all else KeepLastIterations(keep_last_iterations),
        )
        self._writing: int | None = None
        self._failure: str | None = None
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_no_orbax_traceback)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def should_save(self, step: int) -> bool:
        """Whether `save(step, …)` would write without being forced."""
        return step % self.save_every == 0

    def save(
        self,
        step: int,
        state: PyTree,
        data_state: Mapping[str, Any],
        meta: Mapping[str, Any],
        force: bool = False,
    ) -> bool:
        """Writes a checkpoint if `step` is a multiple of `save_every` (or `force`).

        Args:
          state: any tree of jax or numpy arrays, typed random keys included.
          data_state, meta: JSON values, given back equal (no tuples, no NaN, string keys only). The
            main process's are written: those of several processes must be the same.

        Returns:
          True if a checkpoint was begun; False if none was due or the step is already there (a run
          that ends, or is interrupted, on a step it has just saved).

        Raises:
          ValueError: a leaf or a JSON value that would not come back the same, or checkpoints of
            later steps in the directory (a resume would take those for the newest).
          CheckpointSaveError: this save failed, or the one before it did in the background.
        """
        if not (force or self.should_save(step)):
            self.check()
            return False
        self.wait()
        steps = distributed.from_main(self.all_steps())
        if step in steps:
            return False
        if steps and steps[-1] > step:
            raise ValueError(
                f"{self.directory} already holds step {steps[-1]}, later than step {step}: a "
                f"resume would continue from there. Move it away or use another workdir."
            )
        arrays = tree.savable(state)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays),
            data=ocp.args.JsonSave(_json_copy("data_state", data_state)),
            meta=ocp.args.JsonSave(_json_copy("meta", meta)),
        )
        self._writing = step
        n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        self._report_failure(lambda: _require_space(self.directory, n_bytes))
        return self._report_failure(lambda: self._manager.save(step, args=args, force=True))

    def restore(
        self, abstract_state: PyTree | None = None, step: int | None = None
    ) -> tuple[PyTree, dict[str, Any], dict[str, Any]]:
        """Reads a checkpoint, the newest complete one by default.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct` (or arrays) with the shapes, dtypes and
            shardings to restore to; a leaf without a sharding goes to the first device. None: a
            nested dict of numpy arrays (keyed by path), as stored.

        Returns:
          (state, data_state, meta), the state in the tree of `abstract_state`.

        Raises:
          FileNotFoundError: no checkpoint, or not this step.
          CheckpointMismatchError: other arrays, shapes or dtypes than asked for; lists all paths.
          CheckpointUnreadableError: damaged files; names the folder and the next older step.
        """
        self.wait()
        step = distributed.from_main(_existing_step(self.directory, step))
        with _reading_errors(self.directory, step):
            saved = tree.saved_layout(self._manager, step)
            if abstract_state is None:
                state = unflatten_dict(tree.read_arrays(self._manager, step, saved), sep="/")
            else:
                wanted = tree.leaves_by_path(abstract_state)
                arrays = tree.read_checked(self._manager, step, saved, wanted)
                state = jax.tree.unflatten(
                    jax.tree.structure(abstract_state), [arrays[path] for path in wanted]
                )
            json_args = {name: ocp.args.JsonRestore() for name in ("data", "meta")}
            read = self._manager.restore(step, args=ocp.args.Composite(**json_args))
        return state, read.data, read.meta

    def all_steps(self) -> list[int]:
        """The complete checkpoints on disk, oldest first."""
        return complete_steps(self.directory)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint on disk, as process 0 sees it; None if there is none."""
        return max(distributed.from_main(self.all_steps()), default=None)

    def check(self) -> None:
        """Raises CheckpointSaveError if a background save has failed; does not wait for one."""
        if self._failure or not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written; raises CheckpointSaveError if that failed."""
        self._report_failure(lambda: self._manager.wait_until_finished())

    def close(self) -> None:
        """Waits and releases the threads. After a failure that was raised it does nothing."""
        if not self._failure:
            self.wait()
            self._manager.close()

    def _report_failure(self, action: Callable[[], Any]) -> Any:
        """Runs `action`; its error becomes a CheckpointSaveError, raised by later calls too."""
        if not self._failure:
            try:
                return action()
            except Exception as err:  # TensorStore's write errors have no narrower class
                cause = _shortened(err)
            # Not chained, and without the manager (which holds the error), so that the writes Orbax
            # left pending are collected now: at exit they would print pages after our message.
            self._manager = None
            gc.collect()
            steps = self.all_steps()
            kept = f"The complete checkpoints {steps} are kept." if steps else "None is there yet."
            self._failure = (
                f"the checkpoint of step {self._writing} could not be written to {self.directory}: "
                f"{cause}. {kept} Make room and start again: what is half-written is removed, and "
                f"the run goes on from the newest complete checkpoint."
            )
        raise CheckpointSaveError(self._failure)


def complete_steps(directory: str | Path) -> list[int]:
    """Steps with a complete checkpoint in `directory`, oldest first; [] if it does not exist."""
    directory = Path(directory)
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []


def restore_params(
    directory: str | Path,
    step: int | None = None,
    which: Literal["ema", "params"] = "ema",
    abstract_params: PyTree | None = None,
) -> PyTree:
    """Reads a model's parameters alone (for sampling): no optimiser state is touched.

    The stored state must have the fields of TrainState: `params` (trainable), `ema` (same tree) and
    `frozen` (the rest). The directory is opened read-only, so a run that is training there is not
    disturbed.

    Args:
      step: the newest complete one by default.
      which: whether the trainable parameters are taken averaged, from `ema`, or raw, from `params`.
      abstract_params: the merged tree with shapes, dtypes and shardings, as for
        `Checkpointer.restore`. None: numpy arrays in a nested dict, whose keys made of digits are
        ints again (so NNX writes positions in a list).

    Returns:
      `which` and `frozen` merged into one tree: the whole model.

    Raises:
      As `Checkpointer.restore`; CheckpointMismatchError also if the state has no such field.
    """
    directory = Path(directory).absolute()
    step = distributed.from_main(_existing_step(directory, step))
    manager = tree.open_manager(directory, read_only=True, save_interval_steps=0, create=False)
    with contextlib.closing(manager), _reading_errors(directory, step):
        layout = tree.saved_layout(manager, step)
        if which not in ("ema", "params") or not any(p.startswith(which + "/") for p in layout):
            held = {path.split("/")[0] for path in layout}
            choices = " or ".join(map(repr, sorted(held & {"ema", "params"}))) or "another folder"
            raise CheckpointMismatchError(
                f"{directory / str(step)} holds no parameters {which!r}: choose {choices} "
                f"(it holds {sorted(held)})"
            )
        saved = {p: leaf for p, leaf in layout.items() if p.split("/")[0] in (which, "frozen")}
        if abstract_params is None:
            arrays = tree.read_arrays(manager, step, saved)
            return unflatten_dict({_model_keys(path): x for path, x in arrays.items()})
        on_disk = {path.partition("/")[2]: path for path in saved}
        wanted = {
            on_disk.get(path, f"{which}/{path}"): leaf
            for path, leaf in tree.leaves_by_path(abstract_params).items()
        }
        arrays = tree.read_checked(manager, step, saved, wanted)
        return jax.tree.unflatten(
            jax.tree.structure(abstract_params), [arrays[path] for path in wanted]
        )


def _model_keys(path: str) -> tuple[str | int, ...]:
    """ "ema/blocks/0/w" → ("blocks", 0, "w")."""
    return tuple(int(key) if key.isdigit() else key for key in path.split("/")[1:])


def _json_copy(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that later changes can't reach. Raises ValueError if it isn't equal after JSON."""
    try:
        copy = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as err:
        raise ValueError(f"{name} can't be written as JSON: {err}") from err
    if copy != value:
        raise ValueError(
            f"{name} changes in JSON, from {value} to {copy}: use lists and string keys"
        )
    return copy


def _existing_step(directory: Path, step: int | None) -> int:
    steps = complete_steps(directory)
    if not steps:
        raise FileNotFoundError(f"no complete checkpoint in {directory}")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {directory}: it holds {steps}")
    return steps[-1] if step is None else step


@contextlib.contextmanager
def _reading_errors(directory: Path, step: int) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise on damaged files into CheckpointUnreadableError."""
    try:
        yield
    except (CheckpointError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # the files are not to blame
    except Exception as err:  # TensorStore's read errors have no narrower class
        older = [s for s in complete_steps(directory) if s < step]
        then = (
            f"the next older complete checkpoint is step {older[-1]}"
            if older
            else "no older checkpoint is there, so the run would start from the beginning"
        )
        raise CheckpointUnreadableError(
            f"checkpoint {directory / str(step)} is damaged (files cut off or missing): "
            f"{_shortened(err)}. Move this folder out of {directory} and start again; {then}."
        ) from err


def _require_space(directory: Path, n_bytes: int) -> None:
    """Raises OSError if `n_bytes` surely don't fit; better than filling the disk for everyone."""
    free = shutil.disk_usage(directory).free
    if free < n_bytes:
        raise OSError(
            errno.ENOSPC, f"{n_bytes / 2**20:.1f} MiB to write, {free / 2**20:.1f} MiB free on disk"
        )


def _shortened(err: BaseException) -> str:
    """Class, start of the first line, and the system's reason if TensorStore quotes one."""
    line = next(iter(str(err).strip().splitlines()), "")
    code = re.search(r"os_error_code='(\d+)'", str(err))
    reason = f" ({os.strerror(int(code[1]))})" if code else ""
    return f"{type(err).__name__}: {line[:240]}{'…' * (len(line) > 240)}{reason}"


def _is_no_orbax_traceback(record: logging.LogRecord) -> bool:
    """Drops the tracebacks that a failed save logs many times over: the error is raised as well."""
    return not (record.exc_info and "orbax" in record.pathname + record.getMessage())
