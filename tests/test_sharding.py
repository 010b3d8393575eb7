"""The sharding table against every config's parameters, and eight devices against one.

Run as a script it trains a few steps on one device and on a mesh of eight simulated ones.
"""

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from run_fixtures import script_env, tiny_config

from lact_jax import sharding
from lact_jax.config import parse
from lact_jax.models.dit import DiTConfig, abstract_params
from lact_jax.models.lact import LaCTConfig
from lact_jax.sharding import AXES, MeshConfig, make_mesh, spec_for, state_shardings
from lact_jax.train_state import init_state, make_train_step
from lact_jax.trainer import make_parts

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
        cut += leaf.size if "fsdp" in spec else 0
        if keys[0] == "blocks":  # layers are never cut: scan walks along them
            assert not spec or spec[0] is None
    assert cut > 0.9 * sum(leaf.size for _, leaf in leaves)


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
        (("patch_embedding", "kernel"), 3, r"patch_embedding\.kernel has 3 axes, its row 2"),
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
        (MeshConfig(seq=2), "sequence sharding is not there yet"),
    ],
)
def test_meshes_that_can_not_be_made(mesh, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(mesh, devices=jax.devices()[:1] * 8)


def test_one_device_gives_a_mesh_of_one():
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    assert mesh.axis_names == AXES and dict(mesh.shape) == {"data": 1, "fsdp": 1, "seq": 1}


def _train(config, devices):
    """(losses, grad norms, parameters, moments, average) after three steps over the mesh."""
    mesh = make_mesh(config.mesh, devices)
    abstract = jax.eval_shape(lambda: init_state(config))
    shardings = state_shardings(mesh, abstract, abstract_params(config.model))
    state = jax.jit(lambda: init_state(config), out_shardings=shardings)()
    whole = sharding.replicated(mesh)
    step = jax.jit(make_train_step(config), donate_argnums=0, out_shardings=(shardings, whole))
    seen = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        latent, text = rng.standard_normal((8, 6, 4, 4, 16)), rng.standard_normal((8, 4, 8))
        placed = jax.device_put(
            [latent.astype(np.float32), text.astype(np.float32)], sharding.batch_sharding(mesh)
        )
        empty = jax.device_put(jnp.zeros((4, 8), jnp.float32), whole)
        state, metrics = step(state, *placed, empty)
        seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    assert step._cache_size() == 1
    return seen, state


def _error(actual, expected) -> float:
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (actual, expected))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _compare() -> None:
    assert jax.device_count() == 8
    # A large eps: with a small one Adam's first step is the gradient's sign, whatever its size.
    config = tiny_config(data__batch_size=8, train__eps=1e-2)
    mesh = MeshConfig(data=2, fsdp=4)
    one, whole = _train(dataclasses.replace(config, mesh=MeshConfig()), jax.devices()[:1])
    eight, cut = _train(dataclasses.replace(config, mesh=mesh), jax.devices())
    errors = {
        name: _error(jax.device_get(getattr(cut, name)), jax.device_get(getattr(whole, name)))
        for name in ("params", "ema")
    }
    errors["opt_state"] = _error(*(jax.device_get(s.opt_state[1].mu) for s in (cut, whole)))
    errors["metrics"] = float(np.max(np.abs(np.divide(eight, one) - 1)))
    assert max(errors.values()) < 1e-5, errors
    for tree in (cut.params, cut.ema, cut.opt_state[1].mu, cut.opt_state[1].nu):
        w0 = tree["blocks"]["0"]["self_attn"]["w0"]
        assert w0.sharding.spec == PartitionSpec(None, None, "fsdp", None)
        assert w0.addressable_shards[0].data.shape == (2, 2, 3, 12)
    assert cut.step.sharding.spec == PartitionSpec()

    for batch_size, accumulation in ((4, 1), (8, 2)):
        small = tiny_config(
            data__batch_size=batch_size, train__accumulation=accumulation,
            mesh__data=2, mesh__fsdp=4,
        )  # fmt: skip
        with pytest.raises(ValueError, match=r"4 clips at a time.* 8 devices"):
            make_parts(small)
    print(errors)


def test_eight_devices_compute_what_one_does():
    flags = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
    done = subprocess.run(
        [sys.executable, __file__],
        # Eight devices wait for one another in collectives: XLA must have threads for all of them.
        env=script_env(XLA_FLAGS=flags, JAX_PLATFORMS="cpu", NPROC="128"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "params" in done.stdout


if __name__ == "__main__":
    _compare()
