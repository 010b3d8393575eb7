"""The two interfaces between pictures and captions and what the model sees, and who is behind them.

Legend: B batch, T video frames, F latent frames, H, W pixels, h, w latent cells, C latent
channels, L text tokens, D text width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from lact_jax.models.block_codec import BlockCodec
from lact_jax.models.word_text import WordTextEncoder
from lact_jax.wan_encoders import umt5_text_encoder, wan_codec


class VideoCodec(Protocol):
    """Video <-> latents, with the Wan VAE's time layout: frame 0 alone, then groups of 4 frames."""

    temporal_stride: int
    spatial_stride: int
    latent_channels: int

    def encode(self, frames_BTHW3) -> jax.Array:
        """uint8 (B, 1 + 4k, H, W, 3) -> float32 (B, 1 + k, h, w, C), of about unit variance."""

    def decode(self, latent_BFhwC) -> jax.Array:
        """float32 (B, F, h, w, C) -> uint8 (B, 4F - 3, H, W, 3), a whole video at once."""

    def init_decode(self, batch: int, height: int, width: int) -> Any:
        """The carry before a video's first latent frame; height and width in pixels."""

    def decode_chunk(self, carry: Any, latent_BFhwC) -> tuple[Any, jax.Array]:
        """The next latent frames: (carry, uint8 frames), 4F frames, or 4F - 3 in the first call.

        Any split in time gives the same video.
        """


class TextEncoder(Protocol):
    """Captions -> token embeddings."""

    text_len: int
    text_dim: int

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """B captions -> float32 (B, L, D), zero after each text's end."""


# Name -> constructor, taking keyword options.
CODECS: dict[str, Callable[..., VideoCodec]] = {
    "pca": BlockCodec,
    "wan": wan_codec,
}
TEXT_ENCODERS: dict[str, Callable[..., TextEncoder]] = {
    "words": WordTextEncoder,
    "umt5": umt5_text_encoder,
}


def make_codec(name: str, **options: Any) -> VideoCodec:
    """The codec of that name; ValueError names an unknown name or option and lists the known."""
    return _make(CODECS, "codec", name, options)


def make_text_encoder(name: str, **options: Any) -> TextEncoder:
    """The text encoder of that name; errors as in `make_codec`."""
    return _make(TEXT_ENCODERS, "text", name, options)


def _make(table: Mapping[str, Callable], section: str, name: str, options: Mapping[str, Any]):
    if name not in table:
        raise ValueError(f"{section}.name={name!r}: unknown, choose one of {sorted(table)}")
    known = [key for key in inspect.signature(table[name]).parameters if key != "self"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"{section}.options of {name!r}: unknown {', '.join(unknown)}; it takes {known}"
        )
    return table[name](**options)
