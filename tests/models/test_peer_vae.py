"""diffusers' AutoencoderKLWan on small random weights: through the key table, equal, and back."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from flax import traverse_util
from vae_fixtures import TINY, bind, random_array, relative_error

from lact_jax.models.vae import VAEConfig
from lact_jax.models.vae_codec import abstract_vae, check_params
from lact_jax.vae_weights import TRANSFORMS, rows

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIGS = {
    "wan": dataclasses.replace(TINY, dim_mult=(1, 2, 4, 4)),
    "other": dataclasses.replace(
        TINY,
        dim=6,
        z_dim=3,
        dim_mult=(2, 1, 2, 3),
        temporal_downsample=(True, False, True),
        latent_mean=(0.5, -0.25, 0.125),
        latent_std=(2.0, 0.5, 1.5),
    ),
}


def peer_kwargs(config):
    return dict(
        base_dim=config.dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
        latents_mean=list(config.latent_mean),
        latents_std=list(config.latent_std),
    )


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """(config, peer, our parameters): every parameter of the peer random, biases and scales too."""
    config = CONFIGS[request.param]
    torch.manual_seed(0)
    peer = AutoencoderKLWan(**peer_kwargs(config)).eval()
    with torch.no_grad():
        for tensor in peer.parameters():
            tensor += 0.05 * torch.randn_like(tensor)
        peer.decoder.conv_out.weight *= 0.1  # the peer clamps to [-1, 1]: stay inside
    state = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    table = rows(config)
    assert {row.diffusers for row in table} == state.keys()
    flat = {row.jax: TRANSFORMS[row.transform].to_jax(state[row.diffusers]) for row in table}
    params = traverse_util.unflatten_dict(flat, sep="/")
    check_params(params, config)
    return config, peer, jax.tree.map(jax.numpy.asarray, params)


def to_torch(x_BTHWC):
    return torch.from_numpy(np.array(np.moveaxis(x_BTHWC, -1, 1)))


def from_torch(x_BCTHW):
    return np.moveaxis(x_BCTHW.numpy(), 1, -1)


def test_encoding_equals_the_peer(pair):
    config, peer, params = pair
    video = random_array(1, 2, 9, 16, 24, 3)
    with torch.no_grad():
        mean_BFhwC = from_torch(peer.encode(to_torch(video)).latent_dist.mode())
    want = (mean_BFhwC - np.array(config.latent_mean)) / np.array(config.latent_std)
    assert relative_error(bind(params, config)[0](None, video)[1], want) < 1e-5


def test_decoding_equals_the_peer(pair):
    config, peer, params = pair
    latent = random_array(2, 2, 3, 2, 3, config.z_dim)
    z = latent * np.array(config.latent_std) + np.array(config.latent_mean)
    with torch.no_grad():
        want = from_torch(peer.decode(to_torch(z).float()).sample)
    assert np.abs(want).max() < 1
    assert relative_error(bind(params, config)[1](None, latent)[1], want) < 1e-5


def test_the_table_in_reverse_loads_into_the_peer(pair):
    config, peer, params = pair
    flat = traverse_util.flatten_dict(params, sep="/")
    state = {
        row.diffusers: torch.from_numpy(
            np.array(TRANSFORMS[row.transform].to_torch(np.asarray(flat[row.jax])))
        )
        for row in rows(config)
    }
    fresh = AutoencoderKLWan(**peer_kwargs(config))
    fresh.load_state_dict(state, strict=True)
    for name, tensor in peer.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_full_size_names_shapes_and_count_are_the_peers():
    with torch.device("meta"):
        peer = AutoencoderKLWan()
    state = peer.state_dict()
    config = VAEConfig()
    assert list(config.latent_mean) == peer.config.latents_mean
    assert list(config.latent_std) == peer.config.latents_std
    flat = traverse_util.flatten_dict(abstract_vae(config)[1], sep="/")
    table = {row.diffusers: row for row in rows(config)}
    assert table.keys() == state.keys() and {row.jax for row in table.values()} == flat.keys()
    for name, tensor in state.items():
        row = table[name]
        empty = np.broadcast_to(np.float32(0), tuple(tensor.shape))
        assert TRANSFORMS[row.transform].to_jax(empty).shape == flat[row.jax].shape, name
    assert sum(leaf.size for leaf in flat.values()) == sum(t.numel() for t in state.values())
