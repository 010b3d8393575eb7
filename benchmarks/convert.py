"""Converts a full-size checkpoint of random weights, in and out: time and peak memory.

    python benchmarks/convert.py --size=1.3b --load --folder=SCRATCH
    python benchmarks/convert.py --size=14b --only=dit --dtype=bfloat16 --folder=SCRATCH

Writes a source with the true file and tensor names, shapes and types, converts it with
convert_wan_weights.py in a process of its own whose memory is watched, compares every tensor of the
result with the source, exports it again and compares that. With --load the DiT is also loaded into
the parameters of a LaCT model, as training starts. Each stage's input is deleted when it is no
longer needed, so the disk holds two copies at a time (1.3b: 36 GB). Anonymous memory is what
counts: pages of mapped files are the page cache's. Linux only.
"""

import contextlib
import dataclasses
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from absl import app, flags, logging
from tokenizers import Tokenizer, models

from lact_jax.convert import load_dit, missing_parameters
from lact_jax.convert.components import COMPONENTS, flat, torch_shape
from lact_jax.convert.exporting import TARGETS, write_component
from lact_jax.convert.layouts import TOKENIZERS, recognise
from lact_jax.convert.shards import Tensor
from lact_jax.convert.stream import read_stream, stored_layout
from lact_jax.convert.tensors import open_tensors
from lact_jax.models.dit import DiTConfig
from lact_jax.models.lact import LaCTConfig
from lact_jax.models.umt5 import UMT5Config
from lact_jax.models.vae import VAEConfig

MODELS = {
    "tiny": DiTConfig(dim=128, ffn_dim=512, num_heads=4, num_layers=4, mixer="full"),
    "1.3b": DiTConfig(mixer="full"),
    "14b": DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, mixer="full"),
}
FAST_WEIGHT_HEADS = {"tiny": 64, "1.3b": 768, "14b": 1280}
TINY_TEXT = UMT5Config(vocab_size=500, dim=64, dim_attn=64, dim_ffn=96, num_heads=4, num_layers=2)
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
PUBLISHED = {"dit": F32, "vae": F32, "text": BF16}
DTYPES = {
    "published": PUBLISHED,
    "float32": dict.fromkeys(PUBLISHED, F32),
    "bfloat16": dict.fromkeys(PUBLISHED, BF16),
}
SCRIPT = Path(__file__).parents[1] / "convert_wan_weights.py"
# A tensor is a slice of one of these many random values, or is made of repetitions of the larger.
POOLS = (2_000_003, 60_000_011)
BLOCK = 2**26

SIZE = flags.DEFINE_enum("size", "tiny", list(MODELS), "Of the DiT; not tiny: UMT5-XXL with it.")
LAYOUT = flags.DEFINE_enum("layout", "wan", list(TARGETS), "Of the source and of the export.")
ONLY = flags.DEFINE_list("only", list(PUBLISHED), "The components of the source.")
DTYPE = flags.DEFINE_enum("dtype", "published", list(DTYPES), "Of the source's tensors.")
LOAD = flags.DEFINE_bool("load", False, "Load the DiT into float32 parameters with new LaCT ones.")
FOLDER = flags.DEFINE_string("folder", None, "Scratch; must not exist.")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What the source is: a key of MODELS, of TARGETS and of DTYPES, and its components."""

    size: str
    layout: str = "wan"
    only: tuple[str, ...] = tuple(PUBLISHED)
    dtype: str = "published"

    def configs(self) -> dict:
        """The config of every component."""
        text = TINY_TEXT if self.size == "tiny" else UMT5Config()
        vae = VAEConfig(dim=8 if self.size == "tiny" else 96)
        every = {"dit": MODELS[self.size], "vae": vae, "text": text}
        return {name: every[name] for name in self.only}

    def tensors(self, name: str) -> Iterator[tuple[object, Tensor]]:
        """The table's entries and the tensors of a component."""
        config, dtype = self.configs()[name], DTYPES[self.dtype][name]
        shapes = {path: x.shape for path, x in flat(COMPONENTS[name].abstract(config)).items()}
        for entry in COMPONENTS[name].entries(config, self.layout):
            yield entry, random_tensor(entry.name, torch_shape(entry, shapes[entry.path]), dtype)


@lru_cache
def _pool(count: int, dtype: np.dtype) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(count, np.float32)
    return (values * np.float32(0.02)).astype(dtype)


