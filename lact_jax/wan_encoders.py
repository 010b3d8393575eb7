"""Wan's VAE and text encoder out of a converted folder, as the codec and encoder of a run.

The folder is what `convert_wan_weights.py` writes. Configs pass it on from `config.init_from`.
"""

from pathlib import Path

from lact_jax.convert.load import load_text, load_vae, text_config
from lact_jax.models.vae_codec import WanCodec
from lact_jax.models.vae_tiling import Tiling
from lact_jax.text import CaptionTokenizer, UMT5TextEncoder

TOKENIZER = "tokenizer"


def _folder(path: str, section: str) -> Path:
    if not path:
        raise ValueError(
            f"{section}.options.path is empty: name a converted Wan folder with "
            "--config.init_from=FOLDER (python convert_wan_weights.py makes one)"
        )
    return Path(path)


def wan_codec(
    *, path: str, dtype: str = "bfloat16", latents_per_call: int = 0, tiled: bool = False
) -> WanCodec:
    """The Wan VAE.

    Args:
      path: the converted folder.
      dtype: what it computes in.
      latents_per_call: latent frames that go through at a time; 0 chooses by the frame's size.
      tiled: cut large frames into tiles with blended seams, to bound memory.
    """
    config, params = load_vae(_folder(path, "codec"), dtype)
    return WanCodec(
        params,
        config,
        latents_per_call=latents_per_call or None,
        tiling=Tiling() if tiled else None,
    )


def umt5_text_encoder(
    *, path: str, text_len: int = 512, dtype: str = "bfloat16", cache_dir: str = ""
) -> UMT5TextEncoder:
    """UMT5 with the folder's tokenizer; weights are loaded when a caption is not in the cache.

    Args:
      path: the converted folder.
      text_len: tokens of a caption.
      dtype: of weights and computation.
      cache_dir: where embeddings are kept by content; '' keeps none.
    """
    folder = _folder(path, "text")
    return UMT5TextEncoder(
        CaptionTokenizer(folder / TOKENIZER, text_len),
        lambda: load_text(folder, dtype, dtype)[1],
        weights_id=str(folder.resolve()),
        config=text_config(folder, dtype, dtype),
        cache_dir=cache_dir or None,
    )
