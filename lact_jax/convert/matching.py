"""Table against tensors: every parameter gets its sources, or all that does not fit is listed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from lact_jax.convert.components import (
    COMPONENTS,
    Change,
    Entry,
    ParamPath,
    Reading,
    flat,
    torch_shape,
)
from lact_jax.convert.errors import ConversionError, in_few_lines
from lact_jax.convert.tensors import TensorRef

DTYPES = {
    "source": None,
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def parse_dtype(name: str) -> np.dtype | None:
    """The type to convert to, None for the source's own. Raises ConversionError."""
    if name not in DTYPES:
        raise ConversionError(f"--dtype={name}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True)
class Target:
    """A parameter (a whole stack) and the tensors it is made of.

    sources: one for each layer, one for an unstacked parameter, none for a fresh one.
    """

    path: ParamPath
    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    sources: tuple[TensorRef, ...]
    to_jax: Change

    @property
    def nbytes(self) -> int:
        """Its size as it is stored."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self, layer: int | None) -> np.ndarray:
        """The parameter, or one layer of it, in the type and layout it is stored in."""
        value = self.to_jax(self.sources[layer or 0].read())
        return np.asarray(value).astype(self.dtype, copy=False)


def match(name: str, reading: Reading, dtype: np.dtype | None) -> list[Target]:
    """Every parameter of component `name` with its sources.

    LaCT parameters of which no layer of a stack has a tensor come out without sources.

    Raises ConversionError that lists all that is missing, unexpected, of another shape or not
    floating-point.
    """
    component = COMPONENTS[name]
    entries = component.entries(reading.config, reading.names)
    shapes = {path: leaf.shape for path, leaf in flat(component.abstract(reading.config)).items()}
    stacks: dict[ParamPath, list[Entry]] = {}
    for entry in entries:
        stacks.setdefault(entry.path, []).append(entry)
    fresh = {
        path
        for path, stack in stacks.items()
        if stack[0].is_lact and not any(entry.name in reading.tensors for entry in stack)
    }
    wanted = [entry for entry in entries if entry.path not in fresh]
    problems = _problems(wanted, shapes, reading.tensors)
    if problems:
        lines = in_few_lines([*reading.contradictions, *problems])
        listed = "\n  ".join(lines)
        raise ConversionError(f"{name}: {len(problems)} tensors do not fit\n  {listed}")
    return [
        _target(path, shapes[path], stack, reading.tensors, path in fresh, dtype)
        for path, stack in stacks.items()
    ]


def _problems(
    wanted: Iterable[Entry],
    shapes: Mapping[ParamPath, tuple[int, ...]],
    tensors: Mapping[str, TensorRef],
) -> list[tuple[str, str]]:
    problems, known = [], set()
    for entry in wanted:
        known.add(entry.name)
        ref, need = tensors.get(entry.name), torch_shape(entry, shapes[entry.path])
        if ref is None:
            problems.append((entry.name, f"missing (need {need})"))
        elif ref.shape != need:
            hint = " (transposed?)" if ref.shape == need[::-1] else ""
            problems.append((ref.name, f"has {ref.shape} in {ref.file.name}, need {need}{hint}"))
        elif ref.dtype is None:
            problems.append((ref.name, f"in {ref.file.name} is not float32, float16 or bfloat16"))
    return problems + [
        (ref.name, f"unexpected ({ref.shape} in {ref.file.name})")
        for name, ref in tensors.items()
        if name not in known
    ]


def _target(path, shape, stack, tensors, is_fresh, dtype) -> Target:
    by_layer = sorted(stack, key=lambda entry: entry.layer or 0)
    sources = () if is_fresh else tuple(tensors[entry.name] for entry in by_layer)
    if dtype is None:
        dtype = np.result_type(*{ref.dtype for ref in sources}) if sources else np.dtype(np.float32)
    return Target(path, shape, dtype, stack[0].layer is not None, sources, stack[0].to_jax)


def table_lines(name: str, targets: Iterable[Target]) -> list[str]:
    """What goes where, a line for each parameter."""
    lines = []
    for target in targets:
        sources = [(ref.name, f"{ref.dtype} {ref.shape}") for ref in target.sources]
        origin = "; ".join(in_few_lines(sources)) or "(fresh)"
        goal = f"{name}/{'/'.join(target.path)}: {target.dtype} {target.shape}"
        lines.append(f"{origin} -> {goal}")
    return lines
