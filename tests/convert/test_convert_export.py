"""Training runs and converted folders out as safetensors."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_fixtures import (
    BF16,
    PLAIN,
    STEM,
    VAE,
    assert_same,
    random_tensors,
    read_all,
    write_wan,
)
from safetensors import safe_open
from safetensors.numpy import save_file

from lact_jax.checkpoint import Checkpointer
from lact_jax.config import Config
from lact_jax.convert import Export, Import, export_checkpoint, import_checkpoint
from lact_jax.convert.components import vae_to_diffusers_json
from lact_jax.convert.errors import ConversionError
from lact_jax.convert.shards import Tensor, cut, write_shards
from lact_jax.models.lact import LaCTConfig
from lact_jax.optim import split_trainable
from lact_jax.wan_weights import params_from_torch

MODEL = dataclasses.replace(
    PLAIN, mixer="lact", lact=(LaCTConfig(fw_head_dim=12, momentum=True),), attn_every_n_layers=2
)


def silent(_):
    """A log that nobody reads."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training workdir of two steps, and the tensors of each step's raw and averaged weights."""
    workdir = tmp_path_factory.mktemp("run") / "work"
    workdir.mkdir()
    config = dataclasses.asdict(Config(model=MODEL))
    (workdir / "config.json").write_text(json.dumps(config))
    tensors = {}
    with Checkpointer(workdir / "checkpoints", 1, None, async_=False) as checkpoints:
        for step in (1, 2):
            for i, which in enumerate(("params", "ema")):
                tensors[step, which] = random_tensors("dit", MODEL, dtype=np.float32, seed=step + i)
            trees = {
                which: split_trainable(_params(tensors[step, which]), "attn_only")
                for which in ("params", "ema")
            }
            frozen = trees["params"][1]
            state = {"params": trees["params"][0], "ema": trees["ema"][0], "frozen": frozen}
            checkpoints.save(step, state | {"step": jnp.int32(step)}, {}, {})
    return workdir, tensors


def _params(tensors):
    return jax.tree.map(jnp.asarray, params_from_torch(tensors, MODEL))


def expected(tensors, step, which):
    """Attention from the weights asked for, the rest as it was frozen."""
    return {
        name: tensors[step, which if ".self_attn." in name else "params"][name]
        for name in tensors[step, which]
    }


@pytest.mark.parametrize(
    ("options", "step", "which"),
    [({}, 2, "ema"), ({"weights": "params"}, 2, "params"), ({"step": 1}, 1, "ema")],
)
def test_training_run(run, tmp_path, options, step, which):
    workdir, tensors = run
    export_checkpoint(Export(workdir, tmp_path / "out", "wan", **options), log=silent)
    assert_same(
        read_all([tmp_path / "out" / f"{STEM}.safetensors"]), expected(tensors, step, which)
    )
    written = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert f"checkpoints/{step}/state ({which})" in written["exported_from"]["weights"]


def test_checkpoint_directory_and_dtype(run, tmp_path):
    workdir, tensors = run
    task = Export(workdir / "checkpoints", tmp_path / "out", "diffusers", dtype="bfloat16")
    export_checkpoint(task, log=silent)
    exported = read_all([tmp_path / "out" / "transformer" / f"{STEM}.safetensors"])
    assert {value.dtype for value in exported.values()} == {BF16}
    name = "blocks.0.self_attn.w1"
    np.testing.assert_array_equal(exported[name], tensors[2, "ema"][name].astype(BF16))


