"""Where every tensor of a Wan or LaCT-AR checkpoint goes in the JAX model: one table, both ways.

A row names a PyTorch tensor in both worlds' checkpoints, the parameter it becomes, and how its
layout changes:
- "wan": the names of the official code, which LaCT-AR's own parameters have everywhere;
- "diffusers": the names of `WanTransformer3DModel`.
`rows(config)` spells the table out for a model: one row for each tensor of each layer.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class Entry(NamedTuple):
    """A tensor's names in the two worlds, the parameter's path, and its change of layout."""

    wan: str
    diffusers: str
    path: str
    layout: Layout


def _linear(wan: str, diffusers: str, path: str) -> tuple[Entry, Entry]:
    return (
        Entry(f"{wan}.weight", f"{diffusers}.weight", f"{path}/kernel", TRANSPOSED),
        Entry(f"{wan}.bias", f"{diffusers}.bias", f"{path}/bias", SAME),
    )


_EMBEDDER = "condition_embedder"
MODEL_TABLE = (
    Entry("patch_embedding.weight", "patch_embedding.weight", "patch_embedding/kernel", PATCH_CONV),
    Entry("patch_embedding.bias", "patch_embedding.bias", "patch_embedding/bias", SAME),
    *_linear("text_embedding.0", f"{_EMBEDDER}.text_embedder.linear_1", "text_embedding/fc1"),
    *_linear("text_embedding.2", f"{_EMBEDDER}.text_embedder.linear_2", "text_embedding/fc2"),
    *_linear("time_embedding.0", f"{_EMBEDDER}.time_embedder.linear_1", "time_embedding/fc1"),
    *_linear("time_embedding.2", f"{_EMBEDDER}.time_embedder.linear_2", "time_embedding/fc2"),
    *_linear("time_projection.1", f"{_EMBEDDER}.time_proj", "time_projection"),
    Entry("head.modulation", "scale_shift_table", "head/modulation", LEADING_ONE),
    *_linear("head.head", "proj_out", "head/head"),
)

_ATTENTION = tuple(
    entry
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for entry in (
        *_linear(f"{ours}.q", f"{theirs}.to_q", f"{ours}/q"),
        *_linear(f"{ours}.k", f"{theirs}.to_k", f"{ours}/k"),
        *_linear(f"{ours}.v", f"{theirs}.to_v", f"{ours}/v"),
        *_linear(f"{ours}.o", f"{theirs}.to_out.0", f"{ours}/o"),
        Entry(f"{ours}.norm_q.weight", f"{theirs}.norm_q.weight", f"{ours}/norm_q/scale", SAME),
        Entry(f"{ours}.norm_k.weight", f"{theirs}.norm_k.weight", f"{ours}/norm_k/scale", SAME),
    )
)

# In every block, under "blocks.<i>." there and "blocks/<i mod p>/" here. The norm before
# cross-attention is the only one with weights: norm3 in the official code, norm2 in diffusers.
BLOCK_TABLE = (
    Entry("modulation", "scale_shift_table", "modulation", LEADING_ONE),
    *_ATTENTION,
    Entry("norm3.weight", "norm2.weight", "norm3/scale", SAME),
    Entry("norm3.bias", "norm2.bias", "norm3/bias", SAME),
    *_linear("ffn.0", "ffn.net.0.proj", "ffn/fc1"),
    *_linear("ffn.2", "ffn.net.2", "ffn/fc2"),
)


def _lact(name: str, path: str, layout: Layout = SAME) -> Entry:
    return Entry(f"self_attn.{name}", f"self_attn.{name}", f"self_attn/{path}", layout)


def _lact_linear(name: str, path: str) -> tuple[Entry, Entry]:
    name = f"self_attn.{name}"
    return _linear(name, name, f"self_attn/{path}")


# What LaCT adds to a block; which of them exist depends on the layer's options.
LACT_TABLE = (
    _lact("w0", "w0"),
    _lact("w1", "w1"),
    _lact("w2", "w2"),
    _lact("qk_scale", "qk_scale"),
    _lact("qk_offset", "qk_offset"),
    *_lact_linear("lr_proj", "lr_proj"),
    *_lact_linear("momentum_proj.0", "momentum_proj"),
    _lact("output_norm.weight", "output_norm/scale"),
    *_lact_linear("ttt_scale_proj", "ttt_scale_proj"),
)


@dataclass(frozen=True)
class Row:
    """One tensor: its name in a checkpoint, the parameter's path, its layer's place in a stack."""

    torch_name: str
    path: Path
    layer: int | None
    layout: Layout
    is_lact: bool = False


def rows(config: DiTConfig, names: str = "wan") -> list[Row]:
    """The table for this model: every tensor under its "wan" or "diffusers" name."""
    table = [
        Row(getattr(entry, names), tuple(entry.path.split("/")), None, entry.layout)
        for entry in MODEL_TABLE
    ]
    for i, (mixer, options) in enumerate(config.layer_specs):
        stack, layer = i % config.period, i // config.period
        entries = [(entry, False) for entry in BLOCK_TABLE]
        if mixer == "lact":
            absent = _absent(options)
            entries += [(e, True) for e in LACT_TABLE if not e.path.startswith(absent)]
        for entry, is_lact in entries:
            path = ("blocks", str(stack), *entry.path.split("/"))
            name = f"blocks.{i}.{getattr(entry, names)}"
            table.append(Row(name, path, layer, entry.layout, is_lact))
    return table


_OFFICIAL = {entry.diffusers: entry.wan for entry in MODEL_TABLE}
_OFFICIAL_IN_BLOCK = {entry.diffusers: entry.wan for entry in BLOCK_TABLE}


def official_name(diffusers_name: str) -> str:
    """The official name of a diffusers tensor; a name that isn't in the table is left as it is."""
    if block := re.fullmatch(r"(blocks\.\d+)\.(.+)", diffusers_name):
        prefix, rest = block.groups()
        return f"{prefix}.{_OFFICIAL_IN_BLOCK.get(rest, rest)}"
    return _OFFICIAL.get(diffusers_name, diffusers_name)


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


def params_from_torch(
    tensors: Mapping[str, np.ndarray], config: Any, table: Sequence[Row] | None = None
) -> dict:
    """Official tensors as a parameter dict. All must be there, and no others.

    `table` is the DiT's by default; another network's (umt5_weights) goes with its own config.

    Raises:
      ValueError: lists every missing and every unexpected tensor.
    """
    table = rows(config) if table is None else table
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
