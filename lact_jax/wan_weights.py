"""Where every tensor of a Wan or LaCT-AR checkpoint goes in the JAX model: one table, both ways.

A row names an official PyTorch tensor, the parameter it becomes, and how its layout changes.
`rows(config)` spells the table out for a model: one row for each tensor of each layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from einops import rearrange

from lact_jax.models.dit import DiTConfig

Path = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """How a tensor changes on its way: `to_jax` and its inverse `to_torch`, (array, config)."""

    to_jax: Callable[[np.ndarray, DiTConfig], np.ndarray]
    to_torch: Callable[[np.ndarray, DiTConfig], np.ndarray]


def _patch_to_torch(kernel, config):
    pt, ph, pw = config.patch_size
    return rearrange(kernel, "(pt ph pw c) d -> d c pt ph pw", pt=pt, ph=ph, pw=pw)


SAME = Layout(lambda x, _: x, lambda x, _: x)
TRANSPOSED = Layout(lambda x, _: x.T, lambda x, _: x.T)
LEADING_ONE = Layout(lambda x, _: x[0], lambda x, _: x[None])
PATCH_CONV = Layout(
    lambda x, _: rearrange(x, "d c pt ph pw -> (pt ph pw c) d"), _patch_to_torch
)


def _linear(torch_name: str, jax_name: str):
    return (
        (f"{torch_name}.weight", f"{jax_name}/kernel", TRANSPOSED),
        (f"{torch_name}.bias", f"{jax_name}/bias", SAME),
    )


MODEL_TABLE = (
    ("patch_embedding.weight", "patch_embedding/kernel", PATCH_CONV),
    ("patch_embedding.bias", "patch_embedding/bias", SAME),
    *_linear("text_embedding.0", "text_embedding/fc1"),
    *_linear("text_embedding.2", "text_embedding/fc2"),
    *_linear("time_embedding.0", "time_embedding/fc1"),
    *_linear("time_embedding.2", "time_embedding/fc2"),
    *_linear("time_projection.1", "time_projection"),
    ("head.modulation", "head/modulation", LEADING_ONE),
    *_linear("head.head", "head/head"),
)

_ATTENTION = tuple(
    row
    for attention in ("self_attn", "cross_attn")
    for row in (
        *_linear(f"{attention}.q", f"{attention}/q"),
        *_linear(f"{attention}.k", f"{attention}/k"),
        *_linear(f"{attention}.v", f"{attention}/v"),
        *_linear(f"{attention}.o", f"{attention}/o"),
        (f"{attention}.norm_q.weight", f"{attention}/norm_q/scale", SAME),
        (f"{attention}.norm_k.weight", f"{attention}/norm_k/scale", SAME),
    )
)

# In every block, under "blocks.<i>." there and "blocks/<i mod p>/" here.
BLOCK_TABLE = (
    ("modulation", "modulation", LEADING_ONE),
    *_ATTENTION,
    ("norm3.weight", "norm3/scale", SAME),
    ("norm3.bias", "norm3/bias", SAME),
    *_linear("ffn.0", "ffn/fc1"),
    *_linear("ffn.2", "ffn/fc2"),
)

# What LaCT adds to a block; which of them exist depends on the layer's options.
LACT_TABLE = (
    ("self_attn.w0", "self_attn/w0", SAME),
    ("self_attn.w1", "self_attn/w1", SAME),
    ("self_attn.w2", "self_attn/w2", SAME),
    ("self_attn.qk_scale", "self_attn/qk_scale", SAME),
    ("self_attn.qk_offset", "self_attn/qk_offset", SAME),
    *_linear("self_attn.lr_proj", "self_attn/lr_proj"),
    *_linear("self_attn.momentum_proj.0", "self_attn/momentum_proj"),
    ("self_attn.output_norm.weight", "self_attn/output_norm/scale", SAME),
    *_linear("self_attn.ttt_scale_proj", "self_attn/ttt_scale_proj"),
)


@dataclass(frozen=True)
class Row:
    """One tensor: its official name, the parameter's path, the layer's place in its stack."""

    torch_name: str
    path: Path
    layer: int | None
    layout: Layout
    is_lact: bool = False


def rows(config: DiTConfig) -> list[Row]:
    """The table for this model: every official tensor name and where it goes."""
    table = [Row(name, tuple(path.split("/")), None, layout) for name, path, layout in MODEL_TABLE]
    for i, (mixer, options) in enumerate(config.layer_specs):
        stack, layer = i % config.period, i // config.period
        absent = _absent(options) if mixer == "lact" else ()
        entries = [(row, False) for row in BLOCK_TABLE]
        if mixer == "lact":
            entries += [(row, True) for row in LACT_TABLE if not row[1].startswith(absent)]
        for (name, path, layout), is_lact in entries:
            full_path = ("blocks", str(stack), *path.split("/"))
            table.append(Row(f"blocks.{i}.{name}", full_path, layer, layout, is_lact))
    return table


def _absent(options) -> tuple[str, ...]:
    switches = {
        "self_attn/momentum_proj": options.momentum,
        "self_attn/output_norm": options.o_norm,
        "self_attn/ttt_scale_proj": options.learnable_ttt_scale,
    }
    return tuple(path for path, present in switches.items() if not present)


def get(params: Mapping, path: Path):
    """params[path[0]][path[1]]…"""
    for key in path:
        params = params[key]
    return params


def _put(params: dict, path: Path, value) -> None:
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = value


def params_from_torch(tensors: Mapping[str, np.ndarray], config: DiTConfig) -> dict:
    """Official tensors as a parameter dict. All must be there, and no others.

    Raises:
      ValueError: lists every missing and every unexpected tensor.
    """
    table = rows(config)
    names = {row.torch_name for row in table}
    if names != tensors.keys():
        raise ValueError(
            f"missing tensors: {sorted(names - tensors.keys()) or 'none'}; "
            f"unexpected tensors: {sorted(tensors.keys() - names) or 'none'}"
        )
    stacks: dict[Path, dict] = {}
    for row in table:
        value = row.layout.to_jax(np.asarray(tensors[row.torch_name]), config)
        stacks.setdefault(row.path, {})[row.layer] = value
    params: dict = {}
    for path, by_layer in stacks.items():
        single = None in by_layer
        value = by_layer[None] if single else np.stack([by_layer[i] for i in sorted(by_layer)])
        _put(params, path, np.ascontiguousarray(value))
    return params


def params_to_torch(params: Mapping, config: DiTConfig) -> dict[str, np.ndarray]:
    """The inverse of `params_from_torch`."""
    tensors = {}
    for row in rows(config):
        value = np.asarray(get(params, row.path))
        value = value if row.layer is None else value[row.layer]
        tensors[row.torch_name] = np.ascontiguousarray(row.layout.to_torch(value, config))
    return tensors
