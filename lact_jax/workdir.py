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


class WorkdirError(RuntimeError):
    """The workdir is another run's: of another config, or in use."""


@contextlib.contextmanager
def open_workdir(
    path: str | Path, config: Mapping[str, Any], may_differ: Collection[str] = ()
) -> Iterator[Path]:
    """Makes or reopens the folder and holds its lock inside the block.

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
    """
    folder = Path(path).absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"workdir {folder} is a file: give a folder, or a new path")
    new = _json_values(config)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        file = folder / "config.json"
        old = _read_config(file) if file.exists() else new
        _raise_on_other_config(folder, old, new, may_differ)
        if not file.exists() or old != new:
            write_atomically(file, json.dumps(new, indent=2, sort_keys=True) + "\n")
        yield folder


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


def _raise_on_other_config(
    folder: Path, old: Mapping[str, Any], new: Mapping[str, Any], may_differ: Collection[str]
) -> None:
    was, now = flat_config(old), flat_config(new)
    changed = [
        key
        for key in sorted(was.keys() | now.keys())
        if (key in was, was.get(key)) != (key in now, now.get(key))
        and not any(fnmatchcase(key, pattern) for pattern in may_differ)
    ]
    if changed:
        lines = "\n".join(f"  {k}: {_value(was, k)} there, {_value(now, k)} now" for k in changed)
        free = ", ".join(sorted(may_differ)) or "nothing"
        raise WorkdirError(
            f"workdir {folder} was started with another config:\n{lines}\n"
            f"Give the values it was started with, or another workdir (may change: {free})."
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
