"""The teacher-forcing sequence: which chunks stand in it, in which order, at which positions.

Letters: B batch, W chunks of the video, R noise repeats, C chunks of the sequence,
F latent frames of a chunk.

The official sequence interleaves (REFERENCE.md 3): noise_0 x R, then clean_{i-1}, noise_i x R.
Nothing a chunk computes depends on where it stands, only on which video chunk it belongs to. So
here the chunks are grouped, and every group is one contiguous slice:

    first  noise_0 x R          reads the initial fast weights, attends to itself
    clean  clean_0 .. clean_{W-2}    updates the fast weights, attends to itself
    later  (noise_1 x R) .. (noise_{W-1} x R)    reads, attends to itself and clean_{i-1}
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange


@dataclass(frozen=True)
class SequenceLayout:
    """Sizes of a sequence: W chunks of video (`num_chunks`) with R noise copies each."""

    num_chunks: int
    num_repeat: int = 1

    @property
    def num_clean(self) -> int:
        return self.num_chunks - 1

    @property
    def length(self) -> int:
        """C = (R + 1) W - 1."""
        return (self.num_repeat + 1) * self.num_chunks - 1

    @property
    def first(self) -> slice:
        return slice(0, self.num_repeat)

    @property
    def clean(self) -> slice:
        return slice(self.num_repeat, self.num_repeat + self.num_clean)

    @property
    def later(self) -> slice:
        return slice(self.num_repeat + self.num_clean, self.length)

    def video_chunk(self) -> np.ndarray:
        """Index of the video chunk each chunk of the sequence is a copy of: (C,) int32."""
        index = np.arange(self.num_chunks, dtype=np.int32)
        repeated = np.repeat(index, self.num_repeat)
        return np.concatenate(
            [repeated[: self.num_repeat], index[:-1], repeated[self.num_repeat :]]
        )

    def interleaved(self) -> np.ndarray:
        """Indices that put the grouped chunks in the official, interleaved order: (C,)."""
        grouped = np.arange(self.length)
        first, clean, later = (grouped[s] for s in (self.first, self.clean, self.later))
        rows = np.concatenate([clean[:, None], later.reshape(-1, self.num_repeat)], axis=1)
        return np.concatenate([first, rows.reshape(-1)])


def pack(noise_BRW: jax.Array, clean_BW: jax.Array, layout: SequenceLayout) -> jax.Array:
    """Joins noise copies (B, R, W, ...) and clean chunks (B, W, ...) into (B, C, ...)."""
    first_BR = noise_BRW[:, :, 0]
    later_BC = rearrange(noise_BRW[:, :, 1:], "b r w ... -> b (w r) ...")
    return jnp.concatenate([first_BR, clean_BW[:, : layout.num_clean], later_BC], axis=1)


def unpack_noise(x_BC: jax.Array, layout: SequenceLayout) -> jax.Array:
    """The noise copies of a sequence (B, C, ...) as (B, R, W, ...)."""
    first_BR1 = x_BC[:, layout.first][:, :, None]
    later_BRW = rearrange(x_BC[:, layout.later], "b (w r) ... -> b r w ...", r=layout.num_repeat)
    return jnp.concatenate([first_BR1, later_BRW], axis=2)


def frame_positions(layout: SequenceLayout, frames_per_chunk: int) -> np.ndarray:
    """True latent frame index of every frame of every chunk of the sequence: (C, F) int32."""
    start = layout.video_chunk()[:, None] * frames_per_chunk
    return start + np.arange(frames_per_chunk, dtype=np.int32)
