"""Validation and samples inside a run: they change nothing of it, and none is lost or repeated."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from imageio.v3 import imread
from run_fixtures import assert_same_end, quick_train, tiny_config

from lact_jax import loop_samples, watch
from lact_jax.batch_encoder import BatchEncoder
from lact_jax.checkpoint import complete_steps
from lact_jax.loop_samples import LoopSampler, finished_steps
from lact_jax.run_logging import read_metrics
from lact_jax.sharding import batch_sharding
from lact_jax.trainer import make_parts
from lact_jax.validation import Validator
from lact_jax.video_io import read_video

pytest_plugins = ["run_plugin"]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PROMPTS = ("a red circle moving left", "a blue square moving up")
WATCHED = {
    "validation__every": 3,
    "validation__num_clips": 2,
    "validation__sample_every": 3,
    "validation__prompts": PROMPTS,
    "data__options": {
        "num_shapes": 4, "num_rings": 2, "seed": 0,
        "num_validation_shapes": 1, "num_validation_rings": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def watched_folder(tmp_path_factory, data_folder):
    """A copy of the clips: fewer are held out beside them than other tests want."""
    folder = tmp_path_factory.mktemp("watched") / "clips"
    return shutil.copytree(data_folder, folder, ignore=shutil.ignore_patterns(".validation"))


def watched_config(watched_folder, **changes):
    return tiny_config(watched_folder, **{**WATCHED, **changes})


@pytest.fixture(scope="module")
def watched_run(tmp_path_factory, watched_folder):
    """The run of `finished_run`, validated and sampled after steps 3 and 6."""
    workdir = tmp_path_factory.mktemp("runs") / "watched"
    assert quick_train(watched_config(watched_folder), workdir) == 0
    return workdir


def assert_same_watch(workdir, reference):
    """All that was validated and sampled is the same, byte by byte."""
    assert_same_end(workdir, reference)
    rows = (workdir / "validation.jsonl").read_bytes()
    assert rows == (reference / "validation.jsonl").read_bytes()
    folders = [finished_steps(x / "samples") for x in (workdir, reference)]
    assert folders[0] == folders[1] == [3, 6]
    for file in ["index.html", *(f"step_{s:06d}/contact_sheet.png" for s in folders[0])]:
        assert (workdir / "samples" / file).read_bytes() == (
            reference / "samples" / file
        ).read_bytes()
    assert not (workdir / "samples" / "unfinished").exists()


def keep_rows(file, steps):
    lines = [line for line in file.read_text().splitlines() if json.loads(line)["step"] in steps]
    file.write_text("".join(f"{line}\n" for line in lines))


def test_a_watched_run_computes_what_an_unwatched_one_does(watched_run, finished_run):
    assert_same_end(watched_run, finished_run)
    assert not (finished_run / "validation.jsonl").exists()
    assert not (finished_run / "samples").exists()


def test_rows_and_picture_of_the_validations(watched_run):
    rows = read_metrics(watched_run / "validation.jsonl")
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        table = np.array(row["loss_by_noise_and_chunk"])
        assert table.shape == (10, 2) and (table > 0).all() and row["num_clips"] == 2
        assert row["loss"] == pytest.approx(table.mean())
    assert rows[0]["loss"] != rows[-1]["loss"]
    assert imread(watched_run / "validation.png").std() > 5


def test_samples_are_a_gallery_for_each_step_and_a_page_of_all(watched_run):
    page = (watched_run / "samples" / "index.html").read_text()
    assert page.index("step_000006/index.html") < page.index("step_000003/index.html")
    assert 'src="step_000003/contact_sheet.png"' in page
    for step in (3, 6):
        folder = watched_run / "samples" / f"step_{step:06d}"
        listing = json.loads((folder / "prompts.json").read_text())
        assert [clip["prompt"] for clip in listing["clips"]] == list(PROMPTS)
        assert listing["settings"]["training_step"] == step
        assert len(list(folder.glob("*.mp4"))) == 2
    sheets = [imread(f) for f in sorted(watched_run.glob("samples/*/contact_sheet.png"))]
    assert not np.array_equal(*sheets)


def test_speed_is_reported_in_tokens_and_flops(watched_run):
    rows = read_metrics(watched_run / "throughput.jsonl")
    # 2 clips, 3 chunks of 3 latent frames of 2 x 2 tokens.
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(72 * row["steps_per_second"])
        assert row["tflops_per_second"] > 0 and "mfu" not in row  # no peak is known of a CPU


def test_after_ctrl_c_inside_or_a_kill_nothing_is_lost_or_there_twice(
    tmp_path, watched_folder, watched_run, monkeypatch
):
    call = Validator.__call__

    def call_under_signal(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return call(self, *arguments)

    config, workdir = watched_config(watched_folder), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Validator, "__call__", call_under_signal)
        assert quick_train(config, workdir) == 130
    assert complete_steps(workdir / "checkpoints") == [3]
    assert not (workdir / "validation.jsonl").exists()
    assert finished_steps(workdir / "samples") == []
    # What a kill would leave that came after step 6, but before its checkpoint.
    shutil.copy(watched_run / "validation.jsonl", workdir)
    keep_rows(workdir / "validation.jsonl", [6])
    shutil.copytree(watched_run / "samples" / "step_000003", workdir / "samples" / "step_000006")
    (workdir / "samples" / "unfinished").mkdir()
    assert quick_train(config, workdir) == 0
    assert_same_watch(workdir, watched_run)


def test_ctrl_c_inside_a_clip_leaves_no_folder(tmp_path, monkeypatch):
    """With a sampler that only writes frames: the true one is in the runs above."""

    def sample_batches(pipeline, prompts, gallery, progress):
        for i, prompt in enumerate(prompts):
            with gallery.open_clip(prompt, 2) as clip:
                clip.write(np.full((2, 16, 16, 3), pipeline.params["grey"] + i, np.uint8))
                progress(range(i, i + 1), 0)(1, 1)

    monkeypatch.setattr(loop_samples, "sample_batches", sample_batches)
    config = tiny_config(validation__sample_every=2, validation__prompts=PROMPTS)
    sampler = LoopSampler(config, *make_parts(config)[:2], tmp_path, 0)
    asked = iter([False, True])
    assert sampler(2, {"grey": 10}, lambda: next(asked)) is None
    assert list((tmp_path / "samples").iterdir()) == [] and not sampler.done(2)
    folder = sampler(2, {"grey": 200}, lambda: False)
    assert sampler.done(2) and folder == tmp_path / "samples" / "step_000002"
    clips = sampler.videos(folder)
    assert list(clips) == list(PROMPTS) and read_video(clips[PROMPTS[0]]).mean() > 190


def test_a_finished_run_says_so_and_is_not_watched_again(
    tmp_path, watched_folder, watched_run, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(watched_run, workdir)
    monkeypatch.setattr(Validator, "__call__", None)  # calling it is an error
    monkeypatch.setattr(LoopSampler, "__call__", None)
    assert quick_train(watched_config(watched_folder), workdir) == 0
    assert "is the last: a larger train.steps goes on" in capsys.readouterr().out
    assert_same_watch(workdir, watched_run)


def make_watch(config, workdir):
    """As a run makes it before its first step."""
    codec, text, mesh = make_parts(config)
    encoder = BatchEncoder(codec, text, batch_sharding(mesh))
    return watch.Watch(config, config.data.name, codec, text, encoder, mesh, workdir, 0)


def test_a_data_set_without_held_out_clips_is_an_error(tmp_path, watched_folder):
    config = tiny_config(
        watched_folder, data__name="video_folder", data__options={}, validation__every=2
    )
    fixes = r"held out .*--config\.data\.holdout=16.*--config\.validation\.every=0"
    with pytest.raises(ValueError, match=fixes):
        make_watch(config, tmp_path)


def test_too_few_held_out_clips_are_an_error(tmp_path, watched_folder):
    config = watched_config(watched_folder, validation__num_clips=3)
    with pytest.raises(ValueError, match=r"num_clips=3, but .*'synthetic' has 2 clips"):
        make_watch(config, tmp_path)


def test_a_missing_prompt_file_and_missing_prompts_are_errors(tmp_path, watched_folder):
    with pytest.raises(ValueError, match="nothing to sample: give validation.prompts"):
        tiny_config(watched_folder, validation__sample_every=2)
    file = str(tmp_path / "none.txt")
    config = tiny_config(
        watched_folder, validation__sample_every=2, validation__prompts_file=file
    )
    with pytest.raises(FileNotFoundError, match="none.txt: no such prompt file"):
        make_watch(config, tmp_path)


def test_a_missing_key_does_not_claim_the_workdir(tmp_path, watched_folder, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    keys = str(tmp_path / "keys.yaml")
    config = tiny_config(watched_folder, wandb__mode="online", wandb__api_keys=keys)
    with pytest.raises(ValueError, match="there is no API key: set WANDB_API_KEY"):
        quick_train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("step", "every", "due"), [(0, 2, False), (1, 2, False), (4, 2, True), (4, 0, False)]
)
def test_due_is_every_so_many_steps_and_not_at_the_start(step, every, due):
    assert watch._due(step, every) is due
