"""From a loader's batch to what the model takes, on the devices.

Letters: B clips, T video frames, H, W pixels, F latent frames, h, w latent size, c channels,
L text tokens, Q text width.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lact_jax.encoders import TextEncoder, VideoCodec


class BatchEncoder:
    """Turns a loader's batch into latents and text embeddings on the devices.

    Raw batches hold `frames` (B, T, H, W, 3) uint8 and `caption`; encoded ones `latent`
    (B, F, h, w, c) and `text` (B, L, Q).
    """

    def __init__(self, codec: VideoCodec, text: TextEncoder, sharding: jax.sharding.Sharding):
        self._codec, self._text, self._sharding = codec, text, sharding

    def __call__(self, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        latent, text = self.encode(batch)
        return self.place(latent, jnp.float32), self.place(text, jnp.float32)

    def encode(self, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        """Latents and text embeddings of this process's clips, wherever the encoders put them."""
        if "frames" in batch:
            return self._codec.encode(batch["frames"]), self._text.encode(list(batch["caption"]))
        return batch["latent"], batch["text"]

    def place(self, x: Any, dtype: Any) -> jax.Array:
        """The array of all processes' clips, cut over the devices, from this process's."""
        if jax.process_count() == 1:
            return jax.device_put(jnp.asarray(x, dtype), self._sharding)
        return jax.make_array_from_process_local_data(self._sharding, np.asarray(x, dtype))
