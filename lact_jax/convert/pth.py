"""`.pth` files as `torch.save` writes them, tensor by tensor and without PyTorch.

The format is that of torch_pickle.py, which reads it: an uncompressed zip file with a pickle of the
state dict and the bytes of each tensor. The pickle of a dict of tensors takes a dozen opcodes,
written here one by one: `pickle.Pickler` names a function only after importing it, from torch.
"""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from lact_jax.convert.shards import Tensor, checked_bytes

# torch aligns a tensor's bytes to this, so that they can be used where they are mapped.
_ALIGNMENT = 64
_PADDING_ID = b"FB"  # of the zip extra field that torch pads with
_LOCAL_HEADER_BYTES = 30
_ZIP64_EXTRA_BYTES = 20
_PIECE_BYTES = 64 * 2**20
_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
}


def write_pth(
    path: Path, tensors: list[Tensor], on_written: Callable[[int], None] = lambda _: None
) -> None:
    """Writes a state dict of `tensors`, in their order; one at a time is in memory.

    `torch.load(path, weights_only=True)` reads it, mapped or not. `on_written(bytes)` is called
    after each tensor.
    """
    root = path.stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", _state_dict(tensors))
        archive.writestr(f"{root}/byteorder", "little")
        for i, tensor in enumerate(tensors):
            member = _aligned_member(archive, f"{root}/data/{i}", tensor.nbytes)
            with archive.open(member, "w") as file:
                data = checked_bytes(tensor)
                for start in range(0, len(data), _PIECE_BYTES):
                    file.write(data[start : start + _PIECE_BYTES])
            on_written(tensor.nbytes)
        archive.writestr(f"{root}/version", "3\n")


def _aligned_member(archive: zipfile.ZipFile, name: str, nbytes: int) -> zipfile.ZipInfo:
    """The next member's entry, with an extra field that makes its bytes start at a multiple."""
    member = zipfile.ZipInfo(name)
    # Reserves 64-bit sizes in the local header where `zipfile` would: near the format's limit.
    member.file_size = nbytes
    header = _LOCAL_HEADER_BYTES + len(name.encode()) + 2 * 2
    if nbytes * 1.05 > zipfile.ZIP64_LIMIT:
        header += _ZIP64_EXTRA_BYTES
    padding = -(archive.fp.tell() + header) % _ALIGNMENT
    member.extra = _PADDING_ID + padding.to_bytes(2, "little") + b"Z" * padding
    return member


def _state_dict(tensors: list[Tensor]) -> bytes:
    """The pickle of an OrderedDict name -> tensor, each with a storage of its own."""
    items = (
        _text(tensor.name) + _rebuilt_tensor(str(i), tensor) for i, tensor in enumerate(tensors)
    )
    return b"".join(
        [pickle.PROTO + b"\x02", _EMPTY_DICT, pickle.MARK, *items, pickle.SETITEMS, pickle.STOP]
    )


def _rebuilt_tensor(key: str, tensor: Tensor) -> bytes:
    """_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, backward_hooks)."""
    count = int(np.prod(tensor.shape))
    strides = [int(np.prod(tensor.shape[i + 1 :])) for i in range(len(tensor.shape))]
    storage = _tuple(
        _text("storage"),
        _global("torch", _STORAGES[tensor.dtype]),
        _text(key),
        _text("cpu"),
        _int(count),
    )
    arguments = _tuple(
        storage + pickle.BINPERSID,
        _int(0),
        _tuple(*map(_int, tensor.shape)),
        _tuple(*map(_int, strides)),
        pickle.NEWFALSE,
        _EMPTY_DICT,
    )
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + len(data).to_bytes(4, "little") + data


def _int(value: int) -> bytes:
    data = pickle.encode_long(value)
    return pickle.LONG1 + len(data).to_bytes(1, "little") + data


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


_EMPTY_DICT = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
