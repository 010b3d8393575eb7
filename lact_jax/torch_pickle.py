"""Reads PyTorch `.pth` / `.pt` files without PyTorch, and without running anything in them.

`torch.save` writes a zip file: `data.pkl` is a pickle of the saved object, in which each tensor is
a call of `torch._utils._rebuild_tensor_v2` on a storage named by a persistent id, and `data/<key>`
holds the raw, uncompressed bytes of one storage. A pickle can call any function it can name. Here
it can name only the few of `_GLOBALS`, each of which stands for an inert placeholder; any other
name is an error. Tensors are views into the memory-mapped file, so that a 28 GB checkpoint costs
no more memory than the one tensor that is being looked at.

None of the libraries on the package index fits: those that need no PyTorch read every storage into
memory, or let the pickle import what it likes.
"""

import io
import math
import mmap
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MAX_DEPTH = 32
_MAX_ENTRIES = 1_000_000
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError,
    OverflowError, MemoryError, RecursionError,
)  # fmt: skip


# What a pickle gets hold of below it can also try to alter (the BUILD opcode). So these have no
# attributes to set: tuples, and classes with empty slots.
class _StorageType(NamedTuple):
    dtype: np.dtype


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    count: int


class TensorInfo(NamedTuple):
    """Where one tensor lies: strides and offset count elements of its storage `key`."""

    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage_count: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _naturals(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(v) is int and v >= 0 for v in values):
        raise ValueError(f"a tensor's {what} is {values!r}, not a tuple of integers >= 0")
    return values


class _RebuildTensor:
    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, requires_grad=False, hooks=None, meta=None):
        if not isinstance(storage, _Storage):
            raise ValueError(f"a tensor is built from {storage!r}, not from a storage")
        shape, strides = _naturals(shape, "shape"), _naturals(strides, "strides")
        (offset,) = _naturals((offset,), "offset")
        if len(shape) != len(strides):
            raise ValueError(f"a tensor's shape {shape} and strides {strides} differ in length")
        last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if 0 not in shape and offset + last >= storage.count:
            raise ValueError(
                f"a tensor of shape {shape}, strides {strides}, offset {offset} reaches out of "
                f"its storage {storage.key} of {storage.count} elements"
            )
        return TensorInfo(storage.key, storage.dtype, shape, strides, offset, storage.count)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, data, requires_grad=False, hooks=None):
        return data


class _Dict(dict):
    __slots__ = ()

    def __setstate__(self, state):
        """Drops the attributes of a state dict: `_metadata`, its modules' version numbers."""


_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
}
# All that a state dict needs.
_GLOBALS: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{("torch", name): _StorageType(np.dtype(dtype)) for name, dtype in _STORAGES.items()},
}


class _ForbiddenGlobal(Exception):
    """The pickle names something outside `_GLOBALS`."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise _ForbiddenGlobal(f"{module}.{name}")
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType(dtype), str(key), str(), int(count)) if count >= 0:
                return _Storage(key, dtype, count)
        raise ValueError(f"persistent id {pid!r} is not a tensor storage")


@dataclass(frozen=True)
class TorchFile:
    """An opened file. `tensors` and `scalars` are by dotted name, in the file's order.

    Nested containers are flattened: {"model": {"w": …}, "steps": [3]} gives the tensor "model.w"
    and the scalar "steps.0". `keys` and `get_tensor` are as in safetensors' `safe_open`.
    """

    path: str
    tensors: Mapping[str, TensorInfo]
    scalars: Mapping[str, Any]
    _storages: Mapping[str, memoryview]

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_tensor(self, name: str) -> np.ndarray:
        """The tensor as a read-only view into the mapped file; strides as saved.

        Raises KeyError for an unknown name.
        """
        if name not in self.tensors:
            raise KeyError(f"{self.path}: no tensor {name!r}")
        info = self.tensors[name]
        size = info.dtype.itemsize
        return np.ndarray(
            info.shape,
            info.dtype,
            buffer=self._storages[info.key],
            offset=info.offset * size if info.nbytes else 0,
            strides=tuple(size * s for s in info.strides),
        )


def open_torch(path: str | os.PathLike) -> TorchFile:
    """Opens a `.pth` / `.pt` file: reads its index, maps the rest. Nothing in it is executed.

    Raises FileNotFoundError; ValueError, always naming the file, when it is truncated or damaged,
    not a zip file of PyTorch's, or when its pickle wants anything but the tensors, containers and
    plain values of a state dict.
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        _check_magic(path, file.read(len(_LEGACY_MAGIC)))
        try:
            archive = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path}: truncated or damaged (no directory at its end)") from error
        with archive:
            members = {info.filename: info for info in archive.infolist()}
            root = _root(path, members)
            order = members.get(f"{root}/byteorder")
            if order is not None and _read_member(path, archive, order) != b"little":
                raise ValueError(f"{path}: saved on a big-endian machine, which is not supported")
            saved = _unpickle(path, _read_member(path, archive, members[f"{root}/data.pkl"]))
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    tensors, scalars = _flatten(path, saved)
    storages = _map_storages(path, f"{root}/data", tensors, members, mapped)
    return TorchFile(path, tensors, scalars, storages)


