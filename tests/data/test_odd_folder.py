"""A folder of videos as they are downloaded: all kinds and lengths, covers and bad files."""

import json
import logging

import numpy as np
import pytest
from batch_checks import take
from odd_videos import FPS, KINDS, garble, pictures, times, write, write_still

from lact_jax.data import video_folder
from lact_jax.data.listing import list_clips, split_clips

logging.getLogger("libav").setLevel(logging.CRITICAL)  # broken files are made on purpose

LENGTHS = {"long.mp4": 40, "middle.mkv": 21, "short.mp4": 9}


@pytest.fixture
def folder(tmp_path):
    """Three clips of different lengths."""
    for name, length in LENGTHS.items():
        write(tmp_path / name, pictures(length))
        (tmp_path / name).with_suffix(".txt").write_text(name)
    return tmp_path


def options(path, **changes):
    given = {"num_frames": 9, "height": 32, "width": 48, "fps": FPS, "batch_size": 3,
             "num_threads": 2}  # fmt: skip
    return video_folder.Options(path=str(path), **given | changes)


def windows(batches):
    """For every clip, the bars' columns in what was shown of it, epoch after epoch."""
    shown = {}
    for batch in batches:
        for name, frames in zip(batch["name"], batch["frames"], strict=True):
            shown.setdefault(name, []).append(times(frames))
    return shown


def test_a_folder_of_all_kinds_is_read(tmp_path):
    names = sorted(KINDS)
    for name in names:
        KINDS[name](tmp_path / name, pictures(13))
    table = "".join(json.dumps({"file": n, "caption": f"a {n}"}) + "\n" for n in names)
    (tmp_path / "captions.jsonl").write_text(table)
    asked = options(tmp_path, batch_size=len(names), shuffle=False, num_frames=13, max_bad_files=0)
    batch = next(iter(video_folder.make(asked)))
    assert batch["name"] == names and batch["caption"] == [f"a {name}" for name in names]
    bars = [number % 12 for number in range(13)]
    assert [times(frames) for frames in batch["frames"]] == [bars] * len(names)


def test_every_epoch_shows_another_window(folder):
    asked = options(folder, random_crop_time=True, shuffle=False)
    shown = windows(take(iter(video_folder.make(asked)), 8))
    for name, length in LENGTHS.items():
        possible = [[i % 12 for i in range(start, start + 9)] for start in range(length - 8)]
        assert len(shown[name]) == 8 and all(window in possible for window in shown[name])
    assert len(set(map(tuple, shown["long.mp4"]))) > 3
    assert len(set(map(tuple, shown["short.mp4"]))) == 1


def test_windows_depend_on_seed_epoch_and_clip_alone(folder):
    asked = options(folder, random_crop_time=True)
    straight = windows(take(iter(video_folder.make(asked)), 8))
    others = [
        options(folder, random_crop_time=True, num_threads=0),
        options(folder, random_crop_time=True, batch_size=1),
    ]
    for other in others:
        count = 8 * asked.batch_size // other.batch_size
        assert windows(take(iter(video_folder.make(other)), count)) == straight
    seeded = options(folder, random_crop_time=True, seed=1)
    assert windows(take(iter(video_folder.make(seeded)), 8)) != straight
    for name in LENGTHS:  # a clip more or less changes the order, not the windows
        if name != "long.mp4":
            (folder / name).unlink()
            (folder / name).with_suffix(".txt").unlink()
    alone = options(folder, random_crop_time=True, batch_size=1)
    assert windows(take(iter(video_folder.make(alone)), 8)) == {"long.mp4": straight["long.mp4"]}


def test_random_crops_in_space_keep_the_time(folder):
    centre = {"height": 32, "width": 16, "shuffle": False}
    (fixed,) = take(iter(video_folder.make(options(folder, **centre))), 1)
    asked = options(folder, random_crop_space=True, **centre)
    drawn = take(iter(video_folder.make(asked)), 6)
    lefts = []
    whole = next(iter(video_folder.make(options(folder, shuffle=False))))["frames"][0]
    for batch in drawn:
        matches = [left for left in range(33)
                   if np.array_equal(whole[:, :, left : left + 16], batch["frames"][0])]
        assert len(matches) == 1
        lefts += matches
    assert len(set(lefts)) > 3
    np.testing.assert_array_equal(fixed["frames"][0], whole[:, :, 16:32])


def test_where_a_window_can_not_be_decoded_the_first_is_shown(folder, caplog):
    garble(folder / "long.mp4", keep=0.75)
    asked = options(folder, random_crop_time=True, shuffle=False)
    damaged = windows(take(iter(video_folder.make(asked)), 9))
    write(folder / "long.mp4", pictures(40))
    whole = windows(take(iter(video_folder.make(asked)), 9))
    pairs = list(zip(damaged["long.mp4"], whole["long.mp4"], strict=True))
    first = list(range(9))
    assert all(shown in (drawn, first) for shown, drawn in pairs)
    assert any(shown != drawn for shown, drawn in pairs)
    assert not caplog.records  # nothing stood in for it


