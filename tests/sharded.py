"""What eight simulated devices compute beside one: a script, whose tables the tests judge.

    python sharded.py meshes|layers|training FOLDER

prints one JSON object; FOLDER is for what it writes. It runs in a process of its own because the
number of devices is fixed when JAX starts. Letters as in model_fixtures.py.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from model_fixtures import CHANNELS, FITS_KERNELS, random_params, tiny
from run_fixtures import script_env, tiny_config

from lact_jax.checkpoint import Checkpointer
from lact_jax.config import Config
from lact_jax.hlo import collectives
from lact_jax.models.dit import DiTConfig, abstract_params, bind
from lact_jax.objective import ObjectiveConfig, compute_loss
from lact_jax.pipeline import Pipeline
from lact_jax.sharding import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    on_mesh,
    replicated,
    state_shardings,
)
from lact_jax.train_state import init_state, make_train_step
from lact_jax.trainer import make_parts

ONE = (1, 1, 1)
# The others of eight devices are those of `training`.
MESHES = [(1, 1, 8), (4, 2, 1), (4, 1, 2), (2, 4, 1), (1, 4, 2), (2, 1, 4), (1, 2, 4)]
# 32 tokens a chunk: more than a fast-weight head is wide, so that Muon does not blow up the
# rounding of a matrix of lower rank.
LATENT = (6, 8, 8, CHANNELS)
OBJECTIVE = ObjectiveConfig(frames_per_chunk=2, num_repeat=2)
# The options of the LaCT layer away from their defaults in one of two layers, and full attention in
# a third; the other mixers. Without L2 norm there is a model of its own: beside the layer without
# weight norm its gradients are off by 1.6e-5, alone by 3e-6. The policies of what the backward pass
# finds saved are dealt out among the models.
LACT_LAYERS = (
    {
        "momentum": True, "muon": True, "muon_iters": 3, "qkv_silu": True, "fw_head_dim": 12,
        "kv_cache_size": 5,
    },
    {
        "weight_norm": False, "qkv_silu": True, "l2_norm_after_silu": True, "o_norm": False,
        "ttt_scale": 0.7, "learnable_ttt_scale": False, "kv_cache_size": 0, "fw_head_dim": 48,
        "inter_multi": 0.5,
    },
)  # fmt: skip
LAYERS = {
    "options": tiny(*LACT_LAYERS, num_layers=3, attn_every_n_layers=3, remat="selective"),
    "no l2": tiny(
        {"qk_l2_norm": False, "w_init": "identity", "inter_multi": 3}, num_layers=1, remat="full"
    ),
    "gla": tiny({"kv_cache_size": 5}, num_layers=1, mixer="gla", remat="dots"),
    "window": tiny(
        {"kv_cache_size": 20}, num_layers=1, mixer="window", remat="attention",
        position_embedding=True,
    ),
    "kernels": replace(FITS_KERNELS, num_layers=1),
}  # fmt: skip
LAYER_MESHES = [(2, 1, 4), (1, 2, 4)]
# A chunk of 12 tokens and two heads: over four devices heads don't divide.
ROLLOUT = tiny_config(
    model__attn_every_n_layers=2, sample__steps=1, sample__guidance_scale=3.0,
    mesh__data=2, mesh__seq=4,
)  # fmt: skip
PROMPTS = ["a red circle", "a blue square moving left"]


def mesh_of(shape: tuple[int, int, int]) -> Mesh:
    return make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])


def error(actual, expected) -> float:
    """Relative L2; of zeros, whatever is not zero is infinitely wrong."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    if not expected.any():
        return float("inf") if actual.any() else 0.0
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def errors(actual, expected) -> dict[str, float]:
    """By leaf."""
    found = jax.tree_util.tree_leaves_with_path(expected)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): error(x, want)
        for (path, want), x in zip(found, jax.tree.leaves(actual), strict=True)
    }


def present(stats: dict) -> dict:
    """The statistics of the layers that have them: NaN stands for those that don't."""
    return {name: x[~np.isnan(x)] for name, x in stats.items()}


def joined_projections(gradients: dict) -> dict:
    """The kernel and bias of two narrow projections as one vector in every layer.

    Muon divides a common factor of a chunk's learning rates away: what is left as the gradient of
    their bias alone is rounding. That of the gate's bias is one number, whose terms all but cancel.
    """
    return {
        name: np.concatenate([np.ravel(x) for x in part.values()])
        if name in ("lr_proj", "ttt_scale_proj")
        else joined_projections(part)
        if isinstance(part, dict)
        else part
        for name, part in gradients.items()
    }


