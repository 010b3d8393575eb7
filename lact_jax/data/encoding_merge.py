"""Finished shards -> a data set that TFDS reads: names, metadata, summary, manifest."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from lact_jax.data import encoded_format as layout
from lact_jax.data.encoding_source import Shard
from lact_jax.data.listing import BadFiles, enumerate_some
from lact_jax.video_io import replacing

_SUFFIX = "array_record"


def record_file(work: Path, shard: Shard) -> Path:
    """Where a shard's clips lie until the merge."""
    return work / f"{shard.name}.{_SUFFIX}"


def report_file(work: Path, shard: Shard) -> Path:
    """The report that says what a finished shard has."""
    return work / f"{shard.name}.json"


def unreadable(work: Path, shards: Sequence[Shard]) -> list[str]:
    """Why files of the shards that are finished could not be read, a line each."""
    reports = [
        layout.read_json(file) for s in shards if (file := report_file(work, s)).exists()
    ]
    return [report["skipped"][name] for report in reports for name in report["unreadable"]]


def merge(
    dst: Path, plan: dict[str, Any], shards: Sequence[Shard], text: Any, bad: BadFiles
) -> dict[str, Any] | None:
    """Makes the data set if all shards are there; any process may, and a killed merge goes on.

    Args:
      dst: the data set's folder.
      plan: what goes into the manifest.
      shards: all of the plan.
      text: encodes the empty caption.
      bad: is told of the files that no process could read.

    Returns:
      The summary, or None where shards are missing.

    Raises ValueError if no training clip could be used, and as `bad.add`.
    """
    with (dst / ".lock").open("w") as lock:  # processes that finish together merge once
        fcntl.flock(lock, fcntl.LOCK_EX)
        work = dst / layout.UNFINISHED
        if not (dst / layout.MANIFEST).exists():
            if not all(report_file(work, shard).exists() for shard in shards):
                return None
            bad.add(unreadable(work, shards))  # each process knew of its own at most
            _finish(dst, work, plan, shards, text)
        shutil.rmtree(work, ignore_errors=True)
    return layout.read_json(dst / layout.SUMMARY)


def _finish(
    dst: Path, work: Path, plan: dict[str, Any], shards: Sequence[Shard], text: Any
) -> None:
    reports = {shard: layout.read_json(report_file(work, shard)) for shard in shards}
    summary = _summary(dst, reports)
    splits = {}
    for split in plan["source"]["clips"]:
        full = [s for s, report in reports.items() if s.split == split and report["kept"]]
        if full:
            splits[split] = [
                _put(record_file(work, shard), dst / _final_name(split, place, len(full)))
                | {"clips": len(reports[shard]["kept"]), "buckets": reports[shard]["buckets"]}
                for place, shard in enumerate(full)
            ]
    empty_LD = layout.cut_text(np.asarray(text.encode([""])[0], np.float32))
    with replacing(dst / layout.EMPTY_TEXT) as file:
        np.save(file, empty_LD)
    _write_tfds_metadata(dst, plan, splits)
    _write_json(dst / layout.SUMMARY, summary)
    _write_json(dst / layout.MANIFEST, plan | {"splits": splits, "empty_text": layout.EMPTY_TEXT})


def _summary(dst: Path, reports: dict[Shard, dict[str, Any]]) -> dict[str, Any]:
    kept: dict[str, list[str]] = {}
    skipped: dict[str, dict[str, str]] = {}
    for shard, report in reports.items():
        kept.setdefault(shard.split, []).extend(report["kept"])
        skipped.setdefault(shard.split, {}).update(report["skipped"])
    if not kept.get("train"):
        reasons = list(skipped.get("train", {}).values())
        raise ValueError(
            f"{dst}: none of the {len(reasons)} training clips can be used: "
            f"{enumerate_some(reasons)}"
        )
    return {
        split: {
            "num_kept": len(kept[split]),
            "num_skipped": len(skipped[split]),
            "kept": kept[split],
            "skipped": skipped[split],
        }
        for split in kept
    }


def _final_name(split: str, place: int, count: int) -> str:
    return f"{layout.DATASET_NAME}-{split}.{_SUFFIX}-{place:05d}-of-{count:05d}"


def _put(source: Path, target: Path) -> dict[str, Any]:
    """Moves a shard to its place, unless a merge that was killed has."""
    if source.exists():
        os.replace(source, target)
    return {"file": target.name, "bytes": target.stat().st_size}


def _write_tfds_metadata(dst: Path, plan: dict[str, Any], splits: dict[str, list[dict]]) -> None:
    template = tfds.core.ShardedFileTemplate(
        data_dir=dst, dataset_name=layout.DATASET_NAME, filetype_suffix=_SUFFIX
    )
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard["clips"] for shard in shards],
            num_bytes=sum(shard["bytes"] for shard in shards),
            filename_template=template.replace(split=split),
        )
        for split, shards in splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=dst,
        features=layout.features(plan["codec"]["latent_channels"], plan["text"]["text_dim"]),
        split_infos=infos,
        version=f"{layout.VERSION}.0.0",
        check_data=False,  # its check needs TensorFlow
        description="Videos as latents, and captions as text embeddings, for lact_jax.",
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
