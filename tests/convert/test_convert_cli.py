"""The script: what it prints, how it ends, and what it leaves when it is stopped."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from convert_fixtures import (
    CONFIG_JSON,
    PLAIN,
    STEM,
    assert_same,
    random_tensors,
    read_all,
    write_wan,
)

ROOT = Path(__file__).parents[2]


def start(*arguments):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    return subprocess.Popen(
        [sys.executable, str(ROOT / "convert_wan_weights.py"), *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_in_and_out_and_errors(tmp_path):
    """Both directions by flags; an error ends with 1 and its message."""
    tensors = random_tensors("dit", PLAIN)
    write_wan(tmp_path / "src", tensors)
    bad = write_wan(tmp_path / "bad", tensors | {"surplus": np.zeros(2, np.float32)})
    runs = [
        start(f"--src={tmp_path / 'src'}", f"--dst={tmp_path / 'out'}"),
        start(f"--src={bad}", f"--dst={tmp_path / 'none'}"),
    ]
    (output, errors), (_, complaint) = (run.communicate() for run in runs)
    assert runs[0].returncode == 0, errors
    assert "dit/blocks/0/ffn/fc1/kernel" in output and f"wrote {tmp_path / 'out'}" in output
    assert "converting: 100%" in errors
    assert runs[1].returncode == 1
    assert "error:" in complaint and "surplus: unexpected" in complaint
    assert "Traceback" not in complaint
    back = start(f"--src={tmp_path / 'out'}", f"--dst={tmp_path / 'back'}", "--to=wan")
    _, errors = back.communicate()
    assert back.returncode == 0, errors
    assert_same(read_all([tmp_path / "back" / f"{STEM}.safetensors"]), tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "bad", "out", "src"]


def test_stopped_half_way_it_leaves_nothing(tmp_path):
    """Stopped when the progress bar appears: some of 200 MB are written then, or none.

    A killed run can't clean up. It leaves a folder of another name, which the next run removes.
    """
    shapes = random_tensors("dit", PLAIN)
    tensors = {
        name: np.zeros([2**18 if n == PLAIN.ffn_dim else n for n in value.shape], np.float32)
        for name, value in shapes.items()
    }
    write_wan(tmp_path / "src", tensors, CONFIG_JSON | {"ffn_dim": 2**18})
    code, _, _ = stop_half_way(tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL
    left, src = sorted(path.name for path in tmp_path.iterdir())
    assert left.startswith(".out.unfinished-") and src == "src"
    code, output, errors = stop_half_way(tmp_path, signal.SIGINT)
    assert code == 128 + signal.SIGINT
    assert f"{left}, left by an interrupted conversion" in output
    assert "stopped: " in errors and "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def stop_half_way(folder, number):
    """Converts folder/src to folder/out, sends a signal; (exit status, output, errors)."""
    run = start(f"--src={folder / 'src'}", f"--dst={folder / 'out'}")
    seen = ""
    while "converting" not in seen:
        seen += run.stderr.read(1) or pytest.fail(f"it ended too early: {seen}")
    run.send_signal(number)
    output, errors = run.communicate()
    return run.returncode, output, errors
