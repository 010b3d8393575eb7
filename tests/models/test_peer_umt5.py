"""The UMT5 encoder and its key table against transformers' UMT5EncoderModel."""

import jax
import numpy as np
import pytest
import torch
from transformers import UMT5Config as PeerConfig
from transformers import UMT5EncoderModel
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from lact_jax.models.umt5 import (
    UMT5Config,
    abstract_umt5,
    relative_position_buckets,
    umt5_encode,
)
from lact_jax.umt5_weights import ALIASES, config_from_transformers, config_to_transformers, rows
from lact_jax.wan_weights import get

CONFIG = UMT5Config(
    vocab_size=60, dim=40, dim_attn=32, dim_ffn=56, num_heads=4, num_layers=3, num_buckets=16,
    max_distance=24, eps=1e-5,
)  # fmt: skip


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def random_peer(seed=0):
    torch.manual_seed(seed)
    peer = UMT5EncoderModel(PeerConfig(**config_to_transformers(CONFIG))).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "layer_norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return peer


def batch(seed=1):
    rng = np.random.default_rng(seed)
    mask_BL = (np.arange(40)[None] < np.array([40, 23, 1])[:, None]).astype(np.int32)
    return rng.integers(1, CONFIG.vocab_size, mask_BL.shape).astype(np.int32) * mask_BL, mask_BL


def peer_forward(peer, ids_BL, mask_BL):
    with torch.no_grad():
        out = peer(torch.tensor(ids_BL, dtype=torch.long), torch.tensor(mask_BL))
    return out.last_hidden_state.numpy() * mask_BL[..., None]


def test_weights_in_forward_equal():
    peer = random_peer()
    state = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    for alias, name in ALIASES["diffusers"].items():
        np.testing.assert_array_equal(state.pop(alias, state[name]), state[name])
    params = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), abstract_umt5(CONFIG)[1])
    for row in rows(CONFIG, "diffusers"):
        array = get(params, row.path)
        layer = ... if row.layer is None else row.layer
        array[layer] = row.layout.to_jax(state.pop(row.torch_name), CONFIG)
    assert not state
    got = umt5_encode(CONFIG, params, *batch())
    assert relative_error(got, peer_forward(peer, *batch())) <= 2e-6


def test_weights_out_load_strictly_and_forward_equal():
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: (0.2 * rng.standard_normal(x.shape)).astype(x.dtype), abstract_umt5(CONFIG)[1]
    )
    state = {}
    for row in rows(CONFIG, "diffusers"):
        array = get(params, row.path)
        value = array if row.layer is None else array[row.layer]
        state[row.torch_name] = torch.tensor(row.layout.to_torch(value, CONFIG).copy())
    for alias, name in ALIASES["diffusers"].items():
        state[alias] = state[name]
    peer = random_peer(seed=4)
    peer.load_state_dict(state, strict=True)
    got = umt5_encode(CONFIG, params, *batch())
    assert relative_error(got, peer_forward(peer, *batch())) <= 2e-6


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (16, 24), (8, 20), (64, 1000)])
def test_buckets_equal_at_every_distance(num_buckets, max_distance):
    config = PeerConfig(
        relative_attention_num_buckets=num_buckets, relative_attention_max_distance=max_distance
    )
    attention = UMT5Attention(config, has_relative_attention_bias=True)
    position = torch.arange(600)
    want = attention._relative_position_bucket(position[None, :] - position[:, None]).numpy()
    got = relative_position_buckets(600, num_buckets, max_distance)
    np.testing.assert_array_equal(got, want)


def test_xxl_has_the_parameters_of_the_real_one():
    with torch.device("meta"):
        peer = UMT5EncoderModel(PeerConfig(**config_to_transformers(UMT5Config())))
    shapes = {name: tuple(parameter.shape) for name, parameter in peer.named_parameters()}
    _, abstract = abstract_umt5(UMT5Config())
    assert sum(x.size for x in jax.tree.leaves(abstract)) == peer.num_parameters() == 5_680_910_336
    for row in rows(UMT5Config(), "diffusers"):
        shape = get(abstract, row.path).shape[0 if row.layer is None else 1 :]
        assert shapes.pop(row.torch_name) == row.layout.to_torch(np.empty(shape, "b"), None).shape
    assert not shapes


def test_config_survives_the_round_trip():
    assert config_from_transformers(config_to_transformers(CONFIG)) == CONFIG
    peer = PeerConfig(**config_to_transformers(CONFIG)).to_dict()
    assert config_from_transformers(peer, param_dtype="bfloat16").param_dtype == "bfloat16"


def test_other_encoders_are_refused_by_key():
    with pytest.raises(ValueError, match="feed_forward_proj='relu'"):
        config_from_transformers({**config_to_transformers(CONFIG), "feed_forward_proj": "relu"})
    with pytest.raises(ValueError, match="lacks d_model, d_kv"):
        known = config_to_transformers(CONFIG)
        config_from_transformers({k: v for k, v in known.items() if k not in ("d_model", "d_kv")})
