"""A folder that appears whole or not at all, and the manifest that says what is in it."""

import contextlib
import fcntl
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lact_jax.convert.components import read_json
from lact_jax.convert.errors import ConversionError

MANIFEST = "manifest.json"
WRITTEN_BY = "lact_jax.convert"
_LOCK = "lock"
_OLD = "overwritten"


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes the manifest; the last file of a conversion."""
    text = json.dumps({"written_by": WRITTEN_BY, "version": 1, **content}, indent=2)
    (folder / MANIFEST).write_text(text + "\n")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a converted folder.

    Raises FileNotFoundError or ConversionError when the folder isn't one.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: not a converted checkpoint (no {MANIFEST} in it). Make one with "
            "python convert_wan_weights.py --src=CHECKPOINT --dst=FOLDER"
        )
    manifest = read_json(path)
    if manifest.get("written_by") != WRITTEN_BY or manifest.get("version") != 1:
        raise ConversionError(f"{path}: not written by this version of convert_wan_weights.py")
    return manifest


def _prefix(dst: Path) -> str:
    return f".{dst.name}.unfinished-"


def check_free(dst: Path, overwrite: bool) -> None:
    """Raises FileExistsError unless `dst` may be written.

    What is overwritten must itself be a finished conversion: never any other folder.
    """
    if not dst.exists():
        return
    if not overwrite:
        raise FileExistsError(f"--dst={dst} exists: give another, or --overwrite")
    if dst.is_dir() and not any(dst.iterdir()):
        return
    try:
        read_manifest(dst)
    except (FileNotFoundError, NotADirectoryError, ConversionError) as error:
        raise FileExistsError(
            f"--dst={dst} is not a folder that a conversion wrote, so --overwrite leaves it alone; "
            "move it away or give another"
        ) from error


def remove_leftovers(dst: Path) -> list[Path]:
    """Removes what interrupted conversions to `dst` left; returns the folders that went.

    A folder that was being overwritten, and had been moved aside, is put back first.

    Raises ConversionError if one is still being written.
    """
    removed = []
    for folder in sorted(dst.parent.glob(f"{_prefix(dst)}*")):
        with contextlib.ExitStack() as stack:
            lock = folder / _LOCK
            if lock.exists() and not _try_lock(stack.enter_context(lock.open("w"))):
                raise ConversionError(f"another conversion to {dst} is running (in {folder})")
            if (folder / _OLD).exists() and not dst.exists():
                (folder / _OLD).rename(dst)
            shutil.rmtree(folder)
            removed.append(folder)
    return removed


def _try_lock(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def new_folder(dst: Path) -> Iterator[Path]:
    """A folder to write into; it takes `dst`'s place when the block ends, and is gone if it raises.

    It lies beside `dst` under a name of its own. If the process is killed, it stays there under
    that name, and `remove_leftovers` finds it.
    """
    dst.parent.mkdir(parents=True, exist_ok=True)
    outer = Path(tempfile.mkdtemp(prefix=_prefix(dst), dir=dst.parent))
    try:
        with (outer / _LOCK).open("w") as lock:
            _try_lock(lock)
            inner = outer / "folder"
            inner.mkdir()
            yield inner
            _put_in_place(inner, dst, outer / _OLD)
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def _put_in_place(new: Path, dst: Path, old: Path) -> None:
    if dst.exists():
        dst.rename(old)
    try:
        new.rename(dst)
    except OSError:
        if old.exists():
            old.rename(dst)
        raise


@contextlib.contextmanager
def prepared_folder(
    dst: str | Path | None, overwrite: bool, nbytes: int, log: Callable[[str], None]
) -> Iterator[Path]:
    """`new_folder` after its checks: `dst` free, leftovers removed and logged, room on the disk.

    Raises FileExistsError, ConversionError or OSError, saying what to do.
    """
    if dst is None:
        raise ConversionError("--dst is missing: give the folder to make, or --dry_run")
    dst = Path(dst)
    for folder in remove_leftovers(dst):
        log(f"removed {folder}, left by an interrupted conversion")
    check_free(dst, overwrite)
    check_space(dst, nbytes)
    with new_folder(dst) as folder:
        yield folder


def check_given(dst: str | Path | None, overwrite: bool, nbytes: int) -> None:
    """What a dry run checks of a destination, where one is given. Raises as `prepared_folder`."""
    if dst is not None:
        check_free(Path(dst), overwrite)
        check_space(Path(dst), nbytes)


def check_space(dst: Path, nbytes: int) -> None:
    """Raises OSError unless `nbytes` fit on the disk of `dst`."""
    parent = next(p for p in dst.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise OSError(f"--dst={dst} needs {nbytes / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