def random_batch(batch: int):
    rng = np.random.default_rng(1)
    latent, text = rng.standard_normal((batch, *LATENT)), rng.standard_normal((batch, 4, 7))
    return latent.astype(np.float32), text.astype(np.float32)


def loss_and_gradients(config: DiTConfig, shape, batch: int) -> SimpleNamespace:
    """loss, stats and gradients in host memory, and the compiled program."""
    mesh, params = mesh_of(shape), random_params(config)
    shardings = state_shardings(mesh, params, params)

    def loss(params, latent, text):
        key, empty = jax.random.key(0), jnp.zeros((4, 7), jnp.float32)
        found, stats = compute_loss(bind(config, params), latent, text, empty, key, OBJECTIVE)
        return found.loss, (stats, found.by_chunk_W)

    function = jax.jit(
        on_mesh(mesh, jax.value_and_grad(loss, has_aux=True)), out_shardings=(None, shardings)
    )
    placed = jax.device_put(random_batch(batch), batch_sharding(mesh))
    compiled = function.lower(jax.device_put(params, shardings), *placed).compile()
    (value, aux), gradients = compiled(jax.device_put(params, shardings), *placed)
    return SimpleNamespace(
        loss=float(value), by_chunk=np.asarray(aux[1]), stats=present(jax.device_get(aux[0])),
        gradients=jax.device_get(gradients), compiled=compiled,
    )  # fmt: skip


def compare(config: DiTConfig, shapes, batch: int, *, read: bool = False) -> dict[str, dict]:
    """The errors on each mesh beside one device; with `read`, the collectives as well."""
    one = loss_and_gradients(config, ONE, batch)
    table = {}
    for shape in shapes:
        many = loss_and_gradients(config, shape, batch)
        table[str(shape)] = {
            "loss": abs(many.loss / one.loss - 1),
            "by_chunk": error(many.by_chunk, one.by_chunk),
            "stats": errors(many.stats, one.stats),
            "gradients": errors(*map(joined_projections, (many.gradients, one.gradients))),
        }
        if read:
            found = collectives(many.compiled.as_text())
            table[str(shape)]["collectives"] = [asdict(c) for c in found]
    return table


def meshes(_: Path) -> dict:
    """The default layer on meshes of eight devices."""
    return compare(tiny(), MESHES, batch=8, read=True)


def rollout_params(config: Config) -> dict:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32),
        abstract_params(config.model),
    )


def rollout(config: Config) -> np.ndarray:
    """Sampled latents (B, F, h, w, c) of two prompts, on the mesh of the config."""
    mesh, params = make_mesh(config.mesh), rollout_params(config)
    placed = jax.device_put(params, state_shardings(mesh, params, params))
    codec, text, _ = make_parts(replace(config, data=replace(config.data, batch_size=2)))
    pipeline = Pipeline(config, placed, codec, text)
    return np.concatenate([*map(np.asarray, pipeline.latent_chunks(PROMPTS, [0, 1]))], axis=1)


def cached_velocity(config: DiTConfig, shape) -> np.ndarray:
    """What `denoise` gives a third chunk after two were committed."""
    mesh, params = mesh_of(shape), random_params(config)
    latent, text = random_batch(2)

    def velocity(params, latent, text):
        model = bind(config, params)
        chunks = [latent[:, i : i + 2] for i in (0, 2, 4)]
        text_kv, cache = model.text_kv(text), model.init_cache(2)
        for chunk in chunks[:2]:
            cache = model.commit(chunk, text_kv, cache)
        return model.denoise(chunks[2], jnp.full((2,), 500, jnp.float32), text_kv, cache)

    placed = jax.device_put(params, state_shardings(mesh, params, params))
    inputs = jax.device_put((latent, text), replicated(mesh))
    return np.asarray(jax.jit(on_mesh(mesh, velocity))(placed, *inputs))


def layers(folder: Path) -> dict:
    """Every other option and every mixer, trained and sampled with; a rollout to rollout.npy."""
    np.save(folder / "rollout.npy", rollout(ROLLOUT))
    table = {name: compare(config, LAYER_MESHES, batch=2) for name, config in LAYERS.items()}
    for name, config in LAYERS.items():
        velocities = [cached_velocity(config, shape) for shape in (LAYER_MESHES[1], ONE)]
        table[name]["velocity"] = error(*velocities)
    return table


