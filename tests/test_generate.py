"""From a trained workdir to clips: length, weights, seeds, and what does not fit the workdir."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from run_fixtures import tiny_config

from lact_jax.checkpoint_tree import CheckpointError
from lact_jax.generate import check_trained_with, generate
from lact_jax.video_io import read_video

pytest_plugins = ["run_plugin"]
# TensorStore's reads of other arrays, still pending when one fails, are collected as unraisable.
pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PROMPTS = ["a red circle", "a blue square", "a green triangle moving up"]


def sampled(out, num_frames: int) -> list[np.ndarray]:
    """The clips of a gallery; reading fails unless there are `num_frames` frames."""
    clips = json.loads((out / "prompts.json").read_text())["clips"]
    videos = [
        read_video(out / clip["file"], fps=16.0, height=32, width=32, num_frames=None)
        for clip in clips
    ]
    assert [len(video) for video in videos] == [num_frames] * len(videos)
    return videos


def test_every_prompt_becomes_a_clip_and_a_seed_is_a_clip(tmp_path, finished_run):
    config = tiny_config(sample__batch_size=2)
    page = generate(config, finished_run, PROMPTS, tmp_path / "a")
    assert page == tmp_path / "a" / "index.html" and page.is_file()
    assert (tmp_path / "a" / "contact_sheet.png").is_file()
    listed = json.loads((tmp_path / "a" / "prompts.json").read_text())
    assert [clip["prompt"] for clip in listed["clips"]] == PROMPTS
    assert listed["settings"]["checkpoint_step"] == 8
    first = sampled(tmp_path / "a", 21)
    generate(config, finished_run, PROMPTS[:2], tmp_path / "b")
    again = sampled(tmp_path / "b", 21)
    np.testing.assert_array_equal(again, first[:2])
    other = tiny_config(sample__batch_size=2, sample__seed=1)
    generate(other, finished_run, PROMPTS[:2], tmp_path / "c")
    assert (np.asarray(sampled(tmp_path / "c", 21)) != again).any()


def test_longer_than_trained_and_raw_weights_of_an_older_checkpoint(tmp_path, finished_run):
    clips = {}
    for weights, step in (("ema", 8), ("params", 8), ("params", 3)):
        config = tiny_config(sample__num_latent_frames=9, sample__weights=weights)
        out = tmp_path / f"{weights}{step}"
        generate(config, finished_run, PROMPTS[:1], out, step)
        clips[weights, step] = sampled(out, 33)[0]
    assert (clips["ema", 8] != clips["params", 8]).any()
    assert (clips["params", 8] != clips["params", 3]).any()


def test_another_config_is_refused_and_every_key_listed(tmp_path, finished_run):
    other = tiny_config(model__ffn_dim=40, model__lact__muon=True, sample__steps=9)
    with pytest.raises(ValueError) as raised:
        generate(other, finished_run, PROMPTS, tmp_path / "out")
    message = str(raised.value)
    assert "model.ffn_dim: trained with 32, asked for 40" in message
    assert "model.lact" in message and "sample.steps" not in message
    assert not (tmp_path / "out").exists()


def test_precision_and_remat_may_differ_from_training(finished_run):
    config = tiny_config(
        model__remat="full", model__dtype="bfloat16", model__unroll_layers=True, train__lr=1.0
    )
    assert check_trained_with(config, finished_run) is None
    bad = dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, frames_per_chunk=2)
    )
    with pytest.raises(ValueError, match=r"objective\.frames_per_chunk: trained with 3"):
        check_trained_with(bad, finished_run)


def test_what_is_not_there_is_named(tmp_path, finished_run):
    config, out = tiny_config(), tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"nowhere.*not the workdir of a run"):
        generate(config, tmp_path / "nowhere", PROMPTS, out)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7 .*\[3, 6, 8\]"):
        generate(config, finished_run, PROMPTS, out, 7)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 0"):
        generate(config, finished_run, PROMPTS, out, 0)
    workdir = tmp_path / "run"
    workdir.mkdir()
    shutil.copy(finished_run / "config.json", workdir)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint: train first"):
        generate(config, workdir, PROMPTS, out)
    (workdir / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        generate(config, workdir, PROMPTS, out)


def test_a_checkpoint_that_was_cut_off_is_named(tmp_path, finished_run):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    # Sampling reads the averages alone, so all files of arrays are cut: one would not do.
    for file in (workdir / "checkpoints" / "8" / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"checkpoints/8 is damaged.* step 6"):
        generate(tiny_config(), workdir, PROMPTS, tmp_path / "out")
