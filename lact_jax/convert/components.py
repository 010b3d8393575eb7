"""The three components of a checkpoint as one table: names, sizes, and where tensors go.

`COMPONENTS["dit" | "vae" | "text"]` puts the weight tables of wan_weights.py, vae_weights.py and
umt5_weights.py behind one interface.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lact_jax import umt5_weights, vae_weights, wan_weights
from lact_jax.convert import sizes
from lact_jax.convert.errors import ConversionError
from lact_jax.convert.tensors import TensorRef, without_wrappers
from lact_jax.models.dit import DiTConfig, abstract_params
from lact_jax.models.lact import LaCTConfig
from lact_jax.models.umt5 import UMT5Config, abstract_umt5
from lact_jax.models.vae import VAEConfig
from lact_jax.models.vae_codec import abstract_vae
from lact_jax.wan_weights import Path as ParamPath

Change = Callable[[np.ndarray], np.ndarray]
Tensors = Mapping[str, TensorRef]


@dataclass(frozen=True)
class Entry:
    """One tensor: its name there, the parameter's path here, its layer in a stack, its layout."""

    name: str
    path: ParamPath
    layer: int | None
    to_jax: Change
    to_torch: Change
    is_lact: bool = False


@dataclass(frozen=True)
class Options:
    """What the user says of a DiT that its files don't (see `sizes.complete`)."""

    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lact: Mapping[str, Any] | None = None


def parse_options(model: str, lact: str | None) -> Options:
    """Options from flags, "num_heads=12,eps=1e-6". Raises ConversionError naming what is wrong."""
    return Options(
        sizes.parse_fields(model, DiTConfig, "--model"),
        None if lact is None else sizes.parse_fields(lact, LaCTConfig, "--lact"),
    )


@dataclass(frozen=True)
class Reading:
    """What a component's files hold.

    Attributes:
      config: DiTConfig, VAEConfig or UMT5Config.
      names: "wan" or "diffusers", whose names the tensors have.
      tensors: by those names, without wrappers' prefixes.
      ignored: (tensor, why) that are not used.
      assumed: fields of config that nothing in the files says.
      contradictions: (field, text) where config.json and the tensors differ.
    """

    config: Any
    names: str
    tensors: Tensors
    ignored: tuple[tuple[str, str], ...] = ()
    assumed: tuple[str, ...] = ()
    contradictions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Component:
    """How a component is read and laid out.

    Attributes:
      read: (tensors, parsed config.json or None, where it is, Options) -> Reading.
      entries: (config, names) -> its table.
      abstract: config -> nested dict of shapes and dtypes.
      to_json, from_json: config to JSON values and back.
    """

    read: Callable[[Tensors, Mapping | None, str, Options], Reading]
    entries: Callable[[Any, str], list[Entry]]
    abstract: Callable[[Any], dict]
    to_json: Callable[[Any], dict]
    from_json: Callable[[Mapping], Any]


def read_json(path: Path) -> dict:
    """A JSON object from a file; ConversionError naming the file if it isn't one."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ConversionError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: not a JSON object")
    return value


def torch_shape(entry: Entry, stack_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor has there, from the parameter's shape here."""
    shape = stack_shape if entry.layer is None else stack_shape[1:]
    return entry.to_torch(np.broadcast_to(np.zeros((), np.int8), shape)).shape


# The DiT.


def _read_dit(tensors: Tensors, config: Mapping | None, where: str, options: Options) -> Reading:
    plain = without_wrappers(dict(tensors))
    names = "diffusers" if any(n.startswith("condition_embedder.") for n in plain) else "wan"
    official = wan_weights.official_name if names == "diffusers" else str
    shapes = {official(name): ref.shape for name, ref in plain.items()}
    seen = sizes.from_shapes(shapes)
    declared = {} if config is None else sizes.from_config_json(config, where)
    contradictions = tuple(
        (name, f"{declared[name]} in {where}, {seen[name]} by the tensors' shapes")
        for name in sorted(declared.keys() & seen.keys())
        if declared[name] != seen[name]
    )
    dit, assumed = sizes.complete(seen, declared, options.model, options.lact)
    return Reading(dit, names, plain, (), assumed, contradictions)


def _from_rows(rows: Iterable[wan_weights.Row], config: Any) -> list[Entry]:
    return [
        Entry(
            row.torch_name,
            row.path,
            row.layer,
            lambda x, row=row: row.layout.to_jax(x, config),
            lambda x, row=row: row.layout.to_torch(x, config),
            row.is_lact,
        )
        for row in rows
    ]


def _dit_entries(config: DiTConfig, names: str) -> list[Entry]:
    return _from_rows(wan_weights.rows(config, names), config)


# The VAE.

_VAE_KEYS = {
    "dim": "base_dim", "z_dim": "z_dim", "dim_mult": "dim_mult",
    "num_res_blocks": "num_res_blocks", "temporal_downsample": "temperal_downsample",
    "latent_mean": "latents_mean", "latent_std": "latents_std",
}  # fmt: skip
_VAE_FIXED = {"attn_scales": [], "is_residual": False, "patch_size": None}


