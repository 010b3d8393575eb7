"""A converted folder into parameters: other stackings, other meshes, other models."""

import dataclasses
import json
import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_fixtures import LACT, PLAIN, random_tensors, write_pt, write_wan

from lact_jax.convert import (
    Import,
    import_checkpoint,
    load_dit,
    load_text,
    load_vae,
    missing_parameters,
    parse_options,
    sizes,
)
from lact_jax.convert.components import flat
from lact_jax.convert.errors import ConversionError
from lact_jax.models.dit import abstract_params
from lact_jax.models.gla import GLAConfig
from lact_jax.wan_weights import params_to_torch, rows

MIXED = dataclasses.replace(PLAIN, mixer="lact", lact=(LACT,), attn_every_n_layers=2)


def silent(_):
    """A log that nobody reads."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A converted plain Wan and its tensors in float32."""
    root = tmp_path_factory.mktemp("plain")
    tensors = random_tensors("dit", PLAIN)
    import_checkpoint(Import(write_wan(root / "src", tensors), root / "out"), log=silent)
    return root / "out", {name: value.astype(np.float32) for name, value in tensors.items()}


def test_plain_wan_starts_a_model_of_mixed_layers(plain, caplog):
    """One stack in the file, two in the model: every layer finds its own, LaCT's are fresh."""
    folder, tensors = plain
    with caplog.at_level(logging.INFO):
        params = load_dit(folder, MIXED, key=jax.random.key(5))
    shapes = {path: (x.shape, x.dtype) for path, x in flat(abstract_params(MIXED)).items()}
    assert {path: (x.shape, x.dtype) for path, x in flat(params).items()} == shapes
    loaded = params_to_torch(params, MIXED)
    for name, value in tensors.items():
        np.testing.assert_array_equal(loaded[name], value)
    fresh = {"/".join(row.path) for row in rows(MIXED) if row.is_lact}
    assert set(missing_parameters(folder, MIXED)) == fresh
    assert all(name in caplog.text for name in fresh)
    assert missing_parameters(folder, PLAIN) == ()
    w0 = loaded["blocks.0.self_attn.w0"]
    again = load_dit(folder, MIXED, key=jax.random.key(5))
    np.testing.assert_array_equal(again["blocks"]["0"]["self_attn"]["w0"][0], w0)
    assert not np.array_equal(loaded["blocks.2.self_attn.w0"], w0)


def test_several_stacks_into_one(tmp_path):
    """A LaCT model with alternating layers, read as one whose layers are all LaCT's."""
    config = dataclasses.replace(PLAIN, mixer="lact", lact=(LACT,), attn_every_n_layers=2)
    tensors = random_tensors("dit", config, dtype=np.float32)
    write_pt(tmp_path / "src" / "model.pt", tensors)
    options = parse_options("num_heads=2", None)
    import_checkpoint(Import(tmp_path / "src", tmp_path / "out", options=options), log=silent)
    target = dataclasses.replace(config, attn_every_n_layers=0)
    loaded = params_to_torch(load_dit(tmp_path / "out", target), target)
    for name, value in tensors.items():
        np.testing.assert_array_equal(loaded[name], value)
    fresh = loaded["blocks.1.self_attn.w1"]
    assert abs(fresh.std() * np.sqrt(fresh.shape[-1]) - 1) < 0.1
    with pytest.raises(ConversionError, match=r"self_attn.w0: .* the model has none"):
        load_dit(tmp_path / "out", PLAIN)


def test_another_size_lists_every_difference(plain):
    folder, _ = plain
    other = dataclasses.replace(PLAIN, dim=12, ffn_dim=20, num_layers=6)
    with pytest.raises(ConversionError) as caught:
        load_dit(folder, other)
    for part in (
        "its DiT (dim 24, ffn_dim 40, num_heads 2, num_layers 4, full)",
        "the config's (dim 12, ffn_dim 20, num_heads 2, num_layers 6, full)",
        "blocks.{0-3}.ffn.0.weight: (24, 40) in the file, (12, 20) asked for",
        "blocks.{4-5}.ffn.0.weight: not in the file",
        "head.modulation: (2, 24) in the file, (2, 12) asked for",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConversionError, match="model.num_heads: 2 in the file, 4 asked for"):
        load_dit(folder, dataclasses.replace(PLAIN, num_heads=4))


def test_another_mixer_lists_what_no_checkpoint_has(plain):
    folder, _ = plain
    with pytest.raises(ConversionError, match="blocks/0/self_attn/decay_.*mixer 'gla' has it"):
        load_dit(folder, dataclasses.replace(PLAIN, mixer="gla", lact=(LACT,)))


