"""A user's own data: a Python module that keeps the official code's contract.

`config.data.module = "my_package.my_data"` names a module with a function

    get_data_module(config, data_seed) -> object

whose object has `train_dataloader()` and, for validation, `val_dataloader()`. Both return an
iterable of batches

    {"frames": (B, 3, F, H, W) floats in [0, 1], "caption": list of B strings}

in torch tensors (of any device and float type) or NumPy arrays. F, H, W are data.num_frames,
data.height and data.width, or a size of data.buckets; B is data.batch_size over the number of
processes, but any number to validate on. `examples/my_data.py` is such a module.

What the module gets: the whole `lact_jax.config.Config`, and the run's seed plus this process's
index, so that every process draws clips of its own. Options of the module's own belong in
`config.data.options`.

An iterable that ends is started again: an epoch. Before each, `set_epoch(epoch)` is called where
the loader, its sampler or its dataset has it. Clips that are left over at the end of an epoch and
don't fill a batch are dropped.

Coming back to a position: by the loader's own `state_dict` and `load_state_dict`, where it has them
and one process runs; otherwise its batches are drawn again and thrown away, from the epoch's first
batch where there is a `set_epoch`, else from the run's first. That gives the same batches only if
their order depends on `data_seed` and the epoch alone: give a torch DataLoader that shuffles a
`generator` seeded with it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from lact_jax.data.batch import RawBatch, process_share

_log = logging.getLogger(__name__)
_LOADERS = {"train": "train_dataloader", "validation": "val_dataloader"}
_OUT_OF_RANGE = 1e-3  # what rounding may leave outside [0, 1]


def from_config(config: Any, codec: Any, text: Any, split: str = "train") -> grain.IterDataset:
    """The data set of `config.data.module`.

    Raises:
      ValueError: no module named, no `get_data_module` in it, no loader for the split; later, at
        the first batch that breaks the contract. All name the module and what is wrong in it.
      ImportError: it can't be imported.
    """
    del codec, text
    data = config.data
    if not data.module:
        raise ValueError(
            "data.name='module' needs data.module, the name of a Python module such as "
            "'my_package.my_data'"
        )
    batch_size, process_index, _ = process_share(data)
    make = functools.partial(_make_loader, data.module, config, config.seed + process_index, split)
    convert = functools.partial(
        to_raw_batch,
        num_frames=data.num_frames,
        sizes=data.buckets or ((data.height, data.width),),
    )
    where = f"data.module={data.module!r}: {_LOADERS[split]}()"
    train = split == "train"
    return ModuleDataset(
        make, convert, where=where, batch_size=batch_size if train else None, endless=train
    )


def to_raw_batch(
    batch: Any, *, where: str, num_frames: int, sizes: Sequence[tuple[int, int]]
) -> RawBatch:
    """A batch of the contract as a RawBatch, its frames rounded to the nearest of 256 levels.

    Args:
      batch: what a loader yielded.
      where: the module and its loader, for messages.
      num_frames, sizes: F, and the (H, W) that may be.

    Raises ValueError that names the key and what is there.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"{where} yields a {type(batch).__name__}: it must yield dicts with 'frames' and "
            "'caption'"
        )
    if missing := sorted({"frames", "caption"} - set(batch)):
        raise ValueError(f"{where} yields no {', '.join(missing)}, but {sorted(map(str, batch))}")
    caption = batch["caption"]
    if not isinstance(caption, list | tuple) or not all(isinstance(x, str) for x in caption):
        raise ValueError(f"{where}: caption must be a list of strings, got {caption!r:.200}")
    frames = _floats(batch["frames"], where)
    wanted = [(len(caption), 3, num_frames, *size) for size in sizes]
    if frames.shape not in wanted:
        raise ValueError(
            f"{where}: frames have the shape {frames.shape}, but with {len(caption)} captions and "
            f"the sizes in config.data (batch, 3, frames, height, width) is "
            f"{' or '.join(map(str, wanted))}"
        )
    low, high = float(frames.min()), float(frames.max())
    if not (low >= -_OUT_OF_RANGE and high <= 1 + _OUT_OF_RANGE):  # NaN is not in range either
        raise ValueError(f"{where}: frames go from {low:g} to {high:g}, they must be in [0, 1]")
    levels = np.rint(np.clip(frames, 0, 1) * np.float32(255)).astype(np.uint8)
    return RawBatch(
        frames=np.ascontiguousarray(levels.transpose(0, 2, 3, 4, 1)),
        caption=list(caption),
        name=[f"{where}, clip {row}" for row in range(len(caption))],
    )


class ModuleDataset(grain.IterDataset):
    """The batches of a loader, converted.

    Args:
      make_loader: makes the loader, each time in the same state.
      convert: a batch of the loader to a RawBatch, given `where`.
      where: the module and its loader, for messages.
      batch_size: clips of a batch in this process; None for as many as the loader gives.
      endless: start the loader again when it ends.
    """

    def __init__(
        self,
        make_loader: Callable[[], Iterable],
        convert: Callable[..., RawBatch],
        *,
        where: str,
        batch_size: int | None,
        endless: bool,
    ):
        super().__init__()
        self.make_loader, self.convert, self.where = make_loader, convert, where
        self.batch_size, self.endless = batch_size, endless

    def __iter__(self) -> grain.DatasetIterator:
        return _Iterator(self)


