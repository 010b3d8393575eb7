"""Every option of the layer and every mixer: tokens cut over four devices against one device.

See sharded.py for the models and the meshes.
"""

import dataclasses

import numpy as np
import pytest
import sharded

from lact_jax.sharding import MeshConfig


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """(table by model, rollout)"""
    folder = tmp_path_factory.mktemp("layers")
    return sharded.run("layers", folder), np.load(folder / "rollout.npy")


@pytest.mark.parametrize("mesh", sharded.LAYER_MESHES)
@pytest.mark.parametrize("name", sharded.LAYERS)
def test_loss_gradients_and_statistics_are_those_of_one_device(name, mesh, computed):
    table = computed[0][name][str(mesh)]
    assert table["loss"] < 1e-6 and table["by_chunk"] < 1e-6
    assert len(table["gradients"]) > 35
    assert max(table["gradients"].values()) < 1e-5, table["gradients"]
    assert max(table["stats"].values()) < 1e-5, table["stats"]


@pytest.mark.parametrize("name", sharded.LAYERS)
def test_a_chunk_after_committed_ones_is_that_of_one_device(name, computed):
    assert computed[0][name]["velocity"] < 1e-5


@pytest.mark.usefixtures("quick_compile")
def test_a_rollout_is_that_of_one_device(computed):
    _, rollout = computed
    config = dataclasses.replace(sharded.ROLLOUT, mesh=MeshConfig())
    assert rollout.shape == (2, 6, 4, 4, 16)
    assert sharded.error(rollout, sharded.rollout(config)) < 1e-5
