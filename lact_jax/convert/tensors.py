"""Tensors of safetensors and .pth files under their names: shape and dtype now, content later."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lact_jax.convert.errors import ConversionError, in_few_lines
from lact_jax.torch_pickle import open_torch

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What wraps a module in training leaves its name somewhere in the tensors' names.
_WRAPPERS = {"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod", "module"}


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a file. `dtype` is None where it is none of float64, 32, 16 and bfloat16."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype | None
    read: Callable[[], np.ndarray]


def shard_files(folder: Path, stem: str) -> tuple[Path, ...]:
    """The files of a checkpoint `stem`.safetensors, single or sharded; () if there is none.

    Raises ConversionError listing the shards that are missing.
    """
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if index.is_file():
        files = sorted({folder / name for name in _weight_map(index).values()})
    elif single.is_file():
        return (single,)
    else:
        shards = re.compile(re.escape(stem) + r"-\d+-of-(\d+)\.safetensors")
        found = [m for f in folder.glob(f"{stem}-*") if (m := shards.fullmatch(f.name))]
        total = max((m[1] for m in found), key=int, default="0")
        width = len(total)
        files = [
            folder / f"{stem}-{i:0{width}d}-of-{total}.safetensors"
            for i in range(1, int(total) + 1)
        ]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ConversionError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing)}. "
            "Download them again"
        )
    return tuple(files)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return {str(name): Path(file).name for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{index}: damaged, or not a safetensors index: {error}") from error


def open_tensors(files: Iterable[Path]) -> dict[str, TensorRef]:
    """Every tensor of the files, by its name in them. Nothing is read but headers.

    Raises ConversionError naming the file that is truncated or damaged, the tensors that two files
    hold, and those that an index promises of a file that lacks them.
    """
    found = [ref for file in files for ref in _OPEN[file.suffix](file)]
    twice = [name for name, count in Counter(ref.name for ref in found).items() if count > 1]
    if twice:
        where = [(r.name, f"in {r.file.name}") for r in found if r.name in twice]
        raise ConversionError("tensors in two files:\n  " + "\n  ".join(in_few_lines(where)))
    tensors = {ref.name: ref for ref in found}
    for index in {f.parent / f"{_stem(f)}.safetensors.index.json" for f in files}:
        if index.is_file():
            _check_index(index, tensors)
    return tensors


def _stem(file: Path) -> str:
    return re.sub(r"-\d+-of-\d+$", "", file.stem)


def _check_index(index: Path, tensors: dict[str, TensorRef]) -> None:
    wrong = [
        (name, f"not in {file}, where {index.name} has it")
        for name, file in _weight_map(index).items()
        if name not in tensors or tensors[name].file.name != file
    ]
    if wrong:
        raise ConversionError(f"{index.parent}:\n  " + "\n  ".join(in_few_lines(wrong)))


def _open_safetensors(path: Path) -> Iterable[TensorRef]:
    try:
        file = safe_open(path, "numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        with path.open("rb") as start:
            pointer = start.read(16).startswith(b"version https:")
        why = "a git-lfs pointer, not the file itself" if pointer else "truncated or damaged"
        raise ConversionError(f"{path}: {why} ({error})") from error
    for name, header in slices.items():
        dtype = _DTYPES.get(header.get_dtype())
        shape = tuple(header.get_shape())
        yield TensorRef(name, path, shape, dtype, lambda name=name: file.get_tensor(name))


def _open_pth(path: Path) -> Iterable[TensorRef]:
    file = open_torch(path)
    for name, info in file.tensors.items():
        dtype = info.dtype if info.dtype in _DTYPES.values() else None
        yield TensorRef(name, path, info.shape, dtype, lambda name=name: file.get_tensor(name))


_OPEN = {".safetensors": _open_safetensors, ".pth": _open_pth, ".pt": _open_pth}


def without_wrappers(tensors: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """The same tensors without what training wrapped around their names.

    Raises ConversionError listing the tensors that get the same name.
    """
    plain: dict[str, list[TensorRef]] = {}
    for name, ref in tensors.items():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        plain.setdefault(".".join(parts).removeprefix("model."), []).append(ref)
    if twice := {name: refs for name, refs in plain.items() if len(refs) > 1}:
        lines = [(name, ", ".join(ref.name for ref in refs)) for name, refs in twice.items()]
        raise ConversionError(
            "several tensors become one when their prefixes go:\n  "
            + "\n  ".join(in_few_lines(lines))
        )
    return {name: refs[0] for name, refs in plain.items()}
