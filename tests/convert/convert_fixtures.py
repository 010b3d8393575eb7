"""Small random checkpoints as the PyTorch world writes them, made without PyTorch."""

import json
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from lact_jax.convert.components import COMPONENTS, flat, torch_shape
from lact_jax.models.dit import DiTConfig
from lact_jax.models.lact import LaCTConfig
from lact_jax.models.umt5 import UMT5Config
from lact_jax.models.vae import VAEConfig

BF16 = np.dtype(ml_dtypes.bfloat16)
PLAIN = DiTConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=4, freq_dim=16, text_dim=8, text_len=6,
    latent_channels=4, mixer="full", dtype="float32", remat="none",
)  # fmt: skip
LACT = LaCTConfig(fw_head_dim=12)
VAE = VAEConfig(dim=8)
TEXT = UMT5Config(
    vocab_size=50, dim=16, dim_attn=24, dim_ffn=20, num_heads=4, num_layers=2, num_buckets=16
)
STEM = "diffusion_pytorch_model"
CONFIG_JSON = {
    "_class_name": "WanModel", "model_type": "t2v", "dim": 24, "num_heads": 2, "num_layers": 4,
    "ffn_dim": 40, "freq_dim": 16, "in_dim": 4, "out_dim": 4, "text_len": 6, "eps": 1e-6,
}  # fmt: skip


def random_tensors(component, config, names="wan", dtype=BF16, seed=0):
    """Every tensor of a component under its PyTorch name, random."""
    rng = np.random.default_rng(seed)
    leaves = flat(COMPONENTS[component].abstract(config))
    return {
        entry.name: rng.standard_normal(torch_shape(entry, leaves[entry.path].shape)).astype(dtype)
        for entry in COMPONENTS[component].entries(config, names)
    }


def write_wan(folder: Path, tensors, config_json=CONFIG_JSON, shards=1):
    """An official folder: safetensors, an index when sharded, config.json."""
    folder.mkdir(parents=True)
    if config_json is not None:
        (folder / "config.json").write_text(json.dumps(config_json))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / f"{STEM}.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"{STEM}-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_all(files):
    """The tensors of safetensors files."""
    tensors = {}
    for path in files:
        with safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            assert not tensors.keys() & set(file.keys())
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def assert_same(got, want):
    """The same names, dtypes, shapes and bits."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        assert got[name].tobytes() == value.tobytes(), name


# What torch.save writes: a zip file of a pickle, which names storages, and their bytes.

_STORAGE = {np.dtype(np.float32): "FloatStorage", BF16: "BFloat16Storage"}


class _Global:
    def __init__(self, module, name):
        self.module, self.name = module, name


class _Pickler(pickle._Pickler):
    """Writes globals by name, without importing them."""

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, _Storage) else None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, _Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, _Tensor):
            self.save(_Global("torch._utils", "_rebuild_tensor_v2"))
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


class _Storage:
    def __init__(self, key, array):
        kind = _Global("torch", _STORAGE[array.dtype])
        self.pid = ("storage", kind, key, "cpu", array.size)


class _Tensor:
    def __init__(self, key, array):
        strides = tuple(s // array.itemsize for s in array.strides)
        self.arguments = (_Storage(key, array), 0, array.shape, strides, False, {})


def write_pt(path: Path, tensors, wrap=lambda tree: tree):
    """A .pt file of a state dict; `wrap` may put it into other containers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {str(i): np.ascontiguousarray(value) for i, value in enumerate(tensors.values())}
    tree = {name: _Tensor(key, arrays[key]) for name, key in zip(tensors, arrays, strict=True)}
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("archive/data.pkl", "w") as file:
            _Pickler(file, protocol=2).dump(wrap(tree))
        for key, array in arrays.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return path
