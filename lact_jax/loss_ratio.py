"""How far a run's loss fell: python -m lact_jax.loss_ratio WORKDIR

Prints the mean loss of the first and of the last 20 steps, and their ratio.
"""

import argparse
from pathlib import Path

import numpy as np

from lact_jax import cli
from lact_jax.run_logging import METRICS, read_metrics

WINDOW = 20


def loss_ratio(workdir: str | Path) -> tuple[float, float]:
    """(mean of the first 20 steps, mean of the last 20); ValueError for a run of fewer than 40."""
    losses = [row["loss"] for row in read_metrics(Path(workdir) / METRICS)]
    if len(losses) < 2 * WINDOW:
        raise ValueError(f"{workdir}: {len(losses)} steps are too few to compare")
    return float(np.mean(losses[:WINDOW])), float(np.mean(losses[-WINDOW:]))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lact_jax.loss_ratio", description=__doc__)
    parser.add_argument("workdir", type=Path)
    first, last = loss_ratio(parser.parse_args(argv).workdir)
    print(f"loss: {first:.3f} in the first {WINDOW} steps, {last:.3f} in the last {WINDOW}: "
          f"{last / first:.0%}")  # fmt: skip
    return 0


if __name__ == "__main__":
    cli.finish(main)
