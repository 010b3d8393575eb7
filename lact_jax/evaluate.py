"""Measures, from pixels, whether sampled clips show what their prompts ask for.

    python -m lact_jax.evaluate --samples=DIR --out=DIR/evaluation.json

reads a gallery folder (DIR/prompts.json and the clips that it names) and counts, over the prompts
of the shapes family ("a red circle moving left"), the clips whose colour, shape and direction are
right.

Legend: T frames, H, W pixels. How each is measured:
  colour     every pixel that stands out from the background votes for the nearest of the six hues
  coverage   how far a pixel lies on the way from the background to the winning colour
  direction  the straight line fitted through the coverage's centroid, over all frames
  shape      the one whose drawing, at the measured place and of the measured area, overlaps best
"""

from __future__ import annotations

import argparse
import colorsys
import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from lact_jax import cli
from lact_jax.data import shapes
from lact_jax.models.word_text import words
from lact_jax.video_io import read_video, replacing

QUESTIONS = {
    "colour": tuple(shapes.COLOURS),
    "shape": shapes.SHAPES,
    "direction": tuple(shapes.DIRECTIONS),
}

_STANDS_OUT = 60  # difference from the background, of 255, that makes a pixel foreground
_SMALLEST = 0.01  # of the picture: less foreground than this is nothing to measure
_FAINT = 0.25  # coverage below this is noise
_SHAPE_FRAMES = 9  # frames that the shape is looked at in
_SHORTEST_WAY = 4 / 64  # of the picture: less movement than this has no direction


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a clip shows; None where it can't be told.

    Attributes:
      colour, shape, direction: names as in captions.
      overlap: mean intersection over union with the best shape's drawing: 1 is a perfect one.
      moved: pixels (down, right) from the first frame to the last, along the fitted line.
    """

    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    overlap: float = 0.0
    moved: tuple[float, float] = (0.0, 0.0)


def measure(frames_THW3: np.ndarray) -> Measurement:
    """Measures one clip, uint8 (T, H, W, 3)."""
    x = frames_THW3.astype(np.float32)
    background_3 = np.median(x[:, ::2, ::2].reshape(-1, 3), axis=0)
    colour, tint_3 = _colour(x, background_3)
    if colour is None:
        return Measurement()
    coverage_THW = _coverage(x, background_3, tint_3)
    centre_T2 = _centroids(coverage_THW)
    direction, moved = _direction(centre_T2, frames_THW3.shape[1:3])
    shape, overlap = _shape(coverage_THW, centre_T2)
    return Measurement(colour, shape, direction, overlap, moved)


def asked_for(prompt: str) -> dict[str, str] | None:
    """The colour, shape and direction that a prompt names, or None where it isn't of the family."""
    found = {
        question: [word for word in words(prompt) if word in answers]
        for question, answers in QUESTIONS.items()
    }
    if any(len(named) != 1 for named in found.values()):
        return None
    return {question: named[0] for question, named in found.items()}


def evaluate(samples: os.PathLike | str) -> dict:
    """Measures every clip of a gallery folder whose prompt is of the shapes family.

    Args:
      samples: a folder with prompts.json: a list of {"file", "prompt"}, or {"clips": such a list}.

    Returns:
      {"right": {question: count}, "clips": count, "others": prompts not of the family,
       "results": [{"file", "prompt", "asked", "measured"}, …]}.

    Raises:
      FileNotFoundError: no prompts.json, or a clip that it names is missing.
      ValueError: prompts.json of another form, or no prompt of the family in it.
    """
    folder = Path(samples)
    results, others = [], 0
    for file, prompt in _gallery(folder):
        asked = asked_for(prompt)
        if asked is None:
            others += 1
            continue
        measured = dataclasses.asdict(measure(read_video(folder / file)))
        results.append({"file": file, "prompt": prompt, "asked": asked, "measured": measured})
    if not results:
        raise ValueError(
            f"{folder}: none of its {others} prompts is of the kind that can be measured, "
            f"such as {shapes.caption('red', 'circle', 'left')!r}"
        )
    right = {
        question: sum(r["asked"][question] == r["measured"][question] for r in results)
        for question in QUESTIONS
    }
    return {"right": right, "clips": len(results), "others": others, "results": results}


def table(report: dict) -> str:
    """The report as lines of text: one a clip, then the counts."""
    lines = []
    for result in report["results"]:
        asked, measured = result["asked"], result["measured"]
        answers = [
            f"{'ok' if asked[q] == measured[q] else '--'} {measured[q] or 'none':<9}"
            for q in QUESTIONS
        ]
        overlap = f"overlap {measured['overlap']:.2f}"
        lines.append(f"{result['prompt']:<36} {' '.join(answers)} {overlap}")
    for question in QUESTIONS:
        lines.append(f"{question:>9}: {report['right'][question]} of {report['clips']} as asked")
    if report["others"]:
        lines.append(f"{report['others']} clips of other prompts were not measured")
    return "\n".join(lines)


