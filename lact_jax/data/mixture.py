"""Several data sets in one, mixed by weight.

    config.data.name = "mixture"
    config.data.options = {"datasets": {
        "films": {"weight": 0.7, "name": "video_folder", "path": "FILMS"},
        "drawn": {"weight": 0.3, "name": "synthetic", "path": "DRAWN", "options": {"num_rings": 9}},
    }}

A data set may set what the config's `data` section has, but for the clips' sizes and the batch.
Clips are mixed, not batches: of any number of clips in a row each data set has its share, to the
nearest clip (Grain's deterministic interleaving, weights to within a hundredth of the smallest).
The position is that of every data set. Validation mixes the validation splits in the same way and
ends with the first of them that is read to its end.

All must give the same form of batch: videos with videos, encoded clips with encoded ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from lact_jax.data.batch import process_share

_WEIGHT = "weight"
# What all clips of a batch share.
_COMMON = {"num_frames", "height", "width", "fps", "buckets", "batch_size", "share"}
_TOLERANCE = 1e-6


def parts(data: Any) -> dict[str, tuple[float, Any]]:
    """name -> (weight, `data` section) of the data sets that `data.options` names.

    Raises ValueError that names the data set and the key: nothing named, a key that can't be set,
    a weight that is missing or not positive, weights that don't sum to 1.
    """
    where = "data.options of 'mixture'"
    if unknown := sorted(set(data.options) - {"datasets"}):
        raise ValueError(f"{where}: unknown {unknown}; it takes ['datasets']")
    given = data.options.get("datasets", {})
    if not isinstance(given, Mapping) or not given:
        raise ValueError(
            f"{where}: names no data set; give datasets={{'a': {{'name': …, 'path': …, "
            "'weight': …}, …}"
        )
    known = {field.name for field in dataclasses.fields(data)} - _COMMON | {_WEIGHT}
    found = {}
    for key, changes in given.items():
        where_key = f"{where}: datasets.{key}"
        if not isinstance(changes, Mapping) or "name" not in changes:
            raise ValueError(f"{where_key}: must name a data set, such as {{'name': 'encoded', …}}")
        if unknown := sorted(set(changes) - known):
            raise ValueError(f"{where_key}: unknown {unknown}; it takes {sorted(known)}")
        weight = changes.get(_WEIGHT)
        if not isinstance(weight, int | float) or not math.isfinite(weight) or weight <= 0:
            raise ValueError(f"{where_key}.weight={weight!r}: must be a number above 0")
        changes = {"path": "", "options": {}} | {k: v for k, v in changes.items() if k != _WEIGHT}
        for name, value in changes.items():
            kind = Mapping if name == "options" else type(getattr(data, name))
            if not isinstance(value, kind):
                raise ValueError(f"{where_key}.{name}={value!r}: expected {kind.__name__}")
        found[key] = float(weight), dataclasses.replace(data, **changes)
    total = sum(weight for weight, _ in found.values())
    if abs(total - 1) > _TOLERANCE:
        weights = ", ".join(f"{key}: {weight:g}" for key, (weight, _) in found.items())
        raise ValueError(f"{where}: the weights sum to {total:.7g}, not 1 ({weights})")
    return found


def from_config(
    make_dataset: Callable[..., grain.IterDataset],
    config: Any,
    codec: Any,
    text: Any,
    split: str = "train",
) -> grain.IterDataset:
    """The mixture for a run.

    Args:
      make_dataset: `lact_jax.data.make_dataset`, for the data sets that are mixed.
      config, codec, text, split: as there.

    Raises ValueError as `parts`, and as each data set, after its name in the mixture.
    """
    if config.data.buckets:
        raise ValueError(
            f"data.buckets={config.data.buckets}: a mixture draws clip by clip and so has clips of "
            "one size; leave the buckets out"
        )
    mine, _, process_count = process_share(config.data)
    datasets, weights = [], []
    for key, (weight, data) in parts(config.data).items():
        one_clip = dataclasses.replace(data, batch_size=process_count)
        try:
            dataset = make_dataset(
                data.name, dataclasses.replace(config, data=one_clip), codec, text, split
            )
        except (ValueError, OSError, ImportError) as error:
            raise ValueError(f"data.options.datasets.{key}: {error}") from error
        datasets.append(dataset)
        weights.append(weight)
    mixed = grain.IterDataset.mix(datasets, weights)
    return mixed.batch(mine, drop_remainder=True, batch_fn=join)


def join(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Batches of a clip each -> one batch; ValueError where they are not of one form."""
    forms = {tuple(sorted(batch)) for batch in batches}
    if len(forms) > 1:
        raise ValueError(
            f"a mixture of batches of different forms ({' and '.join(map(str, sorted(forms)))}): "
            "mix videos with videos, and encoded clips with encoded ones"
        )
    first = batches[0]
    if counts := [n for batch in batches if (n := len(next(iter(batch.values())))) != 1]:
        raise ValueError(
            f"a data set of the mixture gave a batch of {counts[0]} clips where data.batch_size "
            "asked for one: it can't be mixed"
        )
    return {
        key: np.concatenate([batch[key] for batch in batches])
        if isinstance(value, np.ndarray)
        else [item for batch in batches for item in batch[key]]
        for key, value in first.items()
    }
