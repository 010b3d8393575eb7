"""Makes docs/planner.md: what the large runs take of how many H200s. No GPU is needed.

    python -m benchmarks.plan_tables --folder=runs/plans --out=docs/planner.md

Every plan is a compilation of some minutes; those whose file is in the folder are not made again.
"""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import jax
from absl import app, flags

from lact_jax.config import parse
from lact_jax.planning import tables
from lact_jax.planning.cards import Card, find_card
from lact_jax.planning.search import Planner
from lact_jax.planning.virtual import gpu_devices

FOLDER = flags.DEFINE_string("folder", "runs/plans", "Finished plans, one JSON file each.")
OUT = flags.DEFINE_string("out", "docs/planner.md", "The page.")
COMPILE = flags.DEFINE_bool("compile", True, "Make the plans that are missing.")
GPU = "h200"


@dataclass(frozen=True)
class Case:
    """A plan to make: a config with `trainable` and `frames`, on a mesh."""

    config: str
    trainable: str
    frames: int
    mesh: tuple[int, int, int]
    remat: str = "full"
    job: str = "train"

    @property
    def gpus(self) -> int:
        data, fsdp, seq = self.mesh
        return data * fsdp * seq

    @property
    def name(self) -> str:
        mesh = "x".join(map(str, self.mesh))
        return f"{self.config}-{self.job}-{self.trainable}-{self.frames}-{mesh}-{self.remat}"


SMALL, LARGE = "ar_chunk3f", "ar_chunk3f_14b"
# GB at the peak of a step on one H200 at commit 0a253ea (benchmarks/results).
MEASURED = {
    Case(SMALL, "attn_only", 81, (1, 1, 1), "dots"): 119.51,
    Case(SMALL, "all", 81, (1, 1, 1), "selective"): 97.65,
}
CASES = [
    *MEASURED,
    Case(SMALL, "attn_only", 81, (1, 1, 1)),
    Case(SMALL, "attn_only", 81, (1, 1, 1), "selective"),
    Case(SMALL, "all", 81, (1, 1, 1)),
    Case(SMALL, "attn_only", 81, (1, 1, 1), job="sample"),
    Case(LARGE, "all", 81, (1, 8, 1)),
    Case(LARGE, "all", 165, (1, 8, 1)),
    Case(LARGE, "all", 165, (1, 4, 2)),
    Case(LARGE, "all", 81, (8, 8, 1)),
    Case(LARGE, "all", 165, (8, 4, 2)),
    Case(SMALL, "all", 165, (1, 1, 1)),
    Case(SMALL, "all", 81, (1, 8, 1)),
    Case(SMALL, "all", 165, (1, 8, 1)),
    Case(SMALL, "all", 81, (8, 8, 1)),
    Case(SMALL, "all", 165, (8, 8, 1)),
    Case(LARGE, "all", 81, (1, 4, 2)),
    Case(LARGE, "all", 81, (1, 1, 8)),
    Case(LARGE, "all", 81, (1, 8, 1), job="sample"),
    Case(LARGE, "all", 81, (1, 1, 8), job="sample"),
]


def make(case: Case, card: Card) -> dict:
    """The plan of a case, as its file has it."""
    config = importlib.import_module(f"configs.{case.config}").get_config()
    config.data.num_frames = case.frames
    config.sample.num_latent_frames = 1 + (case.frames - 1) // 4
    config.train.trainable = case.trainable
    config.model.remat = case.remat
    data, fsdp, seq = case.mesh
    config.mesh.update(data=data, fsdp=fsdp, seq=seq)
    planner = Planner(parse(config), case.job, card, gpu_devices(card, case.gpus))
    plan = planner(planner.given())
    return tables.as_json(plan, card) | {"text": tables.plan_text(plan, card)}


def load(card: Card, folder: Path) -> dict[Case, dict]:
    """The finished plans in the folder, those that are missing made first if they shall be."""
    plans = {}
    for case in CASES:
        path = folder / f"{case.name}.json"
        if not path.exists() and COMPILE.value:
            print(f"compiling {case.name}", flush=True)
            path.write_text(json.dumps(make(case, card)))
        if path.exists():
            plans[case] = json.loads(path.read_text())
    return plans


def summary(plans: dict[Case, dict], job: str) -> str:
    """One row a plan of this job, by model, frames and GPUs."""
    rows = []
    for case, plan in sorted(plans.items(), key=lambda item: (
        item[0].config, item[0].frames, item[0].gpus, item[0].mesh, item[0].trainable, item[0].remat
    )):  # fmt: skip
        if case.job != job:
            continue
        first = plan["programs"][0]
        limits = [
            sum(p["bounds"][key] for p in plan["programs"])
            for key in ("compute", "memory", "communication")
        ]
        rows.append((
            "14B" if case.config == LARGE else "1.3B",
            *([case.trainable, case.remat] if job == "train" else []),
            str(case.frames), str(case.gpus), ",".join(map(str, case.mesh)), str(plan["clips"]),
            tables.gigabytes(sum(first["state"].values())),
            *([tables.gigabytes(first["kept"])] if job == "train" else []),
            tables.gigabytes(plan["peak"]), "yes" if plan["fits"] else "**no**",
            *(tables.milliseconds(seconds) for seconds in limits),
            f"{plan['seconds_per_clip']:.2f}",
        ))  # fmt: skip
    train = job == "train"
    header = (
        "model", *(["trained", "remat"] if train else []), "frames", "GPUs", "data,fsdp,seq",
        "clips", "state GB", *(["kept GB"] if train else []), "peak GB", "fits", "compute ms",
        "memory ms", "communication ms", "s a clip" if train else "s",
    )  # fmt: skip
    return tables.table(header, rows)


def comparison(plans: dict[Case, dict]) -> str:
    """Planned beside measured."""
    rows = []
    for case in MEASURED.keys() & plans.keys():
        measured, planned = MEASURED[case], plans[case]["peak"]
        rows.append((
            f"{case.trainable}, {case.remat}", f"{measured:.2f}", tables.gigabytes(planned),
            f"{planned / 1e9 / measured - 1:+.1%}",
        ))  # fmt: skip
    header = "step of 1.3B, 81 frames, one H200, GB", "measured", "planned", ""
    return tables.table(header, sorted(rows))


PAGE = """# Planned runs

Made by `python -m benchmarks.plan_tables` with JAX {jax}, without a GPU: the run's own programs,
compiled for so many H200s (`python -m lact_jax.plan` makes such plans for any config). bf16, one
clip for each of data x fsdp. "State" is what a device holds between steps
(parameters, moving average and Adam's moments in float32, batch); "kept" is what layers keep for
the backward pass; times are lower bounds.

{assumptions}; {usable:.1f} GB usable.

## Training

{train}

## Sampling

One prompt with guidance: a denoise step of the last chunk and a commit together.

{sample}

## Planned beside measured

Measured with JAX 0.11.2 at commit 0a253ea, whose program is the one that is planned here.

{comparison}

## 14B, whole model, 81 frames, one node of eight

{detail}
"""


def main(_):
    jax.config.update("jax_platforms", "cpu")
    card, folder = find_card(GPU), Path(FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    plans = load(card, folder)
    node = plans.get(Case(LARGE, "all", 81, (1, 8, 1)))
    Path(OUT.value).write_text(
        PAGE.format(
            jax=jax.__version__, assumptions=tables.assumptions(card), usable=card.usable / 1e9,
            train=summary(plans, "train"), sample=summary(plans, "sample"),
            comparison=comparison(plans), detail=node["text"] if node else "not compiled yet",
        )
    )  # fmt: skip


if __name__ == "__main__":
    app.run(main)
