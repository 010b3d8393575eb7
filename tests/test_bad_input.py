"""Bad input ends in a message that says what to do, a status that is not 0, and no traceback.

Scripts are run where the shell sees the difference; the rest goes through `cli.finish` alone.
"""

import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from run_fixtures import CONFIG_FILE, assert_same_bits, restore, run_script, tiny_config

from lact_jax import cli
from lact_jax.checkpoint import complete_steps
from lact_jax.gallery import read_prompts
from lact_jax.generate import generate
from lact_jax.trainer import train
from lact_jax.video_io import write_video

pytest_plugins = ["run_plugin"]


@pytest.fixture(autouse=True)
def hooks_of_the_process(monkeypatch):
    """`cli.finish` sets what belongs to a script's whole process: put back after each test."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with warnings.catch_warnings():
        yield


def finish(capsys, main) -> str:
    """What a script that does `main` tells before it ends with status 1."""
    with pytest.raises(SystemExit) as ended:
        cli.finish(main)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said
    return said


def test_an_error_is_told_with_its_notes(capsys):
    def main():
        error = ValueError("no frames")
        error.add_note("data.module='mine': raised there")
        raise error

    assert finish(capsys, main).startswith("error: no frames\ndata.module='mine': raised there\n")


@pytest.fixture
def videos(tmp_path):
    """A folder of two short captioned clips, for the tests to spoil."""
    folder = tmp_path / "videos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("first", "second"):
        frames = rng.integers(0, 255, (21, 32, 32, 3)).astype(np.uint8)
        write_video(folder / f"{name}.mp4", frames, fps=16)
        (folder / f"{name}.txt").write_text("a clip")
    return folder


def spoil(folder, how: str) -> None:
    first = folder / "first.mp4"
    match how:
        case "empty":
            for file in folder.iterdir():
                file.unlink()
        case "video without caption":
            (folder / "first.txt").unlink()
        case "caption without video":
            first.unlink()
        case "all cut off":
            for file in folder.glob("*.mp4"):
                file.write_bytes(file.read_bytes()[:300])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", "no videos in this folder"),
        ("video without caption", r"1 videos without caption: first\.mp4"),
        ("caption without video", r"1 captions without video: first\.txt"),
        ("all cut off", r"none of the 2 clips can be used: .*first\.mp4"),
    ],
)
def test_folders_of_videos_that_can_not_be_trained_on(how, message, videos, tmp_path, capsys):
    spoil(videos, how)
    config = tiny_config(videos, data__name="video_folder", data__options={})
    said = finish(capsys, lambda: train(config, tmp_path / "run"))
    assert re.search(message, said) and str(videos) in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__height": 40}, r"data\.height=40 is not a multiple of 16 .*use 32 or 48"),
        ({"data__width": 8}, r"data\.width=8 is not a multiple of 16 .*use 16$"),
        ({"data__num_frames": 20}, r"data\.num_frames=20 is not 1 \+ 4k: use 17"),
        ({"data__num_frames": 25}, r"7 latent frames are not whole chunks of 3: use 1 \+ 4"),
        ({"data__name": "videos"}, r"data\.name='videos': unknown, choose one of"),
        ({"codec__name": "vae"}, r"codec\.name='vae': unknown, choose one of"),
        ({"codec__name": "wan", "codec__options": {"path": ""}}, r"--config\.init_from=FOLDER"),
        ({"model__latent_channels": 8}, r"model\.latent_channels=8, but codec 'pca' makes 16"),
        ({"model__text_dim": 9}, r"model\.text_dim=9, but text encoder 'words' makes .* width 8"),
        ({"mesh__seq": 2}, r"mesh=\(-1, 1, 2\) does not divide 1 devices"),
        ({"mesh__fsdp": 3}, r"does not divide 1 devices"),
        ({"data__path": ""}, r"data\.path is empty: give the folder"),
    ],
)
def test_configs_that_can_not_be_trained(changes, message, tmp_path, capsys):
    defaults = {"data__name": "video_folder", "data__options": {}, "data__path": "nowhere"}
    config = tiny_config(**{**defaults, **changes})
    assert re.search(message, finish(capsys, lambda: train(config, tmp_path)), re.MULTILINE)


def test_workdir_that_is_a_file(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    said = finish(capsys, lambda: train(tiny_config(), file, debug=True))
    assert "is a file: give a folder" in said


def test_prompt_files(tmp_path, capsys):
    assert "no such prompt file" in finish(capsys, lambda: read_prompts(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("# only a comment\n\n")
    assert "no prompts in it" in finish(capsys, lambda: read_prompts(tmp_path / "empty.txt"))


def test_errors_that_nobody_foresaw_keep_their_traceback(capsys):
    def bug():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.finish(bug)


def test_the_traceback_of_an_expected_error_can_be_had(monkeypatch):
    def wrong():
        raise ValueError("wrong")

    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="wrong"):
        cli.finish(wrong)


@pytest.mark.parametrize("status", [0, 143])
def test_the_status_of_the_work_is_the_status_of_the_script(status):
    with pytest.raises(SystemExit) as ended:
        cli.finish(lambda: status)
    assert ended.value.code == status


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.train.lrr=1", r'does not fit the config file: lrr.*Did you mean "lr"'),
        ("--config.trian.lr=1", r'does not fit the config file: trian.*Did you mean "train"'),
        ("--config.train.steps=many", r"--config\.train\.steps=many: invalid literal for int"),
    ],
)
def test_overrides_that_do_not_fit(flag, message, monkeypatch, capsys):
    values = flags.FlagValues()  # absl's own set is global
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    monkeypatch.setattr(cli.app, "FLAGS", values)
    # Overrides are looked for in sys.argv, whatever is parsed.
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config={CONFIG_FILE}", flag])
    with pytest.raises(SystemExit) as ended:
        cli.parse_flags(sys.argv)
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert re.search(message, said.err + said.out), said
    assert "Traceback" not in said.err + said.out


def assert_told(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_train_without_a_config_file(tmp_path):
    done = run_script("train.py", "--config=configs/none.py", f"--workdir={tmp_path / 'run'}")
    assert_told(done, r"error: Configuration(.|\n)*No such file or directory: 'configs/none\.py'")
    assert not (tmp_path / "run").exists()


def test_train_with_an_override_of_no_key(tmp_path):
    done = run_script("train.py", "--config.train.lrr=1", f"--workdir={tmp_path / 'run'}")
    assert_told(done, r"lrr.*Did you mean")


def test_sample_without_prompts_and_from_another_config(tmp_path, finished_run):
    places = [f"--workdir={finished_run}", f"--out={tmp_path / 'out'}"]
    assert_told(run_script("sample.py", *places), "give --prompts=FILE or --prompt=TEXT")
    config = tiny_config(model__ffn_dim=40)
    with pytest.raises(ValueError, match=r"model\.ffn_dim: trained with 32, asked for 40"):
        generate(config, finished_run, ["a"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_ends_the_run_and_leaves_the_earlier_checkpoints_whole(
    tmp_path, data_folder, finished_run
):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    done = run_script(
        "train.py", f"--config.data.path={data_folder}", f"--workdir={workdir}",
        "--config.train.steps=14", largest_file_kb=20,
    )  # fmt: skip
    assert_told(done, r"error: the checkpoint of step 9 could not be written .*\[3, 6, 8\]")
    assert "File too large" in done.stderr
    assert complete_steps(workdir / "checkpoints") == [3, 6, 8]
    assert_same_bits(restore(workdir), restore(finished_run))
