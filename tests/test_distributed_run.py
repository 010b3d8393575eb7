"""Two processes with two devices each against one with four: training, stops, kills, sampling.

A few starts of Python serve all tests, as each costs several seconds.
"""

import json
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from distributed_fixtures import (
    WORKER,
    alone,
    finish,
    free_last_port,
    free_port,
    kubernetes,
    open_mpi,
    slurm,
    start,
)
from run_fixtures import assert_same_bits, restore

from lact_jax.checkpoint import complete_steps
from lact_jax.run_logging import read_metrics
from lact_jax.video_io import read_video

pytest_plugins = ["run_plugin"]

STEPS = 6
MESH = {"mesh.data": 2, "mesh.fsdp": 1, "mesh.seq": 2}
# The tokens of every clip are cut over both processes.
WIDE = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.seq": 4, "train.steps": 1}
SAMPLE = {"sample.num_latent_frames": 3, "sample.steps": 1, "sample.guidance_scale": 1.0}
WATCH = {
    "validation.every": STEPS, "validation.num_clips": 4, "validation.sample_every": STEPS,
    "validation.prompts": ("a red circle", "a blue square"),
}  # fmt: skip
HEARTBEAT = {"distributed.heartbeat_timeout": 15}
ENOUGH = 500  # seconds, for a machine that does other things as well


def config(data_folder, *changes) -> dict:
    common = {
        "data.path": str(data_folder), "data.batch_size": 4, "train.steps": STEPS,
        "train.save_every": 2, "train.keep_last": 100, "tensorboard.enabled": False,
    }  # fmt: skip
    merged = common | MESH | SAMPLE
    for change in changes:
        merged |= change
    return merged


def work(jobs, told, devices=(2, 2)):
    return start([str(WORKER), json.dumps(jobs)], told, devices)


def assert_all_done(processes) -> None:
    for status, output in finish(processes, ENOUGH):
        assert status == 0, output


@pytest.fixture(scope="module")
def together(tmp_path_factory, data_folder) -> Path:
    """A run of two processes from its first step to its last, and what they sampled after it."""
    folder = tmp_path_factory.mktemp("together")
    watched = config(data_folder, WATCH)
    assert_all_done(work([
        {"train": f"{folder}/run", "config": watched},
        {"sample": f"{folder}/run", "out": f"{folder}/clips", "config": watched},
        {"train": f"{folder}/wide", "config": config(data_folder, WIDE)},
    ], slurm(free_last_port())))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def one(together, tmp_path_factory, data_folder) -> Path:
    """The same of one process, and a run that goes on from step 2 of the two processes'."""
    folder = tmp_path_factory.mktemp("one")
    shutil.copytree(together / "run", folder / "resumed")
    for step in complete_steps(folder / "resumed" / "checkpoints"):
        if step > 2:
            shutil.rmtree(folder / "resumed" / "checkpoints" / str(step))
    watched = config(data_folder, WATCH)
    assert_all_done(work([
        {"train": f"{folder}/run", "config": watched},
        {"sample": f"{folder}/run", "out": f"{folder}/clips", "config": watched},
        {"train": f"{folder}/wide", "config": config(data_folder, WIDE)},
        {"train": f"{folder}/resumed", "config": watched},
    ], alone, [4]))  # fmt: skip
    return folder


def relative_error(actual, expected) -> float:
    actual, expected = (np.concatenate([np.ravel(x) for x in xs]) for xs in (actual, expected))
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def losses(workdir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(workdir / "metrics.jsonl")]


def arrays(workdir: Path) -> list[np.ndarray]:
    state, *_ = restore(workdir)
    return jax.tree.leaves({name: state[name] for name in ("params", "ema", "opt_state")})


@pytest.mark.parametrize(("run", "steps"), [("run", STEPS), ("wide", 1)])
def test_two_processes_train_as_one_does(together, one, run, steps):
    assert len(losses(one / run)) == steps
    assert relative_error([losses(together / run)], [losses(one / run)]) < 1e-6
    assert relative_error(arrays(together / run), arrays(one / run)) < 1e-6


def test_one_process_goes_on_from_the_checkpoint_of_two(together, one):
    assert complete_steps(one / "resumed" / "checkpoints") == [2, 4, STEPS]
    assert relative_error([losses(one / "resumed")], [losses(together / "run")]) < 1e-6
    assert relative_error(arrays(one / "resumed"), arrays(together / "run")) < 1e-6


def test_the_data_position_is_one_for_all(together):
    state, data, meta = restore(together / "run")
    assert int(state["step"]) == STEPS
    assert data["next_index"] == STEPS and meta == {"step": STEPS, "readers": 2}


def test_validation_is_the_same_and_written_once(together, one):
    rows = [read_metrics(folder / "run" / "validation.jsonl") for folder in (together, one)]
    assert [row["step"] for row in rows[0]] == [STEPS] and rows[0][0]["num_clips"] == 4
    found = [[row[0]["loss_by_noise_and_chunk"]] for row in rows]
    assert relative_error(*found) < 1e-6


def clips(folder: Path) -> list[np.ndarray]:
    listed = json.loads((folder / "prompts.json").read_text())["clips"]
    return [
        read_video(folder / clip["file"], fps=16.0, height=32, width=32, num_frames=None)
        for clip in listed
    ]


@pytest.mark.parametrize(("gallery", "count"), [("clips", 3), (f"run/samples/step_{6:06d}", 2)])
def test_two_processes_write_one_gallery(together, one, gallery, count):
    ours, theirs = (clips(folder / gallery) for folder in (together, one))
    assert len(ours) == len(theirs) == count
    # Frames are rounded to bytes, and compressed.
    assert np.mean(np.abs(np.float32(ours) - np.float32(theirs))) < 0.5
    assert np.std(np.float32(ours)) > 5
    names = [sorted(p.name for p in (f / gallery).iterdir()) for f in (together, one)]
    assert names[0] == names[1] and len(names[0]) == count + 3
    sheets = [(folder / gallery / "index.html").read_text() for folder in (together, one)]
    assert sheets[0] == sheets[1]


def test_stopped_killed_and_started_again_two_processes_end_as_if_left_alone(
    together, tmp_path, data_folder
):
    run = tmp_path / "run"
    stopped = config(data_folder, HEARTBEAT)
    # SIGTERM reaches one of them, and both save one step; the next start loses one of them.
    jobs = [
        {"train": str(run), "config": stopped, "signal": [1, 1, signal.SIGTERM]},
        {"train": str(run), "config": stopped, "signal": [1, 2, signal.SIGKILL]},
    ]
    (status, output), (killed, lost_output) = finish(
        work(jobs, open_mpi(free_last_port())), ENOUGH
    )
    assert killed == -signal.SIGKILL
    for text in (output, lost_output):
        assert re.findall(r"process \d of 2: (\d+)", text) == ["143"]
    assert status not in (0, 143)
    assert "another task died" in output or "failed" in output
    first = complete_steps(run / "checkpoints")
    assert first and first[-1] < STEPS
    assert_all_done(work([{"train": str(run), "config": stopped}], kubernetes(free_port())))
    assert_same_bits(restore(run), restore(together / "run"))
    assert (run / "metrics.jsonl").read_bytes() == (
        together / "run" / "metrics.jsonl"
    ).read_bytes()