class _Iterator(grain.DatasetIterator):
    """Position: batches drawn in all, the epoch, and batches drawn in it."""

    def __init__(self, dataset: ModuleDataset):
        super().__init__()
        self._dataset = dataset
        self._open()

    def __next__(self) -> RawBatch:
        where, wanted = self._dataset.where, self._dataset.batch_size
        batch = self._dataset.convert(self._draw(), where=where)
        if wanted not in (None, len(batch["caption"])):
            raise ValueError(
                f"{where} yields batches of {len(batch['caption'])} clips, but data.batch_size "
                f"over the number of processes is {wanted}"
            )
        return batch

    def get_state(self) -> dict[str, Any]:
        """Numbers, and the loader's own state where it can be used; for JSON."""
        return {
            "batches": self._batches,
            "epoch": self._epoch,
            "in_epoch": self._in_epoch,
            "loader": _json_state(self._loader),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Comes back to a position; with a loader that keeps none, by drawing up to it."""
        if self._batches:
            self._open()
        if state["loader"] is not None and hasattr(self._loader, "load_state_dict"):
            self._loader.load_state_dict(state["loader"])
            self._batches, self._in_epoch = state["batches"], state["in_epoch"]
            self._epoch, self._running = state["epoch"], None
            return
        epochs = _with_set_epoch(self._loader)
        again = state["in_epoch"] if epochs else state["batches"]
        if epochs:
            self._batches, self._epoch = state["batches"] - again, state["epoch"]
        if again:
            _log.warning(
                "%s: %d batches are drawn again, to come back to where the run was",
                self._dataset.where, again,
            )  # fmt: skip
        for _ in range(again):
            self._draw()

    def _open(self) -> None:
        """A fresh loader, before its first epoch."""
        self._loader = self._dataset.make_loader()
        self._batches = self._epoch = self._in_epoch = 0
        self._running = None

    def _draw(self) -> Any:
        """The loader's next whole batch, of the next epoch where this one ends."""
        while True:
            if self._running is None:
                for part in _with_set_epoch(self._loader):
                    part.set_epoch(self._epoch)
                self._running = iter(self._loader)
            batch = next(self._running, None)
            if batch is not None and not self._is_left_over(batch):
                self._batches, self._in_epoch = self._batches + 1, self._in_epoch + 1
                return batch
            if not self._dataset.endless:
                raise StopIteration
            if self._in_epoch == 0:
                raise ValueError(
                    f"{self._dataset.where} yields no batch of {self._dataset.batch_size} clips in "
                    f"epoch {self._epoch}: it must return an iterable that can be started again, "
                    "such as a DataLoader, or one that never ends"
                )
            self._epoch, self._in_epoch, self._running = self._epoch + 1, 0, None

    def _is_left_over(self, batch: Any) -> bool:
        """Whether these are the clips at the end of an epoch that don't fill a batch."""
        captions = batch.get("caption") if isinstance(batch, Mapping) else None
        whole = self._dataset.batch_size or 0
        if not isinstance(captions, list | tuple) or len(captions) >= whole:
            return False
        after = next(self._running, None)
        return after is None

def _make_loader(name: str, config: Any, seed: int, split: str) -> Iterable:
    """The loader of a split out of the module `name`; errors as `from_config`."""
    where, method = f"data.module={name!r}", _LOADERS[split]
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{where}: must be a module's name, such as 'my_package.my_data'")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{where} can't be imported: {error}; the folder of the module or package must be on "
            "PYTHONPATH, or be the one of train.py"
        ) from error
    except Exception as error:
        error.add_note(f"{where}: raised while it was imported")
        raise
    function = getattr(module, "get_data_module", None)
    if not callable(function):
        raise ValueError(f"{where}: {module.__file__} has no function get_data_module")
    try:
        inspect.signature(function).bind(config, seed)
    except TypeError as error:
        raise ValueError(
            f"{where}: get_data_module must take (config, data_seed): {error}"
        ) from error
    with _named(where):
        made = function(config, seed)
    if not callable(getattr(made, method, None)):
        raise ValueError(
            f"{where}: what get_data_module returns (a {type(made).__name__}) has no {method}()"
        )
    with _named(where):
        loader = getattr(made, method)()
    if not hasattr(loader, "__iter__"):
        raise ValueError(
            f"{where}: {method}() returns a {type(loader).__name__}, which is not iterable"
        )
    return loader


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Errors of the user's own code keep their traceback and get a note of whose they are."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{where}: raised there; its own options belong in config.data.options")
        raise


def _floats(x: Any, where: str) -> np.ndarray:
    """Float32 NumPy from an array or a torch tensor; ValueError if it holds no floats."""
    if hasattr(x, "detach"):  # a torch tensor: NumPy has no bfloat16 and reads no GPU's memory
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() else x
    array = np.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{where}: frames are of type {array.dtype}, they must be floats in [0, 1] "
            "(divide bytes by 255)"
        )
    return array.astype(np.float32)


def _with_set_epoch(loader: Any) -> list[Any]:
    """The loader and its parts that want to know the epoch."""
    parts = [loader, *(getattr(loader, name, None) for name in ("sampler", "dataset"))]
    return [part for part in parts if hasattr(part, "set_epoch")]


def _json_state(loader: Any) -> Any:
    """The loader's own position, or None: it keeps none, or none that JSON and one file can hold.

    A checkpoint holds one position for all processes, so with several a loader's own can't be kept.
    """
    if jax.process_count() > 1 or not hasattr(loader, "state_dict"):
        return None
    state = loader.state_dict()
    try:
        return state if json.loads(json.dumps(state, allow_nan=False)) == state else None
    except (TypeError, ValueError):
        return None
