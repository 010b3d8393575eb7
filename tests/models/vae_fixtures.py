"""What the VAE's tests share: a small random VAE, pieces of time, errors."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from safetensors import safe_open

from lact_jax.models.vae import VAEConfig
from lact_jax.models.vae_codec import abstract_vae, random_params
from lact_jax.vae_weights import TRANSFORMS, rows

GOLDEN = Path(__file__).parents[1] / "golden" / "vae.safetensors"
TINY = VAEConfig(dim=4, dim_mult=(1, 2, 2, 2), num_res_blocks=1, dtype="float32")


def relative_error(got, want):
    """‖got − want‖ / ‖want‖ in float64; the shapes must be equal."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def random_array(seed, *shape):
    """Standard normal, float32."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def bind(params, config):
    """The two streaming steps, jitted, of a VAE with these parameters."""
    vae = nnx.merge(abstract_vae(config)[0], params)
    return jax.jit(vae.encode_chunk), jax.jit(vae.decode_chunk)


def read_golden():
    """(config, tensors by name) of the golden case."""
    with safe_open(GOLDEN, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        header = json.loads(file.metadata()["config"])
    sizes = {name: header[name] for name in ("dim", "z_dim", "num_res_blocks")}
    tuples = {name: tuple(header[name]) for name in ("dim_mult", "temporal_downsample")}
    return VAEConfig(**sizes, **tuples, dtype="float32"), tensors


def golden_params(config, tensors):
    """The golden case's weights, through the key table."""
    flat = {
        row.jax: jnp.asarray(TRANSFORMS[row.transform].to_jax(tensors[f"param.{row.wan}"]))
        for row in rows(config)
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def shifted_params():
    """Parameters of TINY, its biases and scales moved off 0 and 1."""
    flat, tree = jax.tree.flatten(random_params(TINY, 3))
    flat = [x + 0.1 * random_array(i, *x.shape) for i, x in enumerate(flat)]
    return jax.tree.unflatten(tree, flat)


def stream(step, x_BT, sizes):
    """Results of a step over pieces of these sizes on axis 1, joined."""
    assert sum(sizes) == x_BT.shape[1]
    carry, results = None, []
    for piece in jnp.split(x_BT, np.cumsum(sizes)[:-1], axis=1):
        carry, result = step(carry, piece)
        results.append(result)
    return jnp.concatenate(results, axis=1)
