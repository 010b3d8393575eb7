"""What an encoded data set looks like on disk; `encoding` writes it and `encoded` reads it.

    DATASET/lact_clips-train.array_record-00000-of-00004 …   the clips, by `features`
    DATASET/dataset_info.json, features.json    what TFDS reads them by
    DATASET/empty_text.npy                      the empty caption's embedding
    DATASET/summary.json                        which files were kept, and why others were not
    DATASET/manifest.json                       what encoded them; written last
    DATASET/.unfinished/                        shards, until all are there

`tfds.builder_from_directory(DATASET).as_data_source("train")` reads it by itself, once `ml_dtypes`
(or jax) is imported, from which NumPy knows bfloat16. TensorFlow is not needed.

Legend: F latent frames, h, w latent cells, C latent channels, L text tokens, D text width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

DATASET_NAME = "lact_clips"
FORMAT = "lact_jax encoded clips"
VERSION = 1
MANIFEST, SUMMARY, EMPTY_TEXT = "manifest.json", "summary.json", "empty_text.npy"
UNFINISHED = ".unfinished"

# Where files lie and how they are computed with: two encoders that differ in these are the same.
_NO_IDENTITY = ("path", "cache_dir", "dtype")
# Rounding in bfloat16 moves a latent by less, another codec moves it by more.
_PROBE_TOLERANCE = 0.03


def features(latent_channels: int, text_dim: int) -> tfds.features.FeaturesDict:
    """A clip's record. `text` has the caption's own tokens alone, `size` is height, width and
    number of frames before encoding."""
    import tensorflow_datasets as tfds  # over a second, which only encoded data needs

    tensor = tfds.features.Tensor
    return tfds.features.FeaturesDict({
        "latent": tensor(
            shape=(None, None, None, latent_channels), dtype=ml_dtypes.bfloat16, encoding="bytes"
        ),
        "text": tensor(shape=(None, text_dim), dtype=np.float32, encoding="bytes"),
        "caption": tfds.features.Text(),
        "name": tfds.features.Text(),
        "fps": tfds.features.Scalar(np.float32),
        "size": tensor(shape=(3,), dtype=np.int32),
    })  # fmt: skip


def cut_text(text_LD: np.ndarray) -> np.ndarray:
    """An embedding without the zeros after the text's end."""
    filled = np.flatnonzero(text_LD.any(axis=1))
    return text_LD[: filled[-1] + 1 if filled.size else 0]


def pad_text(text_LD: np.ndarray, text_len: int) -> np.ndarray:
    """What `cut_text` cut: float32 (text_len, D), zero after the text's end."""
    padded_LD = np.zeros((text_len, text_LD.shape[1]), np.float32)
    padded_LD[: len(text_LD)] = text_LD
    return padded_LD


def describe(config: Any, codec: Any, text: Any) -> dict[str, Any]:
    """What a data set that is encoded by a run's config depends on, as JSON values.

    The codec is known by what it makes of a fixed picture, so that it may lie elsewhere, and
    compute in another type, when the data set is read. The text encoder, whose weights may be too
    many to load for that, is known by its name, its options and its tokenizer.

    Args:
      config: `lact_jax.config.Config`; its `codec`, `text` and `data` sections are read.
      codec, text: as in `lact_jax.encoders`.
    """
    data = config.data
    tokenizer = getattr(text, "tokenizer", None)
    return {
        "codec": {
            "name": config.codec.name,
            "latent_channels": codec.latent_channels,
            "temporal_stride": codec.temporal_stride,
            "spatial_stride": codec.spatial_stride,
            "probe": _probe(codec),
        },
        "text": {
            "name": config.text.name,
            "options": {k: v for k, v in config.text.options.items() if k not in _NO_IDENTITY},
            "text_len": text.text_len,
            "text_dim": text.text_dim,
            "tokenizer": getattr(tokenizer, "fingerprint", None),
        },
        "clip": {
            "num_frames": data.num_frames,
            "sizes": [list(size) for size in sizes(data)],
            "fps": data.fps,
        },
    }


def sizes(data: Any) -> tuple[tuple[int, int], ...]:
    """(height, width) in pixels of each size bucket; a single one unless data.buckets is set."""
    return tuple(map(tuple, data.buckets)) or ((data.height, data.width),)


def _probe(codec: Any) -> list[float]:
    """The latent of a fixed clip of two latent frames, with 4 significant digits."""
    side, time = 4 * codec.spatial_stride, 1 + codec.temporal_stride
    frames = np.random.default_rng(0).integers(0, 256, (1, time, side, side, 3), np.uint8)
    latent = np.asarray(codec.encode(frames), np.float32)
    return [float(f"{x:.4g}") for x in latent.ravel()]


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A line for every value of `here` that `there` does not have, named by its dotted key."""
    lines = []
    for key, value in here.items():
        name, found = f"{prefix}{key}", there.get(key)
        if isinstance(value, Mapping):
            lines += differences(found if isinstance(found, Mapping) else {}, value, f"{name}.")
            extra = set(found) - set(value) if isinstance(found, Mapping) else set()
            lines += [f"{name}.{k}: {found[k]!r} there, absent here" for k in sorted(extra)]
        elif key == "probe":
            if not _same_probe(found, value):
                lines.append(f"{name}: the codec there makes other latents of the same picture")
        elif found != value:
            lines.append(f"{name}: {found!r} there, {value!r} here")
    return lines


def _same_probe(there: Any, here: list[float]) -> bool:
    a, b = np.asarray(there, np.float64), np.asarray(here, np.float64)
    return a.shape == b.shape and np.linalg.norm(a - b) <= _PROBE_TOLERANCE * np.linalg.norm(b)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError that names a damaged file."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged (not a JSON object)")
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished data set of this version.

    Raises:
      FileNotFoundError: no such folder, no manifest in it, or the encoding isn't finished.
      ValueError: the manifest is damaged or of another version.
    """
    path = folder / MANIFEST
    if (folder / UNFINISHED).is_dir() and not path.is_file():
        raise FileNotFoundError(
            f"{folder}: its encoding is not finished; run encode_dataset.py again with "
            f"--dst={folder}, it goes on where it was stopped"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: not an encoded data set (no {MANIFEST}); make one with "
            "python encode_dataset.py --config=CONFIG --src=VIDEOS --dst=FOLDER"
        )
    manifest = read_json(path)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise ValueError(
            f"{path}: format {manifest.get('format')!r}, version {manifest.get('version')!r}; this "
            f"program reads {FORMAT!r}, version {VERSION}: encode the videos again"
        )
    if missing := sorted({"splits", "clip", "codec", "text", "empty_text"} - set(manifest)):
        raise ValueError(f"{path}: damaged (has no {', '.join(missing)}); copy the data set again")
    return manifest
