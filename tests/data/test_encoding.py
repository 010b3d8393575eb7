import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from encoded_fixtures import (
    CountingCodec,
    EndedText,
    contents,
    encode,
    small_config,
)
from run_fixtures import quickly_compiled, script_env

from lact_jax.data import encoding_merge
from lact_jax.data.encoded_format import MANIFEST, SUMMARY, cut_text, read_manifest
from lact_jax.data.encoding import encode_dataset
from lact_jax.data.listing import list_clips
from lact_jax.encoders import make_codec, make_text_encoder
from lact_jax.video_io import read_video, write_video


@pytest.fixture(scope="module", autouse=True)
def compiled_as_in_scripts():
    with quickly_compiled():
        yield


def names_of(summary):
    return sorted(name for split in summary.values() for name in split["kept"])


def test_tfds_reads_what_encoding_directly_gives(videos, dataset):
    codec, text, records = make_codec("pca"), EndedText(), {}
    for split in ("train", "validation"):
        for record in tfds.builder_from_directory(dataset).as_data_source(split):
            records[record["name"].decode()] = record
    clips = list_clips(videos)
    assert set(records) == {clip.name for clip in clips} and len(clips) == 6
    for clip in clips:
        record = records[clip.name]
        frames = read_video(clip.file, fps=16.0, height=32, width=32, num_frames=9)
        latent = np.asarray(codec.encode(frames[None])[0]).astype(ml_dtypes.bfloat16)
        assert record["latent"].dtype == ml_dtypes.bfloat16
        assert record["latent"].shape == latent.shape == (3, 4, 4, 16)
        assert record["latent"].tobytes() == latent.tobytes()
        embedding = text.encode([clip.caption])[0]
        tokens = 1 + len(clip.caption) % 3
        assert record["text"].shape == (tokens, 8) and not embedding[tokens:].any()
        np.testing.assert_array_equal(record["text"], embedding[:tokens])
        assert record["caption"].decode() == clip.caption
        assert record["fps"] == 16.0 and record["size"].tolist() == [32, 32, 9]
    empty = np.load(dataset / read_manifest(dataset)["empty_text"])
    np.testing.assert_array_equal(empty, text.encode([""])[0, :1])


def test_tensorflow_is_not_loaded(dataset):
    code = (
        "import sys, ml_dtypes, tensorflow_datasets as tfds\n"
        f"source = tfds.builder_from_directory({str(dataset)!r}).as_data_source('train')\n"
        "print(len(source), source[0]['latent'].dtype, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["4", "bfloat16", "False"], done.stderr


def test_the_zeros_after_a_text_are_cut_and_those_inside_stay():
    text_LD = np.zeros((5, 2), np.float32)
    assert cut_text(text_LD).shape == (0, 2)
    text_LD[2, 1] = 3
    assert cut_text(text_LD).tolist() == [[0, 0], [0, 0], [0, 3]]


def test_held_out_clips_depend_on_their_names_alone(videos, dataset, tmp_path):
    split = json.loads((dataset / SUMMARY).read_text())
    assert (split["train"]["num_kept"], split["validation"]["num_kept"]) == (4, 2)
    other = encode(tmp_path / "other", videos, shard_size=4)
    assert other["validation"]["kept"] == split["validation"]["kept"]


@pytest.fixture
def spoiled(tmp_path):
    """Videos of which one is whole, one cut off, one short, and one no video at all."""
    folder = tmp_path / "videos"
    folder.mkdir()
    frames = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3)).astype(np.uint8)
    for name, count in (("cut", 16), ("good", 9), ("short", 5)):
        write_video(folder / f"{name}.mp4", frames[:count], fps=16)
    os.truncate(folder / "cut.mp4", 900)
    (folder / "text.mp4").write_text("no video")
    for name in ("cut", "good", "short", "text"):
        (folder / f"{name}.txt").write_text("a clip")
    return folder


def test_clips_that_can_not_be_used_are_counted_and_named(spoiled, tmp_path):
    summary = encode(tmp_path / "dataset", spoiled, holdout=0)
    assert summary["train"]["kept"] == ["good.mp4"]
    assert (summary["train"]["num_kept"], summary["train"]["num_skipped"]) == (1, 3)
    reasons = summary["train"]["skipped"]
    assert set(reasons) == {"cut.mp4", "short.mp4", "text.mp4"}
    assert all(name in reason for name, reason in reasons.items())
    assert "5 frames at 16 fps" in reasons["short.mp4"]
    assert json.loads((tmp_path / "dataset" / SUMMARY).read_text()) == summary
    assert read_manifest(tmp_path / "dataset")["splits"]["train"][0]["clips"] == 1


