"""The device mesh, and which parameter is cut along which of its axes.

One table of path suffix -> PartitionSpec serves parameters, their moving average and Adam's
moments; every parameter matches exactly one row. Models carry no annotation.
"""

from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "seq")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 for the rest.

    data: replicas. fsdp: parameters, optimiser and batch are cut. seq: tokens of a chunk are cut.
    """

    data: int = -1
    fsdp: int = 1
    seq: int = 1


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """The mesh over all (or the given) devices; raises ValueError where it does not divide."""
    devices = jax.devices() if devices is None else devices
    shape = [config.data, config.fsdp, config.seq]
    if any(n < 1 and n != -1 for n in shape) or shape.count(-1) > 1:
        raise ValueError(f"mesh={tuple(shape)}: sizes are positive, and one of them may be -1")
    if config.seq != 1:
        raise ValueError(
            f"mesh.seq={config.seq}: sequence sharding is not there yet; use 1 and the other axes"
        )
    known = int(np.prod([n for n in shape if n != -1]))
    if -1 in shape:
        if len(devices) % known:
            raise ValueError(f"mesh={tuple(shape)} does not divide {len(devices)} devices")
        shape[shape.index(-1)] = len(devices) // known
    if int(np.prod(shape)) != len(devices):
        raise ValueError(f"mesh={tuple(shape)} needs {np.prod(shape)} of {len(devices)} devices")
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


# Path suffix -> axes of the tensor without its layer axis. A matrix is cut along its longer or
# input side; vectors and small tensors are kept whole.
_WHOLE = ()
TABLE: dict[tuple[str, ...], tuple] = {
    ("patch_embedding", "kernel"): (None, "fsdp"),
    ("fc1", "kernel"): (None, "fsdp"),
    ("fc2", "kernel"): ("fsdp", None),
    ("time_projection", "kernel"): ("fsdp", None),
    ("head", "kernel"): ("fsdp", None),
    ("q", "kernel"): ("fsdp", None),
    ("k", "kernel"): ("fsdp", None),
    ("v", "kernel"): ("fsdp", None),
    ("o", "kernel"): (None, "fsdp"),
    ("w0",): (None, "fsdp", None),
    ("w1",): (None, None, "fsdp"),
    ("w2",): (None, "fsdp", None),
    ("lr_proj", "kernel"): ("fsdp", None),
    ("momentum_proj", "kernel"): ("fsdp", None),
    ("ttt_scale_proj", "kernel"): ("fsdp", None),
    ("qk_scale",): ("fsdp", None),
    ("qk_offset",): ("fsdp", None),
    ("modulation",): (None, "fsdp"),
    ("bias",): _WHOLE,
    ("scale",): _WHOLE,
}


def spec_for(keys: tuple[str, ...], ndim: int) -> PartitionSpec:
    """The PartitionSpec of a parameter; raises ValueError unless exactly one row matches."""
    matches = [suffix for suffix in TABLE if keys[-len(suffix) :] == suffix]
    if len(matches) != 1:
        found = [".".join(m) for m in matches] or "none"
        raise ValueError(f"sharding table: {'.'.join(keys)} must match one row, matches {found}")
    stacked = (None,) if keys[0] == "blocks" else ()
    axes = TABLE[matches[0]]
    if axes and len(stacked) + len(axes) != ndim:
        raise ValueError(f"sharding table: {'.'.join(keys)} has {ndim} axes, its row {len(axes)}")
    return PartitionSpec(*stacked, *axes) if axes else PartitionSpec()


def _parameter_keys(path, known: set[tuple[str, ...]]) -> tuple[str, ...] | None:
    """The longest tail of a key path that is a parameter's path (moments mirror parameters)."""
    keys = tuple(str(getattr(e, "key", getattr(e, "name", getattr(e, "idx", "")))) for e in path)
    return next((keys[i:] for i in range(len(keys)) if keys[i:] in known), None)


def state_shardings(mesh: Mesh, state, params) -> object:
    """NamedShardings for any tree that mirrors `params` in places (a train state, for example).

    A leaf whose path ends in a parameter's path is cut like that parameter; others are replicated.
    A dimension that the mesh does not divide is kept whole.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    known = {tuple(str(e.key) for e in path) for path, _ in flat}

    def sharding(path, leaf):
        keys = _parameter_keys(path, known)
        spec = PartitionSpec() if keys is None else spec_for(keys, leaf.ndim)
        axes = [
            name if name and size % mesh.shape[name] == 0 else None
            for size, name in zip(leaf.shape, spec, strict=False)
        ]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are cut along their first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """One whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
