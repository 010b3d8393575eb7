"""Checkpoints into Orbax and out again: bit-equal, complete, and described by the manifest."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from convert_fixtures import (
    BF16,
    CONFIG_JSON,
    LACT,
    PLAIN,
    STEM,
    TEXT,
    VAE,
    assert_same,
    random_tensors,
    read_all,
    write_pt,
    write_wan,
)
from safetensors import safe_open
from safetensors.numpy import save_file

from lact_jax.convert import (
    Export,
    Import,
    export_checkpoint,
    import_checkpoint,
    load_dit,
    load_text,
    load_vae,
    parse_options,
)
from lact_jax.convert.components import COMPONENTS
from lact_jax.convert.fresh import fresh_values
from lact_jax.parity_cases import model_config
from lact_jax.torch_pickle import open_torch
from lact_jax.umt5_weights import config_to_transformers
from lact_jax.wan_weights import params_to_torch

GOLDEN = Path(__file__).parents[1] / "golden"


def silent(_):
    """A log that nobody reads."""


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A sharded official folder and its tensors, and what it converts to."""
    root = tmp_path_factory.mktemp("wan")
    tensors = random_tensors("dit", PLAIN)
    write_wan(root / "src", tensors, shards=3)
    import_checkpoint(Import(root / "src", root / "out"), log=silent)
    return root, tensors