class Training:
    """A run of tiny_config on a mesh, its step compiled."""

    def __init__(self, shape, accumulation: int = 1):
        # A large eps: with a small one Adam's first step is the gradient's sign, whatever its size.
        config = tiny_config(
            data__batch_size=8, train__eps=1e-2, train__accumulation=accumulation
        )
        self.mesh = mesh_of(shape)
        abstract = jax.eval_shape(lambda: init_state(config))
        shardings = state_shardings(self.mesh, abstract, abstract_params(config.model))
        self.wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        self.empty = jax.device_put(jnp.zeros((4, 8), jnp.float32), replicated(self.mesh))
        self.first = jax.jit(lambda: init_state(config), out_shardings=shardings)
        step = jax.jit(
            on_mesh(self.mesh, make_train_step(config)),
            donate_argnums=0, out_shardings=(shardings, replicated(self.mesh)),
        )  # fmt: skip
        self.step = step.lower(self.wanted, *self.batch(0), self.empty).compile()

    def batch(self, number: int):
        rng = np.random.default_rng(number)
        latent, text = rng.standard_normal((8, 6, 4, 4, 16)), rng.standard_normal((8, 4, 8))
        batch = latent.astype(np.float32), text.astype(np.float32)
        return jax.device_put(batch, batch_sharding(self.mesh))

    def go_on(self, state, numbers):
        """(state, (loss, gradient norm) of each step) after steps on these batches."""
        seen = []
        for number in numbers:
            state, metrics = self.step(state, *self.batch(number), self.empty)
            seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        return state, seen


def beside(run: Training, start: Any, whole: Any, expected: list) -> dict:
    """What the run makes of two more steps from `start`, beside the state `whole` after them and
    the metrics `expected` of them."""
    moment = start.opt_state[1].mu["blocks"]["0"]["self_attn"]["q"]["kernel"]
    part = [*moment.addressable_shards[0].data.shape]
    state, seen = run.go_on(start, (1, 2))
    trees = {
        "params": (state.params, whole.params),
        "ema": (state.ema, whole.ema),
        "moments": (state.opt_state[1].mu, whole.opt_state[1].mu),
    }
    worst = {
        name: float(np.max([*errors(*map(jax.device_get, pair)).values()]))
        for name, pair in trees.items()
    }
    return {
        "part": part,
        "metrics": float(np.max(np.abs(np.divide(seen, expected) - 1))),
        "state": worst,
        "collectives": [asdict(c) for c in collectives(run.step.as_text())],
    }


def training(folder: Path) -> dict:
    """A checkpoint of (1, 8, 1) after a step goes on there and elsewhere; one device has gone all
    the way alone. (2, 2, 2) takes each batch in two parts."""
    one = Training(ONE)
    whole, expected = one.go_on(one.first(), range(3))
    eight = Training((1, 8, 1))
    saved, _ = eight.go_on(eight.first(), range(1))
    saved_values = jax.device_get(saved)
    table = {}
    with Checkpointer(folder, 1, None) as checkpoints:
        checkpoints.save(1, saved, {}, {"step": 1}, force=True)
        for shape in (ONE, (1, 8, 1), (2, 2, 2), (8, 1, 1)):
            parts = 2 if shape == (2, 2, 2) else 1
            run = {ONE: one, (1, 8, 1): eight}.get(shape) or Training(shape, parts)
            restored, _, _ = checkpoints.restore(run.wanted)
            same = jax.tree.map(np.array_equal, jax.device_get(restored), saved_values)
            table[str(shape)] = beside(run, restored, whole, expected[1:])
            table[str(shape)]["same"] = all(jax.tree.leaves(same))
    return table


GROUPS = {function.__name__: function for function in (meshes, layers, training)}


def run(group: str, folder: Path) -> dict:
    """The tables of a group, from a process with eight simulated devices."""
    flags = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
    done = subprocess.run(
        [sys.executable, __file__, group, str(folder)],
        # Eight devices wait for one another in collectives: XLA must have threads for all of them.
        env=script_env(XLA_FLAGS=flags, JAX_PLATFORMS="cpu", NPROC="128"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


if __name__ == "__main__":
    json.dump(GROUPS[sys.argv[1]](Path(sys.argv[2])), sys.stdout)
