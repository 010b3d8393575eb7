"""Every way a checkpoint can be wrong: the message names file or tensor, and nothing is left."""

import os
import pickle
import zipfile

import numpy as np
import pytest
from convert_fixtures import (
    CONFIG_JSON,
    PLAIN,
    STEM,
    TEXT,
    VAE,
    random_tensors,
    write_pt,
    write_wan,
)

from lact_jax.convert import (
    Export,
    Import,
    export_checkpoint,
    import_checkpoint,
    load_dit,
    parse_options,
)
from lact_jax.convert.errors import ConversionError, in_few_lines

TENSORS = random_tensors("dit", PLAIN)


def silent(_):
    """A log that nobody reads."""


def missing_shard(src):
    write_wan(src, TENSORS, shards=3)
    (src / f"{STEM}-00002-of-00003.safetensors").unlink()


def missing_shard_without_index(src):
    missing_shard(src)
    (src / f"{STEM}.safetensors.index.json").unlink()


def damaged_index(src):
    write_wan(src, TENSORS, shards=3)
    (src / f"{STEM}.safetensors.index.json").write_text('{"weight_map": [')


def tensor_in_another_shard(src):
    write_wan(src, TENSORS, shards=2)
    index = src / f"{STEM}.safetensors.index.json"
    name = sorted(TENSORS)[0]
    text = index.read_text()
    first, second = f"{STEM}-00001-of-00002", f"{STEM}-00002-of-00002"
    index.write_text(text.replace(f'"{name}": "{first}', f'"{name}": "{second}'))


def extra_missing_and_transposed(src):
    tensors = dict(TENSORS, **{"img_emb.proj.0.weight": np.zeros((3, 2), np.float32)})
    del tensors["blocks.1.norm3.bias"], tensors["blocks.2.norm3.bias"]
    tensors["blocks.3.ffn.0.weight"] = np.ascontiguousarray(tensors["blocks.3.ffn.0.weight"].T)
    write_wan(src, tensors)


def integers(src):
    write_wan(src, TENSORS | {"head.head.bias": np.zeros(16, np.int32)})


def large_under_small_config(src):
    write_wan(src, TENSORS, CONFIG_JSON | {"dim": 12, "ffn_dim": 20, "num_layers": 3})


def image_to_video(src):
    write_wan(src, TENSORS, CONFIG_JSON | {"model_type": "i2v", "in_dim": 36, "out_dim": 16})


def truncated_safetensors(src):
    write_wan(src, TENSORS)
    file = src / f"{STEM}.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def git_lfs_pointer(src):
    write_wan(src, TENSORS)
    (src / f"{STEM}.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")


