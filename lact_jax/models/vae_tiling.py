"""Spatial tiles for the VAE: frames too large for memory, cut with overlap and blended.

The tiles of a frame are all of one size and evenly spread, so that one compiled step serves them
all, one after another. Each has a carry of its own. Where they overlap they fade into each other.
A frame that fits into one tile comes out exactly as without tiling. Otherwise the result is an
approximation: a tile's convolutions see zeros past its edge, and the attention in the middle of the
network sees only the tile.

Letters: N tiles; B batch, T frames, H, W height and width, C channels.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Tiling:
    """(height, width) of a tile and its overlap with the next, in latent pixels: 8 of the video."""

    tile: tuple[int, int] = (64, 64)
    overlap: int = 16

    def __post_init__(self):
        if not 1 <= self.overlap <= min(self.tile) // 2:
            raise ValueError(
                f"Tiling(tile={self.tile}, overlap={self.overlap}): the overlap must be at least 1 "
                "and at most half a tile"
            )


def tile_starts(size: int, tile: int, overlap: int) -> tuple[int, ...]:
    """First pixels of the fewest tiles, evenly spread, that overlap enough and cover `size`."""
    if size <= tile:
        return (0,)
    count = math.ceil((size - overlap) / (tile - overlap))
    return tuple(round(i * (size - tile) / (count - 1)) for i in range(count))


def blend_weights(starts, size: int, tile: int, overlap: int) -> np.ndarray:
    """(N, tile) float32 weights of each tile's pixels along an axis; over any pixel they sum to 1.

    Two tiles fade into each other in the middle half of their overlap. The outer quarter is thrown
    away: a tile is worst at its edge, and doing so halves the error or better.
    """
    across = np.arange(1, tile + 1) / (overlap + 1)
    ramp = np.clip(2 * across - 0.5, 0.0, 1.0)
    weights = np.zeros((len(starts), size))
    for i, start in enumerate(starts):
        rising = ramp if start > 0 else 1.0
        falling = ramp[::-1] if start + tile < size else 1.0
        weights[i, start : start + tile] = rising * falling
    weights /= weights.sum(axis=0)
    rows = [weights[i, start : start + tile] for i, start in enumerate(starts)]
    return np.stack(rows).astype(np.float32)


@dataclass(frozen=True)
class _Axis:
    """The cut of one axis, in pixels."""

    size: int
    tile: int
    overlap: int
    starts: tuple[int, ...]

    def scaled(self, scale: int) -> "_Axis":
        starts = tuple(scale * start for start in self.starts)
        return _Axis(scale * self.size, scale * self.tile, scale * self.overlap, starts)

    def weights(self) -> np.ndarray:
        return blend_weights(self.starts, self.size, self.tile, self.overlap)


def _cut(size: int, tile: int, overlap: int) -> _Axis:
    tile = min(tile, size)
    return _Axis(size, tile, overlap, tile_starts(size, tile, overlap))


def _split(x_BTHWC, rows: _Axis, columns: _Axis):
    tiles = [
        x_BTHWC[:, :, top : top + rows.tile, left : left + columns.tile]
        for top in rows.starts
        for left in columns.starts
    ]
    return jnp.stack(tiles)


def _join(y_NBTHWC, rows: _Axis, columns: _Axis):
    batch, frames = y_NBTHWC.shape[1:3]
    y_BTHWC = jnp.zeros((batch, frames, rows.size, columns.size, y_NBTHWC.shape[-1]), jnp.float32)
    places = [
        (slice(top, top + rows.tile), slice(left, left + columns.tile), down[:, None] * across)
        for top, down in zip(rows.starts, rows.weights(), strict=True)
        for left, across in zip(columns.starts, columns.weights(), strict=True)
    ]
    for y, (down, across, weight_HW) in zip(y_NBTHWC, places, strict=True):
        y_BTHWC = y_BTHWC.at[:, :, down, across].add(y * weight_HW[..., None])
    return y_BTHWC


def tiled(step, tiling: Tiling, scale_in: int, scale_out: int):
    """The streaming step that cuts its input into tiles, runs `step` on each and blends them.

    Args:
      step: (carry, x_BTHWC) -> (carry, y_BTHWC float32), such as `WanVAE.decode_chunk`.
      tiling: the cut, in latent pixels.
      scale_in: pixels of x for each latent pixel (8 to encode, 1 to decode).
      scale_out: pixels of y for each latent pixel (1 to encode, 8 to decode).

    Returns:
      A step of the same form; its carry is that of `step`, stacked over the tiles.
    """

    def tiled_step(carries, x_BTHWC):
        height, width = (side // scale_in for side in x_BTHWC.shape[2:4])
        rows = _cut(height, tiling.tile[0], tiling.overlap)
        columns = _cut(width, tiling.tile[1], tiling.overlap)
        x_NBTHWC = _split(x_BTHWC, rows.scaled(scale_in), columns.scaled(scale_in))
        carries, y_NBTHWC = jax.lax.map(lambda piece: step(*piece), (carries, x_NBTHWC))
        return carries, _join(y_NBTHWC, rows.scaled(scale_out), columns.scaled(scale_out))

    return tiled_step
