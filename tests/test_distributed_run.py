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
    converted_wan,
    finish,
    free_last_port,
    free_port,
    kubernetes,
    open_mpi,
    slurm,
    start,
)
from run_fixtures import assert_same_bits, restore, tiny_config

from lact_jax.checkpoint import complete_steps
from lact_jax.run_logging import read_metrics
from lact_jax.video_io import read_video

pytest_plugins = ["run_plugin"]

STEPS = 4
MESH = {"mesh.data": 2, "mesh.fsdp": 1, "mesh.seq": 2}
# The tokens of every clip are cut over both processes.
WIDE = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.seq": 4}
SAMPLE = {"sample.num_latent_frames": 3, "sample.steps": 1, "sample.guidance_scale": 1.0}
WATCH = {
    "validation.every": STEPS, "validation.num_clips": 4, "validation.sample_every": STEPS,
    "validation.prompts": ("a red circle", "a blue square"),
}  # fmt: skip
LOOK_AWAY = {"validation.every": 0, "validation.sample_every": 0}
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


def assert_done(processes, jobs: list[int]) -> None:
    """The processes did their jobs, which ended with these statuses."""
    for status, output in finish(processes, ENOUGH):
        assert status == jobs[-1], output
        assert re.findall(r"process \d of \d: (\d+)", output) == [str(job) for job in jobs]


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> dict:
    """What makes a run start from a converted Wan, which has no fast weights: they are drawn."""
    folder = converted_wan(tmp_path_factory.mktemp("wan"), tiny_config().model)
    return {"init_from": str(folder)}


@pytest.fixture(scope="module")
def together(tmp_path_factory, data_folder, wan) -> Path:
    """A run of two processes from its first step to its last, one from a converted Wan which one
    process is told to end, and what they sample."""
    folder = tmp_path_factory.mktemp("together")
    watched = config(data_folder, WATCH)
    stopped = {"signal": [1, 1, signal.SIGTERM]}
    assert_done(work([
        {"train": f"{folder}/run", "config": watched},
        {"train": f"{folder}/wide", "config": config(data_folder, WIDE, wan)} | stopped,
        {"sample": f"{folder}/run", "out": f"{folder}/clips", "config": watched},
    ], slurm(free_last_port())), [0, 143, 0])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def one(together, tmp_path_factory, data_folder, wan) -> Path:
    """The same of one process, and a run that goes on from step 2 of the two processes'. All are
    cut alike, so that their step is compiled once."""
    folder = tmp_path_factory.mktemp("one")
    shutil.copytree(together / "run", folder / "resumed")
    for step in complete_steps(folder / "resumed" / "checkpoints"):
        if step > 2:
            shutil.rmtree(folder / "resumed" / "checkpoints" / str(step))
    watched = config(data_folder, WATCH)
    assert_done(work([
        {"train": f"{folder}/run", "config": watched},
        {"train": f"{folder}/resumed", "config": config(data_folder, WATCH, LOOK_AWAY)},
        {"train": f"{folder}/wan", "config": config(data_folder, wan, {"train.steps": 3})},
    ], alone, [4]), [0, 0, 0])  # fmt: skip
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


def test_two_processes_train_as_one_does(together, one):
    assert len(losses(one / "run")) == STEPS
    assert relative_error([losses(together / "run")], [losses(one / "run")]) < 1e-6
    assert relative_error(arrays(together / "run"), arrays(one / "run")) < 1e-6


def test_two_processes_share_every_clip_and_leave_at_one_step_when_one_is_told_to(together, one):
    (step,) = complete_steps(together / "wide" / "checkpoints")[-1:]
    assert 0 < step < STEPS
    found, expected = losses(together / "wide"), losses(one / "wan")
    assert len(found) == step and relative_error([found], [expected[:step]]) < 1e-6
    *_, meta = restore(together / "wide")
    assert meta == {"step": step}  # one part of a batch, which both load


def test_two_processes_start_from_converted_weights(together, one):
    starts = [losses(folder)[0] for folder in (together / "wide", together / "run")]
    assert abs(starts[0] / starts[1] - 1) > 1e-3  # other weights than a new model's
    step = complete_steps(together / "wide" / "checkpoints")[-1]
    state, expected = restore(together / "wide"), restore(one / "wan", step)
    for name in ("params", "ema"):
        found, want = (jax.tree.leaves(run[0][name]) for run in (state, expected))
        assert relative_error(found, want) < 1e-6


def test_one_process_goes_on_from_the_checkpoint_of_two(together, one):
    assert complete_steps(one / "resumed" / "checkpoints") == [2, STEPS]
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


def test_two_processes_write_one_gallery(together, one):
    samples = f"run/samples/step_{STEPS:06d}"
    galleries = [together / "clips", together / samples, one / samples]
    sampled, ours, theirs = (np.float32(clips(gallery)) for gallery in galleries)
    assert (len(sampled), len(ours), len(theirs)) == (3, 2, 2)
    # Frames are rounded to bytes, and compressed.
    assert np.mean(np.abs(ours - theirs)) < 0.5 and np.mean(np.abs(sampled[:2] - ours)) < 0.5
    assert np.mean(np.abs(ours[0] - ours[1])) > 5
    for gallery, count in zip(galleries, (3, 2, 2), strict=True):
        files = {file.name for file in gallery.iterdir()}
        assert {"index.html", "prompts.json", "contact_sheet.png"} < files
        assert len(files) == count + 3
    pages = [(gallery / "index.html").read_text() for gallery in galleries[1:]]
    assert pages[0] == pages[1]


def test_a_lost_process_ends_the_other_and_the_next_start_ends_as_if_left_alone(
    together, tmp_path, data_folder
):
    run = tmp_path / "run"
    # A save waits for the one before it: at batch 4 step 2 is there, and maybe step 3.
    job = {"train": str(run), "config": config(data_folder, HEARTBEAT, {"train.save_every": 1})}
    lost = work([job | {"signal": [1, 4, signal.SIGKILL]}], open_mpi(free_last_port()))
    assert lost[1].wait(ENOUGH) == -signal.SIGKILL
    ((status, output),) = finish(lost[:1], 60)
    assert status not in (0, None) and "process 0 of 2" not in output
    assert "another task died" in output or "one that it exchanges with, failed" in output
    assert complete_steps(run / "checkpoints") in ([1, 2], [1, 2, 3])
    assert_done(work([job], kubernetes(free_port())), [0])
    assert_same_bits(restore(run), restore(together / "run"))
    metrics = [(folder / "metrics.jsonl").read_bytes() for folder in (run, together / "run")]
    assert metrics[0] == metrics[1]