def random_tensor(name: str, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    """Normal values that only the name decides: made again where they are compared."""
    size = int(np.prod(shape))
    count = next((n for n in POOLS if 2 * size < n), POOLS[-1])

    def read() -> np.ndarray:
        pool = _pool(count, dtype)
        start = zlib.crc32(name.encode()) % (count // 2)
        part = pool[start : start + size]  # a view: nothing is copied
        return part.reshape(shape) if part.size == size else np.resize(pool[start:], shape)

    return Tensor(name, shape, dtype, read)


def write_source(folder: Path, source: Checkpoint) -> int:
    """A checkpoint of random weights, with a tokenizer of a word; returns its size in bytes."""
    for name, config in source.configs().items():
        tensors = [tensor for _, tensor in source.tensors(name)]
        write_component(folder, TARGETS[source.layout][name], config, tensors)
    if "text" in source.only:
        home = folder / TOKENIZERS[source.layout]
        home.mkdir(parents=True)
        tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        tokenizer.save(str(home / "tokenizer.json"))
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = (line.split() for line in status.splitlines())
    return next((1024 * int(line[1]) for line in lines if line[:1] == ["RssAnon:"]), 0)


@dataclasses.dataclass
class Usage:
    """Seconds, and the peak of a process's anonymous memory in bytes."""

    seconds: float = 0.0
    peak: int = 0


@contextlib.contextmanager
def watched(pid: int) -> Iterator[Usage]:
    """Measures a process while the block waits for it."""
    usage, ended, start = Usage(), threading.Event(), time.monotonic()

    def watch():
        while not ended.wait(0.05):
            usage.peak = max(usage.peak, _anonymous_bytes(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield usage
    finally:
        usage.peak = max(usage.peak, _anonymous_bytes(pid))
        ended.set()
        watcher.join()
        usage.seconds = time.monotonic() - start


def convert(*arguments: str) -> Usage:
    """Runs convert_wan_weights.py."""
    run = subprocess.Popen([sys.executable, SCRIPT, *arguments], stdout=subprocess.DEVNULL)
    with watched(run.pid) as usage:
        status = run.wait()
    if status:
        sys.exit(f"convert_wan_weights.py {' '.join(arguments)}: exit status {status}")
    return usage


def compare_orbax(folder: Path, source: Checkpoint) -> int:
    """Compares every tensor with the source's; returns how many parameters there are."""
    count = 0
    for name in source.only:
        arrays = read_stream(folder / name, stored_layout(folder / name))
        for entry, tensor in source.tensors(name):
            _expect_equal(tensor, entry.to_torch(arrays[entry.path].read(entry.layer)))
            count += int(np.prod(tensor.shape))
    return count


def compare_export(folder: Path, source: Checkpoint) -> int:
    """As `compare_orbax`, for a folder of the source's layout."""
    count, parts = 0, recognise(folder).parts
    for name in source.only:
        refs = open_tensors(parts[name].files)
        for _, tensor in source.tensors(name):
            _expect_equal(tensor, refs.pop(tensor.name).read())
            count += int(np.prod(tensor.shape))
        if refs:
            sys.exit(f"{folder}: unexpected {sorted(refs)}")
    return count


def _expect_equal(tensor: Tensor, got: np.ndarray) -> None:
    """Bit by bit, in blocks: the largest tensor is 2 GB."""
    if (got.shape, got.dtype) != (tensor.shape, tensor.dtype):
        sys.exit(f"{tensor.name}: {got.dtype} {got.shape}, not {tensor.dtype} {tensor.shape}")
    bits = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (got, tensor.read())]
    if not all(
        np.array_equal(*(x[start : start + BLOCK] for x in bits))
        for start in range(0, tensor.nbytes, BLOCK)
    ):
        sys.exit(f"{tensor.name}: differs from the source")


def lact_model(size: str) -> DiTConfig:
    """The model that training starts from a plain checkpoint of this size."""
    lact = LaCTConfig(fw_head_dim=FAST_WEIGHT_HEADS[size])
    return dataclasses.replace(MODELS[size], mixer="lact", lact=(lact,))


def load(folder: Path, source: Checkpoint) -> Usage:
    """`load_dit` in a process of its own, which then compares; prints the parameters."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_load, args=(folder, source, theirs))
    process.start()
    theirs.close()
    ours.recv()  # imported
    with watched(process.pid) as usage:
        copied, fresh = ours.recv()
    print(f"load: {copied:,} float32 parameters read and {fresh:,} drawn", flush=True)
    process.join()
    if process.exitcode:
        sys.exit("load: failed")
    return usage


def _load(folder: Path, source: Checkpoint, pipe) -> None:
    jax.config.update("jax_platforms", "cpu")
    config = lact_model(source.size)
    pipe.send("imported")
    params = flat(jax.block_until_ready(load_dit(folder, config)))
    drawn = set(missing_parameters(folder, config))
    count = {True: 0, False: 0}
    for path, value in params.items():
        count["/".join(path) in drawn] += value.size
    pipe.send((count[False], count[True]))
    names = {entry.name: entry for entry in COMPONENTS["dit"].entries(config, source.layout)}
    for entry, tensor in source.tensors("dit"):
        here = names[entry.name]
        value = np.asarray(params[here.path])
        got = here.to_torch(value if here.layer is None else value[here.layer])
        wide = Tensor(tensor.name, tensor.shape, F32, lambda t=tensor: t.read().astype(F32))
        _expect_equal(wide, got)


def report(stage: str, nbytes: int, usage: Usage) -> None:
    """Prints a stage's figures."""
    print(
        f"{stage}: {nbytes / 1e9:.2f} GB in {usage.seconds:.1f} s "
        f"({nbytes / usage.seconds / 1e6:.0f} MB/s), "
        f"peak anonymous memory {usage.peak / 1e9:.2f} GB",
        flush=True,
    )


def run(folder: Path, source: Checkpoint, with_load: bool) -> None:
    """All stages, in and below `folder`."""
    original, orbax, export = (folder / name for name in ("source", "orbax", "export"))
    nbytes = write_source(original, source)
    print(f"source: {nbytes / 1e9:.2f} GB", flush=True)
    report("in", nbytes, convert(f"--src={original}", f"--dst={orbax}"))
    shutil.rmtree(original)
    print(f"  {compare_orbax(orbax, source):,} parameters, all bit-equal to the source")
    if with_load:
        size = sum(t.nbytes for _, t in source.tensors("dit"))
        report("load", size, load(orbax, source))
    report("out", nbytes, convert(f"--src={orbax}", f"--dst={export}", f"--to={source.layout}"))
    shutil.rmtree(orbax)
    print(f"  {compare_export(export, source):,} parameters, all bit-equal to the source")


def main(_):
    logging.set_verbosity(logging.WARNING)
    if not FOLDER.value:
        raise app.UsageError("--folder=SCRATCH: name a folder that does not exist yet")
    folder = Path(FOLDER.value)
    source = Checkpoint(SIZE.value, LAYOUT.value, tuple(ONLY.value), DTYPE.value)
    folder.mkdir(parents=True)
    try:
        run(folder, source, LOAD.value)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    app.run(main)
