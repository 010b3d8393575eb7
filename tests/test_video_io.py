import fractions
import logging
import struct
import wave

import av
import numpy as np
import pytest
from odd_videos import note_decoded
from PIL import Image

from lact_jax import video_io
from lact_jax.video_io import VideoError

logging.getLogger("libav").setLevel(logging.CRITICAL)  # broken files are made on purpose


def numbered(count, height=32, width=48):
    """Flat grey frames whose brightness tells their number."""
    level = np.linspace(20, 235, count).round().astype(np.uint8)
    return np.broadcast_to(level[:, None, None, None], (count, height, width, 3)).copy()


def numbers(frames, count):
    """The numbers of `numbered` frames."""
    level = frames.astype(float).mean((1, 2, 3))
    return ((level - 20) / (235 - 20) * (count - 1)).round().astype(int).tolist()


def write_at(path, frames, times_s, key_every=250):
    """An mp4 whose frames are shown at given times, with key frames only where asked for."""
    with av.open(str(path), "w") as container:
        options = {"crf": "5", "bf": "0", "sc_threshold": "0"}
        stream = container.add_stream("libx264", rate=1000, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.gop_size = key_every
        stream.time_base = millisecond = fractions.Fraction(1, 1000)
        for image, time in zip(frames, times_s, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), millisecond
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_tone(path):
    """An audio file, whatever its name says."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        sound = np.sin(np.arange(16000) / 10).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def decoded(monkeypatch):
    """The frames that FFmpeg decoded, as they come."""
    return note_decoded(monkeypatch)


def test_what_is_written_is_read(tmp_path):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (21, 4, 6, 3), np.uint8)
    frames = coarse.repeat(16, 1).repeat(16, 2)
    video_io.write_video(tmp_path / "a.mp4", frames, crf=5)
    read = video_io.read_video(tmp_path / "a.mp4")
    assert read.shape == frames.shape and read.dtype == np.uint8
    inside = np.s_[:, 4::16, 4::16]  # chroma has half the resolution, so look inside the squares
    error = read[inside].astype(float) - frames[inside]
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(frames[inside].astype(float))
    info = video_io.probe_video(tmp_path / "a.mp4")
    assert (info.height, info.width, info.num_frames(16), info.num_frames(8)) == (64, 96, 21, 11)


def test_written_videos_play_in_browsers(tmp_path):
    video_io.write_video(tmp_path / "a.mp4", numbered(9))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 16
    assert (tmp_path / "a.mp4").read_bytes().index(b"moov") < 1000  # before the pictures


def test_same_frames_give_the_same_file(tmp_path):
    frames = numbered(9)
    video_io.write_video(tmp_path / "a.mp4", frames)
    video_io.write_video(tmp_path / "b.mp4", frames)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("fps, expected", [(16, range(24)), (8, range(0, 24, 2)),
                                           (32, np.repeat(range(24), 2)), (12, None)])
def test_other_rates_show_what_a_player_shows(tmp_path, fps, expected):
    video_io.write_video(tmp_path / "a.mp4", numbered(24), crf=5)
    if expected is None:
        expected = [k * 16 // 12 for k in range(18)]
    read = video_io.read_video(tmp_path / "a.mp4", fps=fps)
    assert numbers(read, 24) == list(expected)


def test_timestamps_are_believed_not_the_nominal_rate(tmp_path):
    times = [0, 0.1, 0.2, 0.9, 1.0, 1.5]
    write_at(tmp_path / "a.mp4", numbered(6), times)
    read = video_io.read_video(tmp_path / "a.mp4", fps=10, num_frames=15)
    assert numbers(read, 6) == [0, 1, 2, 2, 2, 2, 2, 2, 2, 3, 4, 4, 4, 4, 4]


def test_a_video_that_starts_late_starts_at_its_first_picture(tmp_path):
    write_at(tmp_path / "a.mkv", numbered(4), [5.0, 5.1, 5.2, 5.3])
    assert numbers(video_io.read_video(tmp_path / "a.mkv", fps=10, num_frames=4), 4) == [0, 1, 2, 3]
    later = video_io.read_video(tmp_path / "a.mkv", fps=10, start=2, num_frames=2)
    assert numbers(later, 4) == [2, 3]


@pytest.mark.parametrize("start, count", [(0, 5), (37, 20), (79, 1), (63, 17)])
def test_a_range_is_a_slice_of_the_whole(tmp_path, start, count):
    write_at(tmp_path / "a.mp4", numbered(80), np.arange(80) / 16, key_every=12)
    whole = video_io.read_video(tmp_path / "a.mp4", num_frames=80)
    part = video_io.read_video(tmp_path / "a.mp4", start=start, num_frames=count)
    np.testing.assert_array_equal(part, whole[start : start + count])


def test_a_range_decodes_no_more_than_it_needs(tmp_path, decoded):
    write_at(tmp_path / "a.mp4", numbered(200), np.arange(200) / 16, key_every=10)
    video_io.read_video(tmp_path / "a.mp4", start=153, num_frames=4)
    # The first picture, which tells the time; from key frame 150 on; and the one that ends it.
    assert len(decoded) == 1 + 3 + 4 + 1


def test_resize_covers_and_crops_the_centre(tmp_path):
    frames = np.zeros((3, 64, 128, 3), np.uint8)
    frames[:, :, 32:96] = (200, 30, 30)  # what a square crop keeps
    video_io.write_video(tmp_path / "a.mp4", frames, crf=5)
    read = video_io.read_video(tmp_path / "a.mp4", height=32, width=32)
    assert read.shape == (3, 32, 32, 3)
    assert np.abs(read[:, 2:-2, 2:-2].astype(float) - (200, 30, 30)).max() < 12
    tall = video_io.read_video(tmp_path / "a.mp4", height=64, width=16)
    assert tall.shape == (3, 64, 16, 3) and tall[..., 0].min() > 150


def test_a_phone_held_upright_is_shown_upright(tmp_path):
    frames = np.full((3, 32, 64, 3), 30, np.uint8)
    frames[:, :, :32] = 220  # the left half as it is coded
    video_io.write_video(tmp_path / "a.mp4", frames)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # of the track header: turn by 90 degrees clockwise
    clockwise = [0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30]
    data[matrix : matrix + 36] = struct.pack(">9i", *clockwise)
    (tmp_path / "a.mp4").write_bytes(data)
    for read in (
        video_io.read_video(tmp_path / "a.mp4"),
        video_io.read_video(tmp_path / "a.mp4", height=32, width=16),
    ):
        _, height, width, _ = read.shape
        assert height == 2 * width
        assert read[:, : height // 2 - 4].min() > 190 and read[:, height // 2 + 4 :].max() < 60


@pytest.mark.parametrize("damage, reason", [
    (lambda data: data[: len(data) * 2 // 3], "cut off"),
    (lambda data: data[:40], "can't be read as a video"),
    (lambda data: b"this is a text" * 100, "can't be read as a video"),
    (lambda data: b"", "can't be read as a video"),
])
@pytest.mark.parametrize("read", [video_io.probe_video, video_io.read_video])
def test_broken_files_are_named(tmp_path, damage, reason, read):
    rng = np.random.default_rng(0)
    video_io.write_video(tmp_path / "a.mp4", rng.integers(0, 256, (20, 32, 32, 3), np.uint8))
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(damage((tmp_path / "a.mp4").read_bytes()))
    with pytest.raises(VideoError, match=reason) as error:
        read(broken)
    assert str(broken) in str(error.value)


def test_a_cut_is_found_without_an_index_before_the_pictures(tmp_path):
    rng = np.random.default_rng(0)
    write_at(tmp_path / "a.mp4", rng.integers(0, 256, (20, 32, 32, 3), np.uint8), np.arange(20) / 9)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match="b.mp4"):
        video_io.probe_video(tmp_path / "b.mp4")


@pytest.mark.parametrize("read", [video_io.probe_video, video_io.read_video])
def test_audio_under_a_videos_name(tmp_path, read):
    write_tone(tmp_path / "song.mp4")
    with wave.open(str(tmp_path / "noise.mp4"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000))
    for name in ("song.mp4", "noise.mp4"):
        with pytest.raises(VideoError, match="no video stream.*audio") as error:
            read(tmp_path / name)
        assert name in str(error.value)


def test_a_video_without_frames(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        sound = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    with pytest.raises(VideoError, match="a.mkv.*(no frame|can't be read)"):
        video_io.read_video(tmp_path / "a.mkv")


def test_too_few_frames_are_counted(tmp_path):
    video_io.write_video(tmp_path / "a.mp4", numbered(10))
    with pytest.raises(VideoError, match="a.mp4: 7 frames at 16 fps from frame 3 on, 9 asked for"):
        video_io.read_video(tmp_path / "a.mp4", start=3, num_frames=9)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
        video_io.read_video(tmp_path / "nowhere.mp4")


@pytest.mark.parametrize("options", [{"fps": 0}, {"start": -1}, {"num_frames": 0}, {"height": 8}])
def test_senseless_arguments(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        video_io.read_video(tmp_path / "a.mp4", **options)


@pytest.mark.parametrize("frames, reason", [
    (np.zeros((2, 32, 32, 3), np.float32), "float32"),
    (np.zeros((2, 32, 32), np.uint8), "uint8"),
    (np.zeros((0, 32, 32, 3), np.uint8), "at least one frame"),
    (np.zeros((2, 31, 32, 3), np.uint8), "31x32"),
])
def test_frames_that_cannot_be_written(tmp_path, frames, reason):
    with pytest.raises(ValueError, match=reason):
        video_io.write_video(tmp_path / "a.mp4", frames)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), video_io.replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with video_io.replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_contact_sheet_shows_each_clip_in_its_row():
    red, blue = np.zeros((81, 32, 32, 3), np.uint8), np.zeros((5, 32, 64, 3), np.uint8)
    red[..., 0], blue[..., 2] = np.arange(81)[:, None, None] * 3, 250
    sheet = video_io.contact_sheet([red, blue], ["a red clip", "a blue clip"], columns=5,
                                   cell_height=32)
    first, second = sheet[20:52], sheet[55 + 20:55 + 52]
    brightness = [int(first[16, 3 + 35 * i + 16, 0]) for i in range(5)]
    assert brightness == [0, 60, 120, 180, 240]
    assert second[16, 10].tolist() == second[16, 3 + 67 * 4 + 30].tolist() == [0, 0, 250]
    assert (sheet[2:18, :100] < 128).any()  # the label is there
    with pytest.raises(ValueError, match="2 clips and 1 labels"):
        video_io.contact_sheet([red, blue], ["one"])


def test_png_is_lossless(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    video_io.write_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)


def test_a_video_written_in_pieces_has_the_same_bytes(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (7, 32, 48, 3), np.uint8)
    video_io.write_video(tmp_path / "whole.mp4", frames)
    with video_io.open_video(tmp_path / "pieces.mp4") as writer:
        for piece in np.split(frames, [1, 1, 4]):
            writer.write(piece)
        hidden = [p.name for p in tmp_path.iterdir()]
        assert "pieces.mp4" not in hidden  # not there until it is whole
    assert (tmp_path / "pieces.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