def test_still_images_beside_videos_are_named(videos, tmp_path, caplog):
    shutil.copytree(videos, tmp_path / "videos")
    (tmp_path / "videos" / "cover.png").write_bytes(b"")
    encode(tmp_path / "dataset", tmp_path / "videos")
    assert "1 still images skipped, clips have 9 frames: cover.png" in caplog.text


def test_videos_without_caption_are_skipped_too(spoiled, tmp_path):
    (spoiled / "short.txt").unlink()
    summary = encode(tmp_path / "dataset", spoiled, holdout=0)
    assert summary["train"]["kept"] == ["good.mp4"] and summary["train"]["num_skipped"] == 3
    assert summary["train"]["skipped"]["short.mp4"] == f"{spoiled / 'short.mp4'}: no caption"
    (spoiled / "short.txt").write_text("a caption after all")
    with pytest.raises(FileExistsError, match="source.fingerprint"):
        encode(tmp_path / "dataset", spoiled, holdout=0)


@pytest.mark.parametrize("processes", [1, 2])
def test_too_many_unreadable_files_end_it_and_a_larger_limit_goes_on(processes, spoiled, tmp_path):
    """Two of them, one in each of two shards: of two processes each met one."""
    folder, codec = tmp_path / "dataset", CountingCodec()
    limited = {"holdout": 0, "shard_size": 2, "config": small_config(data__max_bad_files=1)}
    shares = [{"process_index": i, "process_count": processes} for i in range(processes)]
    message = r"2 files can't be read, more than data\.max_bad_files=1: .*cut\.mp4.*text\.mp4"
    for share in shares[:-1]:
        assert encode(folder, spoiled, codec=codec, **limited, **share) is None
    with pytest.raises(ValueError, match=message) as raised:
        encode(folder, spoiled, codec=codec, **limited, **shares[-1])
    assert "short.mp4" not in str(raised.value) and not (folder / MANIFEST).exists()
    more = limited | {"config": small_config(data__max_bad_files=2)}
    assert encode(folder, spoiled, codec=codec, **more)["train"]["num_skipped"] == 3
    assert codec.clips == 1  # the good one is in a shard that was finished


def test_a_folder_of_which_nothing_can_be_used(spoiled, tmp_path):
    (spoiled / "good.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 4 training clips can be used: .*cut\.mp4"):
        encode(tmp_path / "dataset", spoiled, holdout=0)
    assert not (tmp_path / "dataset" / MANIFEST).exists()


def test_a_latent_that_is_not_finite_is_skipped(videos, tmp_path):
    class Broken(CountingCodec):
        def encode(self, frames_BTHW3):
            latent = super().encode(frames_BTHW3)
            return latent.at[..., 0].set(np.nan) if self.clips == 2 else latent

    summary = encode(tmp_path / "dataset", videos, codec=Broken(), holdout=0)
    assert summary["train"]["num_kept"] == 5
    (reason,) = summary["train"]["skipped"].values()
    assert "NaN" in reason


def test_any_number_of_processes_makes_the_same_files(videos, dataset, tmp_path):
    folder, codecs = tmp_path / "dataset", [CountingCodec(), CountingCodec()]
    shares = {"process_count": 2}
    assert encode(folder, videos, codec=codecs[1], process_index=1, **shares) is None
    assert not (folder / MANIFEST).exists() and not (folder / "dataset_info.json").exists()
    assert encode(folder, videos, codec=codecs[0], process_index=0, **shares) is not None
    assert {codec.clips for codec in codecs} == {2, 4}
    assert contents(folder) == contents(dataset)


def test_stopped_it_goes_on_without_encoding_again(videos, dataset, tmp_path):
    folder, codec = tmp_path / "dataset", CountingCodec()
    assert encode(folder, videos, codec=codec, stop=lambda: codec.clips == 3) is None
    assert not (folder / MANIFEST).exists() and not list(folder.rglob(".writing*"))
    with pytest.raises(FileNotFoundError, match="not finished; run encode_dataset.py again"):
        read_manifest(folder)
    codec = CountingCodec()
    assert encode(folder, videos, codec=codec) is not None
    assert codec.clips == 4  # the shard that was stopped in its middle, and the one after it
    assert contents(folder) == contents(dataset)
    codec = CountingCodec()
    assert encode(folder, videos, codec=codec) == json.loads((dataset / SUMMARY).read_text())
    assert codec.clips == 0


def test_a_full_disk_ends_in_a_message_and_leaves_the_shard_to_the_next_run(
    videos, dataset, tmp_path
):
    folder, before = tmp_path / "dataset", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"train-00000 can't be written: .*Make room"):
            encode(folder, videos)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(folder.rglob("*train-00000*"))
    assert encode(folder, videos) is not None
    assert contents(folder) == contents(dataset)


