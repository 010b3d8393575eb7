"""Family (b) of the synthetic clips: a camera that pans round a ring, three views wide.

Legend: T frames, H height, W width of one view, R = 3 W round the ring.

The world is a periodic strip: sky, two lines of hills, textured ground, trees, houses and balls,
all drawn from the clip's own seed. Chunk i of the clip shows view i mod 3 and stands still but for
its first latent frame, in which the camera moves on by one view. So chunks 3, 4, 5, … show again
what was last seen three chunks ago: attention to the chunk before can't know it, a memory can.
"""

from __future__ import annotations

import numpy as np

CAPTION = "a camera pans round a ring of hills and houses"
VIEWS = 3
_TEMPORAL_STRIDE = 4  # latent frame i > 0 is frames 4i-3 .. 4i
_SOFT = 1.5  # width of an edge in pixels: as smooth as a camera's


def camera(num_frames: int, width: int, chunk_frames: int) -> np.ndarray:
    """Left edge of the view in each frame, in pixels from the ring's origin, not wrapped.

    Args:
      num_frames: frames of the clip, 1 + 4k.
      width: of a view.
      chunk_frames: latent frames in a chunk.

    Returns:
      int64 (T,).
    """
    frame_T = np.arange(num_frames)
    latent_T = (frame_T + _TEMPORAL_STRIDE - 1) // _TEMPORAL_STRIDE
    chunk_T, within_T = np.divmod(latent_T, chunk_frames)
    # 1, 2, 3, 4 quarters of the way in the four frames of the pan; it starts and ends gently.
    way_T = ((frame_T - 1) % _TEMPORAL_STRIDE + 1) / _TEMPORAL_STRIDE
    way_T = way_T**2 * (3 - 2 * way_T)
    panning_T = (within_T == 0) & (chunk_T > 0)
    return np.rint(width * (chunk_T - np.where(panning_T, 1 - way_T, 0))).astype(np.int64)


def draw(rng: np.random.Generator, *, num_frames: int, size: int, chunk_frames: int) -> np.ndarray:
    """Draws a clip of a world of its own.

    Returns:
      uint8 (T, size, size, 3).
    """
    world_HR3 = _world(rng, size)
    left_T = camera(num_frames, size, chunk_frames)
    columns_TW = (left_T[:, None] + np.arange(size)) % world_HR3.shape[1]
    return np.ascontiguousarray(world_HR3[:, columns_TW].transpose(1, 0, 2, 3))


def _world(rng: np.random.Generator, size: int) -> np.ndarray:
    """The strip, uint8 (H, R, 3). Details are 8 pixels (at 64x64) and more wide."""
    around = VIEWS * size
    y_H1 = np.arange(size, dtype=np.float32)[:, None] / size
    x_1R = np.arange(around, dtype=np.float32)[None, :] / size
    sky, haze = _colour(rng, 0.35, (0.75, 0.95)), _colour(rng, 0.15, (0.85, 0.98))
    world_HR3 = np.broadcast_to(sky + (haze - sky) * (y_H1 / 0.6)[..., None], (size, around, 3))
    for base, height in ((0.42, 0.12), (0.55, 0.07)):
        outline_1R = base + height * _waves(rng, x_1R, cycles=(2, 7))
        tint = _colour(rng, 0.5, (0.4, 0.7))
        world_HR3 = _over(world_HR3, _step(y_H1 - outline_1R, size), tint)
    ground = _colour(rng, 0.5, (0.4, 0.65))
    texture_HR = _waves(rng, x_1R, cycles=(5, 18)) * _waves(rng, 3 * y_H1, cycles=(2, 6))
    texture_HR += 0.5 * _waves(rng, x_1R + 0.3 * y_H1, cycles=(3, 18))
    ground_HR3 = ground * (1 + 0.3 * texture_HR[..., None])
    world_HR3 = _over(world_HR3, _step(y_H1 - 0.66 + 0 * x_1R, size), ground_HR3)
    places = (np.arange(2 * VIEWS) + rng.uniform(0.2, 0.8, 2 * VIEWS)) / 2  # two in every view
    for place in places:
        across_1R = (x_1R - place + VIEWS / 2) % VIEWS - VIEWS / 2
        thing = _THINGS[rng.integers(len(_THINGS))]
        foot, scale = rng.uniform(0.72, 0.9), rng.uniform(0.13, 0.19)
        for distance_HR, tint in thing(rng, (y_H1 - foot) / scale, across_1R / scale):
            world_HR3 = _over(world_HR3, _step(-distance_HR * scale, size), tint)
    return np.rint(255 * np.clip(world_HR3, 0, 1)).astype(np.uint8)


def _waves(rng: np.random.Generator, x: np.ndarray, cycles: tuple[int, int]) -> np.ndarray:
    """A smooth random function of x, of period VIEWS, about in [-1, 1]."""
    number = np.arange(*cycles)
    strength = rng.normal(size=number.size) / np.sqrt(number)
    strength /= np.abs(strength).sum() * 0.6
    phase = rng.uniform(0, 2 * np.pi, number.size)
    return np.sum(strength * np.sin(2 * np.pi * number * x[..., None] / VIEWS + phase), -1)


def _colour(rng: np.random.Generator, saturation: float, value: tuple[float, float]) -> np.ndarray:
    """A random hue of given saturation and range of brightness, float (3,) in [0, 1]."""
    hue = rng.uniform(0, 6)
    ramp_3 = np.clip(np.abs((hue - np.array([0, 2, 4]) + 3) % 6 - 3), 1, 2) - 1  # 0 at the hue
    return rng.uniform(*value) * (1 - saturation * ramp_3)


def _step(signed: np.ndarray, size: int) -> np.ndarray:
    """1 where `signed` (in picture heights) is positive, with an edge _SOFT pixels wide."""
    return np.clip(0.5 + signed * size / _SOFT, 0, 1)[..., None]


def _over(world_HR3: np.ndarray, alpha_HR1: np.ndarray, tint: np.ndarray) -> np.ndarray:
    return world_HR3 + alpha_HR1 * (tint - world_HR3)


def _box(y: np.ndarray, x: np.ndarray, middle: float, half_height: float, half_width: float):
    return np.maximum(np.abs(y - middle) - half_height, np.abs(x) - half_width)


# Things stand with their foot at y = 0, up is negative. Each is drawn as a list of
# (signed distance, colour), in units of its own scale.
def _tree(rng, y, x):
    trunk = _box(y, x, -0.6, 0.6, 0.18), _colour(rng, 0.5, (0.3, 0.45))
    crown = np.hypot(y + 1.7, x) - 0.95, _colour(rng, 0.75, (0.5, 0.9))
    return [trunk, crown]


def _house(rng, y, x):
    wall = _box(y, x, -0.6, 0.6, 0.95), _colour(rng, 0.35, (0.75, 0.95))
    roof = np.maximum(y + 1.15, (np.abs(x) - y - 2.4) * 0.7), _colour(rng, 0.8, (0.6, 0.9))
    door = _box(y, x, -0.4, 0.4, 0.25), _colour(rng, 0.7, (0.3, 0.5))
    return [wall, roof, door]


def _ball(rng, y, x):
    return [(np.hypot(y + 0.85, x) - 0.85, _colour(rng, 0.85, (0.7, 1.0)))]


_THINGS = (_tree, _house, _ball)
