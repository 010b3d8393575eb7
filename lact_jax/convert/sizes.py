"""A DiT's sizes and LaCT options: from config.json, from the tensors' shapes, to and from JSON."""

import ast
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lact_jax.convert.errors import ConversionError
from lact_jax.models.dit import DiTConfig
from lact_jax.models.gla import GLAConfig
from lact_jax.models.lact import LaCTConfig

Shapes = Mapping[str, tuple[int, ...]]

# What neither a checkpoint's tensors nor its sizes decide.
_RUN_FIELDS = ("remat", "dtype")
# What shapes don't show: where config.json doesn't say it either, it is assumed.
_UNSEEN = ("num_heads", "eps", "text_len")
_WAN_HEAD_DIM = 128

_OFFICIAL_KEYS = {
    "dim": "dim", "ffn_dim": "ffn_dim", "num_heads": "num_heads", "num_layers": "num_layers",
    "freq_dim": "freq_dim", "text_dim": "text_dim", "text_len": "text_len",
    "in_dim": "latent_channels", "patch_size": "patch_size", "eps": "eps",
}  # fmt: skip
_DIFFUSERS_KEYS = {
    "num_attention_heads": "num_heads", "ffn_dim": "ffn_dim", "num_layers": "num_layers",
    "freq_dim": "freq_dim", "text_dim": "text_dim", "in_channels": "latent_channels",
    "patch_size": "patch_size", "eps": "eps",
}  # fmt: skip
# Keys that may be absent, and the only values that this model has for them.
_OFFICIAL_FIXED = {"model_type": "t2v", "qk_norm": True, "cross_attn_norm": True}
_DIFFUSERS_FIXED = {
    "image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads", "cross_attn_norm": True,
}  # fmt: skip


