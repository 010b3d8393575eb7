"""Eight simulated devices compute the loss and gradients that one does, and exchange what is meant.

The model of the meshes has two default layers in one stack; see sharded.py. The other meshes of
eight devices are in test_sharded_training.py.
"""

from collections import Counter

import pytest
import sharded

WEIGHTS = 2 * 48 * 48 + 48 * 6 * 48 + 7 * 48 + 16 * 48  # that belong to no layer, and are cut


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return sharded.run("meshes", tmp_path_factory.mktemp("meshes"))


@pytest.mark.parametrize("mesh", sharded.MESHES)
def test_the_default_layer_is_that_of_one_device(mesh, tables):
    table = tables[str(mesh)]
    assert table["loss"] < 1e-6 and table["by_chunk"] < 1e-6
    assert len(table["gradients"]) > 40
    assert max(table["gradients"].values()) < 1e-5, table["gradients"]
    assert {"tttx_norm", "fw_w0_norm", "window_x_norm"} <= table["stats"].keys()
    assert max(table["stats"].values()) < 1e-5, table["stats"]


@pytest.mark.parametrize("mesh", sharded.MESHES)
def test_what_devices_exchange_in_the_scan_over_layers(mesh, tables):
    seq, exchanged = mesh[2], 4 % mesh[2] == 0  # of four heads
    found = Counter(c["kind"] for c in tables[str(mesh)]["collectives"] if c["in_scan"])
    # Forward: eight projections, two of the MLP and three fast weights. Backward: again but for the
    # fast weights, whose states are kept. Keys and values where heads don't divide, of the chunks
    # that attend alone and of those that see the one before.
    parts = 2
    assert found.pop("all-gather") == 13 + 10 + (0 if exchanged else 2 * parts)
    assert found.pop("reduce-scatter") == 13 + (0 if exchanged else 2 * parts)
    # q, k, v there and o back, forward and backward.
    assert found.pop("all-to-all", 0) == (8 * parts if exchanged and seq > 1 else 0)
    # Both fast-weight gradients in one sum a chunk, forward and backward.
    assert found.pop("all-reduce", 0) == (2 if seq > 1 else 0)
    assert not found


@pytest.mark.parametrize("mesh", sharded.MESHES)
def test_no_parameter_of_a_layer_and_no_activation_is_exchanged_outside_the_scan(mesh, tables):
    data, fsdp, seq = mesh
    outside = [c for c in tables[str(mesh)]["collectives"] if not c["in_scan"]]
    assert {c["kind"] for c in outside} == {"all-gather", "reduce-scatter", "all-reduce"}
    # What is gathered outside: those parameters, and the tokens' velocity once (5 chunks of 32
    # tokens with 12 numbers each for a device's clips).
    velocity = 8 // (data * fsdp) * 8 * 32 * 12 if seq > 1 else 0
    for kind in ("all-gather", "reduce-scatter"):
        assert sum(c["bytes"] for c in outside if c["kind"] == kind) == 4 * (WEIGHTS + velocity)
    # What is summed: the gradients of each device's part over its copies, those of parameters that
    # are whole everywhere, and some numbers.
    cut = 4 * (WEIGHTS + 2 * (8 * 48 * 48 + 2 * 48 * 40 + 3 * 2 * 24 * 48)) // (fsdp * seq)
    summed = sum(c["bytes"] for c in outside if c["kind"] == "all-reduce")
    assert summed < (cut if data > 1 else 0) + 24_000
