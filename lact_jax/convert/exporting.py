"""Orbax back into PyTorch checkpoints: safetensors, an index, and the config.json of each class.

--to=wan        DST/diffusion_pytorch_model*.safetensors and config.json of the official WanModel.
                The DiT alone: the official code reads its VAE and text encoder from .pth files,
                which training never changes.
--to=diffusers  DST/transformer, DST/vae, DST/text_encoder, DST/tokenizer: what the source has.

LaCT parameters go out under their official names in both, in the same files. The official LaCT code
takes them; `WanTransformer3DModel.from_pretrained` and `WanModel.from_pretrained` load the rest and
warn that these are not used. A model with LaCT layers computes something else without them, so such
a load is for looking at weights, not for making videos.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lact_jax.convert import destination, layouts, shards, sizes
from lact_jax.convert.components import COMPONENTS, Entry, torch_shape, vae_to_diffusers_json
from lact_jax.convert.errors import ConversionError, in_few_lines
from lact_jax.convert.importing import Log, copy_files
from lact_jax.convert.matching import parse_dtype
from lact_jax.convert.origins import Origin, find_origin
from lact_jax.convert.stream import Streamed
from lact_jax.umt5_weights import config_to_transformers


@dataclass(frozen=True)
class Export:
    """What to export and how.

    Attributes:
      src: a converted folder, or the workdir (or checkpoint directory) of a training run.
      dst: the folder to make; a dry run needs none.
      to: 'wan' or 'diffusers'.
      only: components; None for all that are there and that the layout has.
      dtype: a key of matching.DTYPES.
      weights, step: of a training run: 'ema' or 'params', and which step (None: the newest).
      overwrite: replace a `dst` that an earlier conversion wrote.
      max_shard_bytes: size of a safetensors file.
    """

    src: str | Path
    dst: str | Path | None
    to: str
    only: tuple[str, ...] | None = None
    dtype: str = "source"
    weights: str = "ema"
    step: int | None = None
    overwrite: bool = False
    max_shard_bytes: int = shards.MAX_SHARD_BYTES


@dataclass(frozen=True)
class Place:
    """Where a layout keeps a component, and what its config.json says."""

    folder: str
    stem: str
    config_json: Callable[[Any], Mapping[str, Any]]


TARGETS: Mapping[str, Mapping[str, Place]] = {
    "wan": {"dit": Place(".", layouts.WEIGHTS, sizes.to_official_json)},
    "diffusers": {
        "dit": Place("transformer", layouts.WEIGHTS, sizes.to_diffusers_json),
        "vae": Place("vae", layouts.WEIGHTS, vae_to_diffusers_json),
        "text": Place("text_encoder", layouts.TEXT_WEIGHTS, config_to_transformers),
    },
}


def export_checkpoint(task: Export, dry_run: bool = False, log: Log = print) -> None:
    """Exports `task.src` into the folder `task.dst`, or only prints what it would do.

    Raises ConversionError, FileNotFoundError, FileExistsError or OSError, naming what is wrong.
    """
    if task.to not in TARGETS:
        raise ConversionError(f"--to={task.to}: choose one of {', '.join(TARGETS)}")
    origin = find_origin(task.src, task.weights, task.step)
    names = _select(task, origin)
    dtype = parse_dtype(task.dtype)
    tensors = {name: _tensors(name, origin, task.to, dtype) for name in names}
    for name in names:
        for line in in_few_lines((t.name, f"{t.dtype} {t.shape}") for t in tensors[name]):
            log(f"{name}: {line}")
    nbytes = sum(tensor.nbytes for part in tensors.values() for tensor in part)
    log(f"{origin.description}: {', '.join(names)}, {nbytes / 1e9:.2f} GB")
    if dry_run:
        return
    with (
        destination.prepared_folder(task.dst, task.overwrite, nbytes, log) as folder,
        tqdm(total=nbytes, unit="B", unit_scale=True, desc="exporting") as progress,
    ):
        for name in names:
            _write(task, TARGETS[task.to][name], folder, origin, name, tensors[name], progress)
        if origin.tokenizer and "text" in names:
            copy_files(origin.tokenizer, folder / "tokenizer")
        _write_manifest(folder, task, origin, names)
    log(f"wrote {task.dst}")


def _select(task: Export, origin: Origin) -> list[str]:
    possible = [name for name in TARGETS[task.to] if name in origin.configs]
    wanted = possible if task.only is None else list(task.only)
    if bad := [name for name in wanted if name not in possible]:
        raise ConversionError(
            f"--only={','.join(bad)}: {task.src} to the layout {task.to!r} has "
            f"{', '.join(possible) or 'nothing'}"
        )
    if not wanted:
        raise ConversionError(
            f"{task.src} holds {', '.join(origin.configs)}, of which the layout {task.to!r} has "
            "nothing"
        )
    return wanted


def _tensors(name: str, origin: Origin, names: str, dtype: np.dtype | None) -> list[shards.Tensor]:
    """Every tensor of a component, a stack's layers one after another.

    Raises ConversionError listing the parameters that the checkpoint lacks or has too many.
    """
    config, arrays = origin.configs[name], origin.arrays(name)
    entries = COMPONENTS[name].entries(config, names)
    entries.sort(key=lambda entry: (entry.path, entry.layer or 0))
    origin.check(name, {entry.path for entry in entries}, arrays)
    return [_tensor(entry, arrays[entry.path], dtype) for entry in entries]


def _tensor(entry: Entry, array: Streamed, dtype: np.dtype | None) -> shards.Tensor:
    dtype = dtype or array.dtype

    def read() -> np.ndarray:
        return np.asarray(entry.to_torch(array.read(entry.layer))).astype(dtype, copy=False)

    return shards.Tensor(entry.name, torch_shape(entry, array.shape), dtype, read)


def _write(task, place, folder, origin, name, tensors, progress) -> None:
    home = folder / place.folder
    home.mkdir(exist_ok=True)
    shards.write_shards(home, place.stem, tensors, task.max_shard_bytes, progress.update)
    text = json.dumps(place.config_json(origin.configs[name]), indent=2)
    (home / "config.json").write_text(text + "\n")


def _write_manifest(folder: Path, task: Export, origin: Origin, names: list[str]) -> None:
    destination.write_manifest(
        folder,
        {
            "exported_from": {"path": str(task.src), "weights": origin.description},
            "layout": task.to,
            "components": {
                name: {"config": COMPONENTS[name].to_json(origin.configs[name])} for name in names
            },
        },
    )