def from_config_json(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """DiTConfig fields that an official or a diffusers config.json sets.

    Raises ConversionError listing the keys that say something this model isn't.
    """
    diffusers = "num_attention_heads" in config
    keys = _DIFFUSERS_KEYS if diffusers else _OFFICIAL_KEYS
    fixed = _DIFFUSERS_FIXED if diffusers else _OFFICIAL_FIXED
    ours, theirs = ("in_channels", "out_channels") if diffusers else ("in_dim", "out_dim")
    fixed = {**fixed, theirs: config.get(ours)} if ours in config else fixed
    if wrong := [f"{k}={config[k]!r} (need {v!r})" for k, v in fixed.items()
                 if config.get(k, v) != v]:  # fmt: skip
        raise ConversionError(f"{where}: not a Wan2.1 text-to-video model: {', '.join(wrong)}")
    fields = {field: config[key] for key, field in keys.items() if key in config}
    if "patch_size" in fields:
        fields["patch_size"] = tuple(fields["patch_size"])
    if diffusers and "attention_head_dim" in config:
        fields["dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    return fields


def to_official_json(config: DiTConfig) -> dict[str, Any]:
    """The config.json with which the official WanModel loads the exported weights."""
    values = {key: getattr(config, field) for key, field in _OFFICIAL_KEYS.items()}
    # The official class keeps these two out of its config.json; they are defaults in real models.
    for key in ("patch_size", "text_dim"):
        if values[key] == getattr(DiTConfig(), _OFFICIAL_KEYS[key]):
            del values[key]
    values["out_dim"] = config.latent_channels
    return {"_class_name": "WanModel", "model_type": "t2v", **values}


def to_diffusers_json(config: DiTConfig) -> dict[str, Any]:
    """The config.json with which diffusers' WanTransformer3DModel loads the exported weights."""
    return {
        "_class_name": "WanTransformer3DModel",
        **{key: getattr(config, field) for key, field in _DIFFUSERS_KEYS.items()},
        "attention_head_dim": config.dim // config.num_heads,
        "out_channels": config.latent_channels,
        "rope_max_seq_len": 1024,
        **_DIFFUSERS_FIXED,
    }


def from_shapes(shapes: Shapes) -> dict[str, Any]:
    """DiTConfig fields that the tensors' shapes show, by official names; LaCT options with them.

    Raises ConversionError naming the tensors without which nothing can be said.
    """
    needed = ("patch_embedding.weight", "blocks.0.ffn.0.weight", "time_embedding.0.weight",
              "text_embedding.0.weight")  # fmt: skip
    ranks = (5, 2, 2, 2)
    if bad := [n for n, rank in zip(needed, ranks, strict=True) if len(shapes.get(n, ())) != rank]:
        raise ConversionError(f"not a Wan DiT: without {', '.join(bad)} its sizes can't be told")
    patch, ffn, time, text = (shapes[name] for name in needed)
    num_layers = count_layers(shapes)
    return {
        "dim": patch[0],
        "latent_channels": patch[1],
        "patch_size": patch[2:],
        "ffn_dim": ffn[0],
        "freq_dim": time[1],
        "text_dim": text[1],
        "num_layers": num_layers,
        **_lact_from_shapes(shapes, num_layers),
    }


def count_layers(names: Iterable[str]) -> int:
    """One more than the largest i of names "blocks.<i>.…"."""
    found = [re.match(r"blocks\.(\d+)\.", name) for name in names]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _lact_from_shapes(shapes: Shapes, num_layers: int) -> dict[str, Any]:
    layers = [_layer_options(shapes, f"blocks.{i}.self_attn") for i in range(num_layers)]
    lact = [i for i, options in enumerate(layers) if options is not None]
    if not lact:
        return {"mixer": "full", "attn_every_n_layers": 0}
    # Layer i is full attention where (i + 1) % every == 0. Any other pattern is left to the
    # comparison of all tensors, which says what is missing.
    every = layers.index(None) + 1 if None in layers else 0
    cycle = next(
        n for n in range(1, num_layers + 1)
        if all(layers[i] == layers[j] for i in lact for j in lact if i % n == j % n)
    )  # fmt: skip
    options = [next((layers[i] for i in lact if i % cycle == k), None) for k in range(cycle)]
    filled = tuple(o or layers[lact[0]] for o in options)
    return {"mixer": "lact", "attn_every_n_layers": every, "lact": filled}


def _layer_options(shapes: Shapes, prefix: str) -> LaCTConfig | None:
    w0 = shapes.get(f"{prefix}.w0", ())
    if len(w0) != 3 or 0 in w0:
        return None
    _, hidden, head_dim = w0
    inter_multi = hidden / head_dim
    if int(inter_multi * head_dim) < hidden:  # the quotient was rounded down
        inter_multi = math.nextafter(inter_multi, math.inf)
    return LaCTConfig(
        fw_head_dim=head_dim,
        inter_multi=inter_multi,
        momentum=f"{prefix}.momentum_proj.0.weight" in shapes,
        o_norm=f"{prefix}.output_norm.weight" in shapes,
        learnable_ttt_scale=f"{prefix}.ttt_scale_proj.weight" in shapes,
    )


def complete(
    seen: Mapping[str, Any],
    declared: Mapping[str, Any],
    model_options: Mapping[str, Any],
    lact_options: Mapping[str, Any] | None,
) -> tuple[DiTConfig, tuple[str, ...]]:
    """The config, and the fields that are assumed because nothing says them.

    Later sources win: what the shapes show, what config.json declares, what the user sets.
    `lact_options` are set in every LaCT layer; not None makes all layers of a plain model LaCT's.

    Raises ConversionError for sizes that don't fit together.
    """
    fields = {**seen, **declared, **model_options}
    assumed = tuple(name for name in _UNSEEN if name not in {**declared, **model_options})
    if "num_heads" not in fields:
        if fields["dim"] % _WAN_HEAD_DIM:
            raise ConversionError(
                f"dim={fields['dim']} is not a multiple of Wan's head width {_WAN_HEAD_DIM}, and "
                "no config.json says num_heads: give --model=num_heads=N"
            )
        fields["num_heads"] = fields["dim"] // _WAN_HEAD_DIM
    if lact_options is not None:
        fields["mixer"] = "lact"
        layers = fields.get("lact", (LaCTConfig(),))
        fields["lact"] = tuple(dataclasses.replace(x, **lact_options) for x in layers)
    try:
        return DiTConfig(**fields), assumed
    except ValueError as error:
        raise ConversionError(f"these sizes don't fit together: {error}") from error


def parse_fields(text: str, cls: type, flag: str) -> dict[str, Any]:
    """Fields of a dataclass from "a=1,b=true". Raises ConversionError naming what is wrong."""
    known = {f.name for f in dataclasses.fields(cls)}
    words = {"true": True, "false": False, "none": None}
    options = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (x.strip() for x in item.partition("="))
        if not equals or name not in known:
            raise ConversionError(f"{flag}: {item!r} is not NAME=VALUE with one of {sorted(known)}")
        try:
            options[name] = words[value] if value in words else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def to_json(config: DiTConfig) -> dict[str, Any]:
    """The config as JSON values, without what a run decides (remat, dtype)."""
    fields = dataclasses.asdict(config)
    return {
        **{name: value for name, value in fields.items() if name not in _RUN_FIELDS},
        "patch_size": list(config.patch_size),
        "lact": list(fields["lact"]),
    }


def from_json(fields: Mapping[str, Any]) -> DiTConfig:
    """The inverse of `to_json`. Raises ConversionError for anything else."""
    try:
        parts = {
            "patch_size": tuple(fields["patch_size"]),
            "lact": tuple(LaCTConfig(**options) for options in fields["lact"]),
            "gla": GLAConfig(**fields.get("gla", {})),
        }
        return DiTConfig(**{**fields, **parts})
    except (TypeError, KeyError, ValueError) as error:
        raise ConversionError(f"not a model's description: {error}") from error