def test_a_model_is_the_same_after_its_description():
    model = dataclasses.replace(
        PLAIN, mixer="gla", lact=(LACT, LACT), gla=GLAConfig(gate_rank=3), remat="full"
    )
    described = json.loads(json.dumps(sizes.to_json(model)))
    assert sizes.from_json(described) == dataclasses.replace(model, dtype="bfloat16")
    del described["gla"]  # as written before there was one
    assert sizes.from_json(described).gla == GLAConfig()


def test_an_assumed_size_is_no_difference(tmp_path):
    write_pt(tmp_path / "src" / "model.pt", random_tensors("dit", PLAIN))
    options = parse_options("num_heads=2", None)
    import_checkpoint(Import(tmp_path / "src", tmp_path / "out", options=options), log=silent)
    assert missing_parameters(tmp_path / "out", dataclasses.replace(PLAIN, eps=1e-5)) == ()


def test_folders_that_hold_something_else(plain, tmp_path):
    folder, _ = plain
    with pytest.raises(FileNotFoundError, match="not a converted checkpoint"):
        load_dit(tmp_path, PLAIN)
    with pytest.raises(ConversionError, match="holds dit and no vae: convert again"):
        load_vae(folder)
    with pytest.raises(ConversionError, match="holds dit and no text: convert again"):
        load_text(folder)
    (tmp_path / "manifest.json").write_text('{"written_by": "someone else"}')
    with pytest.raises(ConversionError, match="manifest.json: not written by this version"):
        load_dit(tmp_path, PLAIN)


@pytest.mark.parametrize("damage", ["data", "metadata"])
def test_damaged_checkpoint_is_named(tmp_path, damage):
    write_wan(tmp_path / "src", random_tensors("dit", PLAIN))
    import_checkpoint(Import(tmp_path / "src", tmp_path / "out"), log=silent)
    files = {
        "data": (tmp_path / "out" / "dit" / "ocdbt.process_0" / "d").iterdir(),
        "metadata": [tmp_path / "out" / "dit" / "_METADATA"],
    }
    for file in files[damage]:
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ConversionError, match=r"out/dit: not a complete Orbax checkpoint"):
        load_dit(tmp_path / "out", PLAIN)


def test_shardings_must_be_like_the_parameters(plain):
    folder, _ = plain
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: one, abstract_params(PLAIN))
    del shardings["head"]["modulation"]
    with pytest.raises(ValueError, match="head/modulation"):
        load_dit(folder, PLAIN, shardings)


IN_A_MESH = """
import sys
import jax, numpy as np
from test_convert_load import LACT_MODEL, TWO_STACKS
from lact_jax.convert import load_dit
from lact_jax.models.dit import abstract_params
from lact_jax.sharding import MeshConfig, make_mesh, state_shardings
from lact_jax.wan_weights import params_to_torch

want = np.load(sys.argv[2])
mesh = make_mesh(MeshConfig(data=2, fsdp=2, seq=2))
for config in (LACT_MODEL, TWO_STACKS):
    abstract = abstract_params(config)
    shardings = state_shardings(mesh, abstract, abstract)
    params = load_dit(sys.argv[1], config, shardings)
    jax.tree.map(lambda x, s: x.sharding == s or sys.exit(f"{x.sharding}"), params, shardings)
    cut = params["blocks"]["0"]["ffn"]["fc1"]["kernel"].addressable_shards
    assert len(cut) == 8 and cut[0].data.shape[-1] == config.ffn_dim // 4
    loaded = params_to_torch(params, config)
    for name in want:
        np.testing.assert_array_equal(loaded[name], want[name])
print("equal")
"""
LACT_MODEL = dataclasses.replace(PLAIN, mixer="lact", lact=(LACT,))
TWO_STACKS = dataclasses.replace(LACT_MODEL, lact=(LACT, dataclasses.replace(LACT, muon=True)))


def test_restores_into_a_mesh(tmp_path):
    """On eight devices, in a process of its own, since the device count is fixed at the start."""
    tensors = random_tensors("dit", LACT_MODEL, dtype=np.float32)
    write_pt(tmp_path / "src" / "model.pt", tensors)
    np.savez(tmp_path / "tensors.npz", **tensors)
    options = parse_options("num_heads=2", None)
    import_checkpoint(Import(tmp_path / "src", tmp_path / "out", options=options), log=silent)
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
        PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)]),
    )
    run = subprocess.run(
        [sys.executable, "-c", IN_A_MESH, tmp_path / "out", tmp_path / "tensors.npz"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0 and run.stdout.strip() == "equal", run.stderr[-2000:]


def test_dtype_is_what_is_asked_for(plain):
    folder, tensors = plain
    params = load_dit(folder, PLAIN, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(
        np.asarray(params["patch_embedding"]["bias"], np.float32), tensors["patch_embedding.bias"]
    )
