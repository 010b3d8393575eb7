"""The DiT on a mesh: one `jax.shard_map` around each of its methods.

Inside, every device runs the very same DiT on its clips (over data and fsdp) and its tokens of
every chunk (over seq); ops/parallel.py has the few places where devices exchange something.
Parameters come in cut as in the table of sharding.py. Those of a layer are gathered when `lax.scan`
comes to it, in the type of their matmul, and their gradients are scattered there; the few that
belong to no layer are gathered first.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from lact_jax.ops import parallel
from lact_jax.ops.sequence import SequenceLayout
from lact_jax.sharding import parameter_spec

WHOLE = PartitionSpec()


def _keys(path) -> tuple[str, ...]:
    """Names on the way to a leaf of an nnx.State."""
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def parameter_specs(state: Any) -> Any:
    """The PartitionSpec of every parameter of a whole model's state."""
    shape = parallel.mesh_shape()
    return jax.tree_util.tree_map_with_path(
        lambda path, x: parameter_spec(shape, _keys(path), x.shape), state
    )


def _matmul_dtype(keys: tuple[str, ...], dtype) -> jnp.dtype:
    """The type in which a parameter is used: kernels of all but the time embedding in `dtype`."""
    narrow = keys[-1] == "kernel" and not keys[0].startswith("time_")
    return jnp.dtype(dtype) if narrow else jnp.dtype(jnp.float32)


def gather_parameters(state: Any, specs: Any, dtype, prefix: tuple[str, ...] = ()) -> Any:
    """Whole parameters from a device's parts.

    Args:
      state: the parts; a layer of a stack comes without its layer axis.
      specs: their PartitionSpecs, likewise.
      dtype: the model's matmul type.
      prefix: names on the way to `state`.
    """

    def whole(path, x, spec):
        cut = [(dim, axes) for dim, axes in enumerate(spec) if axes]
        for dim, axes in cut:
            axes = (axes,) if isinstance(axes, str) else tuple(axes)
            x = parallel.gather(x, axes, dim, _matmul_dtype((*prefix, *_keys(path)), dtype))
        return x

    return jax.tree_util.tree_map_with_path(whole, state, specs)


def layer_specs(specs: Any) -> Any:
    """The PartitionSpecs of a layer from those of its stack."""
    return jax.tree.map(
        lambda spec: PartitionSpec(*spec[1:]), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


class ShardedDiT:
    """A DiT whose parameters, clips and tokens are cut over the mesh that is being traced for.

    Its methods are the DiT's, with whole arrays in and out.
    """

    def __init__(self, model: Any):
        self.config = model.config
        self._model = model
        self._graph, self._state = nnx.split(model)

    def _run(self, method: Callable, inputs: tuple, in_specs: tuple, out_specs: Any):
        """method(a device's model, its inputs) on every device."""
        specs = parameter_specs(self._state)
        dtype = self.config.dtype
        stacks = [layer_specs(specs["blocks"][str(i)]) for i in range(self.config.period)]

        def gather_layer(states):
            pairs = zip(states, stacks, strict=True)
            return tuple(gather_parameters(*pair, dtype, ("blocks",)) for pair in pairs)

        def local(state, *inputs):
            outside = {name: part for name, part in state.items() if name != "blocks"}
            outer_specs = {name: part for name, part in specs.items() if name != "blocks"}
            whole = gather_parameters(outside, outer_specs, dtype)
            model = nnx.merge(self._graph, nnx.State({**whole, "blocks": state["blocks"]}))
            model.gather_layer = gather_layer
            return method(model, *inputs)

        # Values are not tracked as equal on devices: each sums its own gradient of what all have,
        # and shard_map adds these up. One sum a chunk is left of the fast weights' backward pass.
        run = jax.shard_map(
            local, in_specs=(specs, *in_specs), out_specs=out_specs, check_vma=False
        )
        return run(self._state, *inputs)

    def sequence(
        self,
        x_BCFhwc: jax.Array,
        timestep_BC: jax.Array,
        text_BLQ: jax.Array,
        frame_CF: jax.Array,
        layout: SequenceLayout,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See DiT.sequence."""
        batch = PartitionSpec(parallel.batch_axes(x_BCFhwc.shape[0]))
        return self._run(
            lambda model, *inputs: model.sequence(*inputs, layout),
            (x_BCFhwc, timestep_BC, text_BLQ, frame_CF),
            (batch, batch, batch, WHOLE),
            (batch, WHOLE),
        )

    def text_kv(self, text_BLQ: jax.Array) -> tuple:
        """See DiT.text_kv."""
        batch = parallel.batch_axes(text_BLQ.shape[0])
        stacked = PartitionSpec(None, batch)
        return self._run(
            lambda model, text: model.text_kv(text), (text_BLQ,), (PartitionSpec(batch),), stacked
        )

    def init_cache(self, batch: int) -> Any:
        """See DiT.init_cache."""
        axes = parallel.batch_axes(batch)
        shape = parallel.mesh_shape()
        own = batch
        for axis in axes:
            own //= shape[axis]
        return self._run(
            lambda model: model.init_cache(own), (), (), self._model.cache_specs(axes)
        )

    def denoise(
        self, x_BFhwc: jax.Array, timestep_B: jax.Array, text_kv: tuple, cache: Any
    ) -> jax.Array:
        """See DiT.denoise."""
        axes = parallel.batch_axes(x_BFhwc.shape[0])
        batch, stacked = PartitionSpec(axes), PartitionSpec(None, axes)
        return self._run(
            lambda model, *inputs: model.denoise(*inputs),
            (x_BFhwc, timestep_B, text_kv, cache),
            (batch, batch, stacked, self._model.cache_specs(axes)),
            batch,
        )

    def commit(
        self, x_BFhwc: jax.Array, text_kv: tuple, cache: Any, timestep: float = 0.0
    ) -> Any:
        """See DiT.commit."""
        axes = parallel.batch_axes(x_BFhwc.shape[0])
        specs = self._model.cache_specs(axes)
        return self._run(
            lambda model, *inputs: model.commit(*inputs, timestep),
            (x_BFhwc, text_kv, cache),
            (PartitionSpec(axes), PartitionSpec(None, axes), specs),
            specs,
        )
