"""Encode, train, validate, sample, on drawn videos and on odd ones.

Stopped in each phase and gone on with, it ends as if it had not been.
"""

import json
import os
import signal
from pathlib import Path

import pytest
from odd_videos import KINDS, pictures, write, write_still, write_turned
from run_fixtures import assert_same_end, quick_train, quickly_compiled, restore, tiny_config

from lact_jax.data.encoding import encode_dataset
from lact_jax.encoders import make_codec, make_text_encoder
from lact_jax.generate import generate
from lact_jax.run_logging import read_metrics
from lact_jax.validation import Validator
from lact_jax.video_io import read_video

pytest_plugins = ["run_plugin"]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory) -> Path:
    """Six videos of 1.6 s that can be used, all odd, and four files that can't."""
    folder, frames = tmp_path_factory.mktemp("odd") / "videos", pictures(16)
    folder.mkdir()
    for name in ("h264_10bit.mp4", "plain.gif", "sound.mkv", "vp9.webm"):
        KINDS[name](folder / name, frames)
    write_turned(folder / "portrait.mp4", frames, "90 clockwise")
    write(folder / "sizes.mkv", pictures(16, 33, 47), pixels="yuv444p")
    write(folder / "uncaptioned.mp4", frames)
    write(folder / "short.mp4", frames[:5])
    write_still(folder / "cover.png", frames[0])
    (folder / "broken.mp4").write_text("not a video")
    captioned = sorted({file.name for file in folder.iterdir()} - {"uncaptioned.mp4", "cover.png"})
    rows = (json.dumps({"file": name, "caption": f"a {name}"}) for name in captioned)
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return folder


def encode(src, dst):
    """Encodes in shards of two, stopped in the third of them at first; returns the summary."""
    config, asked = tiny_config(), iter(range(100))
    codec = make_codec(config.codec.name, **config.codec.options)
    text = make_text_encoder(config.text.name, **config.text.options)
    options = {"src": str(src), "dst": dst, "holdout": 2, "shard_size": 2}
    with quickly_compiled():
        stopped = encode_dataset(config, codec, text, **options, stop=lambda: next(asked) == 5)
        assert stopped is None
        return encode_dataset(config, codec, text, **options)


def assert_kept(summary, skipped):
    """Six clips, and which were not."""
    found = {name for split in summary.values() for name in split["skipped"]}
    assert found == skipped and sum(split["num_kept"] for split in summary.values()) == 6


def encoded_config(dataset, **changes):
    what = {"data__name": "encoded", "train__steps": 4, "train__save_every": 2,
            "validation__every": 2, "validation__num_clips": 1}  # fmt: skip
    return tiny_config(dataset, **what | changes)


def assert_validated(workdir):
    rows = read_metrics(workdir / "validation.jsonl")
    assert [(row["step"], row["num_clips"]) for row in rows] == [(2, 1), (4, 1)]
    return rows


def assert_samples(config, workdir, out):
    with quickly_compiled():
        generate(config, workdir, ["a red circle"], out)
    (clip,) = json.loads((out / "prompts.json").read_text())["clips"]
    assert read_video(out / clip["file"], fps=16.0).shape == (21, 32, 32, 3)


def test_drawn_videos(data_folder, tmp_path):
    assert_kept(encode(data_folder, tmp_path / "dataset"), set())
    config = encoded_config(tmp_path / "dataset")
    assert quick_train(config, tmp_path / "run") == 0
    assert_validated(tmp_path / "run")
    assert_samples(config, tmp_path / "run", tmp_path / "clips")


def test_odd_videos_stopped_in_every_phase(odd_folder, tmp_path, monkeypatch):
    dataset = tmp_path / "dataset"
    assert_kept(encode(odd_folder, dataset), {"broken.mp4", "short.mp4", "uncaptioned.mp4"})
    config = encoded_config(dataset)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert quick_train(config, whole) == 0
    call = Validator.__call__

    def call_under_signal(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return call(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Validator, "__call__", call_under_signal)
        assert quick_train(config, halves) == 130
    assert json.loads(json.dumps(restore(halves)[1])) == {"next_index": 2}
    # Of the drawing threads and this worker process each gives the same batches.
    assert quick_train(encoded_config(dataset, data__num_workers=1), halves) == 0
    assert_same_end(halves, whole)
    assert assert_validated(halves) == assert_validated(whole)
    assert_samples(config, halves, tmp_path / "clips")
