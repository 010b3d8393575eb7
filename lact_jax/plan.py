"""What a run would take of cards that nobody has booked yet: memory, traffic and least times.

    python -m lact_jax.plan --config=configs/ar_chunk3f_14b.py --gpu=h200 --gpus=8 --mesh=1,8,1
    python -m lact_jax.plan --config=configs/ar_chunk3f.py --gpus=8 --job=sample
    python -m lact_jax.plan --config=configs/ar_chunk3f_14b.py --gpus=8 --sweep --json=plans.json

Compiles the run's own programs for that many cards, with no GPU present; the CUDA plugin's wheels
are needed. A batch that the mesh can't share evenly is planned with as many clips more.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from lact_jax import cli
from lact_jax.config import Config, parse
from lact_jax.planning import tables
from lact_jax.planning.cards import CARDS, find_card
from lact_jax.planning.programs import JOBS, sizes_of
from lact_jax.planning.search import (
    FRUGALITY,
    Choice,
    Planner,
    Shape,
    meshes,
    nearest_fitting,
    ranked,
    sweep,
)
from lact_jax.planning.virtual import gpu_devices
from lact_jax.sharding import MeshConfig
from lact_jax.sizes import latent_size

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


def parse_mesh(text: str) -> Shape:
    """'1,8,1' as (1, 8, 1); ValueError for anything but three whole numbers."""
    parts = text.split(",")
    try:
        data, fsdp, seq = (int(part) for part in parts)
    except ValueError:
        raise ValueError(f"--mesh={text}: give data,fsdp,seq, for example 1,8,1") from None
    return data, fsdp, seq


def chunk_tokens(config: Config) -> int:
    """Tokens of a chunk."""
    _, height, width = latent_size(config, sizes_of(config))
    sizes = config.objective.frames_per_chunk, height, width
    return math.prod(n // p for n, p in zip(sizes, config.model.patch_size, strict=True))


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
        choices = [Choice(shape, remat) for shape in asked for remat in policies]
        plans = ranked(sweep(choices, planner))
        print(tables.sweep_text(plans, card))
    else:
        plans = [planner(planner.given())]
        print(tables.plan_text(plans[0], card))
        if not plans[0].fits and NEAREST.value:
            found = nearest_fitting(plans[0], shapes, planner)
            print(f"\nnearest: {tables.verdict(found, card) if found else 'nothing fits'}")
            plans += [found] if found else []
    if JSON.value:
        written = [tables.as_json(plan, card) for plan in plans]
        Path(JSON.value).write_text(json.dumps(written, indent=1) + "\n")
    return 0 if any(plan.fits for plan in plans) else 2


def main(_):
    cli.finish(run)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=cli.parse_flags)