def test_wan_to_orbax_to_wan_is_bit_equal(wan, tmp_path):
    root, tensors = wan
    out = tmp_path / "back"
    export_checkpoint(Export(root / "out", out, "wan", max_shard_bytes=8000), log=silent)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 8000 + 8000 for file in files)
    assert_same(read_all(files), tensors)
    index = json.loads((out / f"{STEM}.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert json.loads((out / "config.json").read_text()) == CONFIG_JSON | {"text_dim": 8}
    import_checkpoint(Import(out, tmp_path / "again"), log=silent)
    again = load_dit(tmp_path / "again", PLAIN, dtype=BF16)
    assert_same(params_to_torch(again, PLAIN), tensors)


def test_manifest_says_what_was_converted(wan):
    root, tensors = wan
    written = manifest(root / "out")
    assert written["source"] == {"path": str(root / "src"), "layout": "wan"}
    dit = written["components"]["dit"]
    assert COMPONENTS["dit"].from_json(dit["config"]) == dataclasses.replace(
        PLAIN, dtype="bfloat16", remat="full"
    )
    assert dit["parameters"] == sum(t.size for t in tensors.values())
    assert dit["dtypes"] == ["bfloat16"]
    assert dit["assumed"] == [] and dit["fresh"] == []
    assert len(dit["files"]) == 3


def test_dtype_casts_every_tensor(wan, tmp_path):
    root, tensors = wan
    out = tmp_path / "out"
    import_checkpoint(Import(root / "src", out, dtype="float32"), log=silent)
    assert manifest(out)["components"]["dit"]["dtypes"] == ["float32"]
    want = {name: value.astype(np.float32) for name, value in tensors.items()}
    assert_same(params_to_torch(load_dit(out, PLAIN, dtype=np.float32), PLAIN), want)
    export_checkpoint(Export(out, tmp_path / "back", "wan", dtype="bfloat16"), log=silent)
    assert_same(read_all([tmp_path / "back" / f"{STEM}.safetensors"]), tensors)


def test_dry_run_prints_the_table_and_writes_nothing(wan, tmp_path):
    root, _ = wan
    lines = []
    import_checkpoint(Import(root / "src", None), dry_run=True, log=lines.append)
    table = "\n".join(lines)
    assert (
        "blocks.{0-3}.ffn.0.weight: bfloat16 (40, 24) -> "
        "dit/blocks/0/ffn/fc1/kernel: bfloat16 (4, 24, 40)"
    ) in table
    assert sorted(path.name for path in root.iterdir()) == ["out", "src"]
    exported = []
    export_checkpoint(Export(root / "out", None, "diffusers"), dry_run=True, log=exported.append)
    assert any("blocks.{0-3}.attn1.to_q.weight: bfloat16 (24, 24)" in line for line in exported)


WRAPPED = {
    "wrapped": lambda tree: {
        f"_orig_mod.{k.replace('self_attn', '_checkpoint_wrapped_module.self_attn')}": v
        for k, v in tree.items()
    },
    "module": lambda tree: {f"module.model.{k}": v for k, v in tree.items()},
    "nested": lambda tree: {"model": tree, "step": 7},
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_lact_model_pt(tmp_path, wrap):
    """Prefixes go, sizes and options come from the shapes, layers of two kinds alternate."""
    lact = (
        dataclasses.replace(LACT, momentum=True, inter_multi=1),
        dataclasses.replace(LACT, o_norm=False, learnable_ttt_scale=False, inter_multi=1.5),
    )
    config = dataclasses.replace(
        PLAIN, mixer="lact", lact=lact, attn_every_n_layers=4, num_layers=8
    )
    tensors = random_tensors("dit", config, dtype=np.float32)
    source = write_pt(tmp_path / "ckpt" / "model.pt", tensors, WRAPPED[wrap])
    options = parse_options("num_heads=2", None)
    import_checkpoint(Import(source.parent, tmp_path / "out", options=options), log=silent)
    part = manifest(tmp_path / "out")["components"]["dit"]
    assert part["assumed"] == ["eps", "text_len"]
    read = COMPONENTS["dit"].from_json(part["config"])
    assert read.lact == lact
    assert (read.attn_every_n_layers, read.num_layers, read.num_heads) == (4, 8, 2)
    assert_same(params_to_torch(load_dit(tmp_path / "out", config), config), tensors)
    export_checkpoint(Export(tmp_path / "out", tmp_path / "back", "wan"), log=silent)
    assert_same(read_all([tmp_path / "back" / f"{STEM}.safetensors"]), tensors)


def test_fresh_lact_parameters(wan, tmp_path):
    """Asked for, they are drawn from the seed, listed, and leave the rest untouched."""
    root, tensors = wan
    config = dataclasses.replace(PLAIN, mixer="lact", lact=(LACT,))
    options = parse_options("", "fw_head_dim=12")
    lines = []
    task = Import(root / "src", tmp_path / "out", options=options, seed=3)
    import_checkpoint(task, log=lines.append)
    part = manifest(tmp_path / "out")["components"]["dit"]
    expected = {
        f"blocks/0/self_attn/{name}"
        for name in ("w0", "w1", "w2", "qk_scale", "qk_offset", "lr_proj/kernel", "lr_proj/bias",
                     "output_norm/scale", "ttt_scale_proj/kernel", "ttt_scale_proj/bias")
    }  # fmt: skip
    assert set(part["fresh"]) == expected and part["seed"] == 3
    assert any("freshly initialised" in line and "blocks/0/self_attn/w0" in line for line in lines)
    params = load_dit(tmp_path / "out", config, dtype=np.float32)
    torch = params_to_torch(params, config)
    for name, value in tensors.items():
        np.testing.assert_array_equal(torch[name], value.astype(np.float32))
    lact = params["blocks"]["0"]["self_attn"]
    w0, w1 = np.asarray(lact["w0"]), np.asarray(lact["w1"])
    for w in (w0, w1):
        assert abs(w.std() * np.sqrt(w.shape[-1]) - 1) < 0.1
    assert not np.allclose(w0[0], w0[1])
    assert not np.any(lact["ttt_scale_proj"]["kernel"]) and np.all(lact["qk_scale"] == 1)
    dtypes = {tuple(name.split("/")): w0.dtype for name in part["fresh"]}
    same, other = (
        fresh_values(config, jax.random.key(seed), dtypes)["blocks", "0", "self_attn", "w0"]
        for seed in (3, 4)
    )
    np.testing.assert_array_equal(same, w0)
    assert not np.allclose(other, w0)


def test_vae_and_text_of_an_official_folder(tmp_path):
    vae, text = random_tensors("vae", VAE, dtype=np.float32), random_tensors("text", TEXT)
    src = tmp_path / "src"
    write_pt(src / "Wan2.1_VAE.pth", vae)
    write_pt(src / "models_t5_umt5-xxl-enc-bf16.pth", text)
    (src / "google" / "umt5-xxl").mkdir(parents=True)
    (src / "google" / "umt5-xxl" / "tokenizer.json").write_text("{}")
    import_checkpoint(Import(src, tmp_path / "out"), log=silent)
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_text() == "{}"
    config, params = load_vae(tmp_path / "out", "float32")
    assert config == dataclasses.replace(VAE, dtype="float32")
    assert_same(_back("vae", config, params), vae)
    config, params = load_text(tmp_path / "out")
    assert config == dataclasses.replace(TEXT, param_dtype="bfloat16", compute_dtype="bfloat16")
    assert_same({k: v.astype(BF16) for k, v in _back("text", config, params).items()}, text)
    assert params["norm"]["scale"].dtype == np.float32
    export_checkpoint(Export(tmp_path / "out", tmp_path / "back", "wan"), log=silent)
    assert (tmp_path / "back" / "google" / "umt5-xxl" / "tokenizer.json").read_text() == "{}"
    for name, tensors in (("Wan2.1_VAE", vae), ("models_t5_umt5-xxl-enc-bf16", text)):
        file = open_torch(tmp_path / "back" / f"{name}.pth")
        assert_same({key: file.get_tensor(key) for key in file.keys()}, tensors)
    import_checkpoint(Import(src, tmp_path / "vae", only=("vae",)), log=silent)
    assert list(manifest(tmp_path / "vae")["components"]) == ["vae"]
    assert not (tmp_path / "vae" / "tokenizer").exists()


def _back(name, config, params):
    tensors = {}
    for entry in COMPONENTS[name].entries(config, "wan"):
        value = params
        for key in entry.path:
            value = value[key]
        value = np.asarray(value) if entry.layer is None else np.asarray(value)[entry.layer]
        tensors[entry.name] = np.ascontiguousarray(entry.to_torch(value))
    return tensors


def test_shards_without_an_index_and_single_files(wan, tmp_path):
    """The folder's index may be missing; a file may be given, and the names of diffusers."""
    root, tensors = wan
    shutil.copytree(root / "src", tmp_path / "src")
    (tmp_path / "src" / f"{STEM}.safetensors.index.json").unlink()
    import_checkpoint(Import(tmp_path / "src", tmp_path / "a"), log=silent)
    renamed = random_tensors("dit", PLAIN, "diffusers")
    assert renamed.keys() != tensors.keys()
    write_wan(tmp_path / "b", renamed, config_json=None)
    options = parse_options("num_heads=2,text_len=6", None)
    task = Import(tmp_path / "b" / f"{STEM}.safetensors", tmp_path / "c", options=options)
    import_checkpoint(task, log=silent)
    for folder in ("a", "c"):
        params = load_dit(tmp_path / folder, PLAIN, dtype=BF16)
        assert_same(params_to_torch(params, PLAIN), tensors)


def test_official_lact_names(tmp_path):
    """The parameters of a golden case, as the official code names them."""
    with safe_open(GOLDEN / "train_repeat1.safetensors", "numpy") as file:
        official = json.loads(file.metadata()["config"])
        names = [name for name in file.keys() if name.startswith("param.")]
        tensors = {name.removeprefix("param."): file.get_tensor(name) for name in names}
    write_pt(tmp_path / "src" / "model.pt", tensors, WRAPPED["wrapped"])
    options = parse_options(f"num_heads={official['num_heads']}", None)
    import_checkpoint(Import(tmp_path / "src", tmp_path / "out", options=options), log=silent)
    assert not manifest(tmp_path / "out")["components"]["dit"]["fresh"]
    config = model_config(official)
    assert_same(params_to_torch(load_dit(tmp_path / "out", config), config), tensors)


def test_a_tensor_under_two_names_is_used_once_and_told(tmp_path):
    """transformers may save the shared embedding a second time."""
    text = random_tensors("text", TEXT, "diffusers")
    home = tmp_path / "src" / "text_encoder"
    home.mkdir(parents=True)
    alias = "encoder.embed_tokens.weight"
    save_file(text | {alias: text["shared.weight"]}, home / "model.safetensors")
    (home / "config.json").write_text(json.dumps(config_to_transformers(TEXT)))
    lines = []
    import_checkpoint(Import(tmp_path / "src", tmp_path / "out"), log=lines.append)
    assert f"text: not used: {alias}: the same as shared.weight" in lines
    assert any("has no tokenizer" in line for line in lines)
    assert manifest(tmp_path / "out")["components"]["text"]["not_used"] == [alias]
    export_checkpoint(Export(tmp_path / "out", tmp_path / "back", "diffusers"), log=silent)
    assert_same(read_all([tmp_path / "back" / "text_encoder" / "model.safetensors"]), text)
