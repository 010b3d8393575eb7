"""Trees of arrays on disk: which leaves can be stored, reading them by path, comparing them.

A tree is stored leaf by leaf under its path ("params/blocks/attn/q/kernel"), whatever containers
hold it (dicts, dataclasses, named tuples). Reading starts from a table path → shape, dtype and
sharding; what does not match it is an error that lists every path.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

PyTree = Any
Layout = dict[str, jax.ShapeDtypeStruct]  # tree path -> shape and dtype as stored

_HANDLERS = {
    "state": (ocp.PyTreeCheckpointHandler, ocp.args.PyTreeSave, ocp.args.PyTreeRestore),
    "data": (ocp.JsonCheckpointHandler, ocp.args.JsonSave, ocp.args.JsonRestore),
    "meta": (ocp.JsonCheckpointHandler, ocp.args.JsonSave, ocp.args.JsonRestore),
}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which and what to do."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """The checkpoint's arrays are not the ones asked for; the message lists every difference."""


def open_manager(directory: Any, **options: Any) -> ocp.CheckpointManager:
    """A `CheckpointManager` for the items state (arrays), data and meta (JSON)."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item, (handler_class, save_args, restore_args) in _HANDLERS.items():
        handler = handler_class()
        registry.add(item, save_args, handler)
        registry.add(item, restore_args, handler)
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(**options),
        handler_registry=registry,
    )


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """Leaves in flattening order, keyed by path. Raises ValueError if two paths coincide."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    leaves = dict(zip(names, (leaf for _, leaf in pairs), strict=True))
    if len(leaves) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"two leaves of the state have the same path: {twice}")
    return leaves


def savable(state: PyTree) -> dict[str, Any]:
    """The nested dict that is stored for `state`.

    Raises ValueError listing the leaves that would not come back the same.
    """
    leaves = leaves_by_path(state)
    problems = []
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray):
            problems.append(f"{path}: {type(leaf).__name__}, not an array")
        elif leaf.size == 0:
            problems.append(f"{path}: no elements (shape {leaf.shape})")
        elif (
            isinstance(leaf, np.ndarray) and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype
        ):
            problems.append(f"{path}: {leaf.dtype}, which jax would restore in 32 bits")
    if problems:
        raise ValueError(
            "these leaves of the state can't be checkpointed (small values belong in `meta`):\n  "
            + "\n  ".join(problems)
        )
    return unflatten_dict(leaves, sep="/")


def saved_layout(manager: ocp.CheckpointManager, step: int) -> Layout:
    """What the checkpoint of `step` holds, from its metadata."""
    tree = manager.item_metadata(step).state.tree
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in flatten_dict(tree, sep="/").items()
    }


def read_arrays(
    manager: ocp.CheckpointManager, step: int, wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """Reads `wanted` and nothing else: jax arrays where a sharding is given, numpy elsewhere."""
    item = unflatten_dict(dict(wanted), sep="/")
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
    return flatten_dict(manager.restore(step, args=ocp.args.Composite(state=args)).state, sep="/")


def read_checked(
    manager: ocp.CheckpointManager, step: int, saved: Layout, wanted: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Reads `wanted`, which must be all of `saved`, to its shardings (default: the first device).

    Orbax casts and pads without a word, so shapes and dtypes are compared before reading. Raises
    CheckpointMismatchError.
    """
    _raise_on_mismatch(manager, step, saved, {path: _stored_as(x) for path, x in wanted.items()})
    first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first_device
        )
        for path, leaf in wanted.items()
    }
    arrays = read_arrays(manager, step, placed)
    # Random keys come back in the implementation they were saved with, which only shows now.
    _raise_on_mismatch(manager, step, arrays, placed)
    return arrays


def _stored_as(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype on disk: random keys are stored as their uint32 data."""
    struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, struct) if is_key else struct


def _raise_on_mismatch(
    manager: ocp.CheckpointManager, step: int, saved: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    def describe(leaves: Mapping[str, Any], path: str) -> str:
        if path not in leaves:
            return "nothing"
        return f"{leaves[path].dtype}{list(leaves[path].shape)}"

    paths = [*wanted, *(path for path in saved if path not in wanted)]
    lines = [
        f"  {path}: {describe(saved, path)} in the checkpoint, {describe(wanted, path)} asked for"
        for path in paths
        if describe(saved, path) != describe(wanted, path)
    ]
    if lines:
        raise CheckpointMismatchError(
            f"checkpoint {manager.directory / str(step)} does not fit this config: "
            f"{len(lines)} of {len(paths)} arrays differ\n" + "\n".join(lines)
        )