# Sends itself a signal at the third clip.
_SUICIDAL = """
import os, sys
import encode_dataset
from absl import app
from lact_jax.models import block_codec
encode, clips = block_codec.BlockCodec.encode, []
def counted(self, frames):
    if frames.shape[1] > 5:
        clips.append(0)
        if len(clips) == 3:
            os.kill(os.getpid(), {number})
    return encode(self, frames)
block_codec.BlockCodec.encode = counted
app.run(encode_dataset.main, flags_parser=encode_dataset.cli.parse_flags)
"""


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_signal_in_the_middle_of_a_shard(number, code, videos, tmp_path):
    root = Path(__file__).parents[2]
    folder = tmp_path / "dataset"
    flags = [
        f"--config={root / 'tests' / 'tiny_run.py'}", "--config.data.num_frames=9",
        f"--src={videos}", f"--dst={folder}", "--holdout=2", "--shard_size=2",
    ]  # fmt: skip
    command = [sys.executable, "-c", _SUICIDAL.format(number=int(number)), *flags]
    done = subprocess.run(
        command, env=script_env(), cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert not (folder / MANIFEST).exists()
    assert bool(list(folder.rglob(".writing*"))) == (number == signal.SIGKILL)
    codec, config = CountingCodec(), small_config()
    text = make_text_encoder(config.text.name, **config.text.options)
    summary = encode(folder, videos, codec=codec, text=text)
    assert codec.clips == 4
    assert names_of(summary) == [clip.name for clip in list_clips(videos)]
    encode(tmp_path / "whole", videos, text=text)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_merge_that_was_killed_is_finished(videos, dataset, tmp_path, monkeypatch):
    folder = tmp_path / "dataset"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encoding_merge, "_write_tfds_metadata", killed)
        with pytest.raises(KeyboardInterrupt):
            encode(folder, videos)
    assert not (folder / MANIFEST).exists() and not (folder / "dataset_info.json").exists()
    codec = CountingCodec()
    assert encode(folder, videos, codec=codec) is not None and codec.clips == 0
    assert contents(folder) == contents(dataset)


@pytest.mark.parametrize(
    "changes, lines",
    [
        ({"data__fps": 8.0, "data__num_frames": 5},
         ["clip.fps: 16.0 there, 8.0 here", "clip.num_frames: 9 there, 5 here"]),
        ({"data__height": 16}, [r"clip.sizes: \[\[32, 32\]\] there, \[\[16, 32\]\] here"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("begun", [True, False])
def test_a_data_set_is_not_gone_on_with_in_other_settings(changes, lines, begun, videos, tmp_path):
    folder = tmp_path / "dataset"
    encode(folder, videos, stop=lambda: begun)
    before = contents(folder)
    with pytest.raises(FileExistsError) as raised:
        encode(folder, videos, config=small_config(**changes))
    for line in lines:
        assert re.search(line, str(raised.value))
    assert "another --dst" in str(raised.value)
    assert contents(folder) == before


def test_nor_with_other_videos(videos, dataset, spoiled):
    with pytest.raises(FileExistsError, match="source.clips.train: 4 there, 2 here"):
        encode(dataset, spoiled)


def test_a_folder_of_something_else_is_left_alone(videos, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        encode(tmp_path, videos)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"holdout": 6}, "holdout=6"),
        ({"holdout": -1}, "holdout=-1"),
        ({"shard_size": 0}, "shard_size=0: must be at least 1"),
        ({"process_index": 2, "process_count": 2}, "process_index=2: must be from 0 to below 2"),
    ],
)
def test_senseless_options(options, message, videos, tmp_path):
    with pytest.raises(ValueError, match=message):
        encode(tmp_path / "dataset", videos, **options)


def test_without_a_source_the_configs_data_set_is_encoded(tmp_path):
    options = {"num_shapes": 2, "num_rings": 1, "num_validation_shapes": 1,
               "num_validation_rings": 1}  # fmt: skip
    config = small_config(tmp_path / "drawn", data__options=options)
    what = {"src": None, "dst": tmp_path / "dataset"}
    summary = encode_dataset(config, CountingCodec(), EndedText(), **what)
    assert [summary[s]["num_kept"] for s in ("train", "validation")] == [3, 2]
    with pytest.raises(ValueError, match="has validation clips of its own"):
        encode_dataset(config, CountingCodec(), EndedText(), **what, holdout=1)
    config = small_config(data__name="encoded")
    with pytest.raises(ValueError, match="nothing to encode: give --src=VIDEOS"):
        encode_dataset(config, CountingCodec(), EndedText(), **what)
