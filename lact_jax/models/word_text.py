"""A fixed embedding of caption words, where the demo has no text encoder to download.

Legend: B captions, L text tokens, D text width.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_POSITION_WEIGHT = 0.5  # beside the word's own vector of weight 1


def words(caption: str) -> list[str]:
    """The words of a caption, in lower case, without punctuation.

    >>> words("A red circle, moving LEFT!")
    ['a', 'red', 'circle', 'moving', 'left']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", caption).lower())


class WordTextEncoder:
    """Every word a fixed random vector, plus one for its place; the same on every machine.

    A vector is drawn from N(0, 1) with a seed that is a hash of the word, so there is no
    vocabulary and no unknown word. Both parts are scaled so that entries have variance 1.
    """

    def __init__(self, *, text_len: int = 12, text_dim: int = 64):
        """`text_len` tokens of `text_dim` entries each; ValueError unless both are positive."""
        if text_len < 1 or text_dim < 1:
            raise ValueError(f"text_len={text_len}, text_dim={text_dim}: must be positive")
        self.text_len, self.text_dim = text_len, text_dim
        self._vector = functools.cache(self._draw)

    def _draw(self, name: str) -> np.ndarray:
        digest = hashlib.sha256(name.encode()).digest()
        rng = np.random.default_rng(np.frombuffer(digest, np.uint32))
        return rng.standard_normal(self.text_dim, np.float32)

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Embeds captions.

        Args:
          captions: B texts. Only the first `text_len` words of one count; "" gives zeros.

        Returns:
          float32 (B, text_len, text_dim), zero after the text's end.
        """
        embedding_BLD = np.zeros((len(captions), self.text_len, self.text_dim), np.float32)
        norm = np.float32(1 / np.hypot(1, _POSITION_WEIGHT))
        for row, caption in zip(embedding_BLD, captions, strict=True):
            for place, word in enumerate(words(caption)[: self.text_len]):
                position = self._vector(f"place {place}")
                row[place] = norm * (self._vector(f"word {word}") + _POSITION_WEIGHT * position)
        return embedding_BLD