def truncated_pth(src):
    file = write_pt(src / "Wan2.1_VAE.pth", random_tensors("vae", VAE))
    os.truncate(file, file.stat().st_size - 100)


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def pickle_with_code(src):
    src.mkdir()
    with zipfile.ZipFile(src / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": Evil()}, protocol=2))


def two_prefixes(src):
    tensors = {"head.head.bias": TENSORS["head.head.bias"]}
    both = {f"{prefix}{k}": v for prefix in ("", "module.") for k, v in tensors.items()}
    write_pt(src / "model.pt", both)


def no_head_count(src):
    write_pt(src / "model.pt", TENSORS)


def not_a_dit(src):
    write_wan(src, {"weight": np.zeros((2, 2), np.float32)})


def nothing_known(src):
    src.mkdir()
    (src / "model.ckpt").write_bytes(b"")


def two_checkpoints(src):
    write_wan(src, TENSORS)
    write_pt(src / "model.pt", TENSORS)


def all_components_wrong(src):
    write_wan(src, TENSORS | {"surplus.a": np.zeros(2, np.float32)})
    vae, text = random_tensors("vae", VAE), random_tensors("text", TEXT)
    del vae["encoder.middle.1.proj.bias"], text["blocks.1.norm2.weight"]
    write_pt(src / "Wan2.1_VAE.pth", vae)
    write_pt(src / "models_t5_umt5-xxl-enc-bf16.pth", text)


WRONG = {
    missing_shard: ["1 of 3 shards are missing", f"{STEM}-00002-of-00003.safetensors"],
    missing_shard_without_index: ["1 of 3 shards", f"{STEM}-00002-of-00003.safetensors"],
    damaged_index: [f"{STEM}.safetensors.index.json: damaged"],
    tensor_in_another_shard: [sorted(TENSORS)[0], f"not in {STEM}-00002-of-00002.safetensors"],
    extra_missing_and_transposed: [
        "4 tensors do not fit",
        f"img_emb.proj.0.weight: unexpected ((3, 2) in {STEM}.safetensors)",
        "blocks.{1-2}.norm3.bias: missing (need (24,))",
        f"blocks.3.ffn.0.weight: has (24, 40) in {STEM}.safetensors, need (40, 24) (transposed?)",
    ],
    integers: ["head.head.bias", "is not float32, float16 or bfloat16"],
    large_under_small_config: [
        "dim: 12 in ", "config.json, 24 by the tensors' shapes",
        "num_layers: 3 in ", "ffn_dim: 20 in ",
        "blocks.{0-2}.ffn.0.weight: has (40, 24)", "need (20, 12)",
        "blocks.3.ffn.0.weight: unexpected",
    ],
    image_to_video: ["config.json", "model_type='i2v'", "need 't2v'"],
    truncated_safetensors: [f"{STEM}.safetensors: truncated or damaged"],
    git_lfs_pointer: [f"{STEM}.safetensors: a git-lfs pointer"],
    truncated_pth: ["Wan2.1_VAE.pth", "truncated"],
    pickle_with_code: ["model.pt: refused", "posix.system", "nothing was executed"],
    two_prefixes: ["head.head.bias", "module.head.head.bias"],
    no_head_count: ["dim=24", "--model=num_heads=N"],
    not_a_dit: ["not a Wan DiT", "patch_embedding.weight"],
    nothing_known: ["not a Wan2.1 folder", "it holds model.ckpt"],
    two_checkpoints: ["several checkpoints", "wan (dit)", "lact (dit)"],
    all_components_wrong: [
        "surplus.a: unexpected",
        "vae: 1 tensors do not fit", "encoder.middle.1.proj.bias: missing",
        "text: 1 tensors do not fit", "blocks.1.norm2.weight: missing",
    ],
}  # fmt: skip


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_wrong_sources(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "src")
    with pytest.raises(ValueError) as caught:
        import_checkpoint(Import(tmp_path / "src", tmp_path / "out"), log=silent)
    for part in WRONG[make]:
        assert part in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_no_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        import_checkpoint(Import(tmp_path / "nowhere", tmp_path / "out"), log=silent)


WRONG_OPTIONS = {
    "only": (dict(only=("dit", "clip")), "--only=clip: choose from dit, vae, text"),
    "absent": (dict(only=("vae",)), "--only=vae: not in the source, which has dit"),
    "dtype": (dict(dtype="int8"), "--dtype=int8: choose one of source, float32"),
    "dst": (dict(dst=None), "--dst is missing"),
    "lact": (
        dict(options=parse_options("", "fw_head_dim=7")), "fw_head_dim=7 does not divide",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options(case, tmp_path):
    changes, message = WRONG_OPTIONS[case]
    write_wan(tmp_path / "src", TENSORS)
    task = dict(src=tmp_path / "src", dst=tmp_path / "out") | changes
    with pytest.raises(ConversionError, match=message):
        import_checkpoint(Import(**task), log=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("to", ["wan", "diffusers"])
def test_a_position_embedding_which_wan_has_not(to, tmp_path):
    write_wan(tmp_path / "src", TENSORS)
    options = parse_options("position_embedding=true", None)
    converted = tmp_path / "converted"
    import_checkpoint(Import(tmp_path / "src", converted, options=options), log=silent)
    with pytest.raises(ConversionError, match=f"--to={to}: .*converted .*model.position_embedding"):
        export_checkpoint(Export(converted, tmp_path / "out", to), log=silent)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConversionError, match="position_embedding: True in the file, False asked"):
        load_dit(converted, PLAIN)


@pytest.mark.parametrize(
    ("model", "lact", "message"),
    [("dims=3", None, "--model: 'dims=3'.*'dim'"), ("", "muon", "--lact: 'muon'")],
)
def test_wrong_option_names(model, lact, message):
    with pytest.raises(ConversionError, match=message):
        parse_options(model, lact)


def test_options_are_parsed_by_value():
    options = parse_options("num_heads=4, eps=1e-5", "muon=true,w_init=identity,kv_cache_size=none")
    assert options.model == {"num_heads": 4, "eps": 1e-5}
    assert options.lact == {"muon": True, "w_init": "identity", "kv_cache_size": None}


def test_alike_lines_are_put_together():
    pairs = [(f"blocks.{i}.q.weight", "missing") for i in (0, 1, 2, 5)]
    pairs += [("blocks.7.q.weight", "short"), ("head.bias", "missing")]
    assert in_few_lines(pairs) == [
        "blocks.{0-2,5}.q.weight: missing",
        "blocks.7.q.weight: short",
        "head.bias: missing",
    ]