def _map_storages(path, folder, tensors, members, mapped) -> dict[str, memoryview]:
    storages = {}
    for name, info in tensors.items():
        if info.key not in storages:
            member = members.get(f"{folder}/{info.key}")
            if member is None:
                raise ValueError(f"{path}: storage {info.key} of tensor {name} is missing")
            storages[info.key] = _member_bytes(path, mapped, member)
        if len(storages[info.key]) < info.storage_count * info.dtype.itemsize:
            raise ValueError(
                f"{path}: storage {info.key} of tensor {name} has {len(storages[info.key])} bytes, "
                f"its {info.storage_count} elements of {info.dtype} need more"
            )
    return storages


def _check_magic(path: str, start: bytes) -> None:
    if start.startswith(_ZIP_MAGIC):
        return
    if start == _LEGACY_MAGIC:
        raise ValueError(
            f"{path}: in PyTorch's format from before 1.6, which can't be read without executing "
            "it; rewrite it with torch.save(torch.load(path, weights_only=True), new_path)"
        )
    if start.startswith(b"version https:"):
        raise ValueError(f"{path}: a git-lfs pointer, not the file itself; run git lfs pull")
    raise ValueError(f"{path}: not a file written by torch.save (it starts with {start!r})")


def _root(path: str, members: Mapping[str, zipfile.ZipInfo]) -> str:
    roots = [name[: -len("/data.pkl")] for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"{path}: a zip file, but not of torch.save (no data.pkl in its folder)")
    if f"{roots[0]}/constants.pkl" in members:
        raise ValueError(f"{path}: a TorchScript program; save its state_dict() with torch.save")
    return roots[0]


def _read_member(path: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path}: {member.filename} is compressed, which torch.save never does")
    try:
        return archive.read(member)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{path}: {member.filename} is truncated or damaged: {error}") from error


def _member_bytes(path: str, mapped: memoryview, member: zipfile.ZipInfo) -> memoryview:
    """The bytes of an uncompressed member, found through its local header (which torch pads)."""
    header = mapped[member.header_offset : member.header_offset + _LOCAL_HEADER.size]
    if member.compress_type != zipfile.ZIP_STORED or len(header) != _LOCAL_HEADER.size:
        raise ValueError(f"{path}: {member.filename} is compressed or cut off")
    magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    start = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if magic != _ZIP_MAGIC or start + member.file_size > len(mapped):
        raise ValueError(f"{path}: {member.filename} is truncated or damaged")
    return mapped[start : start + member.file_size]


def _unpickle(path: str, data: bytes) -> Any:
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except _ForbiddenGlobal as error:
        raise ValueError(
            f"{path}: refused, its pickle wants to use {error}. Only tensors, dicts, lists and "
            "plain values are read (nothing was executed); save a plain state_dict instead"
        ) from error
    except _UNPICKLING_ERRORS as error:
        raise ValueError(f"{path}: damaged index (data.pkl): {error}") from error


def _flatten(path: str, saved: Any) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    tensors, scalars = {}, {}
    for name, leaf in _leaves(path, saved, "", 0):
        if len(tensors) + len(scalars) >= _MAX_ENTRIES:
            raise ValueError(f"{path}: more than {_MAX_ENTRIES} entries; this is no state dict")
        if name in tensors or name in scalars:
            raise ValueError(f"{path}: two entries have the dotted name {name!r}")
        if isinstance(leaf, TensorInfo):
            tensors[name] = leaf
        elif isinstance(leaf, _SCALARS):
            scalars[name] = leaf
        else:
            raise ValueError(f"{path}: {name!r} is neither a tensor nor a plain value: {leaf!r}")
    return tensors, scalars


def _leaves(path: str, node: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > _MAX_DEPTH:
        raise ValueError(f"{path}: {name[:80]!r} is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list | tuple) and not isinstance(node, TensorInfo):
        children = enumerate(node)
    else:
        yield name, node
        return
    for key, child in children:
        yield from _leaves(path, child, f"{name}.{key}" if depth else str(key), depth + 1)
