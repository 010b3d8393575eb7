"""3-D rotary position embedding, computed from positions: no table, so no longest video.

Letters: C chunks, F frames of a chunk, S tokens of a chunk (S = F * h * w), N heads, K head width,
P = K / 2 pairs.
"""

import jax
import jax.numpy as jnp
import numpy as np

THETA = 10000.0


def split_pairs(head_dim: int) -> tuple[int, int, int]:
    """Pairs of a head that belong to (time, height, width): 128 gives (22, 21, 21)."""
    pairs, side = head_dim // 2, head_dim // 6
    return pairs - 2 * side, side, side


def _frequencies(pairs: int) -> np.ndarray:
    return THETA ** (-np.arange(pairs, dtype=np.float64) / pairs)


def rope_rotations(frame_CF: jax.Array, height: int, width: int, head_dim: int) -> jax.Array:
    """Cosine and sine of every token's angles: (C, S, P, 2) float32. All layers share them.

    Args:
      frame_CF: latent frame index of every frame of every chunk.
      height, width: size of the token grid of a frame.
      head_dim: K; must be even.

    Source: REFERENCE.md 2.
    """
    axes = zip(
        (frame_CF[:, :, None, None], jnp.arange(height)[:, None], jnp.arange(width)),
        split_pairs(head_dim),
        strict=True,
    )
    chunks, frames = frame_CF.shape
    parts = []
    for position, pairs in axes:
        frequency_P = jnp.asarray(_frequencies(pairs), jnp.float32)
        angle = position.astype(jnp.float32)[..., None] * frequency_P
        parts.append(jnp.broadcast_to(angle, (chunks, frames, height, width, pairs)))
    angle_CFhwP = jnp.concatenate(parts, axis=-1)
    angle_CSP = angle_CFhwP.reshape(chunks, frames * height * width, head_dim // 2)
    return jnp.stack([jnp.cos(angle_CSP), jnp.sin(angle_CSP)], axis=-1)


def apply_rope(x: jax.Array, rotation_CSP2: jax.Array) -> jax.Array:
    """Rotates the interleaved pairs (x[2i], x[2i+1]) of (..., C, S, N, K) by `rope_rotations`."""
    pair = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    even, odd = pair[..., 0], pair[..., 1]
    cos, sin = (rotation_CSP2[:, :, None, :, i] for i in range(2))
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