def test_a_config_that_does_not_fit_is_told(run, tmp_path):
    workdir, _ = run
    other = tmp_path / "work"
    other.mkdir()
    os.symlink(workdir / "checkpoints", other / "checkpoints")
    model = dataclasses.replace(MODEL, ffn_dim=44, lact=(LaCTConfig(fw_head_dim=12),))
    (other / "config.json").write_text(json.dumps(dataclasses.asdict(Config(model=model))))
    with pytest.raises(ConversionError) as caught:
        export_checkpoint(Export(other, tmp_path / "out", "wan"), log=silent)
    for part in (
        "blocks/0/self_attn/momentum_proj/kernel: not in the model",
        "blocks/0/ffn/fc1/kernel: (2, 24, 40) in the checkpoint, (2, 24, 44) in the model",
    ):
        assert part in str(caught.value)
    (other / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json of a training run"):
        export_checkpoint(Export(other, tmp_path / "out", "wan"), log=silent)


WRONG = {
    "to": (dict(to="onnx"), "--to=onnx: choose one of wan, diffusers"),
    "step": (dict(step=7), "--step=7: .* has 1, 2"),
    "weights": (dict(weights="best"), "--weights=best: choose ema or params"),
    "only": (dict(only=("vae",)), "--only=vae: .*work to the layout 'wan' has dit"),
    "dtype": (dict(dtype="int4"), "--dtype=int4: choose one of source"),
    "dst": (dict(dst=None), "--dst is missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(run, tmp_path, case):
    changes, message = WRONG[case]
    task = dict(src=run[0], dst=tmp_path / "out", to="wan") | changes
    with pytest.raises(ConversionError, match=message):
        export_checkpoint(Export(**task), log=silent)
    assert list(tmp_path.iterdir()) == []


def test_sources_that_hold_no_weights(tmp_path):
    write_wan(tmp_path / "src", random_tensors("dit", PLAIN))
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="--src=.*nowhere: no such folder"):
        export_checkpoint(Export(tmp_path / "nowhere", out, "wan"), log=silent)
    with pytest.raises(ConversionError, match="neither a converted folder"):
        export_checkpoint(Export(tmp_path / "src", out, "wan"), log=silent)
    import_checkpoint(Import(tmp_path / "src", tmp_path / "orbax"), log=silent)
    export_checkpoint(Export(tmp_path / "orbax", out, "wan"), log=silent)
    with pytest.raises(ConversionError, match="out: already exported"):
        export_checkpoint(Export(out, tmp_path / "again", "wan"), log=silent)


def test_a_file_that_could_not_say_what_the_model_is(tmp_path):
    """Wan's VAE file has no room for latents of another scale; a diffusers folder has."""
    vae = dataclasses.replace(VAE, latent_std=(2.0,) * 16)
    home = tmp_path / "src" / "vae"
    home.mkdir(parents=True)
    save_file(random_tensors("vae", vae, "diffusers"), home / f"{STEM}.safetensors")
    (home / "config.json").write_text(json.dumps(vae_to_diffusers_json(vae)))
    import_checkpoint(Import(tmp_path / "src", tmp_path / "orbax"), log=silent)
    with pytest.raises(ConversionError, match=r"VAE.pth can't say .*latent_std=\[2.0.*--only"):
        export_checkpoint(Export(tmp_path / "orbax", tmp_path / "out", "wan"), log=silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["orbax", "src"]


def test_a_damaged_checkpoint_is_named_and_nothing_is_left(tmp_path):
    write_wan(tmp_path / "src", random_tensors("dit", PLAIN))
    import_checkpoint(Import(tmp_path / "src", tmp_path / "orbax"), log=silent)
    for file in (tmp_path / "orbax" / "dit" / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ConversionError, match="orbax/dit: not a complete Orbax checkpoint"):
        export_checkpoint(Export(tmp_path / "orbax", tmp_path / "out", "wan"), log=silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["orbax", "src"]


def test_shards_are_cut_by_size_and_large_tensors_stand_alone(tmp_path):
    def tensor(name, size):
        value = np.arange(size, dtype=np.float32)
        return Tensor(name, (size,), value.dtype, lambda: value)

    tensors = [tensor(name, size) for name, size in (("a", 3), ("b", 2), ("c", 9), ("d", 1))]
    assert [[t.name for t in shard] for shard in cut(tensors, 20)] == [["a", "b"], ["c"], ["d"]]
    written = []
    write_shards(tmp_path, "model", tensors, 20, written.append)
    assert written == [12, 8, 36, 4]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 60
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "numpy") as opened:
            np.testing.assert_array_equal(
                opened.get_tensor(name), {t.name: t.read() for t in tensors}[name]
            )


def test_a_tensor_of_another_shape_than_announced_is_an_error(tmp_path):
    wrong = Tensor("a", (3,), np.dtype(np.float32), lambda: np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=r"a: \(4,\) to write, announced \(3,\)"):
        write_shards(tmp_path, "model", [wrong])
