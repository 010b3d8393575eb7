"""Converts a full-size checkpoint of random bfloat16 weights, in and out: time and peak memory.

    python benchmarks/convert.py --size=14b --folder=SCRATCH

Writes a source with the true tensor names and shapes, converts it with convert_wan_weights.py in a
process of its own whose memory is watched, compares every tensor of the result with the source,
exports it again and compares that. Each stage's input is deleted when it is no longer needed, so
the disk holds two copies at a time (14b: 60 GB). Anonymous memory is what counts: pages of mapped
files are the page cache's. Linux only.
"""

import json
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import app, flags, logging
from safetensors import safe_open

from lact_jax.convert.components import COMPONENTS, flat, torch_shape
from lact_jax.convert.exporting import TARGETS
from lact_jax.convert.shards import Tensor, write_shards
from lact_jax.convert.stream import read_stream, stored_layout
from lact_jax.models.dit import DiTConfig
from lact_jax.models.umt5 import UMT5Config
from lact_jax.models.vae import VAEConfig

MODELS = {
    "tiny": DiTConfig(dim=128, ffn_dim=512, num_heads=4, num_layers=4, mixer="full"),
    "1.3b": DiTConfig(mixer="full"),
    "14b": DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, mixer="full"),
}
TINY_TEXT = UMT5Config(vocab_size=500, dim=64, dim_attn=64, dim_ffn=96, num_heads=4, num_layers=2)
BF16 = np.dtype(ml_dtypes.bfloat16)
SCRIPT = Path(__file__).parents[1] / "convert_wan_weights.py"

SIZE = flags.DEFINE_enum("size", "tiny", list(MODELS), "Of the DiT.")
LAYOUT = flags.DEFINE_enum(
    "layout", "wan", list(TARGETS), "wan: the DiT; diffusers: VAE and UMT5-XXL as well."
)
FOLDER = flags.DEFINE_string("folder", None, "Scratch; must not exist.", required=True)


def configs(size: str, layout: str) -> dict:
    """The config of every component that the layout holds."""
    text = TINY_TEXT if size == "tiny" else UMT5Config()
    every = {"dit": MODELS[size], "vae": VAEConfig(dim=96 if size != "tiny" else 8), "text": text}
    return {name: every[name] for name in TARGETS[layout]}


@lru_cache
def _pool() -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(2**25, np.float32)
    return (values * np.float32(0.02)).astype(BF16)


def random_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal values that only the name decides: made again where they are compared."""
    pool = _pool()
    start = zlib.crc32(name.encode()) % (pool.size // 2)
    return np.resize(pool[start:], shape)


def tensors(name: str, config, layout: str) -> Iterator[tuple[object, Tensor]]:
    """The table's entries and the tensors of a component."""
    shapes = {path: x.shape for path, x in flat(COMPONENTS[name].abstract(config)).items()}
    for entry in COMPONENTS[name].entries(config, layout):
        shape = torch_shape(entry, shapes[entry.path])
        yield (
            entry,
            Tensor(entry.name, shape, BF16, lambda n=entry.name, s=shape: random_weight(n, s)),
        )


def write_source(folder: Path, size: str, layout: str) -> None:
    """A checkpoint of random weights."""
    for name, config in configs(size, layout).items():
        place = TARGETS[layout][name]
        home = folder / place.folder
        home.mkdir(parents=True, exist_ok=True)
        write_shards(home, place.stem, [tensor for _, tensor in tensors(name, config, layout)])
        (home / "config.json").write_text(json.dumps(place.config_json(config)))


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = (line.split() for line in status.splitlines())
    return next((1024 * int(line[1]) for line in lines if line[:1] == ["RssAnon:"]), 0)


def watched(*arguments: str) -> tuple[float, int]:
    """Runs convert_wan_weights.py; returns (seconds, peak of its anonymous memory in bytes)."""
    start = time.monotonic()
    run = subprocess.Popen([sys.executable, SCRIPT, *arguments], stdout=subprocess.DEVNULL)
    peak, ended = 0, threading.Event()

    def watch():
        nonlocal peak
        while not ended.wait(0.05):
            peak = max(peak, _anonymous_bytes(run.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = run.wait()
    ended.set()
    watcher.join()
    if status:
        sys.exit(f"convert_wan_weights.py {' '.join(arguments)}: exit status {status}")
    return time.monotonic() - start, peak


def compare_orbax(folder: Path, size: str, layout: str) -> int:
    """Compares every tensor with the source's; returns how many parameters there are."""
    count = 0
    for name, config in configs(size, layout).items():
        arrays = read_stream(folder / name, stored_layout(folder / name))
        for entry, tensor in tensors(name, config, layout):
            _expect_equal(tensor, entry.to_torch(arrays[entry.path].read(entry.layer)))
            count += int(np.prod(tensor.shape))
    return count


def compare_export(folder: Path, size: str, layout: str) -> int:
    """As `compare_orbax`, for safetensors."""
    count = 0
    for name, config in configs(size, layout).items():
        place = TARGETS[layout][name]
        files = (folder / place.folder).glob(f"{place.stem}*.safetensors")
        opened = [safe_open(file, "numpy") for file in files]
        holder = {key: file for file in opened for key in file.keys()}
        for _, tensor in tensors(name, config, layout):
            _expect_equal(tensor, holder.pop(tensor.name).get_tensor(tensor.name))
            count += int(np.prod(tensor.shape))
        if holder:
            sys.exit(f"{folder}: unexpected {sorted(holder)}")
    return count


def _expect_equal(tensor: Tensor, got: np.ndarray) -> None:
    bits = np.ascontiguousarray(got).view(np.uint16)
    if not np.array_equal(bits, tensor.read().view(np.uint16)):
        sys.exit(f"{tensor.name}: differs from the source")


def stage(name: str, nbytes: int, result: tuple[float, int], compare: Callable[[], int]) -> None:
    """Prints a stage's figures after comparing its result."""
    seconds, peak = result
    rate = nbytes / seconds / 1e6
    print(
        f"{name}: {nbytes / 1e9:.2f} GB in {seconds:.0f} s ({rate:.0f} MB/s), "
        f"peak anonymous memory {peak / 1e9:.2f} GB",
        flush=True,
    )
    print(f"  {compare():,} parameters, all bit-equal to the source", flush=True)


def main(_):
    logging.set_verbosity(logging.WARNING)
    folder, size, layout = Path(FOLDER.value), SIZE.value, LAYOUT.value
    folder.mkdir(parents=True)
    source, orbax, export = (str(folder / name) for name in ("source", "orbax", "export"))
    try:
        write_source(Path(source), size, layout)
        nbytes = sum(f.stat().st_size for f in Path(source).rglob("*.safetensors"))
        result = watched(f"--src={source}", f"--dst={orbax}")
        shutil.rmtree(source)
        stage("in", nbytes, result, lambda: compare_orbax(Path(orbax), size, layout))
        result = watched(f"--src={orbax}", f"--dst={export}", f"--to={layout}")
        shutil.rmtree(orbax)
        stage("out", nbytes, result, lambda: compare_export(Path(export), size, layout))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    app.run(main)
