"""A checkpoint written by eight devices goes on on other meshes as one device would have."""

import pytest
import sharded

MESHES = [(1, 1, 1), (1, 8, 1), (2, 2, 2), (8, 1, 1)]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return sharded.run("training", tmp_path_factory.mktemp("training"))


@pytest.mark.parametrize("mesh", MESHES)
def test_training_goes_on_with_the_losses_of_one_device(mesh, tables):
    table = tables[str(mesh)]
    assert table["same"] is True  # every bit of the state, restored
    assert table["metrics"] < 1e-6
    assert table["state"].keys() == {"params", "ema", "moments"}
    assert max(table["state"].values()) < 1e-5, table["state"]


@pytest.mark.parametrize("mesh", MESHES)
def test_moments_are_cut_over_fsdp_and_seq(mesh, tables):
    _, fsdp, seq = mesh
    assert tables[str(mesh)]["part"] == [2, 24 // (fsdp * seq), 24]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_gathers_parameters_in_the_scan_over_layers(mesh, tables):
    found = tables[str(mesh)]["collectives"]
    cut = mesh[1] * mesh[2] > 1
    # Five parameters belong to no layer.
    outside = [c for c in found if c["kind"] == "all-gather" and not c["in_scan"]]
    assert len(outside) == (5 if cut else 0)
    inside = {c["kind"] for c in found if c["in_scan"]}
    assert inside == {
        (1, 1, 1): set(),
        (1, 8, 1): {"all-gather", "reduce-scatter"},
        (2, 2, 2): {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"},
        (8, 1, 1): set(),
    }[mesh]
    # Where a batch is taken in parts, its latents and texts are dealt anew, once.
    dealt = [c for c in found if c["kind"] in ("all-to-all", "collective-permute")]
    dealt = [c for c in dealt if not c["in_scan"]]
    assert all(c["source"].endswith("step_fn)/reshape") for c in dealt)
    assert sum(c["bytes"] for c in dealt) <= (4 * 8 * (6 * 4 * 4 * 16 + 4 * 8) if dealt else 0)
    assert bool(dealt) == (mesh == (2, 2, 2))
