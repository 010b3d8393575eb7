"""Runs golden cases of the official PyTorch code: python -m lact_jax.parity CASE.safetensors ...

One row for each result: its relative L2 error, the tolerance, and the verdict. Exit status: 0 if
all agree, 1 if any is over its tolerance, 2 if a case can't be run. A case is a safetensors file
whose header entry `config` is JSON with a `kind`; tensors are `param.*`, `in.*`, `out.*`, `grad.*`
and `stat.*`.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from lact_jax.parity_cases import KINDS


class CaseError(Exception):
    """A case that can't be run; the message says why."""


@dataclass(frozen=True)
class Result:
    """One compared result. `tolerance` 0 asks for equality."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


def relative_error(value, expected) -> float:
    """||value - expected|| / ||expected|| in float64; infinite where shapes differ."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    if value.shape != expected.shape:
        return float("inf")
    scale = np.linalg.norm(expected)
    difference = np.linalg.norm(value - expected)
    return float(difference / scale) if scale else float(difference)


def load_case(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """The case's config and its tensors by name."""
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CaseError(f"{path}: not a readable safetensors file ({error})") from error
    if "config" not in metadata:
        raise CaseError(f"{path}: the header has no 'config' entry, so this is not a golden case")
    try:
        config = dict(json.loads(metadata["config"]))
    except (TypeError, ValueError) as error:
        raise CaseError(f"{path}: the header's 'config' is not a JSON object ({error})") from error
    if config.get("kind") not in KINDS:
        known = ", ".join(sorted(KINDS))
        raise CaseError(f"{path}: kind {config.get('kind')!r} is not there yet; known: {known}")
    return config, tensors


def run_case(
    path: Path, tolerance_scale: float = 1.0, dtype: str = "float32"
) -> list[Result]:
    """Runs one case, computing in `dtype`, and compares everything it gives. Raises CaseError."""
    config, tensors = load_case(Path(path))
    config["compute_dtype"] = dtype
    try:
        with jax.default_matmul_precision("highest"):
            computed = list(KINDS[config["kind"]](config, tensors))
    except (KeyError, ValueError) as error:
        raise CaseError(f"{path}: damaged or incomplete: {error!r}") from error
    compared = {name for name, *_ in computed}
    results = {name for name in tensors if name.startswith(("out.", "grad.", "stat."))}
    if results - compared or not compared:
        raise CaseError(f"{path}: nothing to compare with {sorted(results - compared)}")
    return [
        Result(name, relative_error(value, expected), tolerance * tolerance_scale)
        for name, value, expected, tolerance in computed
    ]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lact_jax.parity", description=__doc__)
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE.safetensors")
    parser.add_argument(
        "--tolerance-scale", type=float, default=1.0, help="multiplies every tolerance"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="to compute in"
    )
    args = parser.parse_args(argv)
    status = 0
    for path in args.cases:
        try:
            results = run_case(path, args.tolerance_scale, args.dtype)
        except CaseError as error:
            print(error, file=sys.stderr)
            status = 2
            continue
        print(f"{path.name}\n{'result':48} {'error':>10} {'tolerance':>10}  verdict")
        for r in results:
            print(f"{r.name:48} {r.error:10.2e} {r.tolerance:10.1e}  {'ok' if r.ok else 'OVER'}")
        if not all(r.ok for r in results):
            status = max(status, 1)
    return status


if __name__ == "__main__":
    sys.exit(main())
