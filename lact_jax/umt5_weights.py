"""Where every tensor of a UMT5 checkpoint goes in the JAX model: one table, both ways.

As `wan_weights`, with a row for each torch tensor, under the names of either world:
- "wan": the keys of Wan's `models_t5_umt5-xxl-enc-bf16.pth`;
- "diffusers": those of transformers' `UMT5EncoderModel`, the text_encoder/ of a diffusers folder.
"""

import dataclasses
from collections.abc import Mapping

from lact_jax.models.umt5 import UMT5Config
from lact_jax.wan_weights import SAME, TRANSPOSED, Entry, Row

MODEL_TABLE = (
    Entry("token_embedding.weight", "shared.weight", "token_embedding/embedding", SAME),
    Entry("norm.weight", "encoder.final_layer_norm.weight", "norm/scale", SAME),
)

# In every layer, under "blocks/" here, stacked along axis 0.
BLOCK_PREFIX = {"wan": "blocks.{}.", "diffusers": "encoder.block.{}.layer."}
_BIAS = "0.SelfAttention.relative_attention_bias.weight"
BLOCK_TABLE = (
    Entry("norm1.weight", "0.layer_norm.weight", "norm1/scale", SAME),
    Entry("attn.q.weight", "0.SelfAttention.q.weight", "attn/q/kernel", TRANSPOSED),
    Entry("attn.k.weight", "0.SelfAttention.k.weight", "attn/k/kernel", TRANSPOSED),
    Entry("attn.v.weight", "0.SelfAttention.v.weight", "attn/v/kernel", TRANSPOSED),
    Entry("attn.o.weight", "0.SelfAttention.o.weight", "attn/o/kernel", TRANSPOSED),
    Entry("pos_embedding.embedding.weight", _BIAS, "position_bias/embedding", SAME),
    Entry("norm2.weight", "1.layer_norm.weight", "norm2/scale", SAME),
    Entry("ffn.gate.0.weight", "1.DenseReluDense.wi_0.weight", "ffn/gate/kernel", TRANSPOSED),
    Entry("ffn.fc1.weight", "1.DenseReluDense.wi_1.weight", "ffn/fc1/kernel", TRANSPOSED),
    Entry("ffn.fc2.weight", "1.DenseReluDense.wo.weight", "ffn/fc2/kernel", TRANSPOSED),
)

# Second names under which a file may hold a tensor of the table: read either, write the table's.
ALIASES: Mapping[str, Mapping[str, str]] = {
    "wan": {},
    "diffusers": {"encoder.embed_tokens.weight": "shared.weight"},
}


def rows(config: UMT5Config, names: str = "wan") -> list[Row]:
    """The table for this model: every tensor under its "wan" or "diffusers" name."""
    table = [
        Row(getattr(entry, names), tuple(entry.path.split("/")), None, entry.layout)
        for entry in MODEL_TABLE
    ]
    for i in range(config.num_layers):
        for entry in BLOCK_TABLE:
            name = BLOCK_PREFIX[names].format(i) + getattr(entry, names)
            table.append(Row(name, ("blocks", *entry.path.split("/")), i, entry.layout))
    return table


_CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "dim": "d_model",
    "dim_ffn": "d_ff",
    "num_heads": "num_heads",
    "num_layers": "num_layers",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "eps": "layer_norm_epsilon",
}
_CONFIG_FIXED = {"architectures": ["UMT5EncoderModel"], "model_type": "umt5"}
_FEED_FORWARD = "gated-gelu"


def config_from_transformers(config: Mapping, **dtypes: str) -> UMT5Config:
    """UMT5Config of the config.json of a transformers folder.

    `dtypes` sets param_dtype and compute_dtype. Raises ValueError listing the keys that are
    missing or say something that this encoder isn't.
    """
    missing = [key for key in (*_CONFIG_KEYS.values(), "d_kv") if key not in config]
    if missing:
        raise ValueError(f"UMT5 config.json lacks {', '.join(missing)}")
    if config.get("feed_forward_proj", _FEED_FORWARD) != _FEED_FORWARD:
        raise ValueError(
            f"UMT5 config.json has feed_forward_proj={config['feed_forward_proj']!r}; only "
            f"{_FEED_FORWARD!r} is supported"
        )
    fields = {ours: config[theirs] for ours, theirs in _CONFIG_KEYS.items()}
    return UMT5Config(dim_attn=config["num_heads"] * config["d_kv"], **fields, **dtypes)


def config_to_transformers(cfg: UMT5Config) -> dict:
    """The config.json with which transformers' UMT5EncoderModel loads an exported encoder."""
    ours = dataclasses.asdict(cfg)
    return {
        **_CONFIG_FIXED,
        **{theirs: ours[name] for name, theirs in _CONFIG_KEYS.items()},
        "d_kv": cfg.dim_attn // cfg.num_heads,
        "feed_forward_proj": _FEED_FORWARD,
    }
