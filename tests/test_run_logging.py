"""Metrics that compare bit for bit, their curves, the progress line, and wandb."""

import io
import json
import math
import os
import resource
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from lact_jax.run_logging import (
    MetricsWriter,
    ProgressBar,
    read_metrics,
    running_mean,
    write_curves,
)
from lact_jax.wandb_run import WandbOptions, api_key, start_run


def values(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {
        "loss": jnp.float32(rng.normal()),
        "by_chunk": jnp.asarray(rng.normal(size=3), jnp.bfloat16),
        "lr": float(rng.normal()) * 1e-5,
        "skipped": np.int32(step % 2),
    }


def write_steps(workdir, first: int, last: int, resume: int = 0) -> None:
    with MetricsWriter(workdir, resume) as writer:
        for step in range(first, last + 1):
            writer.write(step, values(step))
            writer.write_throughput(step, {"seconds": 0.1 * step})


def test_floats_come_back_bit_equal_from_valid_json(tmp_path):
    odd = {"a": math.nan, "b": -math.inf, "c": [1.0, math.inf], "d": -0.0, "e": 5e-324, "f": 2**60}
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, values(1))
        writer.write(2, odd)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert np.float32(first["loss"]).tobytes() == np.asarray(values(1)["loss"]).tobytes()
    chunks = np.asarray(first["by_chunk"], jnp.bfloat16)
    assert chunks.tobytes() == np.asarray(values(1)["by_chunk"]).tobytes()
    assert first["lr"] == values(1)["lr"] and first["skipped"] == 1 and first["step"] == 1
    del second["step"]
    assert repr(second) == repr(odd)


def test_a_resumed_run_leaves_the_bytes_of_an_uninterrupted_one(tmp_path):
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    write_steps(tmp_path / "once", 1, 9)
    write_steps(tmp_path / "twice", 1, 7)
    with open(tmp_path / "twice" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "loss": 0.1')  # killed while writing
    write_steps(tmp_path / "twice", 5, 9, resume=4)
    for name in ("metrics.jsonl", "throughput.jsonl"):
        once, twice = ((tmp_path / run / name).read_bytes() for run in ("once", "twice"))
        assert once == twice and once.count(b"\n") == 9


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', "{", "\0\0\0", '{"loss": 1.0}\n'])
def test_a_cut_off_last_line_is_dropped(tmp_path, tail):
    write_steps(tmp_path, 1, 2)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    write_steps(tmp_path, 3, 3, resume=2)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_fresh_start_drops_everything_and_a_reader_sees_each_line_at_once(tmp_path):
    write_steps(tmp_path, 1, 3)
    with MetricsWriter(tmp_path, 0) as writer:
        assert read_metrics(tmp_path / "metrics.jsonl") == []
        writer.write(1, {"loss": 2.0})
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_bad_lines_steps_and_values_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no metrics at .*metrics.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is damaged"):
        MetricsWriter(tmp_path, 2)
    (tmp_path / "metrics.jsonl").unlink()
    with MetricsWriter(tmp_path, 4) as writer:
        with pytest.raises(ValueError, match="step 4 after step 4"):
            writer.write(4, {"loss": 1.0})
        with pytest.raises(ValueError, match="metric name = 'x'"):
            writer.write(5, {"name": "x"})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_disk_full_names_the_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}/metrics.jsonl'"):
            writer.write(2, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.close()


def test_running_mean_is_that_of_the_last_tenth():
    values_N = np.random.default_rng(3).normal(size=2500)
    means_N = running_mean(values_N)
    for n, width in [(1, 1), (10, 1), (39, 3), (400, 40), (1000, 100), (2500, 100)]:
        np.testing.assert_allclose(means_N[n - 1], values_N[n - width : n].mean(), rtol=1e-9)


def test_curves_are_a_picture_that_follows_the_metrics_and_marks_what_is_not_finite(tmp_path):
    def red_pixels():
        picture = imread(write_curves(tmp_path))
        red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
        return picture, int(((red > 0.7) & (green < 0.4) & (blue < 0.4)).sum())

    with MetricsWriter(tmp_path) as writer:
        empty, _ = red_pixels()
        for step in range(1, 30):
            writer.write(step, {"loss": 1 / step, "grad_norm": 2.0 + step % 3, "lr": 1e-4 * step})
        drawn, marks = red_pixels()
        assert drawn.shape[0] > 500 and drawn.shape[1] > 500 and drawn.std() > 0.05
        assert not np.array_equal(empty, drawn) and marks == 0
        writer.write(30, {"loss": math.nan, "grad_norm": math.inf, "lr": 1e-4})
        _, marks = red_pixels()
        assert marks > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "loss.png",
        "metrics.jsonl",
        "throughput.jsonl",
    ]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_in_a_log_file_is_a_line_every_few_seconds_and_at_the_end():
    now = iter(np.arange(0.0, 100.0, 2.0))  # two seconds between looks at the clock
    log = io.StringIO()
    with ProgressBar(8, step=2, stream=log, seconds=5, clock=lambda: next(now)) as bar:
        for step in range(3, 9):
            bar.update(step, {"loss": jnp.float32(1 / step), "lr": 2e-5, "grad_norm": 1.25})
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue()
    assert [line.split(" ")[1] for line in lines] == ["5/8", "8/8"]
    assert lines[0] == "step 5/8 loss 0.2 lr 2e-05 grad_norm 1.25 0.38 steps/s"


