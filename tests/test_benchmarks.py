"""The benchmarks run in their small form and print one line of JSON with what they promise; their
results are kept by row; the README's table is what the results give."""

import functools
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from benchmarks import all as all_benchmarks
from benchmarks import table

ROOT = Path(__file__).parents[1]


@functools.cache  # a flag that was taken away and put back has lost its module
def flags_of_benchmarks() -> list[str]:
    """Names of the flags of benchmarks that test modules have imported."""
    modules = flags.FLAGS.flags_by_module_dict().items()
    return [f.name for m, defined in modules if m.startswith("benchmarks.") for f in defined]


@pytest.fixture
def run(capsys):
    """Runs a benchmark in this process: (name, arguments) -> the result that it printed.

    Benchmarks define flags of the same names, so each one's are taken away after it, and so are
    the modules that would define them when they are imported.
    """
    own_flags, own_modules = set(flags.FLAGS), set(sys.modules)

    def forget():
        for name in set(flags.FLAGS) - own_flags:
            delattr(flags.FLAGS, name)
        for name in set(sys.modules) - own_modules:
            if name.startswith("benchmarks."):
                del sys.modules[name]
                # `from benchmarks import x` would find it there.
                vars(sys.modules["benchmarks"]).pop(name.removeprefix("benchmarks."), None)

    def call(name, *arguments):
        taken = {flag: flags.FLAGS[flag] for flag in own_flags}
        for flag in flags_of_benchmarks():
            delattr(flags.FLAGS, flag)
        try:
            module = importlib.import_module(f"benchmarks.{name}")
            flags.FLAGS(["benchmark", "--small", *arguments])
            module.main(None)
        finally:
            forget()
            for flag, holder in taken.items():
                if flag not in flags.FLAGS:
                    flags.FLAGS[flag] = holder
        return json.loads(capsys.readouterr().out.strip().splitlines()[-1])

    return call


TIMES = ["forward ms", "forward and backward ms", "share of the matmul rate"]
ERRORS = ["forward error of bfloat16", "gradient error of bfloat16"]


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    "name, arguments, positive",
    [
        ("lact_operation", ["--repeats=1", "--chunks=3"],
         [*TIMES, *ERRORS, "keep_hidden=False, forward and backward ms"]),
        ("window_attention", ["--repeats=1", "--chunks=3"], [*TIMES, *ERRORS]),
        ("layer", ["--repeats=1", "--chunks=3"], [*TIMES, *ERRORS]),
        ("train_step", ["--repeats=1"], ["seconds per step", "loss", "grad_norm"]),
        ("umt5", ["--repeats=1"], ["seconds", "TFLOP", "error against float32 matmuls"]),
        ("vae", ["--repeats=1"], ["encode TFLOP", "decode TFLOP", "decode error of bfloat16"]),
        ("vae_convolutions", [], []),
        ("loader", ["--batches=3", "--steps=2"], ["raw clips/s", "cached share of waiting"]),
        ("sampling", ["--chunks=3", "--steps=1", "--far=9"],
         ["TFLOP per guided denoise step", "ms per guided denoise step", "ms per commit",
          "time at chunk 9 over here", "time of a whole chunk at chunk 9 over here"]),
        ("profile_step", [], ["kernels ms"]),
    ],
)  # fmt: skip
def test_small_form(run, name, arguments, positive):
    result = run(name, *arguments)
    assert result["benchmark"] == name
    assert all(math.isfinite(result[name]) and result[name] > 0 for name in positive)
    assert all(result[name] < 3e-2 for name in ERRORS if name in positive)
    if name == "sampling":
        assert result["cache at chunk 9 over here"] == 1


def test_one_command_runs_a_row_and_keeps_its_result(tmp_path):
    out = tmp_path / "results.json"
    other = {"row": "vae", "device": "cpu", "matmul TFLOP/s": 1.0}
    all_benchmarks.keep(out, "abc1234", "first", other)
    command = [sys.executable, "-m", "benchmarks.all", "--small", "--rows=window_attention",
               f"--out={out}", "--commit=abc1234", "--note=tiny"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept = json.loads(out.read_text())
    assert (kept["commit"], kept["note"]) == ("abc1234", "tiny")
    assert kept["runs"][0] == other
    assert kept["runs"][1]["row"] == kept["runs"][1]["benchmark"] == "window_attention"
    assert kept["runs"][1]["measured"] > "2026" and "jaxlib" in kept["runs"][1]["versions"]


def test_a_row_that_is_run_again_takes_its_old_place_but_not_another_commits(tmp_path):
    out = tmp_path / "results.json"
    for seconds in (1.0, 2.0):
        all_benchmarks.keep(out, "abc1234", "", {"row": "umt5", "seconds": seconds})
    assert [run["seconds"] for run in json.loads(out.read_text())["runs"]] == [2.0]
    with pytest.raises(ValueError, match="abc1234, not def5678"):
        all_benchmarks.keep(out, "def5678", "", {"row": "umt5"})


def test_every_row_is_a_benchmark_and_every_line_of_the_table_a_row():
    for row in all_benchmarks.ROWS.values():
        assert (ROOT / "benchmarks" / f"{row.module}.py").exists()
    assert {line.row for line in table.LINES} <= all_benchmarks.ROWS.keys()


def write_results(folder, name, measured, *runs):
    whole = {"commit": name, "measured": measured, "runs": runs}
    (folder / f"{name}.json").write_text(json.dumps(whole))


def test_the_newest_measurement_of_a_row_counts(tmp_path):
    step = {"row": "train_all", "device": "NVIDIA H200", "seconds per step": 3.0, "peak GB": 60.0}
    text = {"row": "umt5", "device": "NVIDIA H200", "seconds": 0.016, "torch seconds": 0.042}
    write_results(tmp_path, "bbb", "2030-01-02T00:00:00Z", step | {"seconds per step": 2.0},
                  text | {"seconds": 0.017})  # fmt: skip
    again = text | {"measured": "2030-01-03T00:00:00Z"}
    write_results(tmp_path, "aaa", "2030-01-01T00:00:00Z", step, again)
    write_results(tmp_path, "ccc", "2030-01-03T00:00:00Z", step | {"device": "cpu"})
    _, _, first, second = table.make(tmp_path).splitlines()
    assert "2.00 s, 60.0 GB" in first and "`bbb`" in first
    assert "16 ms" in second and "42 ms" in second and "`aaa`" in second


def test_the_table_goes_between_the_markers_and_nowhere_else():
    text = f"above\n{table.START}\nold\n{table.END}\nbelow\n"
    put = table.put_into(text, "| new |\n", "README.md")
    assert put == f"above\n{table.START}\n| new |\n{table.END}\nbelow\n"
    assert table.put_into(put, "| new |\n", "README.md") == put
    with pytest.raises(ValueError, match=r"README\.md has no place for the table"):
        table.put_into("no markers", "| new |\n", "README.md")


def test_the_table_of_the_readme_is_what_the_results_give():
    text = (ROOT / "README.md").read_text()
    assert table.put_into(text, table.make(table.RESULTS), "README.md") == text
