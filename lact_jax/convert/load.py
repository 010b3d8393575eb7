"""A converted folder into parameters: nested dicts of jax arrays, on any mesh.

Orbax reads every array straight into its sharding, each device its own slice. Parameters are found
by their official names, so the layers may be stacked differently in the file and in the model: a
plain Wan (one stack) starts a model whose layers alternate (several stacks).
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from lact_jax import wan_weights
from lact_jax.convert.components import COMPONENTS, flat
from lact_jax.convert.destination import read_manifest
from lact_jax.convert.errors import ConversionError, in_few_lines
from lact_jax.convert.fresh import fresh_values
from lact_jax.convert.stream import Keys, reading_errors, stored_layout
from lact_jax.models.dit import DiTConfig, abstract_params
from lact_jax.models.umt5 import UMT5Config
from lact_jax.models.vae import VAEConfig

_log = logging.getLogger(__name__)
# How much is read at a time, on its way through host memory.
_CONCURRENT_GB = 4
# What shapes don't show: two models that differ in it are different all the same.
_UNSEEN = ("num_heads", "eps", "patch_size", "position_embedding")


def load_dit(
    folder: str | Path,
    config: DiTConfig,
    shardings: dict | None = None,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> dict:
    """The DiT's parameters for `config` from a converted folder.

    LaCT parameters that the file does not have (all of them, from a plain Wan) are drawn from
    `key` as a new model's; their names are logged, and `missing_parameters` gives them.

    Args:
      shardings: a nested dict like the parameters; None puts all on the first device.
      key: by default `jax.random.key(0)`.
      dtype: of the result, whatever the file's.

    Returns:
      A nested dict for `dit.bind`.

    Raises:
      FileNotFoundError: no converted folder there.
      ConversionError: it has no DiT, is damaged, or holds another model; lists every difference.
    """
    plan = _DiTPlan(Path(folder), config)
    targets = {path: leaf.shape for path, leaf in flat(abstract_params(config)).items()}
    placed = _shardings(targets, shardings)
    dtype = np.dtype(dtype)
    if plan.fresh:
        _log.info("%s: freshly initialised: %s", folder, ", ".join(map("/".join, plan.fresh)))
    wanted = {
        source: jax.ShapeDtypeStruct(plan.stored[source].shape, dtype, sharding=placed[path])
        for path in targets
        for source, _ in plan.sources[path].values()
    }
    read = _restore(plan.folder, wanted)
    key = jax.random.key(0) if key is None else key
    fresh = fresh_values(config, key, dict.fromkeys(plan.fresh, dtype)) if plan.fresh else {}
    params = {}
    for path, shape in targets.items():
        if len(plan.sources[path]) == 0:
            params[path] = jax.device_put(fresh[path], placed[path])
        else:
            params[path] = _stack(plan.sources[path], shape, read, fresh.get(path), placed[path])
    return unflatten_dict(params)


def missing_parameters(folder: str | Path, config: DiTConfig) -> tuple[str, ...]:
    """The LaCT parameters ("blocks/0/self_attn/w0") that `load_dit` would draw.

    Raises as `load_dit`.
    """
    return tuple(map("/".join, _DiTPlan(Path(folder), config).fresh))


class _DiTPlan:
    """Which array of the file, and which layer of it, every layer of every parameter comes from.

    sources: path -> {layer: (path in the file, layer there)}; None for what is not stacked.
    fresh: the paths of which a layer or all layers are missing.
    """

    def __init__(self, folder: Path, config: DiTConfig):
        part = _component(folder, "dit")
        there = COMPONENTS["dit"].from_json(part["config"])
        self.folder = folder / "dit"
        self.stored = stored_layout(self.folder)
        here = {row.torch_name: row for row in wan_weights.rows(config)}
        in_file = {
            row.torch_name: row for row in wan_weights.rows(there) if row.path in self.stored
        }
        self._raise_on_difference(folder, config, there, part["assumed"], here, in_file)
        self.sources: dict[Keys, dict] = {}
        self.fresh: tuple[Keys, ...] = ()
        for name, row in here.items():
            layers = self.sources.setdefault(row.path, {})
            if name in in_file:
                layers[row.layer] = in_file[name].path, in_file[name].layer
            elif row.path not in self.fresh:
                self.fresh += (row.path,)

    def _raise_on_difference(self, folder, config, there, assumed, here, in_file):
        shapes = {path: leaf.shape for path, leaf in flat(abstract_params(config)).items()}

        def shape_of(row, all_shapes):
            shape = all_shapes[row.path]
            return shape if row.layer is None else shape[1:]

        stored = {path: leaf.shape for path, leaf in self.stored.items()}
        problems = [
            (
                f"model.{name}",
                f"{getattr(there, name)} in the file, {getattr(config, name)} asked for",
            )
            for name in _UNSEEN
            if name not in assumed and getattr(there, name) != getattr(config, name)
        ]
        for name, row in here.items():
            if name not in in_file:
                if not row.is_lact:
                    problems.append((name, f"not in the file, {shape_of(row, shapes)} asked for"))
                continue
            have, need = shape_of(in_file[name], stored), shape_of(row, shapes)
            if have != need:
                problems.append((name, f"{have} in the file, {need} asked for"))
        problems += [
            ("/".join(path), f"mixer {config.mixer!r} has it and no checkpoint does: train it anew")
            for path in sorted(shapes.keys() - {row.path for row in here.values()})
        ]
        problems += [
            (name, f"{shape_of(row, stored)} in the file, the model has none")
            for name, row in in_file.items()
            if name not in here
        ]
        if problems:
            raise ConversionError(
                f"{folder}: its DiT ({_describe(there)}) does not fit the config's "
                f"({_describe(config)}); {len(problems)} differences:\n  "
                + "\n  ".join(in_few_lines(problems))
            )


def _describe(config: DiTConfig) -> str:
    sizes = ("dim", "ffn_dim", "num_heads", "num_layers")
    return ", ".join(f"{name} {getattr(config, name)}" for name in sizes) + f", {config.mixer}"


def _stack(sources: Mapping, shape: tuple[int, ...], read, fresh, sharding) -> jax.Array:
    """One parameter from arrays of the file, of which it may be other layers in another order."""
    arrays = sorted({path for path, _ in sources.values()})
    if None in sources:
        return read[arrays[0]]
    if len(arrays) == 1 and list(sources.items()) == [
        (i, (arrays[0], i)) for i in range(read[arrays[0]].shape[0])
    ]:
        return read[arrays[0]]

    def pick(inputs, fresh):
        layers = [
            inputs[sources[i][0]][sources[i][1]] if i in sources else fresh[i]
            for i in range(shape[0])
        ]
        return jnp.stack(layers)

    return jax.jit(pick, out_shardings=sharding)({path: read[path] for path in arrays}, fresh)


def _component(folder: Path, name: str) -> dict[str, Any]:
    components = read_manifest(folder)["components"]
    if name not in components:
        raise ConversionError(
            f"{folder} holds {', '.join(components)} and no {name}: convert again with "
            f"--only=…,{name}"
        )
    return components[name]


def _shardings(targets: Mapping[Keys, tuple], shardings: dict | None) -> dict[Keys, Any]:
    if shardings is None:
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return dict.fromkeys(targets, first)
    given = {tuple(map(str, path)): leaf for path, leaf in flatten_dict(shardings).items()}
    if given.keys() != targets.keys():
        names = sorted("/".join(path) for path in given.keys() ^ targets.keys())
        raise ValueError(f"shardings is not like the parameters: {', '.join(names)}")
    return given


def _restore(folder: Path, wanted: Mapping[Keys, jax.ShapeDtypeStruct]) -> dict[Keys, jax.Array]:
    """Reads exactly `wanted`, casting to the dtypes asked for."""
    item = unflatten_dict(dict(wanted))
    args = ocp.args.PyTreeRestore(
        item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_CONCURRENT_GB)
    with reading_errors(folder), ocp.Checkpointer(handler) as checkpointer:
        return flatten_dict(checkpointer.restore(folder.absolute(), args=args))


def _load_whole(folder: Path, name: str, config: Any, shardings: dict | None) -> dict:
    """A component whose stacks are those of the file, in the dtypes of its abstract parameters."""
    abstract = flat(COMPONENTS[name].abstract(config))
    stored = stored_layout(folder / name)
    problems = [
        ("/".join(path), f"{_shape(stored, path)} in the file, {_shape(abstract, path)} asked for")
        for path in sorted(abstract.keys() | stored.keys())
        if _shape(stored, path) != _shape(abstract, path)
    ]
    if problems:
        raise ConversionError(
            f"{folder / name} does not fit its config:\n  " + "\n  ".join(in_few_lines(problems))
        )
    placed = _shardings({path: leaf.shape for path, leaf in abstract.items()}, shardings)
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[path])
        for path, leaf in abstract.items()
    }
    return unflatten_dict(_restore(folder / name, wanted))


def _shape(leaves: Mapping[Keys, Any], path: Keys) -> Any:
    return tuple(leaves[path].shape) if path in leaves else "nothing"


def load_vae(
    folder: str | Path, dtype: str = "bfloat16", shardings: dict | None = None
) -> tuple[VAEConfig, dict]:
    """The VAE of a converted folder: its config, with `dtype` to compute in, and parameters.

    Raises as `load_dit`.
    """
    part = _component(Path(folder), "vae")
    config = COMPONENTS["vae"].from_json({**part["config"], "dtype": dtype})
    return config, _load_whole(Path(folder), "vae", config, shardings)


def load_text(
    folder: str | Path,
    param_dtype: str = "bfloat16",
    compute_dtype: str = "bfloat16",
    shardings: dict | None = None,
) -> tuple[UMT5Config, dict]:
    """The text encoder of a converted folder: its config and parameters.

    Raises as `load_dit`.
    """
    config = text_config(folder, param_dtype, compute_dtype)
    return config, _load_whole(Path(folder), "text", config, shardings)


def text_config(
    folder: str | Path, param_dtype: str = "bfloat16", compute_dtype: str = "bfloat16"
) -> UMT5Config:
    """The config of a converted folder's text encoder, without its parameters.

    Raises as `load_dit`.
    """
    part = _component(Path(folder), "text")
    dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
    return COMPONENTS["text"].from_json({**part["config"], **dtypes})
