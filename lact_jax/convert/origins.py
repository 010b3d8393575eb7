"""What can be exported: a converted folder, or a step of a training run."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lact_jax.checkpoint import complete_steps
from lact_jax.convert import sizes
from lact_jax.convert.components import COMPONENTS, flat, read_json
from lact_jax.convert.destination import MANIFEST, read_manifest
from lact_jax.convert.errors import ConversionError, in_few_lines
from lact_jax.convert.stream import Keys, Streamed, read_stream, stored_layout
from lact_jax.models.dit import DiTConfig

Arrays = dict[Keys, Streamed]


@dataclass(frozen=True)
class Origin:
    """Weights on disk, in Orbax.

    Attributes:
      description: for the log and the manifest.
      configs: component -> its config.
      arrays: component -> its parameters, by path.
      tokenizer: its folder.
    """

    description: str
    configs: Mapping[str, Any]
    arrays: Callable[[str], Arrays]
    tokenizer: Path | None = None

    def check(self, name: str, wanted: Collection[Keys], arrays: Arrays) -> None:
        """Raises ConversionError listing where the arrays are not what the config says."""
        abstract = flat(COMPONENTS[name].abstract(self.configs[name]))
        shapes = {path: leaf.shape for path, leaf in abstract.items()}
        problems = [("/".join(p), "not in the checkpoint") for p in wanted if p not in arrays]
        problems += [("/".join(p), "not in the model") for p in arrays if p not in wanted]
        problems += [
            ("/".join(p), f"{arrays[p].shape} in the checkpoint, {shapes[p]} in the model")
            for p in wanted
            if p in arrays and arrays[p].shape != shapes[p]
        ]
        if problems:
            raise ConversionError(
                f"{self.description}: its arrays are not those of its config:\n  "
                + "\n  ".join(in_few_lines(problems))
            )


def find_origin(src: str | Path, weights: str, step: int | None) -> Origin:
    """The weights at `src`: see `Export`. Raises FileNotFoundError or ConversionError."""
    src = Path(src)
    if not src.is_dir():
        raise FileNotFoundError(f"--src={src}: no such folder")
    if (src / MANIFEST).is_file():
        return _converted(src)
    for directory in (src, src / "checkpoints"):
        if complete_steps(directory):
            return _training_run(src, directory, weights, step)
    raise ConversionError(
        f"--src={src}: neither a converted folder ({MANIFEST}) nor a training run with a complete "
        "checkpoint"
    )


def _converted(src: Path) -> Origin:
    manifest = read_manifest(src)
    if "exported_from" in manifest:
        raise ConversionError(f"--src={src}: already exported; give the folder it came from")
    configs = {
        name: COMPONENTS[name].from_json(part["config"])
        for name, part in manifest["components"].items()
    }
    tokenizer = src / "tokenizer"

    def arrays(name: str) -> Arrays:
        return read_stream(src / name, stored_layout(src / name))

    return Origin(str(src), configs, arrays, tokenizer if tokenizer.is_dir() else None)


def _training_run(src: Path, directory: Path, weights: str, step: int | None) -> Origin:
    steps = complete_steps(directory)
    if step is not None and step not in steps:
        raise ConversionError(f"--step={step}: {directory} has {', '.join(map(str, steps))}")
    state = directory / str(steps[-1] if step is None else step) / "state"
    layout = stored_layout(state)
    if weights not in ("ema", "params") or not any(keys[0] == weights for keys in layout):
        held = sorted({keys[0] for keys in layout})
        raise ConversionError(f"--weights={weights}: choose ema or params ({state} has {held})")
    # The trained parameters, and beside them those that were frozen.
    stored = {keys[1:]: keys for keys in layout if keys[0] in (weights, "frozen")}
    config = _run_config(src)

    def arrays(name: str) -> Arrays:
        del name
        read = read_stream(state, stored.values())
        return {path: read[keys] for path, keys in stored.items()}

    return Origin(f"{state} ({weights})", {"dit": config}, arrays)


def _run_config(src: Path) -> DiTConfig:
    """The model of the config.json that a run leaves in its workdir."""
    places = [folder / "config.json" for folder in (src, src.parent)]
    file = next((file for file in places if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"--src={src}: no config.json of a training run; give its workdir")
    model = read_json(file).get("model", {})
    try:
        return sizes.from_json(model)
    except ConversionError as error:
        raise ConversionError(f"{file}: {error}") from error
