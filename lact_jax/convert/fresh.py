"""LaCT parameters that a checkpoint does not have, as a new model would start with them."""

from collections.abc import Callable, Mapping
from functools import lru_cache

import jax
import numpy as np
from flax import nnx

from lact_jax.models.dit import DiTConfig
from lact_jax.models.lact import LaCT
from lact_jax.wan_weights import Path, get


def fresh_values(
    config: DiTConfig, key: jax.Array, dtypes: Mapping[Path, np.dtype]
) -> dict[Path, np.ndarray]:
    """Whole stacks of the parameters blocks/<stack>/self_attn/… that `dtypes` names.

    Layer i of the model draws from `fold_in(key, i)`: its values depend neither on how
    layers are stacked nor on what else is fresh. Drawn a layer at a time, and nothing else of a
    layer is computed: the compiler drops what leads to no result.
    """
    by_stack: dict[str, list[Path]] = {}
    for path in dtypes:
        by_stack.setdefault(path[1], []).append(path)
    return {
        path: value
        for stack, paths in by_stack.items()
        for path, value in _stack_values(config, key, int(stack), tuple(paths), dtypes).items()
    }


@lru_cache
def _draw_layer(config: DiTConfig, names: tuple[Path, ...]) -> Callable:
    """A compiled function key -> the parameters `names` of one LaCT layer, in this order."""

    @jax.jit
    def draw(key):
        mixer = LaCT(config, config.lact[0], rngs=nnx.Rngs(key))
        params = nnx.to_pure_dict(nnx.state(mixer, nnx.Param))
        return [get(params, name) for name in names]

    return draw


def _stack_values(
    config: DiTConfig,
    key: jax.Array,
    stack: int,
    paths: tuple[Path, ...],
    dtypes: Mapping[Path, np.dtype],
) -> dict[Path, np.ndarray]:
    # Only what decides a LaCT layer's parameters, so that many configs share a compilation.
    _, options = config.layer_specs[stack]
    layer_config = DiTConfig(
        dim=config.dim, num_heads=config.num_heads, eps=config.eps, lact=(options,), dtype="float32"
    )
    draw = _draw_layer(layer_config, tuple(path[3:] for path in paths))
    layers = range(stack, config.num_layers, config.period)
    values: dict[Path, np.ndarray] = {}
    for n, i in enumerate(layers):
        drawn = draw(jax.random.fold_in(key, i))
        for path, value in zip(paths, drawn, strict=True):
            if n == 0:
                values[path] = np.empty((len(layers), *value.shape), dtypes[path])
            values[path][n] = np.asarray(value).astype(dtypes[path])
    return values