def test_progress_on_a_terminal_is_a_bar_with_the_values():
    terminal = Terminal()
    with ProgressBar(8, step=2, stream=terminal) as bar:
        bar.update(8, {"loss": 0.125, "lr": 2e-5, "grad_norm": 1.25})
    last = terminal.getvalue().split("\r")[-1]
    assert "8/8" in last and "loss 0.125 lr 2e-05 grad_norm 1.25" in last and "step/s" in last


@pytest.fixture
def no_key(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def test_disabled_wandb_is_not_imported_and_a_missing_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    run = start_run(WandbOptions(), tmp_path, {})
    run.log(1, {"loss": 1.0})
    run.finish()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ImportError, match="pip install wandb, or choose wandb.mode=disabled"):
        start_run(WandbOptions(mode="offline"), tmp_path, {})


def test_unknown_mode_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="'on': choose from disabled, offline, online"):
        start_run(WandbOptions(mode="on"), tmp_path, {})


def test_key_is_taken_from_the_environment_then_from_the_file(tmp_path, monkeypatch, no_key):
    file = tmp_path / "api_keys.yaml"
    file.write_text("wandb: from-file\nother: x\n")
    assert api_key(file) == "from-file"
    monkeypatch.setenv("WANDB_API_KEY", "from-env")
    assert api_key(file) == "from-env"


@pytest.mark.parametrize("content", [None, "other: secret", "wandb:", "- secret", "wandb: [secret"])
def test_online_without_a_key_is_an_error_that_quotes_no_key(
    tmp_path, monkeypatch, no_key, content
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # the key is looked for before anything starts
    file = tmp_path / "api_keys.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError) as error:
        start_run(WandbOptions(mode="online", api_keys=str(file)), tmp_path, {})
    message = str(error.value)
    assert "WANDB_API_KEY" in message and str(file) in message and "secret" not in message
    assert error.value.__cause__ is None


def test_online_run_is_given_the_key_and_resumed_under_the_same_id(tmp_path, monkeypatch):
    started, logged = [], []

    def init(**kwargs):
        started.append(kwargs)
        return types.SimpleNamespace(log=lambda row, step: logged.append((step, row)))

    fake = types.SimpleNamespace(init=init, Settings=lambda **kwargs: kwargs)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    for step in (1, 2):
        run = start_run(WandbOptions(mode="online", project="p"), tmp_path, {"train": {"lr": 1}})
        run.log(step, {"loss": 0.5, "by_chunk": jnp.asarray([1.0, 2.0], jnp.float32)})
    assert started[0] == started[1]
    assert started[0]["settings"] == {"api_key": "k" * 40}
    assert started[0]["resume"] == "allow" and started[0]["name"] == tmp_path.name
    assert started[0]["id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert logged[1] == (2, {"loss": 0.5, "by_chunk/0": 1.0, "by_chunk/1": 2.0})
    (tmp_path / "wandb_id.txt").write_text("not an id!")
    with pytest.raises(ValueError, match="wandb_id.txt holds no wandb run id"):
        start_run(WandbOptions(mode="online"), tmp_path, {})


def test_offline_run_writes_a_folder_and_the_key_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = start_run(WandbOptions(mode="offline"), tmp_path, {"train": {"lr": 1e-5}})
    run.log(1, {"loss": jnp.float32(0.5), "grad_norm": math.nan})
    run.finish()
    name = (tmp_path / "wandb_id.txt").read_text().strip()
    (record,) = (tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb")
    assert b"grad_norm" in record.read_bytes()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(os.environ["WANDB_API_KEY"].encode() in path.read_bytes() for path in files)
