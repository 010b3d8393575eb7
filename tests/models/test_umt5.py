"""The UMT5 encoder against the official golden case, and what it must not depend on."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from lact_jax.models.umt5 import (
    UMT5Config,
    UMT5Encoder,
    abstract_umt5,
    relative_position_buckets,
    umt5_encode,
)
from lact_jax.umt5_weights import rows
from lact_jax.wan_weights import get

GOLDEN = Path(__file__).parents[1] / "golden" / "umt5.safetensors"
SMALL = UMT5Config(
    vocab_size=50, dim=24, dim_attn=32, dim_ffn=40, num_heads=4, num_layers=2, num_buckets=16,
    max_distance=40,
)  # fmt: skip


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def random_params(cfg, seed=0):
    """Random weights, with norm scales away from 1 so that forgetting one shows."""
    rng = np.random.default_rng(seed)
    spread = {"kernel": 0.2, "embedding": 1.0, "scale": 0.3}

    def draw(path, x):
        noise = spread[path[-1].key] * rng.standard_normal(x.shape)
        return jnp.asarray(noise + (path[-1].key == "scale"), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_umt5(cfg)[1])


def random_batch(cfg, lengths, total, seed=1):
    rng = np.random.default_rng(seed)
    mask_BL = (np.arange(total)[None] < np.array(lengths)[:, None]).astype(np.int32)
    ids_BL = rng.integers(1, cfg.vocab_size, mask_BL.shape).astype(np.int32) * mask_BL
    return ids_BL, mask_BL


def load_golden():
    with safe_open(GOLDEN, "numpy") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    fields = {f.name for f in dataclasses.fields(UMT5Config)}
    cfg = UMT5Config(**{k: v for k, v in config.items() if k in fields})
    return cfg, tensors


def params_by_table(tensors, names, cfg):
    """Reads a torch state dict into the JAX tree through the key table, each tensor once."""
    left = dict(tensors)
    params = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), abstract_umt5(cfg)[1])
    for row in rows(cfg, names):
        array = get(params, row.path)
        layer = ... if row.layer is None else row.layer
        array[layer] = row.layout.to_jax(left.pop(row.torch_name), cfg)
    assert not left
    return params


def test_golden_case():
    cfg, tensors = load_golden()
    official = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    params = params_by_table(official, "wan", cfg)
    got = umt5_encode(
        cfg, params, tensors["in.ids"].astype(np.int32), tensors["in.mask"].astype(np.int32)
    )
    assert got.dtype == jnp.float32
    assert relative_error(got, tensors["out.embeds"]) <= 2e-6
    padding = tensors["in.mask"] == 0
    assert padding.any() and not np.asarray(got)[padding].any()


@pytest.mark.parametrize("names", ["wan", "diffusers"])
def test_table_covers_every_parameter_of_every_layer_once(names):
    table = rows(SMALL, names)
    assert len({row.torch_name for row in table}) == len(table)
    _, tree = abstract_umt5(SMALL)
    want = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        layers = range(leaf.shape[0]) if path[0].key == "blocks" else [None]
        want += [(tuple(key.key for key in path), layer) for layer in layers]
    assert sorted((row.path, row.layer) for row in table) == sorted(want)


@pytest.mark.usefixtures("float32_matmuls")
def test_scanned_layers_equal_a_loop_over_them():
    params = random_params(SMALL)
    ids_BL, mask_BL = random_batch(SMALL, [13, 9], 13)
    graphdef, _ = abstract_umt5(SMALL)
    model = nnx.merge(graphdef, params)
    block_def, stacked = nnx.split(model.blocks)
    buckets = jnp.asarray(relative_position_buckets(13, SMALL.num_buckets, SMALL.max_distance))
    mask = jnp.asarray(mask_BL, bool)

    @jax.jit
    def layer(x_BLD, i):
        block = nnx.merge(block_def, jax.tree.map(lambda x: x[i], stacked))
        return block(x_BLD, buckets, mask[:, None, None, :])

    x_BLD = model.token_embedding(jnp.asarray(ids_BL))
    for i in range(SMALL.num_layers):
        x_BLD = layer(x_BLD, i)
    want = np.asarray(model.norm(x_BLD)) * mask_BL[..., None]
    assert relative_error(umt5_encode(SMALL, params, ids_BL, mask_BL), want) <= 1e-6


def test_layers_start_different():
    state = jax.jit(lambda: nnx.state(UMT5Encoder(SMALL, rngs=nnx.Rngs(0))))()
    kernel = np.asarray(nnx.to_pure_dict(state)["blocks"]["attn"]["q"]["kernel"])
    assert kernel.shape == (2, 24, 32)
    assert relative_error(kernel[0], kernel[1]) > 0.5
    # Without attention scaling, q itself must start sqrt(head width) smaller.
    assert math.isclose(kernel.std() * math.sqrt(24 * 8), 1.0, rel_tol=0.1)


def test_batch_equals_single_runs_and_padding_changes_nothing():
    params = random_params(SMALL)
    lengths = [17, 1, 5]
    ids_BL, mask_BL = random_batch(SMALL, lengths, 24)
    batch = np.asarray(umt5_encode(SMALL, params, ids_BL, mask_BL))
    for row, length in enumerate(lengths):
        alone = umt5_encode(
            SMALL, params, ids_BL[row : row + 1, :length], mask_BL[row : row + 1, :length]
        )
        assert relative_error(batch[row, :length], alone[0]) <= 1e-6
        assert not batch[row, length:].any()
    # What stands in the padding must not matter either.
    other_ids = np.where(mask_BL == 1, ids_BL, 7)
    np.testing.assert_array_equal(umt5_encode(SMALL, params, other_ids, mask_BL), batch)


def test_order_and_distance_matter():
    params = random_params(SMALL)
    ids_BL = np.array([[3, 4, 5, 6, 7, 1]], np.int32)
    mask_BL = np.ones_like(ids_BL)
    straight = np.asarray(umt5_encode(SMALL, params, ids_BL, mask_BL))[0]
    swapped = np.asarray(umt5_encode(SMALL, params, ids_BL[:, ::-1].copy(), mask_BL))[0, ::-1]
    assert relative_error(swapped, straight) > 1e-2


def test_buckets():
    buckets = relative_position_buckets(300, 32, 128)
    assert buckets.dtype == np.int32
    from_first, to_first = buckets[0], buckets[:, 0]
    np.testing.assert_array_equal(from_first[1:8], 16 + np.arange(1, 8))
    np.testing.assert_array_equal(to_first[:8], np.arange(8))
    # Edges lie at 8 * sqrt(2)**k: 8, 11.3, 16, 22.6, 32, 45.3, 64, 90.5.
    edges = np.flatnonzero(np.diff(to_first[8:])) + 9
    np.testing.assert_array_equal(edges, [12, 16, 23, 32, 46, 64, 91])
    assert to_first[128] == to_first[299] == 15 and from_first[299] == 31
    np.testing.assert_array_equal(buckets[5:, 5:], buckets[:-5, :-5])


def test_id_outside_the_vocabulary_is_never_a_number():
    params = random_params(SMALL)
    ids_BL = np.array([[3, SMALL.vocab_size]], np.int32)
    assert np.isnan(umt5_encode(SMALL, params, ids_BL, np.ones_like(ids_BL))).any()


def test_bfloat16_holds_matrices_in_bfloat16_and_stays_close():
    cfg = dataclasses.replace(SMALL, param_dtype="bfloat16", compute_dtype="bfloat16")
    params = random_params(cfg)
    assert params["blocks"]["ffn"]["fc1"]["kernel"].dtype == jnp.bfloat16
    assert params["blocks"]["norm1"]["scale"].dtype == jnp.float32
    ids_BL, mask_BL = random_batch(cfg, [13, 7], 13)
    got = umt5_encode(cfg, params, ids_BL, mask_BL)
    float32 = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    want = umt5_encode(SMALL, float32, ids_BL, mask_BL)
    assert got.dtype == jnp.float32
    assert 1e-5 < relative_error(got, want) <= 2e-2


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_heads": 5}, "num_heads=5"),
        ({"num_buckets": 6}, "num_buckets=6"),
        ({"max_distance": 4}, "max_distance=4"),
    ],
)
def test_impossible_config_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **change)
