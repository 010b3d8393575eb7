"""Orbax back into the checkpoints of the PyTorch world, in which it finds what it expects.

--to=wan        The official folder: diffusion_pytorch_model*.safetensors and config.json of its
                WanModel, Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/.
--to=diffusers  transformer/, vae/, text_encoder/ (safetensors, index, config.json), tokenizer/.

Of these what the source has: a training run, which changes neither VAE nor text encoder, a DiT.

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

from lact_jax.convert import destination, layouts, pth, shards, sizes
from lact_jax.convert.components import (
    COMPONENTS,
    Entry,
    Options,
    torch_shape,
    vae_to_diffusers_json,
)
from lact_jax.convert.errors import ConversionError, in_few_lines
from lact_jax.convert.importing import Log, copy_files, progress_bar
from lact_jax.convert.matching import parse_dtype
from lact_jax.convert.origins import Origin, find_origin
from lact_jax.convert.stream import Streamed
from lact_jax.convert.tensors import TensorRef
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
    """Where a layout keeps a component.

    Attributes:
      folder: in the checkpoint's.
      file: a .pth file, or the stem of safetensors.
      config_json: what config.json says of a config; a .pth file has none.
    """

    folder: str
    file: str
    config_json: Callable[[Any], Mapping[str, Any]] | None = None


TARGETS: Mapping[str, Mapping[str, Place]] = {
    "wan": {
        "dit": Place(".", layouts.WEIGHTS, sizes.to_official_json),
        "vae": Place(".", layouts.VAE_PTH),
        "text": Place(".", layouts.TEXT_PTH),
    },
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
        if TARGETS[task.to][name].config_json is None:
            _expect_told_by_shapes(task, name, origin.configs[name], tensors[name])
    for name in names:
        for line in in_few_lines((t.name, f"{t.dtype} {t.shape}") for t in tensors[name]):
            log(f"{name}: {line}")
    nbytes = sum(tensor.nbytes for part in tensors.values() for tensor in part)
    log(f"{origin.description}: {', '.join(names)}, {nbytes / 1e9:.2f} GB")
    if dry_run:
        destination.check_given(task.dst, task.overwrite, nbytes)
        return
    with (
        destination.prepared_folder(task.dst, task.overwrite, nbytes, log) as folder,
        progress_bar(nbytes, "exporting") as progress,
    ):
        for name in names:
            write_component(
                folder, TARGETS[task.to][name], origin.configs[name], tensors[name],
                task.max_shard_bytes, progress.update,
            )  # fmt: skip
        if origin.tokenizer and "text" in names:
            copy_files(origin.tokenizer, folder / layouts.TOKENIZERS[task.to])
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
    if "dit" in wanted and origin.configs["dit"].position_embedding:
        raise ConversionError(
            f"--to={task.to}: {task.src} adds a position embedding to its patches "
            "(model.position_embedding=True), which a Wan model can't do: its weights mean nothing "
            "there. Only models trained with model.position_embedding=False can be exported"
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


def _expect_told_by_shapes(task: Export, name: str, config: Any, tensors: list[shards.Tensor]):
    """ConversionError unless `config` is the one that is read from a file without config.json."""
    component, file = COMPONENTS[name], Path(TARGETS[task.to][name].file)
    refs = {t.name: TensorRef(t.name, file, t.shape, t.dtype, t.read) for t in tensors}
    told = component.to_json(component.read(refs, None, file.name, Options()).config)
    wanted = component.to_json(config)
    if lost := [f"{key}={value}" for key, value in wanted.items() if told[key] != value]:
        raise ConversionError(
            f"--to={task.to}: {file} can't say that {task.src} has {', '.join(lost)}: leave "
            f"{name} out (--only), or export to a layout with a config.json"
        )


def write_component(
    folder: Path,
    place: Place,
    config: Any,
    tensors: list[shards.Tensor],
    max_shard_bytes: int = shards.MAX_SHARD_BYTES,
    on_written: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes a component into its place in the checkpoint `folder`, tensor by tensor."""
    home = folder / place.folder
    home.mkdir(parents=True, exist_ok=True)
    if place.config_json is None:
        pth.write_pth(home / place.file, tensors, on_written)
        return
    shards.write_shards(home, place.file, tensors, max_shard_bytes, on_written)
    text = json.dumps(place.config_json(config), indent=2)
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
