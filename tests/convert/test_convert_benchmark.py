"""benchmarks/convert.py in its smallest size: an official folder, in, loaded, and out again."""

import subprocess
import sys

import numpy as np
import pytest

from benchmarks import convert as benchmark
from lact_jax.convert import Export, Import, export_checkpoint, import_checkpoint
from lact_jax.convert.layouts import recognise

MEMORY = 200 * 2**20
pytestmark = pytest.mark.usefixtures("quick_compile")
HOLDS_MEMORY = f"""
import sys
held = b"x" * {MEMORY}
print(len(held), flush=True)
sys.stdin.read()
"""


class Pipe:
    """What the loading process sends."""

    def __init__(self):
        self.sent = []

    def send(self, value):
        self.sent.append(value)


@pytest.fixture
def source(tmp_path):
    checkpoint = benchmark.Checkpoint("tiny")
    nbytes = benchmark.write_source(tmp_path / "src", checkpoint)
    assert nbytes > 8e6
    return checkpoint, tmp_path / "src"


def count(source, name):
    return sum(int(np.prod(tensor.shape)) for _, tensor in source.tensors(name))


def test_official_folder_in_loaded_and_out(source, tmp_path):
    """What the benchmark compares is equal, and what differs it notices."""
    checkpoint, src = source
    assert {path.name for path in src.iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors", "google", "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
    }  # fmt: skip
    assert recognise(src).layout == "wan"
    import_checkpoint(Import(src, tmp_path / "orbax"), log=lambda _: None)
    parameters = {name: count(checkpoint, name) for name in ("dit", "vae", "text")}
    assert benchmark.compare_orbax(tmp_path / "orbax", checkpoint) == sum(parameters.values())

    pipe = Pipe()
    benchmark._load(tmp_path / "orbax", checkpoint, pipe)
    imported, (read, drawn) = pipe.sent
    assert imported == "imported" and read == parameters["dit"] and drawn > 0

    export_checkpoint(Export(tmp_path / "orbax", tmp_path / "out", "wan"), log=lambda _: None)
    assert benchmark.compare_export(tmp_path / "out", checkpoint) == sum(parameters.values())
    vae = tmp_path / "out" / "Wan2.1_VAE.pth"
    damaged = bytearray(vae.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    vae.write_bytes(damaged)
    with pytest.raises(SystemExit, match="differs from the source"):
        benchmark.compare_export(tmp_path / "out", checkpoint)


def test_memory_of_another_process_is_seen():
    command = [sys.executable, "-S", "-c", HOLDS_MEMORY]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as run:
        with benchmark.watched(run.pid) as usage:
            assert int(run.stdout.readline()) == MEMORY
        run.stdin.close()
    assert MEMORY < usage.peak < 1.5 * MEMORY
    assert usage.seconds > 0
