"""Safetensors written tensor by tensor into shards, with the index that finds them.

The library's own writer wants a whole file's tensors in memory. The format is simple enough to
stream: the header's length, a JSON header, the tensors' bytes one after another.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

MAX_SHARD_BYTES = 5 * 10**9
_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: `read` produces it, of this shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def checked_bytes(tensor: Tensor) -> memoryview:
    """Reads a tensor, for writing: its bytes. ValueError if it isn't of the announced shape."""
    value = np.asarray(tensor.read(), tensor.dtype, order="C")
    if value.shape != tensor.shape:
        raise ValueError(f"{tensor.name}: {value.shape} to write, announced {tensor.shape}")
    return value.reshape(-1).view(np.uint8).data


def cut(tensors: list[Tensor], max_bytes: int) -> Iterator[list[Tensor]]:
    """Shards of at most `max_bytes`, or of one larger tensor, in the given order."""
    shard, size = [], 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def write_shards(
    folder: Path,
    stem: str,
    tensors: list[Tensor],
    max_bytes: int = MAX_SHARD_BYTES,
    on_written: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes `stem`.safetensors, or shards `stem`-00001-of-0000N.safetensors and their index."""
    shards = list(cut(tensors, max_bytes))
    if len(shards) == 1:
        _write_file(folder / f"{stem}.safetensors", tensors, on_written)
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = folder / f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_file(file, shard, on_written)
        weight_map |= {tensor.name: file.name for tensor in shard}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, tensors: list[Tensor], on_written: Callable[[int], None]) -> None:
    # PyTorch's libraries refuse a file that doesn't say which framework's layout it has.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            file.write(checked_bytes(tensor))
            on_written(tensor.nbytes)
