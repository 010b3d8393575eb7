"""The way through: an official Wan folder in, training on raw videos, mp4 out, weights back out."""

import dataclasses
import json

import numpy as np
import pytest
from convert_fixtures import PLAIN, VAE, assert_same, random_tensors, read_all, write_pt, write_wan
from ml_collections import ConfigDict
from text_fixtures import write_tokenizer

from lact_jax.config import default, parse
from lact_jax.convert import Export, Import, export_checkpoint, import_checkpoint
from lact_jax.data.synthetic import Settings, write_folder
from lact_jax.generate import MODES, generate
from lact_jax.models.umt5 import UMT5Config
from lact_jax.trainer import train
from lact_jax.video_io import read_video

pytestmark = pytest.mark.usefixtures("quick_compile")

DIT = dataclasses.replace(PLAIN, num_layers=2, latent_channels=16, text_dim=16)
TEXT = UMT5Config(
    vocab_size=130, dim=16, dim_attn=24, dim_ffn=20, num_heads=4, num_layers=2, num_buckets=16
)
CONFIG_JSON = {
    "_class_name": "WanModel", "model_type": "t2v", "dim": 24, "num_heads": 2, "num_layers": 2,
    "ffn_dim": 40, "freq_dim": 16, "in_dim": 16, "out_dim": 16, "text_len": 6, "eps": 1e-6,
}  # fmt: skip


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(official tensors of the DiT, the converted folder)."""
    folder = tmp_path_factory.mktemp("wan")
    tensors = {k: (0.2 * v).astype(np.float32) for k, v in random_tensors("dit", DIT).items()}
    src = write_wan(folder / "src", tensors, CONFIG_JSON)
    write_pt(src / "Wan2.1_VAE.pth", random_tensors("vae", VAE, dtype=np.float32))
    write_pt(src / "models_t5_umt5-xxl-enc-bf16.pth", random_tensors("text", TEXT))
    (src / "google" / "umt5-xxl").mkdir(parents=True)
    write_tokenizer(src / "google" / "umt5-xxl")
    import_checkpoint(Import(src, folder / "converted"), log=lambda *_: None)
    return tensors, folder / "converted"


def config(converted, folder):
    """A run of two chunks at 32x32 from the converted folder."""
    c = default()
    c.init_from = str(converted)
    c.model.update(
        dim=24, ffn_dim=40, num_heads=2, num_layers=2, freq_dim=16, text_dim=16, text_len=6,
        latent_channels=16, dtype="float32", remat="none",
    )  # fmt: skip
    c.model.lact.fw_head_dim = 12
    c.codec.name, c.text.name = "wan", "umt5"
    c.codec.options = ConfigDict({"path": c.get_ref("init_from"), "dtype": "float32"})
    c.text.options = ConfigDict(
        {"path": c.get_ref("init_from"), "text_len": 6, "cache_dir": str(folder / "text")}
    )
    c.data.update(path=str(folder / "videos"), num_frames=21, height=32, width=32)
    c.train.update(steps=2, warmup_steps=0, lr=1e-3, trainable="attn_only", save_every=2)
    c.sample.update(num_latent_frames=6, steps=2, guidance_scale=2.0)
    return c


def test_train_from_wan_sample_and_export(converted, tmp_path):
    tensors, folder = converted
    write_folder(tmp_path / "videos", Settings(num_shapes=2, num_rings=0, num_frames=21, size=32))
    run = parse(config(folder, tmp_path))
    assert train(run, tmp_path / "run") == 0
    assert len(list((tmp_path / "text").iterdir())) >= 2  # captions and "" are kept on disk

    generate(run, tmp_path / "run", ["a red circle moving left"], tmp_path / "clips")
    clip = next((tmp_path / "clips").glob("*.mp4"))
    frames = read_video(clip, fps=16)
    assert frames.shape == (21, 32, 32, 3) and frames.std() > 0

    export_checkpoint(Export(tmp_path / "run", tmp_path / "out", "wan"), log=lambda *_: None)
    exported = read_all(sorted((tmp_path / "out").glob("*.safetensors")))
    kept = {name: value for name, value in exported.items() if name in tensors}
    frozen = {name for name in tensors if ".self_attn." not in name}
    assert kept.keys() == tensors.keys()
    assert_same({n: kept[n] for n in frozen}, {n: tensors[n] for n in frozen})
    assert any(not np.array_equal(kept[n], tensors[n]) for n in tensors.keys() - frozen)
    assert {"blocks.0.self_attn.w0", "blocks.1.self_attn.lr_proj.bias"} <= exported.keys()


def test_plain_wan_is_sampled_as_it_is(converted, tmp_path):
    _, folder = converted
    run = MODES["full"](parse(config(folder, tmp_path)))
    page = generate(run, None, ["two people dance"], tmp_path / "clips")
    assert page.exists()
    settings = json.loads((tmp_path / "clips" / "prompts.json").read_text())["settings"]
    assert settings["converted"] == str(folder)
    assert read_video(next((tmp_path / "clips").glob("*.mp4")), fps=16).shape == (21, 32, 32, 3)


def test_plain_wan_has_no_memory_to_sample_with(converted, tmp_path):
    _, folder = converted
    with pytest.raises(ValueError, match="holds no LaCT parameters.*--mode=full"):
        generate(parse(config(folder, tmp_path)), None, ["a cat"], tmp_path / "clips")


def test_neither_workdir_nor_checkpoint(converted, tmp_path):
    c = config(converted[1], tmp_path)
    c.init_from = ""
    with pytest.raises(ValueError, match="nothing to sample from: give --workdir=RUN"):
        generate(parse(c), None, ["a cat"], tmp_path / "clips")