def _read_vae(tensors: Tensors, config: Mapping | None, where: str, _: Options) -> Reading:
    if "quant_conv.weight" in tensors:
        if config is None:
            raise ConversionError("the VAE's config.json is missing beside its weights")
        wrong = [f"{k}={config[k]!r}" for k, v in _VAE_FIXED.items() if config.get(k, v) != v]
        if wrong:
            raise ConversionError(f"{where}: not the Wan2.1 VAE: {', '.join(wrong)}")
        fields = {ours: config[theirs] for ours, theirs in _VAE_KEYS.items() if theirs in config}
        return Reading(_vae_from_json(fields), "diffusers", tensors)
    needed = {"encoder.conv1.weight": "dim", "conv2.weight": "z_dim"}
    if missing := [name for name in needed if not tensors.get(name) or not tensors[name].shape]:
        raise ConversionError(f"not a Wan VAE: it has no {', '.join(missing)}")
    fields = {field: tensors[name].shape[0] for name, field in needed.items()}
    return Reading(_vae_from_json(fields), "wan", tensors)


def _vae_entries(config: VAEConfig, names: str) -> list[Entry]:
    transforms = vae_weights.TRANSFORMS
    return [
        Entry(
            getattr(row, names),
            tuple(row.jax.split("/")),
            None,
            transforms[row.transform].to_jax,
            transforms[row.transform].to_torch,
        )
        for row in vae_weights.rows(config)
    ]


def _vae_from_json(fields: Mapping) -> VAEConfig:
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        return VAEConfig(**lists)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"not a description of the Wan VAE: {error}") from error


def vae_to_diffusers_json(config: VAEConfig) -> dict:
    """The config.json with which diffusers' AutoencoderKLWan loads an exported VAE."""
    fields = _to_json(config)
    keys = {theirs: fields[ours] for ours, theirs in _VAE_KEYS.items()}
    return {"_class_name": "AutoencoderKLWan", **keys, "attn_scales": []}


# The text encoder.


def _read_text(tensors: Tensors, config: Mapping | None, where: str, _: Options) -> Reading:
    names = "diffusers" if any(n.startswith("encoder.") for n in tensors) else "wan"
    renamed, ignored = dict(tensors), []
    for alias, name in umt5_weights.ALIASES[names].items():
        if alias in renamed:
            ref = renamed.pop(alias)
            if renamed.setdefault(name, ref) is not ref:
                ignored.append((alias, f"the same as {name}"))
    if names == "diffusers":
        if config is None:
            raise ConversionError("the text encoder's config.json is missing beside its weights")
        try:
            umt5 = umt5_weights.config_from_transformers(config)
        except ValueError as error:
            raise ConversionError(f"{where}: {error}") from error
    else:
        umt5 = _umt5_from_shapes(renamed)
    return Reading(umt5, names, renamed, tuple(ignored))


def _umt5_from_shapes(tensors: Tensors) -> UMT5Config:
    needed = {
        "token_embedding.weight": ("vocab_size", "dim"),
        "blocks.0.attn.q.weight": ("dim_attn", None),
        "blocks.0.ffn.fc1.weight": ("dim_ffn", None),
        "blocks.0.pos_embedding.embedding.weight": ("num_buckets", "num_heads"),
    }
    if bad := [n for n in needed if n not in tensors or len(tensors[n].shape) != 2]:
        raise ConversionError(f"not Wan's UMT5 encoder: without {', '.join(bad)} its sizes "
                              "can't be told")  # fmt: skip
    fields = {
        field: size
        for name, names in needed.items()
        for field, size in zip(names, tensors[name].shape, strict=True)
        if field is not None
    }
    try:
        return UMT5Config(num_layers=sizes.count_layers(tensors), **fields)
    except ValueError as error:
        raise ConversionError(f"not Wan's UMT5 encoder: {error}") from error


def _text_entries(config: UMT5Config, names: str) -> list[Entry]:
    return _from_rows(umt5_weights.rows(config, names), config)


def _text_from_json(fields: Mapping) -> UMT5Config:
    try:
        return UMT5Config(**fields)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"not a description of the UMT5 encoder: {error}") from error


def _to_json(config: Any, without: Iterable[str] = ("dtype",)) -> dict:
    fields = dataclasses.asdict(config)
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in fields.items()
        if name not in without
    }


COMPONENTS: Mapping[str, Component] = {
    "dit": Component(_read_dit, _dit_entries, abstract_params, sizes.to_json, sizes.from_json),
    "vae": Component(
        _read_vae, _vae_entries, lambda c: abstract_vae(c)[1], _to_json, _vae_from_json
    ),
    "text": Component(
        _read_text,
        _text_entries,
        lambda c: abstract_umt5(c)[1],
        partial(_to_json, without=("param_dtype", "compute_dtype")),
        _text_from_json,
    ),
}


def flat(tree: dict) -> dict[ParamPath, Any]:
    """A nested dict's leaves by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(str(key.key) for key in path): leaf for path, leaf in leaves}
