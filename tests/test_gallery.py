"""The gallery folder: what is in it, when, and that no prompt can break it."""

import html.parser
import json
import re

import av
import numpy as np
import pytest
from PIL import Image

from lact_jax import video_io
from lact_jax.gallery import Gallery, clip_name, read_prompts, write_gallery

SETTINGS = {"seed": 7, "solver": "dpm++", "steps": 50, "guidance": 5.0}


class Page(html.parser.HTMLParser):
    """What a browser makes of a page: tags with their attributes, and the text inside each tag."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.texts = [], [], {}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        self.texts.setdefault(tag, [])

    def handle_endtag(self, tag):
        while self.open.pop() != tag:
            continue

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts[self.open[-1]].append(data)

    def attributes(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def solid(rgb, num_frames=5, size=(32, 48)):
    return np.full((num_frames, *size, 3), rgb, np.uint8)


def brightening(num_frames):
    """Frame i of n is grey, of level 40 + 200·i/(n - 1)."""
    levels = np.linspace(40, 240, num_frames).round().astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (num_frames, 32, 32, 3))


def listed(out):
    return json.loads((out / "prompts.json").read_text(encoding="utf-8"))


def names(out):
    return sorted(path.name for path in out.iterdir())


def test_folder_holds_clips_page_sheet_and_list(tmp_path):
    clips = [("a red circle", solid((200, 0, 0))), ("a blue square", solid((0, 0, 200), 9))]
    page = write_gallery(tmp_path / "new" / "out", iter(clips), SETTINGS)
    out = page.parent
    files = ["000-a-red-circle.mp4", "001-a-blue-square.mp4"]
    assert names(out) == [*files, "contact_sheet.png", "index.html", "prompts.json"]
    assert listed(out) == {
        "settings": SETTINGS,
        "clips": [{"file": f, "prompt": p} for f, (p, _) in zip(files, clips, strict=True)],
    }
    for file, (_, frames) in zip(files, clips, strict=True):
        got = video_io.read_video(out / file)
        assert got.shape == frames.shape
        assert np.abs(got.astype(int) - frames).mean() < 4
        with av.open(str(out / file)) as container:
            assert container.streams.video[0].average_rate == 16


def test_page_loops_each_clip_under_its_prompt_with_the_settings(tmp_path):
    prompts = ["first prompt", "second prompt"]
    page = Page(write_gallery(tmp_path, [(p, solid((9, 9, 9))) for p in prompts], SETTINGS))
    assert [v["src"] for v in page.attributes("video")] == [
        "000-first-prompt.mp4",
        "001-second-prompt.mp4",
    ]
    for video in page.attributes("video"):
        assert {"loop", "muted", "autoplay", "playsinline"} <= set(video)
        assert (video["width"], video["height"]) == ("48", "32")
    assert page.texts["figcaption"] == prompts
    assert page.texts["small"] == ["5 frames, 0.3 s, 48×32"] * 2
    assert dict(zip(page.texts["th"], page.texts["td"], strict=True)) == {
        name: str(value) for name, value in SETTINGS.items()
    }
    assert not re.search("https?:", (tmp_path / "index.html").read_text())  # needs no network


@pytest.mark.parametrize(
    "prompt",
    [
        "<script>alert(\"x\")</script> & 'y' $title ${file}",
        '"><img src=x onerror=alert(1)>',
        "</figcaption></main><h1>gone",
        "雪山の上を飛ぶ鳥 — épée",
    ],
)
def test_prompts_and_settings_stay_text(tmp_path, prompt):
    page = Page(write_gallery(tmp_path, [(prompt, solid((9, 9, 9)))], {prompt: prompt}))
    assert "".join(page.texts["figcaption"]) == prompt
    assert page.texts["th"] == page.texts["td"] == [prompt]
    assert [tag for tag, _ in page.tags if tag in ("script", "img")] == []
    assert len(page.attributes("h1")) == 1
    [entry] = listed(tmp_path)["clips"]
    assert entry["prompt"] == prompt and (tmp_path / entry["file"]).is_file()


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("A red circle, moving left!", "003-a-red-circle-moving-left.mp4"),
        ("../../etc/passwd", "003-etc-passwd.mp4"),
        ("Épée à vis", "003-epee-a-vis.mp4"),
        ("飛ぶ鳥", "003-clip.mp4"),
        ("con\nnul\x00:*?", "003-con-nul.mp4"),
        ("x" * 300, "003-" + "x" * 48 + ".mp4"),
    ],
)
def test_clip_names_are_safe(prompt, name):
    assert clip_name(3, prompt) == name


def test_equal_prompts_get_files_of_their_own(tmp_path):
    write_gallery(tmp_path, [("same", solid((200, 0, 0))), ("same", solid((0, 0, 200)))], {})
    first, second = (
        video_io.read_video(tmp_path / c["file"]).mean((0, 1, 2)) for c in listed(tmp_path)["clips"]
    )
    assert first[0] > 150 > first[2] and second[2] > 150 > second[0]


def test_contact_sheet_has_a_row_for_each_clip(tmp_path):
    colours = [(220, 30, 30), (30, 160, 30), (30, 30, 220)]
    write_gallery(tmp_path, [(f"clip {c}", solid(c, 20, (64, 64))) for c in colours], {})
    sheet = np.asarray(Image.open(tmp_path / "contact_sheet.png").convert("RGB")).astype(int)
    tops, areas = [], []
    for colour in colours:
        rows, columns = np.nonzero(np.abs(sheet - colour).max(-1) < 8)
        tops.append(rows.min())
        areas.append(len(rows))
        assert np.ptp(columns) > 0.95 * (sheet.shape[1] - 10)  # eight frames fill the row
        above = sheet[rows.min() - 20 : rows.min()]
        assert 40 < np.sum(above.max(-1) < 100) < above.size / 6  # dark letters on white
    assert tops == sorted(tops) and len(set(areas)) == 1


@pytest.mark.parametrize("prompt", ["a long prompt " * 30, "longword" * 40, "two\nlines " * 40])
def test_long_prompts_are_cut_to_fit_over_their_row(tmp_path, prompt):
    write_gallery(tmp_path, [(prompt, solid((220, 30, 30), 20, (64, 64)))], {})
    sheet = np.asarray(Image.open(tmp_path / "contact_sheet.png").convert("L"))
    first_row = np.flatnonzero(np.mean(sheet < 200, axis=1) > 0.9)[0]
    inked = np.flatnonzero(np.any(sheet[:first_row] < 100, axis=0))
    assert 0.6 * sheet.shape[1] < inked.max() < sheet.shape[1] - 5


@pytest.mark.parametrize("num_frames", [1, 5, 8, 81])
def test_contact_sheet_shows_frames_evenly_from_first_to_last(tmp_path, num_frames):
    frames = brightening(num_frames)
    write_gallery(tmp_path, [("p", frames)], {})
    sheet = np.asarray(Image.open(tmp_path / "contact_sheet.png").convert("RGB"))
    middle = sheet[-sheet.shape[0] // 3, :, 0].astype(int)  # a line through the frames
    starts = np.flatnonzero(np.diff(np.concatenate([[255], middle])) < -10)
    levels = [middle[start + 20] for start in starts]
    wanted = [0.0] if num_frames == 1 else np.linspace(0, 1, min(8, num_frames))
    np.testing.assert_allclose(levels, 40 + 200 * np.array(wanted), atol=3)


def test_clips_written_side_by_side_in_pieces(tmp_path):
    left, right = brightening(9), brightening(9)[::-1]
    with Gallery(tmp_path, SETTINGS) as gallery:
        assert listed(tmp_path)["clips"] == []
        with gallery.open_clip("left", 9) as first:
            with gallery.open_clip("right", 9) as second:
                for piece in (slice(0, 1), slice(1, 5), slice(5, 5), slice(5, 9)):
                    first.write(left[piece])
                    second.write(right[piece])
                assert names(tmp_path) == ["index.html", "prompts.json"]
            # The second is finished first; the page already shows it, and only it.
            assert [c["prompt"] for c in listed(tmp_path)["clips"]] == ["right"]
            assert Page(tmp_path / "index.html").texts["figcaption"] == ["right"]
        assert [c["prompt"] for c in listed(tmp_path)["clips"]] == ["left", "right"]
    for clip, frames in zip(listed(tmp_path)["clips"], (left, right), strict=True):
        got = video_io.read_video(tmp_path / clip["file"])
        assert np.abs(got.astype(int) - frames).mean() < 4


def test_an_error_keeps_the_finished_clips_and_leaves_no_half_ones(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        with Gallery(tmp_path, {}) as gallery:
            gallery.add("whole", solid((9, 9, 9)))
            with gallery.open_clip("half", 9) as clip:
                clip.write(solid((9, 9, 9)))
                raise RuntimeError("out of memory")
    assert names(tmp_path) == ["000-whole.mp4", "contact_sheet.png", "index.html", "prompts.json"]
    assert [c["prompt"] for c in listed(tmp_path)["clips"]] == ["whole"]


def test_a_failed_write_leaves_the_old_page_and_list(tmp_path, monkeypatch):
    with Gallery(tmp_path, {}) as gallery:
        gallery.add("one", solid((9, 9, 9)))
        before = {name: (tmp_path / name).read_bytes() for name in ("index.html", "prompts.json")}

        def full_disk(*args):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("os.replace", full_disk)
            with pytest.raises(OSError, match="No space left"):
                gallery.add("two", solid((9, 9, 9)))
        assert before == {name: (tmp_path / name).read_bytes() for name in before}
        assert names(tmp_path) == ["000-one.mp4", "index.html", "prompts.json"]


def test_a_second_gallery_replaces_the_first_ones_list(tmp_path):
    write_gallery(tmp_path, [("old", solid((9, 9, 9)))] * 2, {"seed": 1})
    write_gallery(tmp_path, [("new", solid((9, 9, 9)))], {"seed": 2})
    assert listed(tmp_path) == {
        "settings": {"seed": 2},
        "clips": [{"file": "000-new.mp4", "prompt": "new"}],
    }
    assert Page(tmp_path / "index.html").texts["figcaption"] == ["new"]


def test_wrong_frames_are_refused(tmp_path):
    with Gallery(tmp_path, {}) as gallery:
        with pytest.raises(ValueError, match="000-p.mp4: 5 frames written, 9 announced"):
            with gallery.open_clip("p", 9) as clip:
                clip.write(solid((9, 9, 9)))
        with pytest.raises(ValueError, match="001-p.mp4: 0 frames written, 9 announced"):
            with gallery.open_clip("p", 9):
                pass
        with pytest.raises(ValueError, match="16x16 after frames of 32x48"):
            with gallery.open_clip("p", 9) as clip:
                clip.write(solid((9, 9, 9)))
                clip.write(solid((9, 9, 9), 4, (16, 16)))
        with pytest.raises(ValueError, match="at least one frame, got num_frames=0"):
            gallery.add("p", solid((9, 9, 9), 0))
        with pytest.raises(ValueError, match="uint8"):
            gallery.add("p", solid((9, 9, 9)).astype(np.float32))
    assert names(tmp_path) == ["index.html", "prompts.json"]


def test_a_folder_that_cannot_be_and_settings_that_are_not_json_fail_before_any_clip(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        Gallery(tmp_path / "file", {}).__enter__()
    with pytest.raises(ValueError, match="plain JSON"):
        Gallery(tmp_path / "out", {"seed": np.int32(3)})
    assert names(tmp_path) == ["file"]


def test_prompts_are_lines_without_blanks_and_comments(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# colours\n\n  a red circle \r\n\t# not this\na # sign, 雪\n", "utf-8")
    assert read_prompts(path) == ["a red circle", "a # sign, 雪"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"# only\n#comments\n"])
def test_a_prompt_file_without_prompts_is_refused(tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="prompts.txt: no prompts"):
        read_prompts(path)


def test_a_prompt_file_that_is_missing_or_not_text_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.txt: no such prompt file"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(FileNotFoundError, match="no such prompt file"):
        read_prompts(tmp_path)
    (tmp_path / "latin.txt").write_bytes("épée".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt: the prompt file is not UTF-8"):
        read_prompts(tmp_path / "latin.txt")
