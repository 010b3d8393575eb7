"""A run as `train` makes it: what it leaves behind, how it ends, and how it goes on."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from run_fixtures import assert_same_end, quick_train, restore, tiny_config

from lact_jax import trainer
from lact_jax.checkpoint import CheckpointUnreadableError, complete_steps
from lact_jax.run_logging import read_metrics
from lact_jax.workdir import WorkdirError

pytest_plugins = ["run_plugin"]
# TensorStore's reads of other arrays, still pending when one fails, are collected as unraisable.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_metrics_have_a_row_for_every_step(finished_run):
    rows = read_metrics(finished_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        assert np.isfinite([row["loss"], row["grad_norm"], row["lr"]]).all()
        assert row["skipped"] is False
        assert len(row["loss_by_chunk"]) == 2
        assert np.shape(row["layers/fw_w0_norm"]) == (2,) and min(row["layers/fw_w0_norm"]) > 0
    assert [row["lr"] for row in rows[:3]] == pytest.approx([0, 5e-3, 1e-2])
    timed = read_metrics(finished_run / "throughput.jsonl")
    assert [row["step"] for row in timed] == list(range(1, 9))
    assert all(row["steps_per_second"] > 0 for row in timed)


def test_layers_are_not_unrolled_on_a_mesh_and_no_workdir_is_opened(tmp_path, monkeypatch):
    mesh = SimpleNamespace(shape={"data": 8, "fsdp": 1, "seq": 1}, size=8)
    monkeypatch.setattr(trainer, "make_mesh", lambda config: mesh)
    with pytest.raises(ValueError, match=r"model\.unroll_layers=True .* the mesh has 8: set it"):
        trainer.train(tiny_config(model__unroll_layers=True), tmp_path / "run", debug=True)
    assert not (tmp_path / "run").exists()


def test_the_curves_and_the_config_are_there(finished_run):
    assert (finished_run / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    stored = json.loads((finished_run / "config.json").read_text())
    assert stored["train"]["lr"] == 1e-2 and stored["debug"] is False


def test_checkpoints_are_those_of_the_last_iterations_and_the_end(finished_run):
    # Saves at 3, 6 and the end; 8 - 6 = 2 is older than all of them.
    assert complete_steps(finished_run / "checkpoints") == [3, 6, 8]


def test_older_checkpoints_go(tmp_path, data_folder):
    config = tiny_config(data_folder, train__keep_last=3, train__steps=6)
    assert quick_train(config, tmp_path) == 0
    assert complete_steps(tmp_path / "checkpoints") == [6]


def test_a_checkpoint_holds_all_that_a_run_is(finished_run):
    state, data, meta = restore(finished_run)
    assert set(state) >= {"step", "params", "ema", "opt_state", "rng"}
    assert int(state["step"]) == 8 and meta == {"step": 8}
    assert data  # the position in the data
    moments = state["opt_state"]["1"]
    shapes = [np.shape(x["blocks"]["0"]["self_attn"]["w0"]) for x in (moments["mu"], moments["nu"])]
    assert shapes == [np.shape(state["params"]["blocks"]["0"]["self_attn"]["w0"])] * 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves_and_the_resumed_run_is_the_uninterrupted_one(
    number, code, tmp_path, data_folder, finished_run, monkeypatch
):
    push = trainer.Log.push

    def push_and_signal(self, step, *of_the_step):
        push(self, step, *of_the_step)
        if step == 4:
            os.kill(os.getpid(), number)

    config = tiny_config(data_folder)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Log, "push", push_and_signal)
        assert quick_train(config, tmp_path) == code
    assert complete_steps(tmp_path / "checkpoints") == [3, 4]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4
    assert quick_train(config, tmp_path) == 0
    assert_same_end(tmp_path, finished_run)


def test_a_finished_run_started_again_does_nothing(tmp_path, data_folder, finished_run):
    workdir = tmp_path / "copy"
    shutil.copytree(finished_run, workdir)
    assert quick_train(tiny_config(data_folder), workdir) == 0
    assert_same_end(workdir, finished_run)


def test_debug_trains_and_validates_on_random_data_without_a_data_set(tmp_path):
    config = tiny_config(
        tmp_path / "nothing here", data__name="video_folder", data__options={}, train__steps=2,
        validation__every=2, validation__num_clips=100,
    )  # fmt: skip
    assert quick_train(config, tmp_path / "run", debug=True) == 0
    assert not (tmp_path / "nothing here").exists()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2 and rows[0]["loss"] != rows[1]["loss"]
    validated = read_metrics(tmp_path / "run" / "validation.jsonl")
    assert [(row["step"], row["num_clips"]) for row in validated] == [(2, 4)]


def test_a_workdir_of_another_config_is_refused_and_every_key_listed(
    tmp_path, data_folder, finished_run
):
    shutil.copytree(finished_run, tmp_path / "run")
    other = tiny_config(data_folder, train__lr=0.5, model__ffn_dim=40, train__steps=9)
    with pytest.raises(WorkdirError) as raised:
        quick_train(other, tmp_path / "run")
    message = str(raised.value)
    assert "train.lr: 0.01 there, 0.5 now" in message
    assert "model.ffn_dim: 32 there, 40 now" in message
    assert "train.steps:" not in message
    assert complete_steps(tmp_path / "run" / "checkpoints") == [3, 6, 8]


def test_a_config_that_can_not_run_does_not_claim_the_workdir(tmp_path, data_folder):
    with pytest.raises(ValueError, match=r"data\.height=40"):
        quick_train(tiny_config(data_folder, data__height=40), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_was_cut_off_is_named_and_the_older_one_can_be_used(
    tmp_path, data_folder, finished_run
):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    newest = workdir / "checkpoints" / "8"
    largest = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    config = tiny_config(data_folder)
    with pytest.raises(CheckpointUnreadableError, match=r"checkpoints/8 is damaged.* step 6"):
        quick_train(config, workdir)
    shutil.move(newest, tmp_path / "damaged")
    assert quick_train(config, workdir) == 0
    assert_same_end(workdir, finished_run)
