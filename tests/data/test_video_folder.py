import csv
import dataclasses
import json
import logging
import os
import types

import numpy as np
import pytest
from batch_checks import assert_same_batches, take

from lact_jax.config import DataConfig
from lact_jax.data import DATASETS, make_dataset, random_latents, video_folder
from lact_jax.data.listing import list_clips
from lact_jax.data.video_folder import Options
from lact_jax.video_io import read_video, write_video

logging.getLogger("libav").setLevel(logging.CRITICAL)  # broken files are made on purpose


def write_clip(path, number=0, num_frames=9, size=16):
    """A clip whose brightness tells its number; noisy, so that a cut hits the pictures."""
    rng = np.random.default_rng(number)
    frames = rng.integers(0, 40, (num_frames, size, size, 3)) + 20 * number
    write_video(path, frames.astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Seven clips with text files."""
    for number in range(7):
        write_clip(tmp_path / f"{number}.mp4", number)
        (tmp_path / f"{number}.txt").write_text(f"clip\n number {number}\n")
    return tmp_path


def options(path, **changes):
    given = {"num_frames": 9, "height": 16, "width": 16, "batch_size": 2, "num_threads": 2}
    return Options(path=str(path), **given | changes)


def names(batches):
    return [name for batch in batches for name in batch["name"]]


def test_batches_are_raw_videos_with_captions(folder):
    batch = next(iter(video_folder.make(options(folder, shuffle=False))))
    assert batch["frames"].shape == (2, 9, 16, 16, 3) and batch["frames"].dtype == np.uint8
    assert batch["caption"] == ["clip number 0", "clip number 1"]
    assert batch["name"] == ["0.mp4", "1.mp4"]
    np.testing.assert_array_equal(batch["frames"][1], read_video(folder / "1.mp4"))


def test_options_reach_the_decoder(folder):
    write_clip(folder / "0.mp4", num_frames=21, size=64)
    changed = options(folder, fps=8, num_frames=5, height=32, width=48, shuffle=False, batch_size=1)
    batch = next(iter(video_folder.make(changed)))
    expected = read_video(folder / "0.mp4", fps=8, num_frames=5, height=32, width=48)
    np.testing.assert_array_equal(batch["frames"][0], expected)


def test_every_epoch_is_another_order_of_all_clips(folder):
    batches = iter(video_folder.make(options(folder, batch_size=7)))
    epochs = [tuple(names(take(batches, 1))) for _ in range(4)]
    assert all(sorted(epoch) == [f"{i}.mp4" for i in range(7)] for epoch in epochs)
    assert len(set(epochs)) == 4
    again = iter(video_folder.make(options(folder, batch_size=7)))
    other = iter(video_folder.make(options(folder, batch_size=7, seed=1)))
    assert epochs == [tuple(names(take(again, 1))) for _ in range(4)]
    assert epochs != [tuple(names(take(other, 1))) for _ in range(4)]


@pytest.mark.parametrize("num_threads", [0, 3])
@pytest.mark.parametrize("cache", [False, True])
def test_position_resumes_bit_for_bit(folder, num_threads, cache):
    changed = options(folder, num_threads=num_threads, cache_in_memory=cache)
    batches = iter(video_folder.make(changed))
    take(batches, 5)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 6)
    resumed = iter(video_folder.make(options(folder)))
    resumed.set_state(state)
    assert_same_batches(take(resumed, 6), expected)
    batches.set_state(state)  # and back in the same iterator
    assert_same_batches(take(batches, 6), expected)


def test_cache_decodes_once(folder, monkeypatch):
    decoded = []
    real = video_folder.read_video
    monkeypatch.setattr(
        video_folder, "read_video", lambda path, **kw: decoded.append(path) or real(path, **kw)
    )
    take(iter(video_folder.make(options(folder, cache_in_memory=True, num_threads=0))), 11)
    assert sorted(p.name for p in decoded) == [f"{i}.mp4" for i in range(7)]


def test_processes_share_an_epoch(folder):
    shares = [
        names(take(iter(video_folder.make(
            options(folder, batch_size=1, process_index=i, process_count=2)
        )), 3))
        for i in range(2)
    ]  # fmt: skip
    assert len(set(shares[0] + shares[1])) == 6


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_caption_tables(tmp_path, kind):
    (tmp_path / "deep").mkdir()
    rows = [("b.mp4", 'says "hi", twice'), ("deep/a.mp4", "größer")]
    for name, _ in rows:
        write_clip(tmp_path / name)
    if kind == "jsonl":
        lines = [json.dumps({"file": f, "caption": c, "other": 1}) for f, c in rows]
        (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    else:
        with (tmp_path / "captions.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("file", "caption"), *rows])
    assert [(clip.name, clip.caption) for clip in list_clips(tmp_path)] == rows


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no videos in this folder"):
        video_folder.make(options(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        video_folder.make(options(tmp_path / "nowhere"))


def test_captions_and_videos_must_match(folder):
    for number in range(14):
        (folder / f"extra{number:02d}.txt").write_text("no video of that name")
    (folder / "3.txt").unlink()
    with pytest.raises(ValueError) as error:
        video_folder.make(options(folder))
    message = str(error.value)
    assert "1 videos without caption: 3.mp4" in message
    assert "14 captions without video: extra00.txt" in message and "and 4 more" in message
    assert "extra09.txt" in message and "extra10.txt" not in message


@pytest.mark.parametrize("table, content, match", [
    ("captions.jsonl", '{"file": "0.mp4", "caption": "a"}\n{"file": ', "line 2: not JSON"),
    ("captions.jsonl", '["0.mp4", "a"]', "line 1: must be an object"),
    ("captions.jsonl", '{"file": "0.mp4", "text": "a"}', "line 1: needs a file and a caption"),
    ("captions.jsonl", '{"file": "0.mp4", "caption": "a"}\n' * 2, "line 2: 0.mp4 has a caption"),
    ("captions.csv", "name,caption\n0.mp4,a\n", "must name the columns file,caption"),
    ("captions.csv", "file,caption\n0.mp4\n", "line 2: needs a file and a caption"),
    ("captions.csv", "file,caption\n0.mp4,a\n", "6 videos without caption: 1.mp4"),
    ("captions.csv", "file,caption\n0.mp4,a red ball, rolling\n", "line 2: more values.*quotes"),
    ("captions.csv", "file,caption\n0.mp4,gr\xf6n\n", "captions.csv: not UTF-8 text"),
    ("captions.jsonl", '{"file": "0.mp4", "caption": "gr\xf6n"}', "captions.jsonl: not UTF-8 text"),
    ("0.txt", "gr\xf6n", "0.txt: not UTF-8 text"),
    ("0.txt", " \n", "1 videos without caption: 0.mp4"),
])
def test_broken_captions(folder, table, content, match):
    (folder / table).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=match) as error:
        list_clips(folder)
    assert str(folder) in str(error.value)


def test_a_folder_under_a_videos_name_is_none_and_a_name_that_is_not_utf8_is_told(folder):
    (folder / "x.mp4").mkdir()
    assert len(list_clips(folder)) == 7
    os.mkdir(os.fsencode(folder) + b"/caf\xe9")
    os.rename(folder / "0.mp4", os.fsencode(folder) + b"/caf\xe9/0.mp4")
    with pytest.raises(ValueError, match=r"file name 'caf.*0.mp4' is not UTF-8: rename it"):
        list_clips(folder)


def test_a_link_to_nothing_is_skipped_and_named(folder, caplog):
    (folder / "0.mp4").unlink()
    (folder / "0.mp4").symlink_to(folder / "gone.mp4")
    next(iter(video_folder.make(options(folder))))
    assert "0.mp4: no such video file" in caplog.text


def test_two_caption_tables(folder):
    (folder / "captions.csv").write_text("file,caption\n")
    (folder / "captions.jsonl").write_text("")
    with pytest.raises(ValueError, match="both captions.jsonl and captions.csv"):
        list_clips(folder)


def break_clips(folder):
    """A short clip, one cut off, an audio file and a text, each under a video's name."""
    write_clip(folder / "1.mp4", num_frames=8)
    data = (folder / "3.mp4").read_bytes()
    (folder / "3.mp4").write_bytes(data[: len(data) * 2 // 3])
    (folder / "4.mp4").write_bytes(b"RIFF\x24\x08\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e"
                                   b"\0\0\2\0\x10\0data\0\x08\0\0" + bytes(2048))
    (folder / "6.mp4").write_text("not a video")


def test_unusable_clips_are_skipped_counted_and_named(folder, caplog):
    break_clips(folder)
    batches = iter(video_folder.make(options(folder, batch_size=3)))
    assert set(names(take(batches, 4))) == {"0.mp4", "2.mp4", "5.mp4"}
    (record,) = caplog.records
    message = record.getMessage()
    assert "4 of 7 clips skipped" in message
    assert "1.mp4: 8 frames at 16 fps, 9 needed" in message and "3.mp4: cut off" in message
    assert "4.mp4: no video stream but audio" in message and "6.mp4: can't be read" in message


def test_all_clips_unusable(folder):
    with pytest.raises(ValueError, match="none of the 7 clips can be used.*0.mp4: 9 frames"):
        video_folder.make(options(folder, num_frames=13))


def garble(path):
    """Damages the pictures but not the header or the index."""
    data = bytearray(path.read_bytes())
    begin = data.index(b"mdat") + 4
    data[begin:] = bytes(len(data) - begin)
    path.write_bytes(data)


@pytest.mark.parametrize("cache", [False, True])
def test_damage_found_in_decoding_is_replaced_by_the_next_clip(folder, caplog, cache):
    changed = options(folder, batch_size=7, shuffle=False, num_threads=0, cache_in_memory=cache)
    garble(folder / "2.mp4")
    garble(folder / "6.mp4")
    first, second = take(iter(video_folder.make(changed)), 2)
    assert first["name"] == [f"{i}.mp4" for i in (0, 1, 3, 3, 4, 5, 0)]
    assert_same_batches([first], [second])
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2 and "2.mp4" in warned[0] and "6.mp4" in warned[1]


def test_all_clips_damaged(folder):
    for number in range(7):
        garble(folder / f"{number}.mp4")
    with pytest.raises(ValueError, match="none of the clips can be decoded.*0.mp4") as raised:
        next(iter(video_folder.make(options(folder, num_threads=0))))
    assert str(raised.value).startswith(f"{folder}: ")


@pytest.mark.parametrize("change, match", [
    ({"height": 24}, "height=24: must be a multiple of 16 .*such as 16"),
    ({"width": 0}, "width=0: must be a multiple of 16"),
    ({"num_frames": 80}, "num_frames=80: must be 1 \\+ 4k, such as 77"),
    ({"fps": 0.0}, "fps=0.0"),
    ({"process_index": 1}, "process_index=1"),
])
def test_senseless_options(change, match):
    with pytest.raises(ValueError, match=match):
        Options(path="clips", **change)


def config(path, name="video_folder", **changes):
    data = {"path": str(path), "name": name, "num_frames": 9, "height": 16, "width": 16,
            "batch_size": 2, "num_threads": 1}
    return types.SimpleNamespace(
        seed=0,
        data=DataConfig(**data | changes),
        model=types.SimpleNamespace(patch_size=(1, 2, 2)),
        objective=types.SimpleNamespace(frames_per_chunk=3),
    )


CODEC = types.SimpleNamespace(temporal_stride=4, spatial_stride=8, latent_channels=5)
TEXT = types.SimpleNamespace(text_len=7, text_dim=11)


def test_datasets_by_name(folder, tmp_path):
    batch = next(iter(make_dataset("video_folder", config(folder), CODEC, TEXT)))
    assert batch["frames"].shape == (2, 9, 16, 16, 3)
    synthetic = config(tmp_path / "new", options={"num_shapes": 2, "num_rings": 1})
    batches = iter(make_dataset("synthetic", synthetic, CODEC, TEXT))
    written = {"shapes_00000.mp4", "shapes_00001.mp4", "ring_00000.mp4"}
    assert set(names(take(batches, 2))) == written
    assert set(DATASETS) == {
        "encoded", "mixture", "module", "random", "synthetic", "video_folder"
    }  # fmt: skip


@pytest.mark.parametrize("name, changes, match", [
    ("videos", {}, "data.name='videos': unknown, choose one of"),
    ("video_folder", {"options": {"shufle": True}}, "unknown \\['shufle'\\]"),
    ("video_folder", {"path": ""}, "data.path is empty"),
    ("video_folder", {"height": 40}, "height=40: must be a multiple of 16"),
    ("synthetic", {"options": {"clips": 3}}, "unknown \\['clips'\\].*num_shapes"),
    ("synthetic", {"width": 32}, "data.height=16, data.width=32"),
])
def test_configs_that_fit_no_dataset(tmp_path, name, changes, match):
    with pytest.raises(ValueError, match=match):
        make_dataset(name, config(**{"path": tmp_path} | changes), CODEC, TEXT)


def test_random_batches_have_the_configured_shapes_and_resume():
    dataset = make_dataset("random", config("nowhere"), CODEC, TEXT)
    batches = iter(dataset)
    first = take(batches, 2)
    assert first[0]["latent"].shape == (2, 3, 2, 2, 5) and first[0]["text"].shape == (2, 7, 11)
    assert all(value.dtype == np.float32 for value in first[0].values())
    assert not np.array_equal(first[0]["latent"], first[1]["latent"])
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 3)
    resumed = iter(dataset)
    resumed.set_state(state)
    for a, b in zip(take(resumed, 3), expected, strict=True):
        np.testing.assert_array_equal(a["latent"], b["latent"])
        np.testing.assert_array_equal(a["text"], b["text"])


def test_random_batches_differ_between_processes_and_seeds():
    base = random_latents.Options(batch_size=1, latent_shape=(1, 2, 2, 3), text_shape=(2, 3))
    changed = [base] + [dataclasses.replace(base, **c) for c in ({"seed": 1}, {"process_index": 1})]
    drawn = [next(iter(random_latents.make(o)))["latent"].tobytes() for o in changed]
    assert len(set(drawn)) == 3
