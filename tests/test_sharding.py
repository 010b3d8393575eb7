"""The sharding table against every config's parameters, and meshes that can not be made."""

import importlib
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from run_fixtures import tiny_config

from lact_jax import sharding
from lact_jax.config import parse
from lact_jax.models.dit import DiTConfig, abstract_params
from lact_jax.models.lact import LaCTConfig
from lact_jax.sharding import (
    AXES,
    MeshConfig,
    make_mesh,
    on_mesh,
    parameter_spec,
    spec_for,
    state_shardings,
)
from lact_jax.train_state import init_state

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(f.stem for f in (ROOT / "configs").glob("*.py") if not f.stem.startswith("_"))
SMALL = dict(dim=24, ffn_dim=32, num_heads=2, num_layers=4, freq_dim=8, text_dim=8, text_len=4)
MODELS = {name: None for name in CONFIGS} | {
    "every option": DiTConfig(
        **SMALL, attn_every_n_layers=2, lact=(LaCTConfig(fw_head_dim=12, momentum=True),)
    ),
    "full attention": DiTConfig(**SMALL, mixer="full"),
    "window": DiTConfig(**SMALL, mixer="window"),
    "gated linear": DiTConfig(**SMALL, mixer="gla"),
}


def keys_of(path) -> tuple[str, ...]:
    return tuple(entry.key for entry in path)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_matches_one_row_of_its_rank(name):
    model = MODELS[name] or parse(importlib.import_module(f"configs.{name}").get_config()).model
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model))
    cut = 0
    for path, leaf in leaves:
        keys = keys_of(path)
        assert sum(keys[-len(row) :] == row for row in sharding.TABLE) == 1, keys
        spec = spec_for(keys, leaf.ndim)
        assert len(spec) in (0, leaf.ndim)
        cut += leaf.size if any(spec) else 0
        if keys[0] == "blocks":  # layers are never cut: scan walks along them
            assert not spec or spec[0] is None
    least = 0.95 if model.dim > 100 else 0.75
    assert cut > least * sum(leaf.size for _, leaf in leaves)


def test_every_row_has_a_parameter():
    names = [
        keys_of(path)
        for model in (MODELS["every option"], MODELS["gated linear"])
        for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(model))
    ]
    assert all(any(n[-len(row) :] == row for n in names) for row in sharding.TABLE)


@pytest.mark.parametrize(
    ("keys", "ndim", "message"),
    [
        (("blocks", "0", "self_attn", "w3"), 4, r"self_attn\.w3 must match one row.* none"),
        (("blocks", "0", "self_attn", "w0"), 3, r"self_attn\.w0 has 3 axes, its row 3"),
        (("time_projection", "kernel"), 3, r"time_projection\.kernel has 3 axes, its row 2"),
    ],
)
def test_a_parameter_that_does_not_fit_the_table_is_named(keys, ndim, message):
    with pytest.raises(ValueError, match=message):
        spec_for(keys, ndim)


def test_a_parameter_that_matches_two_rows_is_named_with_both(monkeypatch):
    monkeypatch.setitem(sharding.TABLE, ("self_attn", "q", "kernel"), (None, None))
    with pytest.raises(ValueError, match=r"matches \['q\.kernel', 'self_attn\.q\.kernel'\]"):
        spec_for(("blocks", "0", "self_attn", "q", "kernel"), 3)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=-1, fsdp=-1), "one of them may be -1"),
        (MeshConfig(data=0), "sizes are positive"),
        (MeshConfig(data=3, fsdp=2), r"\(3, 2, 1\) needs 6 of 8 devices"),
        (MeshConfig(data=-1, fsdp=3), r"\(-1, 3, 1\) does not divide 8 devices"),
        (MeshConfig(data=1, seq=-1, fsdp=5), r"\(1, 5, -1\) does not divide 8 devices"),
    ],
)
def test_meshes_that_can_not_be_made(mesh, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(mesh, devices=jax.devices()[:1] * 8)


def test_one_device_gives_a_mesh_of_one():
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    assert mesh.axis_names == AXES and dict(mesh.shape) == {"data": 1, "fsdp": 1, "seq": 1}


@pytest.mark.parametrize(
    ("shape", "size", "entry"),
    [
        ((8, 1, 1), 48, None),
        ((1, 4, 2), 48, ("fsdp", "seq")),
        ((1, 2, 4), 12, "seq"),  # 8 does not divide it: over the larger of the two
        ((1, 4, 2), 6, "seq"),
        ((1, 4, 2), 9, None),
        ((1, 8, 1), 48, "fsdp"),
    ],
)
def test_a_dimension_is_cut_as_far_as_the_mesh_divides_it(shape, size, entry):
    keys = ("blocks", "0", "self_attn", "q", "kernel")
    spec = parameter_spec(dict(zip(AXES, shape, strict=True)), keys, (2, size, 24))
    assert spec == (PartitionSpec(None, entry, None) if entry else PartitionSpec())


def test_moments_are_cut_like_their_parameters_and_the_step_is_whole():
    config = tiny_config()
    abstract = jax.eval_shape(lambda: init_state(config))
    mesh = AbstractMesh((1, 2, 2), AXES)
    cut = state_shardings(mesh, abstract, abstract_params(config.model))
    for tree in (cut.params, cut.ema, cut.opt_state[1].mu, cut.opt_state[1].nu):
        w0 = tree["blocks"]["0"]["self_attn"]["w0"]
        assert w0.spec == PartitionSpec(None, None, ("fsdp", "seq"), None)
    assert cut.step.spec == PartitionSpec()


def test_on_one_device_a_function_stays_what_it_is():
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    assert on_mesh(mesh, init_state) is init_state
