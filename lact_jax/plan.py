"""What a run would take of cards that nobody has booked yet: memory, traffic and least times.

    python -m lact_jax.plan --config=configs/ar_chunk3f_14b.py --gpu=h200 --gpus=8 --mesh=1,8,1
    python -m lact_jax.plan --config=configs/ar_chunk3f.py --gpus=8 --job=sample
    python -m lact_jax.plan --config=configs/ar_chunk3f_14b.py --gpus=8 --sweep --json=plans.json

Compiles the run's own programs for that many cards, with no GPU present; the CUDA plugin's wheels
are needed. A batch that the mesh can't share evenly is planned with as many clips more.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from lact_jax import cli
from lact_jax.config import parse
from lact_jax.planning.cards import CARDS, find_card
from lact_jax.planning.programs import JOBS, chunk_tokens
from lact_jax.planning.search import FRUGALITY, Planner, meshes, parse_mesh
from lact_jax.planning.tables import answer, as_json, sweep_answer
from lact_jax.planning.virtual import gpu_devices
from lact_jax.sharding import MeshConfig

CONFIG = config_flags.DEFINE_config_file("config", None, "The run's configuration.")
GPU = flags.DEFINE_string("gpu", "h200", f"The card: {', '.join(CARDS)}.")
GPUS = flags.DEFINE_integer("gpus", 8, "How many of them.")
MESH = flags.DEFINE_string("mesh", None, "data,fsdp,seq in place of the config's mesh.")
JOB = flags.DEFINE_enum("job", "train", [*JOBS], "Which programs.")
SWEEP = flags.DEFINE_bool("sweep", False, "Try meshes and remat policies, and rank them.")
MESHES = flags.DEFINE_multi_string("sweep_mesh", [], "Sweep over these meshes only.")
POLICIES = flags.DEFINE_multi_enum(
    "sweep_remat", [*FRUGALITY], FRUGALITY, "Sweep over these remat policies only."
)
NEAREST = flags.DEFINE_bool("nearest", True, "Where it does not fit, look for what does.")
JSON = flags.DEFINE_string("json", None, "Write the plans to this file too.")


def run() -> int:
    """Makes the plans that the flags ask for; 0 if one fits, 2 if none does."""
    card, config = find_card(GPU.value), parse(CONFIG.value)
    if MESH.value:
        mesh = MeshConfig(*parse_mesh(MESH.value))
        config = dataclasses.replace(config, mesh=mesh)
    # On a machine that has a GPU, that one is not wanted.
    jax.config.update("jax_platforms", "cpu")
    devices = gpu_devices(card, GPUS.value)
    planner = Planner(
        config, JOB.value, card, devices, lambda text: print(text, file=sys.stderr, flush=True)
    )
    shapes = meshes(GPUS.value, chunk_tokens(config))
    if SWEEP.value:
        asked = [parse_mesh(text) for text in MESHES.value] or shapes
        policies = POLICIES.value if JOB.value == "train" else [config.model.remat]
        text, plans = sweep_answer(planner, asked, policies)
    else:
        text, plans = answer(planner, shapes if NEAREST.value else [])
    print(text)
    if JSON.value:
        written = [as_json(plan, card) for plan in plans]
        Path(JSON.value).write_text(json.dumps(written, indent=1) + "\n")
    return 0 if any(plan.fits for plan in plans) else 2


def main(_):
    cli.finish(run)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=cli.parse_flags)