def _gallery(folder: Path) -> list[tuple[str, str]]:
    index = folder / "prompts.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"{index}: missing; --samples must be a folder that sample.py wrote"
        )
    try:
        content = json.loads(index.read_text())
        clips = content["clips"] if isinstance(content, dict) else content
        return [(clip["file"], clip["prompt"]) for clip in clips]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{index}: must hold a list of {{"file": …, "prompt": …}} ({error!r})'
        ) from error


def _colour(x_THW3: np.ndarray, background_3: np.ndarray) -> tuple[str | None, np.ndarray]:
    """The hue that most foreground pixels are nearest to, and those pixels' median colour."""
    foreground_N3 = x_THW3[np.abs(x_THW3 - background_3).max(-1) > _STANDS_OUT]
    if len(foreground_N3) < _SMALLEST * x_THW3[..., 0].size:
        return None, background_3
    distance_NC = np.abs(_hue(foreground_N3)[:, None] - _hue(np.array([*shapes.COLOURS.values()])))
    vote_N = np.minimum(distance_NC, 1 - distance_NC).argmin(1)
    count_C = np.bincount(vote_N, minlength=len(shapes.COLOURS))
    winner = int(count_C.argmax())
    tint_3 = np.median(foreground_N3[vote_N == winner], axis=0)
    _, saturation, _ = colorsys.rgb_to_hsv(*(tint_3 / 255))
    return (QUESTIONS["colour"][winner] if saturation > 0.2 else None), tint_3


def _hue(rgb_N3: np.ndarray) -> np.ndarray:
    """Hue in [0, 1), red at 0; grey counts as red."""
    red, green, blue = np.moveaxis(np.asarray(rgb_N3, np.float32), -1, 0)
    angle = np.arctan2(3**0.5 * (green - blue), 2 * red - green - blue)
    return angle / (2 * np.pi) % 1


def _coverage(x_THW3: np.ndarray, background_3: np.ndarray, tint_3: np.ndarray) -> np.ndarray:
    way_3 = tint_3 - background_3
    coverage_THW = np.clip((x_THW3 - background_3) @ (way_3 / (way_3 @ way_3)), 0, 1)
    return np.where(coverage_THW < _FAINT, 0, coverage_THW)


def _centroids(coverage_THW: np.ndarray) -> np.ndarray:
    """(T, 2) down, right; NaN where a frame shows too little."""
    mass_T = coverage_THW.sum((1, 2))
    mass_T = np.where(mass_T < _SMALLEST * coverage_THW[0].size, np.nan, mass_T)
    _, height, width = coverage_THW.shape
    down_T = coverage_THW.sum(2) @ np.arange(height) / mass_T
    right_T = coverage_THW.sum(1) @ np.arange(width) / mass_T
    return np.stack([down_T, right_T], -1)


def _direction(centre_T2: np.ndarray, size: tuple[int, int]):
    """(name or None, pixels moved (down, right)) from a straight line through the centroids."""
    seen_T = np.isfinite(centre_T2[:, 0])
    if seen_T.sum() < max(2, len(seen_T) // 2):
        return None, (0.0, 0.0)
    time = np.arange(len(centre_T2))[seen_T]
    slope_2 = np.polyfit(time, centre_T2[seen_T], 1)[0]
    moved_2 = slope_2 * (len(centre_T2) - 1)
    moved = (float(moved_2[0]), float(moved_2[1]))
    if np.abs(moved_2).max() < _SHORTEST_WAY * min(size):
        return None, moved
    along = {name: np.dot(moved_2, step) for name, step in shapes.DIRECTIONS.items()}
    return max(along, key=along.get), moved


def _shape(coverage_THW: np.ndarray, centre_T2: np.ndarray) -> tuple[str | None, float]:
    """(best shape or None, its mean overlap over some frames)."""
    seen = np.flatnonzero(np.isfinite(centre_T2[:, 0]))
    if seen.size == 0:
        return None, 0.0
    picked = seen[np.linspace(0, seen.size - 1, min(_SHAPE_FRAMES, seen.size)).round().astype(int)]
    overlaps = {shape: [] for shape in shapes.SHAPES}
    for frame in picked:
        seen_HW = coverage_THW[frame]
        for shape, values in overlaps.items():
            radius = float(np.sqrt(seen_HW.sum() / shapes.AREAS[shape]))
            drawn_HW = shapes.coverage(shape, *centre_T2[frame], radius, *seen_HW.shape)
            values.append(np.minimum(seen_HW, drawn_HW).sum() / np.maximum(seen_HW, drawn_HW).sum())
    means = {shape: float(np.mean(values)) for shape, values in overlaps.items()}
    best = max(means, key=means.get)
    return best, means[best]


def main(argv: list[str] | None = None) -> int:
    """Prints the table; writes the report as JSON where --out is given."""
    parser = argparse.ArgumentParser(description="Measure sampled clips of the shapes family.")
    parser.add_argument("--samples", required=True, help="a folder that sample.py wrote")
    parser.add_argument("--out", help="JSON file for the report")
    args = parser.parse_args(argv)
    report = evaluate(args.samples)
    print(table(report))
    if args.out:
        with replacing(args.out) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    cli.finish(main)
