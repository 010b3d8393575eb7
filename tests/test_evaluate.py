import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lact_jax import evaluate
from lact_jax.data import shapes
from lact_jax.data.synthetic import Settings, draw_clip
from lact_jax.encoders import make_codec
from lact_jax.video_io import write_video

HELD_OUT = Settings(seed=7, split="held_out")
QUESTIONS = ("colour", "shape", "direction")


def score(measured, prompts):
    """Share of right answers to each question."""
    asked = [evaluate.asked_for(prompt) for prompt in prompts]
    return {
        q: np.mean([getattr(m, q) == a[q] for m, a in zip(measured, asked, strict=True)])
        for q in QUESTIONS
    }


@pytest.fixture(scope="module")
def drawn():
    """All 72 combinations: (frames, captions)."""
    frames, captions = zip(*[draw_clip(HELD_OUT, "shapes", i) for i in range(72)], strict=True)
    return np.stack(frames)[:, ::2], list(captions)


@pytest.fixture(scope="module")
def measured(drawn):
    return [evaluate.measure(frames) for frames in drawn[0]]


def test_clean_clips_show_what_they_show(drawn, measured):
    assert min(score(measured, drawn[1]).values()) >= 0.95
    assert np.mean([m.overlap for m in measured]) > 0.95


def test_other_prompts_are_right_by_chance_only(drawn, measured):
    rates = [score(measured, np.roll(drawn[1], shift)) for shift in range(1, 72)]
    rate = {q: np.mean([r[q] for r in rates]) for q in QUESTIONS}
    for question, answers in zip(QUESTIONS, (6, 3, 4), strict=True):
        assert abs(rate[question] - 1 / answers) < 0.05


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_reconstructions_show_what_they_show(noise):
    frames, captions = zip(*[draw_clip(HELD_OUT, "shapes", i) for i in range(24)], strict=True)
    codec = make_codec("pca")
    latent = np.asarray(codec.encode(np.stack(frames)))
    latent = latent + noise * np.random.default_rng(0).standard_normal(latent.shape, np.float32)
    decoded = np.asarray(codec.decode(latent))
    assert min(score([evaluate.measure(x) for x in decoded], captions).values()) >= 0.95


def test_movement_is_measured_in_pixels():
    rng = np.random.default_rng(0)
    frames = shapes.draw(rng, "red", "square", "left", num_frames=41, size=64)
    found = evaluate.measure(frames)
    centre = [
        np.abs(x.astype(float) - shapes.BACKGROUND).sum((0, 2)) @ np.arange(64)
        / np.abs(x.astype(float) - shapes.BACKGROUND).sum()
        for x in frames[[0, -1]]
    ]  # fmt: skip
    np.testing.assert_allclose(found.moved, [0, centre[1] - centre[0]], atol=0.3)


def test_nothing_is_told_where_nothing_is_seen():
    rng = np.random.default_rng(0)
    dark = np.full((9, 64, 64, 3), 25, np.uint8) + rng.integers(0, 9, (9, 64, 64, 3), np.uint8)
    assert evaluate.measure(dark) == evaluate.Measurement()
    grey = dark.copy()
    grey[:, 20:40, 20:40] = 200
    assert evaluate.measure(grey).colour is None
    still = np.repeat(draw_clip(HELD_OUT, "shapes", 0)[0][:1], 9, axis=0)
    found = evaluate.measure(still)
    assert found.direction is None and found.colour is not None and found.shape is not None


def test_the_larger_part_tells_the_colour():
    frames = np.full((9, 64, 64, 3), 25, np.uint8)
    frames[:, 10:30, 10:40] = shapes.COLOURS["cyan"]
    frames[:, 40:50, 10:40] = shapes.COLOURS["red"]
    assert evaluate.measure(frames).colour == "cyan"


@pytest.mark.parametrize("prompt, asked", [
    ("a red circle moving left", ("red", "circle", "left")),
    ("DOWN goes the Blue triangle!", ("blue", "triangle", "down")),
    ("a camera pans round a ring of hills and houses", None),
    ("a red or blue circle moving left", None),
    ("a red circle", None),
])
def test_what_prompts_ask_for(prompt, asked):
    expected = None if asked is None else dict(zip(QUESTIONS, asked, strict=True))
    assert evaluate.asked_for(prompt) == expected


def gallery(folder, prompts):
    """A gallery of clips 0, 1, … whose prompts may or may not be theirs."""
    for index in range(len(prompts)):
        write_video(folder / f"{index}.mp4", draw_clip(HELD_OUT, "shapes", index)[0])
    clips = [{"file": f"{i}.mp4", "prompt": prompt} for i, prompt in enumerate(prompts)]
    (folder / "prompts.json").write_text(json.dumps({"settings": {}, "clips": clips}))
    return clips


def test_report_of_a_gallery(tmp_path, capsys):
    captions = [draw_clip(HELD_OUT, "shapes", i)[1] for i in range(3)]
    wrong = evaluate.asked_for(captions[2]) | {"colour": "red"}
    assert evaluate.asked_for(captions[2])["colour"] != "red"
    prompts = [*captions[:2], shapes.caption(**wrong), "a cat on a sofa"]
    clips = gallery(tmp_path, prompts)
    assert evaluate.main([f"--samples={tmp_path}", f"--out={tmp_path / 'report.json'}"]) == 0
    printed = capsys.readouterr().out
    assert "colour: 2 of 3 as asked" in printed and "shape: 3 of 3 as asked" in printed
    assert "1 clips of other prompts" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["right"] == {"colour": 2, "shape": 3, "direction": 3}
    assert (report["clips"], report["others"]) == (3, 1)
    assert [r["file"] for r in report["results"]] == ["0.mp4", "1.mp4", "2.mp4"]
    (tmp_path / "prompts.json").write_text(json.dumps(clips))  # a bare list does as well
    assert json.loads(json.dumps(evaluate.evaluate(tmp_path))) == report


@pytest.mark.parametrize("content, error, match", [
    (None, FileNotFoundError, "prompts.json: missing.*sample.py"),
    ("{", ValueError, "prompts.json: must hold a list"),
    ('[{"prompt": "a red circle moving left"}]', ValueError, "prompts.json: must hold a list"),
    ('{"clips": []}', ValueError, "none of its 0 prompts"),
    ('[{"file": "0.mp4", "prompt": "a red circle moving left"}]', FileNotFoundError, "0.mp4"),
])
def test_folders_that_are_no_gallery(tmp_path, content, error, match):
    if content is not None:
        (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(error, match=match):
        evaluate.evaluate(tmp_path)


def test_command_ends_with_a_message(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lact_jax.evaluate", f"--samples={tmp_path}"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
