"""Files as they are found in the wild come out as a player shows them."""

import contextlib
import logging
from fractions import Fraction

import av
import numpy as np
import odd_videos
import pytest
from av.stream import Disposition
from odd_videos import BRIGHT, DARK, FPS, KINDS, RED, TURNS, pictures, times, write

from lact_jax.video_io import VideoError, probe_video, read_video, shown_size

logging.getLogger("libav").setLevel(logging.CRITICAL)


def bars(numbers):
    """The places in which the pictures of these numbers have their bars."""
    return [number % (odd_videos.WIDTH // odd_videos.BAR) for number in numbers]


def assert_red_corner(frames, height, width):
    """What stands above left in `pictures`, of this size, and the dark beside it."""
    inside, outside = frames[:, 2 : height - 2, 2 : width - 2], frames[:, 2 : height - 2, width + 3]
    assert np.abs(inside.astype(float).mean((0, 1, 2)) - RED).max() < 16
    assert np.abs(outside.astype(float).mean((0, 1)) - DARK).max() < 16


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_read_whole_and_in_parts(tmp_path, kind):
    path = KINDS[kind](tmp_path / kind, pictures(40))
    assert probe_video(path).num_frames(FPS) == 40
    whole = read_video(path, fps=FPS)
    assert whole.shape == (40, 32, 48, 3) and times(whole) == bars(range(40))
    assert_red_corner(whole, 8, 12)
    part = read_video(path, fps=FPS, start=17, num_frames=9)
    assert times(part) == bars(range(17, 26))
    np.testing.assert_array_equal(part, whole[17:26])
    with pytest.raises(VideoError, match=f"{kind}: 5 frames at 10 fps from frame 35 on, 6 asked"):
        read_video(path, fps=FPS, start=35, num_frames=6)


@pytest.mark.parametrize("kind", ["a.mp4", "a.mkv", "a.webm"])
def test_variable_rates_are_resampled_by_the_time_of_showing(tmp_path, kind):
    rng = np.random.default_rng()
    shown_s = np.concatenate([[0], rng.integers(20, 300, 59).cumsum()]) / 1000
    codec = {"a.webm": "libvpx"}.get(kind, "libx264")
    path = write(tmp_path / kind, pictures(60), times_s=shown_s, codec=codec)
    count = int(shown_s[-1] * FPS)
    at_s = np.arange(count) / FPS + 0.001
    expected = bars(np.searchsorted(shown_s, at_s + 1e-9, side="right") - 1)
    assert times(read_video(path, fps=FPS, num_frames=count)) == expected
    start = count // 2
    assert times(read_video(path, fps=FPS, start=start, num_frames=7)) == expected[start:start + 7]


@pytest.mark.parametrize("kind", ["long.mp4", "long.mkv", "long.avi"])
def test_a_window_of_a_long_file_decodes_little_more_than_itself(tmp_path, kind, monkeypatch):
    codec = "mpeg4" if kind.endswith("avi") else "libx264"
    path = write(tmp_path / kind, pictures(1500), codec=codec)
    decoded = odd_videos.note_decoded(monkeypatch)
    read = read_video(path, fps=FPS, start=1400, num_frames=9, height=16, width=16)
    assert len(read) == 9
    # The first picture, which tells where time begins; from the key frame 1392 on; the one after.
    assert len(decoded) <= 1 + 8 + 9 + 1


@pytest.mark.parametrize("turn", TURNS)
def test_rotated_and_mirrored_files_are_shown_upright(tmp_path, turn):
    frames = pictures(3)
    coded = read_video(write(tmp_path / "plain.mp4", frames))
    path = odd_videos.write_turned(tmp_path / "turned.mp4", frames, turn)
    upright = TURNS[turn][1](coded)
    np.testing.assert_array_equal(read_video(path), upright)
    assert shown_size(path) == upright.shape[1:3]
    # Scaled and cropped, what is cut off is what the upright picture has too much of.
    height, width = upright.shape[1:3]
    above = read_video(path, height=height // 2, width=width, crop=(0, 0))
    np.testing.assert_array_equal(above, upright[:, : height // 2])


@pytest.mark.parametrize("height, width", [(31, 47), (33, 48), (96, 32)])
def test_odd_and_portrait_sizes(tmp_path, height, width):
    path = write(tmp_path / "a.mkv", pictures(4, height, width), pixels="yuv444p")
    read = read_video(path, fps=FPS)
    assert read.shape[1:3] == shown_size(path) == (height, width)
    assert_red_corner(read, height // 4, width // 4)
    assert times(read) == [0, 1, 2, 3]
    covered = read_video(path, height=64, width=32, crop=(0, 0))
    scale = max(64 / height, 32 / width)
    assert covered.shape[1:3] == (64, 32)
    assert_red_corner(covered, int(height * scale / 4), int(width * scale / 4))


@pytest.mark.parametrize("aspect, shown", [((2, 1), (32, 96)), ((1, 2), (32, 24)),
                                           ((12, 11), (32, 52))])
def test_pixels_that_are_not_square(tmp_path, aspect, shown):
    path = write(tmp_path / "a.mp4", pictures(3), pixel_aspect=Fraction(*aspect))
    read = read_video(path)
    assert read.shape[1:3] == shown_size(path) == shown
    assert_red_corner(read, 8, shown[1] // 4)
    np.testing.assert_array_equal(read_video(path, height=shown[0], width=shown[1]), read)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("orientation, turn", [(1, None), (3, "180"), (6, "90 clockwise"),
                                               (8, "90 counterclockwise")])
def test_still_images_are_clips_of_one_frame(tmp_path, suffix, orientation, turn):
    image = pictures(3)[2]
    path = odd_videos.write_still(tmp_path / f"a{suffix}", image, orientation)
    upright = image if turn is None else TURNS[turn][1](image)
    assert probe_video(path).num_frames(16) == 1
    for read in (read_video(path), read_video(path, num_frames=1, fps=60)):
        assert read.shape == (1, *upright.shape)
        error = read[0].astype(float) - upright
        assert np.linalg.norm(error) < 0.03 * np.linalg.norm(upright.astype(float))
    with pytest.raises(VideoError, match=f"a{suffix}: 1 frames at 60 fps.*2 asked for"):
        read_video(path, num_frames=2, fps=60)


def test_a_cover_picture_is_not_the_video(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=FPS)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.full((16, 16, 3), BRIGHT, np.uint8))
        container.mux(cover.encode(picture))
        container.mux(cover.encode())
        for image in pictures(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())
    assert (probe_video(path).height, probe_video(path).width) == (32, 48)
    assert times(read_video(path, fps=FPS)) == list(range(12))


def test_where_a_crop_cuts(tmp_path):
    path = write(tmp_path / "a.mp4", pictures(2, 32, 96))
    whole = read_video(path)
    for right, left in [(0, 0), (0.25, 16), (0.5, 32), (1, 64)]:
        read = read_video(path, height=32, width=32, crop=(0.7, right))
        np.testing.assert_array_equal(read, whole[:, :, left : left + 32])


@pytest.mark.parametrize("kind", KINDS)
def test_damage_anywhere_leaves_a_clip_or_a_video_error(tmp_path, kind):
    data = KINDS[kind](tmp_path / kind, pictures(20)).read_bytes()
    damaged = tmp_path / f"damaged_{kind}"
    rng = np.random.default_rng(list(kind.encode()))
    ways = {
        "cut": lambda x: x[: rng.integers(len(x))],
        "hole": lambda x: x[: (at := rng.integers(len(x)))] + bytes(200) + x[at + 200 :],
        "bits": lambda x: bytes(np.where(rng.random(len(x)) < 0.01, rng.integers(0, 256, len(x)),
                                         np.frombuffer(x, np.uint8)).astype(np.uint8)),
    }  # fmt: skip
    for number in range(9):
        damaged.write_bytes(list(ways.values())[number % 3](data))
        with contextlib.suppress(VideoError):
            assert probe_video(damaged).path == damaged
        with contextlib.suppress(VideoError):
            read = read_video(damaged, fps=FPS, start=3, num_frames=9, height=16, width=16)
            assert read.shape == (9, 16, 16, 3)
        with contextlib.suppress(VideoError):
            assert read_video(damaged, fps=FPS, num_frames=2).shape[0] == 2


@pytest.mark.parametrize("codec", [b"xyz1", b"none"])
def test_a_codec_that_nobody_knows(tmp_path, codec):
    path = write(tmp_path / "a.mp4", pictures(3))
    data = path.read_bytes()
    assert data.count(b"avc1") >= 1
    path.write_bytes(data.replace(b"avc1", codec))
    for read in (probe_video, read_video):
        with pytest.raises(VideoError, match="a.mp4: its video is in a codec"):
            read(path)


def test_a_size_that_changes_on_the_way_is_scaled_to_the_first(tmp_path):
    path = tmp_path / "a.mkv"
    first = write(tmp_path / "first.h264", pictures(4, 32, 48))
    second = write(tmp_path / "second.h264", pictures(8, 64, 96)[4:])
    path.write_bytes(first.read_bytes() + second.read_bytes())
    read = read_video(path, fps=FPS)
    assert read.shape[1:] == (32, 48, 3)
    assert_red_corner(read, 8, 12)


def test_a_timestamp_that_jumps_is_damage(tmp_path):
    path = write(tmp_path / "a.mkv", pictures(3), times_s=[0, 0.1, 4000], options={"bf": "0"})
    assert len(read_video(path, fps=FPS, num_frames=1)) == 1
    with pytest.raises(VideoError, match="a.mkv: a picture shown for 4000 s; are its timestamps"):
        read_video(path, fps=FPS)
