"""Family (a) of the synthetic clips: one coloured shape that moves in a straight line.

Legend: T frames, H height, W width. Pictures are float32 in [0, 1] until they leave this file.

A caption reads "a red circle moving left". The shape stays whole and in view for the entire clip:
it crosses most of the free way once, which is 4 to 6 pixels in every chunk of 12 frames at 64x64.
The lane it keeps to is near the middle, so that a caption says most of what there is to see: a
model of a million parameters that trains for minutes is to learn it.
"""

from __future__ import annotations

import itertools

import numpy as np

# Six hues, 60 degrees apart.
COLOURS = {
    "red": (230, 50, 50),
    "yellow": (235, 215, 50),
    "green": (50, 200, 70),
    "cyan": (50, 205, 215),
    "blue": (60, 90, 235),
    "magenta": (220, 60, 210),
}
# Unit motion (down, right).
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
BACKGROUND = (24, 26, 34)

_SOFT = 2.0  # width of an edge in pixels: as smooth as a camera's
_SQUARE = 0.9  # half a side, in radii
_TRIANGLE = 1.25  # centre to corner, in radii
_LANE = 5 / 64  # how far from the middle, of the picture


def _circle(y_HW: np.ndarray, x_HW: np.ndarray, radius: float) -> np.ndarray:
    return np.hypot(y_HW, x_HW) - radius


def _square(y_HW: np.ndarray, x_HW: np.ndarray, radius: float) -> np.ndarray:
    return np.maximum(abs(y_HW), abs(x_HW)) - _SQUARE * radius


def _triangle(y_HW: np.ndarray, x_HW: np.ndarray, radius: float) -> np.ndarray:
    """Equilateral, one corner up, centred on its centroid: the largest of three half planes."""
    sides = (y_HW, 0.5 * (3**0.5 * abs(x_HW) - y_HW))
    return np.maximum(*sides) - 0.5 * _TRIANGLE * radius


# name -> (signed distance to the outline in pixels,
#          reach from the centroid (up, down, left, right) in radii)
_OUTLINES = {
    "circle": (_circle, (1.0, 1.0, 1.0, 1.0)),
    "square": (_square, (_SQUARE,) * 4),
    "triangle": (
        _triangle,
        (_TRIANGLE, 0.5 * _TRIANGLE, 0.5 * 3**0.5 * _TRIANGLE, 0.5 * 3**0.5 * _TRIANGLE),
    ),
}
# Area of a shape of radius 1.
AREAS = {
    "circle": np.pi,
    "square": (2 * _SQUARE) ** 2,
    "triangle": 0.75 * 3**0.5 * _TRIANGLE**2,
}
SHAPES = tuple(_OUTLINES)


def coverage(shape: str, y, x, radius: float, height: int, width: int) -> np.ndarray:
    """How much of each pixel the shape covers, with soft (antialiased) edges.

    Args:
      shape: a key of `SHAPES`.
      y, x: centroid in pixels, numbers or arrays of one shape (…).
      radius: size in pixels.
      height, width: of the picture.

    Returns:
      float32 (…, H, W) in [0, 1].
    """
    distance, _ = _OUTLINES[shape]
    y_11, x_11 = (np.asarray(value, np.float32)[..., None, None] for value in (y, x))
    y_H1 = np.arange(height, dtype=np.float32)[:, None] - y_11
    x_1W = np.arange(width, dtype=np.float32)[None, :] - x_11
    return np.clip(0.5 - distance(y_H1, x_1W, radius) / _SOFT, 0, 1).astype(np.float32)


def combinations() -> list[tuple[str, str, str]]:
    """All (colour, shape, direction) that captions name: 72."""
    return list(itertools.product(COLOURS, SHAPES, DIRECTIONS))


def caption(colour: str, shape: str, direction: str) -> str:
    """The sentence of one combination."""
    return f"a {colour} {shape} moving {direction}"


def draw(rng: np.random.Generator, colour: str, shape: str, direction: str, *,
         num_frames: int, size: int) -> np.ndarray:
    """Draws a clip; radius, way, speed and lane come from `rng`.

    Returns:
      uint8 (T, size, size, 3).
    """
    radius = rng.uniform(12, 14) * size / 64
    up, down, left, right = (reach * radius for reach in _OUTLINES[shape][1])
    low = np.array([up, left]) + 0.5
    high = size - 1 - np.array([down, right]) - 0.5
    # Where the shape is on the axis that it doesn't move along.
    lane = np.clip((size - 1) / 2 + rng.uniform(-_LANE, _LANE, 2) * size, low, high)
    step = np.array(DIRECTIONS[direction])
    axis = int(np.flatnonzero(step)[0])
    room = high[axis] - low[axis]
    way = room * rng.uniform(0.85, 1.0)
    begin = low[axis] + rng.uniform(0, room - way)
    along_T = begin + way * np.linspace(0, 1, num_frames)
    centre_T2 = np.tile(lane, (num_frames, 1))
    centre_T2[:, axis] = along_T if step[axis] > 0 else along_T[::-1]
    alpha_THW1 = coverage(shape, centre_T2[:, 0], centre_T2[:, 1], radius, size, size)[..., None]
    background = np.array(BACKGROUND, np.float32)
    frames = background + alpha_THW1 * (np.array(COLOURS[colour], np.float32) - background)
    return np.rint(frames).astype(np.uint8)