@pytest.mark.parametrize("split, random", [("train", False), ("validation", True)])
def test_otherwise_the_first_window_and_the_centre_are_shown(folder, split, random):
    asked = options(folder, split=split, random_crop_time=random, random_crop_space=random)
    shown = windows(take(iter(video_folder.make(asked)), 1))
    assert shown == {name: [list(range(9))] for name in LENGTHS}


def test_a_cache_can_not_keep_what_changes(folder):
    with pytest.raises(ValueError, match="data.cache_in_memory.*data.random_crop_time"):
        options(folder, random_crop_time=True, cache_in_memory=True)


def test_still_images_are_clips_where_clips_have_one_frame(folder, caplog):
    for number, suffix in enumerate((".png", ".jpg", ".webp")):
        write_still(folder / f"still{number}{suffix}", pictures(5)[4])
        (folder / f"still{number}.txt").write_text("a still")
    write_still(folder / "short.jpg", pictures(1)[0])  # a cover: the caption is the video's
    batches = iter(video_folder.make(options(folder, num_frames=1, batch_size=7)))
    shown = windows(take(batches, 1))
    stills = {f"still{n}{s}": [[4]] for n, s in enumerate((".png", ".jpg", ".webp"))}
    assert shown == {name: [[0]] for name in [*LENGTHS, "short.jpg"]} | stills
    assert not caplog.records
    write_still(folder / "cover.png", pictures(1)[0])
    with pytest.raises(ValueError, match="1 videos without caption: cover.png"):
        video_folder.make(options(folder, num_frames=1))


def test_still_images_beside_videos_are_skipped_counted_and_named(folder, caplog):
    write_still(folder / "cover.png", pictures(1)[0])
    write_still(folder / "still.webp", pictures(1)[0])
    (folder / "still.txt").write_text("a still")
    assert set(windows(take(iter(video_folder.make(options(folder))), 2))) == set(LENGTHS)
    (record,) = caplog.records
    assert "2 still images skipped, clips have 9 frames: cover.png, still.webp" in (
        record.getMessage()
    )
    for name in LENGTHS:
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match="no videos.*its 2 still images are clips of one"):
        video_folder.make(options(folder))


def test_too_many_bad_files_at_the_start_end_the_run(folder):
    for number in range(3):
        (folder / f"bad{number}.mp4").write_text("not a video")
        (folder / f"bad{number}.txt").write_text("bad")
    write(folder / "tiny.mp4", pictures(2))  # too short is not bad
    (folder / "tiny.txt").write_text("tiny")
    video_folder.make(options(folder, max_bad_files=3))
    message = r"3 files can't be read, more than data\.max_bad_files=2: .*bad0\.mp4.*bad2\.mp4"
    with pytest.raises(ValueError, match=message) as error:
        video_folder.make(options(folder, max_bad_files=2))
    assert "tiny.mp4" not in str(error.value)


@pytest.mark.parametrize("limit, ends", [(2, False), (1, True)])
def test_files_found_bad_in_decoding_count_once_each(folder, caplog, limit, ends):
    (folder / "bad.mp4").write_text("not a video")
    (folder / "bad.txt").write_text("bad")
    garble(folder / "long.mp4")
    asked = options(folder, max_bad_files=limit, num_threads=0, random_crop_time=True)
    batches = iter(video_folder.make(asked))
    if ends:
        with pytest.raises(ValueError, match="2 files can't be read.*bad.mp4.*long.mp4"):
            take(batches, 5)
    else:
        assert set(windows(take(batches, 5))) == {"middle.mkv", "short.mp4"}
        assert len(caplog.records) == 2


def test_held_out_clips_are_never_trained_on_and_stay_the_same(folder):
    for number in range(9):
        write(folder / f"{number}.mp4", pictures(9))
        (folder / f"{number}.txt").write_text("more")
    clips = list_clips(folder)
    train = options(folder, holdout=4, batch_size=1)
    trained = {name for b in take(iter(video_folder.make(train)), 30) for name in b["name"]}
    validation = options(folder, holdout=4, batch_size=2, split="validation")
    passes = [[name for b in video_folder.make(validation) for name in b["name"]] for _ in "12"]
    assert passes[0] == passes[1] == sorted(passes[0]) and len(set(passes[0])) == 4
    assert trained == {clip.name for clip in clips} - set(passes[0])
    # The names alone decide: neither the order of the list nor the clips that stay.
    fewer = [clip for clip in clips if clip.name in passes[0] or clip.name < "5"][::-1]
    assert {clip.name for clip in split_clips(fewer, 4)["validation"]} == set(passes[0])


def test_a_holdout_of_everything(folder):
    with pytest.raises(ValueError, match=r"data\.holdout=3: of 3 clips at least one must be left"):
        video_folder.make(options(folder, holdout=3))
    with pytest.raises(ValueError, match="1 validation clips don't fill a batch of 3"):
        video_folder.make(options(folder, holdout=1, split="validation"))
