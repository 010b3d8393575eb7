"""Every file in configs/ parses, its model builds (abstractly), and ar_chunk3f is the recipe."""

import importlib
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from lact_jax.config import Config, parse
from lact_jax.data import synthetic_dataset
from lact_jax.models.dit import abstract_params
from lact_jax.objective import ObjectiveConfig
from lact_jax.sharding import AXES, make_mesh
from lact_jax.train_state import init_state

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(
    file.stem for file in (ROOT / "configs").glob("*.py") if not file.stem.startswith("_")
)


def load(name: str) -> Config:
    return parse(importlib.import_module(f"configs.{name}").get_config())


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_the_documented_configs_are_there():
    assert {"tiny", "small", "ar_chunk3f", "ar_chunk3f_sp"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_parses_and_its_train_state_builds(name):
    config = load(name)
    state = jax.eval_shape(lambda: init_state(config))
    params = abstract_params(config.model)
    assert count(state.params) + count(state.frozen) == count(params) > 0
    assert jax.tree.structure(state.ema) == jax.tree.structure(state.params)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((state.params, state.frozen)))
    trained = jax.tree_util.tree_leaves_with_path(state.params)
    inside = ["self_attn" in jax.tree_util.keystr(path) for path, _ in trained]
    assert all(inside) == (config.train.trainable == "attn_only")


@pytest.mark.parametrize("name", NAMES)
def test_its_chunks_and_patches_divide_its_clips(name):
    config = load(name)
    data, frames = config.data, config.objective.frames_per_chunk
    assert data.num_frames % 4 == 1
    assert (1 + data.num_frames // 4) % frames == 0
    assert config.sample.num_latent_frames % frames == 0
    assert data.height % 16 == 0 and data.width % 16 == 0


@pytest.mark.parametrize("name", NAMES)
def test_as_many_clips_are_held_out_as_it_validates_on(name):
    config = load(name)
    codec = types.SimpleNamespace(temporal_stride=4, spatial_stride=8)
    if config.data.name == "synthetic":
        _, drawn = synthetic_dataset.folders(config, codec)["validation"]
        held_out = drawn.num_shapes + drawn.num_rings
    else:
        held_out = config.data.holdout
    assert config.validation.num_clips <= held_out


def test_ar_chunk3f_is_the_official_recipe():
    config = load("ar_chunk3f")
    model, lact, train = config.model, config.model.lact[0], config.train
    assert (model.dim, model.ffn_dim, model.num_heads, model.num_layers) == (1536, 8960, 12, 30)
    assert (model.text_dim, model.text_len, model.freq_dim) == (4096, 512, 256)
    assert (model.dtype, model.eps, model.patch_size) == ("bfloat16", 1e-6, (1, 2, 2))
    assert (lact.fw_head_dim, lact.inter_multi) == (768, 2.0)
    data = config.data
    assert (data.num_frames, data.height, data.width, data.fps) == (81, 480, 832, 16.0)
    assert config.objective.frames_per_chunk == 3
    assert (train.lr, train.b1, train.b2, train.eps) == (2e-5, 0.9, 0.95, 1e-8)
    assert (train.weight_decay, train.schedule, train.warmup_steps) == (0.01, "cosine", 1000)
    assert (train.steps, train.new_lr_multiplier, train.trainable) == (10_000, 10.0, "attn_only")
    assert (train.clip_norm, train.skip_factor, train.skip_after) == (1.0, 10.0, 200)
    assert (train.ema_decay, train.save_every, train.keep_last) == (0.995, 1000, 2000)
    sample = config.sample
    assert (sample.solver, sample.steps, sample.shift, sample.guidance_scale) == (
        "unipc", 50, 3.0, 5.0,
    )  # fmt: skip
    assert config.objective.shift((60, 104), model.patch_size) == pytest.approx(2.1135, abs=5e-5)
    assert ObjectiveConfig().shift((60, 104), model.patch_size) == 3.0


def test_ar_chunk3f_sp_changes_only_what_its_recipe_says():
    config, base = load("ar_chunk3f_sp"), load("ar_chunk3f")
    train = config.train
    assert (train.lr, train.weight_decay, train.steps) == (5e-6, 0.0, 5000)
    assert (train.accumulation, train.trainable) == (2, "all")
    assert config.objective.drop_text_prob == 0.1
    assert (config.model, config.sample, config.codec, config.text) == (
        base.model, base.sample, base.codec, base.text,
    )  # fmt: skip
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.seq) == (1, 1, -1)


@pytest.mark.parametrize("name", NAMES)
def test_its_mesh_takes_all_devices(name):
    mesh = make_mesh(load(name).mesh)
    assert mesh.axis_names == AXES and mesh.size == jax.device_count()


@pytest.mark.parametrize(
    ("name", "section"), [("ar_chunk3f", "codec"), ("ar_chunk3f_sp", "text")]
)
def test_the_converted_folder_reaches_codec_and_text_encoder(name, section):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    config.init_from = "converted"
    assert getattr(parse(config), section).options["path"] == "converted"
