"""The device mesh, and which parameter is cut along which of its axes.

One table of path suffix -> PartitionSpec serves parameters, their moving average and Adam's
moments; every parameter matches exactly one row. Models carry no annotation.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lact_jax.ops.parallel import AXES, BATCH_AXES


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 for the rest.

    data: replicas. fsdp: parameters, optimiser and batch are cut. seq: tokens of a chunk are cut,
    and parameters and optimiser too.
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
    known = int(np.prod([n for n in shape if n != -1]))
    if -1 in shape:
        if len(devices) % known:
            raise ValueError(f"mesh={tuple(shape)} does not divide {len(devices)} devices")
        shape[shape.index(-1)] = len(devices) // known
    if int(np.prod(shape)) != len(devices):
        raise ValueError(f"mesh={tuple(shape)} needs {np.prod(shape)} of {len(devices)} devices")
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


# Path suffix -> axes of the tensor without its layer axis. A matrix is cut along its longer or
# input side, over all devices that would else hold equal copies. Vectors and narrow matrices are
# kept whole: they are a hundredth of the parameters, and to gather one takes as long as a wide one.
_CUT = ("fsdp", "seq")
_WHOLE = ()
TABLE: dict[tuple[str, ...], tuple] = {
    ("patch_embedding", "kernel"): _WHOLE,
    ("fc1", "kernel"): (None, _CUT),
    ("fc2", "kernel"): (_CUT, None),
    ("time_projection", "kernel"): (_CUT, None),
    ("head", "kernel"): _WHOLE,
    ("q", "kernel"): (_CUT, None),
    ("k", "kernel"): (_CUT, None),
    ("v", "kernel"): (_CUT, None),
    ("o", "kernel"): (None, _CUT),
    ("w0",): (None, _CUT, None),
    ("w1",): (None, None, _CUT),
    ("w2",): (None, _CUT, None),
    ("initial_state",): (None, _CUT, None),
    ("lr_proj", "kernel"): _WHOLE,
    ("momentum_proj", "kernel"): _WHOLE,
    ("ttt_scale_proj", "kernel"): _WHOLE,
    ("decay_down", "kernel"): _WHOLE,
    ("decay_up", "kernel"): _WHOLE,
    ("qk_scale",): _WHOLE,
    ("qk_offset",): _WHOLE,
    ("modulation",): _WHOLE,
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


def _divisor(names: tuple[str, ...], size: int, mesh_shape: Mapping[str, int]):
    """Those of `names` over which a dimension of this size is cut: as an entry of a spec."""
    cut = tuple(name for name in names if mesh_shape[name] > 1)
    choices = [cut, *((name,) for name in sorted(cut, key=lambda name: -mesh_shape[name]))]
    whole = (c for c in choices if c and size % math.prod(mesh_shape[name] for name in c) == 0)
    axes = next(whole, ())
    return axes[0] if len(axes) == 1 else axes or None


def parameter_spec(
    mesh_shape: Mapping[str, int], keys: tuple[str, ...], shape: tuple[int, ...]
) -> PartitionSpec:
    """How a parameter lies on a mesh: its row of the table, as far as the mesh divides its sizes.

    A dimension that fsdp x seq does not divide is cut over one of them, or is kept whole.
    """
    spec = spec_for(keys, len(shape))
    entries = [
        _divisor(names, size, mesh_shape) if names else None
        for size, names in zip(shape, spec, strict=False)
    ]
    return PartitionSpec(*entries) if any(entries) else PartitionSpec()


def _parameter_keys(path, known: set[tuple[str, ...]]) -> tuple[str, ...] | None:
    """The longest tail of a key path that is a parameter's path (moments mirror parameters)."""
    keys = tuple(str(getattr(e, "key", getattr(e, "name", getattr(e, "idx", "")))) for e in path)
    return next((keys[i:] for i in range(len(keys)) if keys[i:] in known), None)


def state_shardings(mesh: Mesh, state, params) -> object:
    """NamedShardings for any tree that mirrors `params` in places (a train state, for example).

    A leaf whose path ends in a parameter's path is cut like that parameter; others are replicated.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    known = {tuple(str(e.key) for e in path) for path, _ in flat}

    def sharding(path, leaf):
        keys = _parameter_keys(path, known)
        whole = PartitionSpec()
        spec = whole if keys is None else parameter_spec(mesh.shape, keys, leaf.shape)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are cut along their first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """One whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def on_mesh(mesh: Mesh, function: Callable) -> Callable:
    """`function`, to be traced for this mesh: models bound in it are cut over its devices.

    On a mesh of one device it is `function` itself.
    """
    if mesh.size == 1:
        return function

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced
