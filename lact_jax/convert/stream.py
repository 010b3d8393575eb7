"""Orbax checkpoints written and read a layer at a time, so that no stack is ever whole in memory.

Orbax leaves how a leaf is written to a type handler. A `Streamed` leaf knows its shape and can
produce its layers one by one; `StreamHandler` writes them as they come. What is on disk is an
ordinary Orbax checkpoint of numpy arrays, which any PyTree handler restores, to any sharding.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from lact_jax.convert.errors import ConversionError

Keys = tuple[str, ...]

# A chunk is what is read, and decompressed, as a whole: small, for devices that hold a slice.
CHUNK_BYTES = 32 * 2**20
# Writes that may be under way before their data must be on disk.
PENDING_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Streamed:
    """An array that is produced on demand: layer `i` (axis 0) by read(i), all of it by read(None).

    `stacked`: it is written by layers. One that was read from a checkpoint takes both.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    read: Callable[[int | None], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def pieces(self) -> Iterator[tuple[Any, np.ndarray]]:
        """(index, value) that together cover the array: a stack layer by layer."""
        if not self.stacked:
            yield ..., self.read(None)
        else:
            for i in range(self.shape[0]):
                yield i, self.read(i)


class StreamHandler(ocp.type_handlers.NumpyHandler):
    """Writes and reads `Streamed` leaves in the format of numpy arrays."""

    def __init__(self, on_written: Callable[[int], None] = lambda _: None):
        """`on_written(bytes)` is called after every piece, in the thread that writes."""
        super().__init__()
        self._on_written = on_written
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._idle.set()

    def stop(self) -> None:
        """Ends the writing after the piece at hand, and returns when nothing is written any more.

        Orbax writes in a thread of its own, which an interrupt of the main thread doesn't reach.
        """
        self._stop.set()
        self._idle.wait()

    async def serialize(self, values: Sequence[Streamed], infos, args=None):
        """See TypeHandler: starts writing, returns the future that it ends with."""
        del args
        self._idle.clear()
        return [
            ocp.future.CommitFutureAwaitingContractedSignals(
                self._write_all(values, infos), name="streamed"
            )
        ]

    async def _write_all(self, values, infos):
        pending: list[ts.WriteFutures] = []
        try:
            await self._write_pieces(values, infos, pending)
        finally:
            # After a failure writes go on by themselves; the folder can't be removed under them.
            await asyncio.gather(*pending, return_exceptions=True)
            self._idle.set()

    async def _write_pieces(self, values, infos, pending):
        # Opened together: a commit of all arrays' metadata, not one of each.
        stores = await asyncio.gather(*map(_open_to_write, values, infos))
        pending_bytes = 0
        for value, store in zip(values, stores, strict=True):
            for index, piece in value.pieces():
                pending.append(store[index].write(piece))
                pending_bytes += piece.nbytes
                if pending_bytes > PENDING_BYTES:
                    await asyncio.gather(*pending)
                    pending.clear()
                    pending_bytes = 0
                self._on_written(piece.nbytes)
                if self._stop.is_set():
                    raise ConversionError("stopped")
        await asyncio.gather(*pending)

    async def deserialize(self, infos, args=None) -> list[Streamed]:
        """See TypeHandler: nothing is read before a leaf is asked for a piece."""
        del args
        return [_lazy(await _open_to_read(info), Path(info.parent_dir)) for info in infos]


async def _open_to_write(value: Streamed, info) -> ts.TensorStore:
    # Small stacks are one chunk; in large ones no chunk spans layers, since layers come singly.
    whole = not value.stacked or value.nbytes <= CHUNK_BYTES
    spec = ocp.type_handlers.get_json_tspec_write(
        info,
        use_ocdbt=True,
        global_shape=value.shape,
        local_shape=value.shape if whole else (1, *value.shape[1:]),
        dtype=value.dtype,
        process_index=0,
        arg=ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES),
    )
    return await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)


async def _open_to_read(info) -> ts.TensorStore:
    spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
    return await ts.open(ts.Spec(spec), open=True, context=info.ts_context)


def _lazy(store: ts.TensorStore, folder: Path) -> Streamed:
    """Reads by layers; layers that share chunks are read together and kept until others are."""
    held: dict[int, np.ndarray] = {}

    def values(part: ts.TensorStore) -> np.ndarray:
        with reading_errors(folder):
            return part.read().result()

    def read(layer: int | None) -> np.ndarray:
        if layer is None:
            return values(store)
        together = store.chunk_layout.read_chunk.shape[0]
        start = layer - layer % together
        if start not in held:
            held.clear()
            held[start] = values(store[start : min(start + together, store.shape[0])])
        return held[start][layer - start]

    return Streamed(store.shape, store.dtype.numpy_dtype, False, read)


def _checkpointer(handler: StreamHandler) -> ocp.Checkpointer:
    registry = ocp.type_handlers.create_type_handler_registry(
        (Streamed, handler), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry))


def write_stream(path: Path, tree: dict, on_written: Callable[[int], None] = lambda _: None):
    """Writes a nested dict of `Streamed` leaves as an Orbax checkpoint at `path`."""
    handler = StreamHandler(on_written)
    with _no_orbax_tracebacks(), _checkpointer(handler) as checkpointer:
        try:
            checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(tree))
        except BaseException:
            handler.stop()
            raise


@contextlib.contextmanager
def _no_orbax_tracebacks() -> Iterator[None]:
    """Drops what Orbax's threads log about an error that is also raised."""

    def keep(record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def stored_layout(path: Path) -> dict[Keys, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays in the checkpoint at `path`.

    Raises ConversionError naming the folder when it isn't a complete checkpoint.
    """
    with reading_errors(path):
        metadata = ocp.PyTreeCheckpointHandler().metadata(epath.Path(path.absolute()))
        leaves = flatten_dict(metadata.tree)
        return {
            tuple(map(str, keys)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for keys, leaf in leaves.items()
        }


def read_stream(path: Path, wanted: Iterable[Keys]) -> dict[Keys, Streamed]:
    """The arrays `wanted` of the checkpoint at `path`, by their keys in its tree.

    Raises ConversionError naming the folder when it is damaged.
    """
    wanted = tuple(wanted)
    args = ocp.args.PyTreeRestore(
        item=unflatten_dict(dict.fromkeys(wanted, 0)),
        restore_args=unflatten_dict(
            {keys: ocp.RestoreArgs(restore_type=Streamed) for keys in wanted}
        ),
        partial_restore=True,
    )
    with reading_errors(path), _checkpointer(StreamHandler()) as checkpointer:
        return flatten_dict(checkpointer.restore(path.absolute(), args=args))


@contextlib.contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise on missing or damaged files into ConversionError."""
    try:
        yield
    except (ConversionError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # the files are not to blame
    except Exception as error:  # TensorStore's read errors have no narrower class
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversionError(f"{path}: not a complete Orbax checkpoint: {first[:300]}") from error
