"""Every option of the layer and every mixer: tokens cut over four devices against one device.

See sharded.py for the models and the meshes.
"""

import dataclasses

import numpy as np
import pytest
import sharded

from lact_jax.sharding import MeshConfig

CASES = [(name, mesh) for name, (_, meshes) in sharded.LAYERS.items() for mesh in meshes]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return sharded.run("layers", tmp_path_factory.mktemp("layers"))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """(errors by model, rollout)"""
    folder = tmp_path_factory.mktemp("sampling")
    return sharded.run("sampling", folder), np.load(folder / "rollout.npy")


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_loss_gradients_and_statistics_are_those_of_one_device(name, mesh, tables):
    table = tables[name][str(mesh)]
    assert table["loss"] < 1e-6 and table["by_chunk"] < 1e-6
    assert len(table["gradients"]) > 35
    assert max(table["gradients"].values()) < 1e-5, table["gradients"]
    assert max(table["stats"].values()) < 1e-5, table["stats"]


@pytest.mark.parametrize("name", sharded.LAYERS)
def test_a_chunk_after_committed_ones_is_that_of_one_device(name, sampled):
    errors, _ = sampled
    assert errors[name] < 1e-5


def test_a_rollout_is_that_of_one_device(sampled):
    _, rollout = sampled
    config = dataclasses.replace(sharded.ROLLOUT, mesh=MeshConfig())
    assert rollout.shape == (2, 6, 4, 4, 16)
    assert sharded.error(rollout, sharded.rollout(config)) < 1e-5
