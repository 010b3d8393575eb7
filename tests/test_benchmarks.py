"""The benchmarks run in their small form and print one line of JSON with what they promise."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "module, arguments, positive",
    [
        ("train_step", ["--repeats=1"], ["seconds per step", "loss", "grad_norm"]),
        ("umt5", ["--repeats=1"], ["seconds", "TFLOP", "error against float32 matmuls"]),
        ("vae", ["--repeats=1"], ["encode TFLOP", "decode TFLOP", "decode error of bfloat16"]),
        ("vae_convolutions", ["--small"], []),
        ("loader", ["--batches=3", "--steps=2"], ["raw clips/s", "cached share of waiting"]),
        ("sampling", ["--chunks=3", "--steps=1"], ["ms per guided denoise step", "ms per commit"]),
    ],
)
def test_small_form(module, arguments, positive):
    command = [sys.executable, "-m", f"benchmarks.{module}", "--small", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.strip().splitlines()[-1])
    assert result["benchmark"] == module
    assert all(math.isfinite(result[name]) and result[name] > 0 for name in positive)
