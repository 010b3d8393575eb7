"""The folder of one run: its config, written once and compared ever after, and a lock.

    <workdir>/config.json   the config of the run
    <workdir>/.lock         held while a process trains here

A workdir belongs to one config: resumed with another learning rate it would hold a run that neither
config describes. Keys that don't change what is computed (how many steps, how often to save, where
to log) may differ, and are then updated.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lact_jax import distributed

_NO_RUN = ("config.json", ".lock", "wandb", "wandb_id.txt")  # may be there before a run is
_OF_A_PROCESS = "distributed.*"  # config keys that differ between the processes of a run


class WorkdirError(RuntimeError):
    """The workdir is another run's: of another config, or in use."""


@contextlib.contextmanager
def open_workdir(
    path: str | Path, config: Mapping[str, Any], may_differ: Collection[str] = ()
) -> Iterator[Path]:
    """Makes or reopens the folder and holds its lock inside the block.

    Of several processes the first does; the others come to the block after it.

    Args:
      config: nested dicts of JSON values (tuples count as lists).
      may_differ: dotted keys as shell patterns ("train.steps", "wandb.*") that may change from one
        start to the next.

    Yields:
      The absolute path of the folder.

    Raises:
      WorkdirError: the folder holds another config (lists every key with both values) or a damaged
        one, or another process has it open (names it).
      ValueError: a config value that JSON can't hold, named by its key.
      NotADirectoryError: `path` is a file.
      In a run of several processes also WorkdirError: this process has another config than process
        0, or does not see its folder.
    """
    new = _json_values(config)
    folder = Path(path).absolute()
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            stack.enter_context(_opened(folder, new, may_differ))
        _raise_on_other_process(folder, new)
        yield folder


@contextlib.contextmanager
def _opened(
    folder: Path, new: Mapping[str, Any], may_differ: Collection[str]
) -> Iterator[None]:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"workdir {folder} is a file: give a folder, or a new path")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        file = folder / "config.json"
        old = _read_config(file) if file.exists() else new
        _raise_on_other_config(folder, old, new, may_differ)
        is_first = not file.exists()
        if is_first or old != new:
            write_atomically(file, json.dumps(new, indent=2, sort_keys=True) + "\n")
        try:
            yield
        except BaseException:
            if is_first and not _holds_a_run(folder):
                file.unlink()  # the mended config is to start here
            raise


def _holds_a_run(folder: Path) -> bool:
    """Whether a run has written anything here but its config and what wandb keeps."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return any(
        file.stat().st_size for file in files if file.relative_to(folder).parts[0] not in _NO_RUN
    )


def write_atomically(file: Path, content: str | bytes) -> None:
    """Replaces `file` whole: a reader, or a start after a kill, finds the old or the new one.

    Raises OSError naming the file (disk full…); the old one is then still there.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with open(temporary, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except OSError as err:
        temporary.unlink(missing_ok=True)
        raise OSError(err.errno, err.strerror, str(file)) from err


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys; an empty dict stays as a value."""
    flat = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        inside = flat_config(value, f"{name}.") if isinstance(value, Mapping) else {}
        flat |= inside or {name: value}
    return flat


def _json_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as JSON gives it back. Raises ValueError naming the key of what it can't hold."""
    for key, value in flat_config(config).items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as err:
            raise ValueError(
                f"config key {key} = {value!r} can't be written as JSON: {err}"
            ) from err
    return json.loads(json.dumps(config))


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as err:
        raise WorkdirError(
            f"{file} is damaged ({err}): restore it, or start in another workdir"
        ) from err


def _changed(
    old: Mapping[str, Any], new: Mapping[str, Any], may_differ: Collection[str]
) -> list[tuple[str, str, str]]:
    """(key, old value, new value) of all that differ but those that may."""
    was, now = flat_config(old), flat_config(new)
    return [
        (key, _value(was, key), _value(now, key))
        for key in sorted(was.keys() | now.keys())
        if (key in was, was.get(key)) != (key in now, now.get(key))
        and not any(fnmatchcase(key, pattern) for pattern in may_differ)
    ]


def _raise_on_other_config(
    folder: Path, old: Mapping[str, Any], new: Mapping[str, Any], may_differ: Collection[str]
) -> None:
    if changed := _changed(old, new, may_differ):
        lines = "\n".join(f"  {key}: {was} there, {now} now" for key, was, now in changed)
        free = ", ".join(sorted(may_differ)) or "nothing"
        raise WorkdirError(
            f"workdir {folder} was started with another config:\n{lines}\n"
            f"Give the values it was started with, or another workdir (may change: {free})."
        )


def _raise_on_other_process(folder: Path, new: Mapping[str, Any]) -> None:
    """Nothing in a run of one process; in others, all wait here for the first."""
    where, first = distributed.from_main([str(folder), new])
    if changed := _changed(first, new, [_OF_A_PROCESS]):
        lines = "\n".join(f"  {key}: {was} there, {now} here" for key, was, now in changed)
        raise WorkdirError(f"this process has another config than process 0:\n{lines}")
    if where != str(folder) or not (folder / "config.json").is_file():
        raise WorkdirError(
            f"this process does not see the workdir of process 0, {where}, as {folder}: all "
            "processes of a run need the same folder, on a file system that their hosts share"
        )


def _value(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "absent"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """An exclusive lock that the system drops when the process ends, however it ends."""
    with open(folder / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            lock.seek(0)
            raise WorkdirError(
                f"workdir {folder} is in use by {lock.read().strip() or 'another process'}: wait "
                f"for that run to end, stop it, or give another workdir"
            ) from err
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield
