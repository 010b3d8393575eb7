import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lact_jax.data import ring, shapes
from lact_jax.data.synthetic import Settings, draw_clip, write_folder
from lact_jax.video_io import read_video

SMALL = Settings(num_shapes=4, num_rings=2, num_frames=9, size=32)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def test_folder_holds_real_videos_with_captions(tmp_path):
    write_folder(tmp_path / "clips", SMALL)
    lines = (tmp_path / "clips" / "captions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 6
    for number, row in enumerate(rows):
        family, index = ("shapes", number) if number < 4 else ("ring", number - 4)
        drawn, caption = draw_clip(SMALL, family, index)
        read = read_video(tmp_path / "clips" / row["file"])
        assert row["caption"] == caption and read.shape == (9, 32, 32, 3)
        error = np.linalg.norm(read.astype(float) - drawn) / np.linalg.norm(drawn.astype(float))
        assert error < 0.15  # chroma at half resolution


def test_same_settings_give_the_same_files(tmp_path):
    write_folder(tmp_path / "a", SMALL, workers=1)
    write_folder(tmp_path / "b", SMALL, workers=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("change", [{"seed": 1}, {"split": "held_out"}])
@pytest.mark.parametrize("family", ["shapes", "ring"])
def test_seed_and_split_give_other_clips(change, family):
    other = Settings(num_frames=9, size=32, **change)
    first, second = (draw_clip(s, family, 0)[0].astype(float) for s in (SMALL, other))
    assert np.linalg.norm(first - second) > 0.1 * np.linalg.norm(first)


def test_a_killed_run_is_completed(tmp_path):
    settings = Settings(num_shapes=30, num_rings=6)
    whole = write_folder(tmp_path / "whole", settings)
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "lact_jax.data.synthetic", str(folder),
               "--num_shapes=30", "--num_rings=6"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    while len(list(folder.glob("shapes_*.mp4"))) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not json.loads((folder / "manifest.json").read_text())["complete"]
    assert not (folder / "captions.jsonl").exists()
    (folder / ".shapes_00029.12345678.tmp.mp4").write_bytes(b"what a killed run leaves")
    write_folder(folder, settings)
    assert contents(folder) == contents(whole)
    assert not list(folder.glob(".*tmp*"))


def test_a_whole_folder_is_left_alone(tmp_path):
    folder = write_folder(tmp_path / "clips", SMALL)
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.*")}
    write_folder(folder, SMALL)
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("*.*")}


def test_other_settings_in_the_same_folder(tmp_path):
    write_folder(tmp_path, SMALL)
    with pytest.raises(FileExistsError, match="num_shapes: 4 there, 5 asked for") as error:
        write_folder(tmp_path, Settings(num_shapes=5, num_rings=2, num_frames=9, size=32))
    assert str(tmp_path) in str(error.value)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="thesis.txt"):
        write_folder(tmp_path, SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("change, match", [
    ({"num_frames": 80}, "num_frames=80: must be 1 \\+ 4k"),
    ({"split": "test"}, "split='test'"),
    ({"size": 63}, "size=63"),
    ({"num_shapes": 0, "num_rings": 0}, "at least one clip"),
])
def test_senseless_settings(change, match):
    with pytest.raises(ValueError, match=match):
        Settings(**change)


def test_every_combination_comes_once_before_any_comes_again():
    settings = Settings(num_frames=1, size=16)
    captions = [draw_clip(settings, "shapes", i)[1] for i in range(144)]
    assert len(set(captions[:72])) == len(set(captions[72:])) == 72
    assert captions[:72] != captions[72:]


@pytest.mark.parametrize("direction", shapes.DIRECTIONS)
@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_shapes_stay_whole_and_move_all_the_time(shape, direction):
    rng = np.random.default_rng(3)
    frames = shapes.draw(rng, "blue", shape, direction, num_frames=81, size=64).astype(float)
    weight = np.abs(frames - shapes.BACKGROUND).sum(-1)
    mass = weight.sum((1, 2))
    assert mass.std() < 0.01 * mass.mean()  # nothing leaves the picture
    down = weight.sum(2) @ np.arange(64) / mass
    right = weight.sum(1) @ np.arange(64) / mass
    step = np.array(shapes.DIRECTIONS[direction])
    along = np.stack([down, right], -1) @ step
    across = np.stack([down, right], -1) @ step[::-1]
    assert (along[12:] - along[:-12]).min() > 3 and np.ptp(across) < 0.5


def test_shapes_have_the_area_that_the_table_says():
    for shape in shapes.SHAPES:
        drawn = shapes.coverage(shape, 31.3, 32.2, 13.0, 64, 64)
        assert abs(drawn.sum() / (shapes.AREAS[shape] * 13**2) - 1) < 0.02
        down, right = drawn.sum(1) @ np.arange(64), drawn.sum(0) @ np.arange(64)
        np.testing.assert_allclose([down, right] / drawn.sum(), [31.3, 32.2], atol=0.1)


def test_ring_returns_to_what_it_showed_three_chunks_ago():
    frames, _ = draw_clip(Settings(), "ring", 0)
    # Chunk 0 is frames 0..8; chunk i > 0 is frames 12i-3 .. 12i+8, still from 12i on.
    still = [frames[12 * i : 12 * i + 9] for i in range(7)]
    for i, chunk in enumerate(still):
        assert (chunk == chunk[:1]).all()
        for j in range(i):
            error = np.abs(chunk[0].astype(float) - still[j][0]).mean()
            assert (error == 0) if (i - j) % 3 == 0 else (error > 10)


def test_ring_moves_only_in_the_first_latent_frame_of_a_chunk():
    left = ring.camera(81, 64, 3)
    moves = np.flatnonzero(np.diff(left)) + 1
    first_latent = {12 * i + k for i in range(1, 7) for k in (-3, -2, -1, 0)}
    assert set(moves) == first_latent and (np.diff(left) >= 0).all()
    np.testing.assert_array_equal(left[::12], 64 * np.arange(7))
