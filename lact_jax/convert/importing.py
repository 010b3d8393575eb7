"""PyTorch checkpoints into Orbax: recognise, check everything, then stream.

What comes out:

    DST/dit, DST/vae, DST/text   Orbax PyTree checkpoints of plain nested dicts
    DST/tokenizer/               the tokenizer's files
    DST/manifest.json            sizes and options, sources, which parameters are fresh
"""

import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from lact_jax.convert import destination, layouts, matching
from lact_jax.convert.components import COMPONENTS, Options, Reading, read_json
from lact_jax.convert.errors import ConversionError, in_few_lines
from lact_jax.convert.fresh import fresh_values
from lact_jax.convert.stream import Streamed, write_stream
from lact_jax.convert.tensors import open_tensors

Log = Callable[[str], None]


@dataclass(frozen=True)
class Import:
    """What to convert and how.

    Attributes:
      src: a folder of a known layout (layouts.py), or a file with a DiT's weights.
      dst: the folder to make; a dry run needs none.
      only: components; None for all that are there.
      dtype: a key of matching.DTYPES.
      options: what the files don't say of the DiT.
      seed: of fresh LaCT parameters.
      overwrite: replace a `dst` that an earlier conversion wrote.
    """

    src: str | Path
    dst: str | Path | None
    only: tuple[str, ...] | None = None
    dtype: str = "source"
    options: Options = field(default_factory=Options)
    seed: int = 0
    overwrite: bool = False


@dataclass(frozen=True)
class Plan:
    """A component that can be converted: what its files hold and where it goes."""

    reading: Reading
    targets: list[matching.Target]

    @property
    def fresh(self) -> list[str]:
        """The parameters that are drawn, "blocks/0/self_attn/w0"."""
        return ["/".join(t.path) for t in self.targets if not t.sources]

    @property
    def nbytes(self) -> int:
        """The size of all parameters as they are stored."""
        return sum(target.nbytes for target in self.targets)


def make_plans(task: Import, source: layouts.Source) -> dict[str, Plan]:
    """Every component asked for, checked.

    Raises ConversionError with what is wrong in all of them.
    """
    dtype = matching.parse_dtype(task.dtype)
    plans, errors = {}, []
    for name, part in layouts.select(source, task.only).items():
        try:
            plans[name] = _plan(name, part, task.options, dtype)
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ConversionError("\n".join(errors))
    return plans


def _plan(name: str, part: layouts.Part, options: Options, dtype: np.dtype | None) -> Plan:
    tensors = open_tensors(part.files)
    config = read_json(part.config) if part.config else None
    where = str(part.config or part.files[0])
    try:
        reading = COMPONENTS[name].read(tensors, config, where, options)
        return Plan(reading, matching.match(name, reading, dtype))
    except ConversionError as error:
        raise ConversionError(f"{part.files[0].parent}: {error}") from error


def describe(plans: Mapping[str, Plan], log: Log) -> None:
    """Prints what goes where, what is fresh and what is left out."""
    for name, plan in plans.items():
        for line in matching.table_lines(name, plan.targets):
            log(line)
        for line in in_few_lines(plan.reading.ignored):
            log(f"{name}: not used: {line}")
        if plan.fresh:
            log(f"{name}: freshly initialised: {', '.join(plan.fresh)}")
        if plan.reading.assumed:
            values = [f"{f}={getattr(plan.reading.config, f)}" for f in plan.reading.assumed]
            log(f"{name}: assumed, no config.json says it: {', '.join(values)} (--model sets it)")
        log(f"{name}: {len(plan.targets)} parameters, {plan.nbytes / 1e9:.2f} GB")


def import_checkpoint(task: Import, dry_run: bool = False, log: Log = print) -> None:
    """Converts `task.src` into the folder `task.dst`, or only prints what it would do.

    Nothing is written before everything has been checked; `dst` appears when it is complete.

    Raises ConversionError, FileNotFoundError, FileExistsError or OSError, naming what is wrong.
    """
    source = layouts.recognise(task.src)
    log(f"{task.src}: layout {source.layout!r}, with {', '.join(source.parts)}")
    plans = make_plans(task, source)
    describe(plans, log)
    if "text" in plans and source.tokenizer is None:
        log("text: the source has no tokenizer; put tokenizer.json into DST/tokenizer")
    nbytes = sum(plan.nbytes for plan in plans.values())
    if dry_run:
        destination.check_given(task.dst, task.overwrite, nbytes)
        return
    with (
        destination.prepared_folder(task.dst, task.overwrite, nbytes, log) as folder,
        progress_bar(nbytes, "converting") as progress,
    ):
        for name, plan in plans.items():
            write_stream(folder / name, _stream(plan, task.seed), progress.update)
        if source.tokenizer and "text" in plans:
            copy_files(source.tokenizer, folder / "tokenizer")
        destination.write_manifest(folder, _manifest(task, source, plans))
    log(f"wrote {task.dst}")


def _stream(plan: Plan, seed: int) -> dict:
    dtypes = {target.path: target.dtype for target in plan.targets if not target.sources}
    fresh = fresh_values(plan.reading.config, jax.random.key(seed), dtypes) if dtypes else {}
    return unflatten_dict(
        {
            t.path: Streamed(
                t.shape, t.dtype, t.stacked, t.read if t.sources else fresh[t.path].__getitem__
            )
            for t in plan.targets
        }
    )


def progress_bar(nbytes: int, name: str) -> tqdm:
    """Of bytes written, on stderr: in a file, where a bar is a line each time, seldom."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=nbytes, unit="B", unit_scale=True, desc=name, mininterval=interval)


def copy_files(source: Path, folder: Path) -> None:
    """Copies the files (not the folders) of `source`."""
    folder.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def _manifest(task: Import, source: layouts.Source, plans: Mapping[str, Plan]) -> dict[str, Any]:
    return {
        "source": {"path": str(task.src), "layout": source.layout},
        "tokenizer": source.tokenizer is not None and "text" in plans,
        "components": {
            name: {
                "config": COMPONENTS[name].to_json(plan.reading.config),
                "assumed": list(plan.reading.assumed),
                "files": [file.name for file in source.parts[name].files],
                "names": plan.reading.names,
                "parameters": count_parameters(target.shape for target in plan.targets),
                "dtypes": sorted({target.dtype.name for target in plan.targets}),
                "not_used": [tensor for tensor, _ in plan.reading.ignored],
                "fresh": plan.fresh,
                **({"seed": task.seed} if plan.fresh else {}),
            }
            for name, plan in plans.items()
        },
    }


def count_parameters(shapes: Iterable[tuple[int, ...]]) -> int:
    """The numbers in arrays of these shapes."""
    return sum(int(np.prod(shape)) for shape in shapes)
