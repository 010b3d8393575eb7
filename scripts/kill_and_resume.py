"""Kills a training run again and again and checks that it ends like one that was left alone.

    python -m scripts.kill_and_resume --times=10 --workdir=runs/kills

trains `--config` once without a kill (WORKDIR/reference) and once with `--times` SIGKILLs
(WORKDIR/killed), each at a random moment: every second one inside a save, the others after a
random step. Each kill is printed. At the end parameters, moving average, optimiser state, data
position and metrics.jsonl of the two must be equal, bit for bit: exit status 0 if they are, else 1.
Arguments after `--` go to train.py, such as `-- --config.train.steps=100`.
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from lact_jax.checkpoint import Checkpointer, complete_steps

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "tests" / "tiny_run.py"
POLL_SECONDS = 0.001
SAVE_SECONDS = 0.05  # a kill inside a save comes up to so long after its beginning


def start(config: Path, workdir: Path, options: Sequence[str]) -> subprocess.Popen:
    """Starts (or resumes) the run; its output goes to WORKDIR.log."""
    command = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}", *options]
    with open(f"{workdir}.log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def finish(process: subprocess.Popen, workdir: Path) -> None:
    """Waits for the end of the run; raises RuntimeError where it failed."""
    if process.wait():
        raise RuntimeError(f"training ended with {process.returncode}; see {workdir}.log")


def steps_written(workdir: Path) -> int:
    """Whole lines of metrics.jsonl."""
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def is_saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written right now."""
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def kill_once(
    process: subprocess.Popen, workdir: Path, step: int, in_save: bool, rng: random.Random
) -> str | None:
    """Kills the run once it has written `step` lines of metrics, at the first moment after that
    when a checkpoint is being written (`in_save`) or none is.

    Returns:
      Where it was killed, in words; None if the run ended before its moment came.
    """
    while process.poll() is None:
        if steps_written(workdir) >= step and is_saving(workdir) == in_save:
            time.sleep(rng.uniform(0, SAVE_SECONDS if in_save else 3 * POLL_SECONDS))
            process.kill()
            process.wait()
            where = "inside a save" if is_saving(workdir) else "between saves"
            kept = complete_steps(workdir / "checkpoints")
            return f"at step {steps_written(workdir)}, {where}; complete checkpoints: {kept}"
        time.sleep(POLL_SECONDS)
    return None


def kill_and_resume(
    config: Path, workdir: Path, times: int, steps: int, options: Sequence[str], seed: int = 0
) -> list[str]:
    """Trains in `workdir` to the end, through `times` kills spread over `steps` steps.

    Returns:
      Where each kill came.

    Raises:
      RuntimeError: the run failed by itself, or ended before the last kill.
    """
    rng = random.Random(seed)
    kills: list[str] = []
    while len(kills) < times:
        # Beyond what is written already, or the lines of the last start would count as progress.
        done = steps_written(workdir)
        room = max((steps - done) // (times - len(kills) + 1), 1)
        process = start(config, workdir, options)
        try:
            killed = kill_once(
                process, workdir, done + rng.randint(1, room), len(kills) % 2 == 0, rng
            )
        finally:
            process.kill()
        if killed is None:
            finish(process, workdir)
            raise RuntimeError(f"the run ended after {len(kills)} of {times} kills: give it steps")
        print(f"kill {len(kills) + 1}: {killed}", flush=True)
        kills.append(killed)
    finish(start(config, workdir, options), workdir)
    return kills


def differences(workdir: Path, reference: Path) -> list[str]:
    """What is not equal, bit for bit, at the end of two runs; [] if all is."""
    ends = []
    for folder in (workdir, reference):
        with Checkpointer(folder / "checkpoints", 1, None) as checkpointer:
            state, data, meta = checkpointer.restore()
        leaves = jax.tree_util.tree_leaves_with_path(state)
        end = {
            jax.tree_util.keystr(path): (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())
            for path, leaf in leaves
        }
        metrics = (folder / "metrics.jsonl").read_bytes()
        ends.append(end | {"data position": data, "meta": meta, "metrics.jsonl": metrics})
    ours, theirs = ends
    return [name for name in ours | theirs if ours.get(name) != theirs.get(name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--times", type=int, default=10, help="kills")
    parser.add_argument("--workdir", type=Path, required=True, help="a folder that is not there")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="of the moments")
    parser.add_argument("options", nargs="*", help="more arguments for train.py, after --")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True)
    data = args.workdir.absolute() / "data"
    options = [
        f"--config.data.path={data}",
        f"--config.train.steps={args.steps}",
        "--config.train.save_every=10",
        *args.options,
    ]
    reference, killed = (args.workdir.absolute() / name for name in ("reference", "killed"))
    print(f"seed {args.seed}", flush=True)
    finish(start(args.config, reference, options), reference)
    kill_and_resume(args.config, killed, args.times, args.steps, options, args.seed)
    unequal = differences(killed, reference)
    print(f"different: {', '.join(unequal)}" if unequal else "equal, bit for bit")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
