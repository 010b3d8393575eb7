"""Checkpoints into Orbax (Wan2.1, diffusers or LaCT-AR), and trained models back out.

python convert_wan_weights.py --src=Wan2.1-T2V-1.3B --dst=wan_1_3b
python convert_wan_weights.py --src=runs/a --dst=exported --to=diffusers
"""

import signal
import sys

import jax
from absl import app, flags, logging

from lact_jax import cli
from lact_jax.convert import Export, Import, export_checkpoint, import_checkpoint, parse_options

SRC = flags.DEFINE_string("src", None, "What to convert: a folder, or a model.pt.", required=True)
DST = flags.DEFINE_string("dst", None, "The folder to make.")
TO = flags.DEFINE_string("to", "orbax", "'orbax', or to export: 'wan' or 'diffusers'.")
ONLY = flags.DEFINE_list("only", None, "Components: dit, vae, text. Default: all there are.")
DTYPE = flags.DEFINE_string("dtype", "source", "float32, bfloat16, float16 or 'source'.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check all and print what would go where.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what an earlier conversion wrote.")
MODEL = flags.DEFINE_string("model", "", "Sizes that the source doesn't say: num_heads=12,…")
LACT = flags.DEFINE_string(
    "lact", None, "Options of LaCT layers: muon=true,… Given ('' too), a plain model becomes LaCT."
)
SEED = flags.DEFINE_integer("seed", 0, "Of the LaCT parameters that the source doesn't have.")
WEIGHTS = flags.DEFINE_string("weights", "ema", "Of a training run: 'ema' or 'params'.")
STEP = flags.DEFINE_integer("step", None, "Of a training run; default: the newest.")


def run() -> int:
    """One conversion. Returns the exit status; a signal ends it with a line that says so."""
    try:
        return convert()
    except SystemExit:
        print("stopped: what was written so far is removed again", file=sys.stderr)
        raise


def convert() -> int:
    """What the flags say. Returns the exit status."""
    only = None if ONLY.value is None else tuple(ONLY.value)
    common = dict(
        src=SRC.value, dst=DST.value, only=only, dtype=DTYPE.value, overwrite=OVERWRITE.value
    )
    if TO.value == "orbax":
        options = parse_options(MODEL.value, LACT.value)
        import_checkpoint(Import(**common, options=options, seed=SEED.value), DRY_RUN.value)
    else:
        task = Export(**common, to=TO.value, weights=WEIGHTS.value, step=STEP.value)
        export_checkpoint(task, DRY_RUN.value)
    return 0


def main(_):
    jax.config.update("jax_platforms", "cpu")  # a training job may hold the accelerator
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step at INFO
    for number in (signal.SIGINT, signal.SIGTERM):  # an exception, so that what it wrote goes
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    cli.finish(run)


if __name__ == "__main__":
    app.run(main)
