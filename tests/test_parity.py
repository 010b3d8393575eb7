"""The parity tool: the golden cases agree, and what can't agree or can't be run says so."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lact_jax import parity
from lact_jax.parity_cases import KINDS

pytestmark = pytest.mark.usefixtures("quick_compile")

GOLDEN = Path(__file__).parent / "golden"
SOLVER = GOLDEN / "solver_unipc_4_3.safetensors"


def case_kind(path):
    with parity.safe_open(str(path), framework="np") as file:
        return json.loads(file.metadata()["config"])["kind"]


CASES = [path for path in sorted(GOLDEN.glob("*.safetensors")) if case_kind(path) in KINDS]


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden_case_agrees(path):
    results = parity.run_case(path)
    assert not [r for r in results if not r.ok]
    _, tensors = parity.load_case(path)
    names = {r.name for r in results}
    assert names >= {name for name in tensors if name.startswith(("out.", "grad.", "stat."))}
    parameters = {name.removeprefix("param.") for name in tensors if name.startswith("param.")}
    if case_kind(path) == "train":
        assert names >= {f"grad.{p}" for p in parameters}
        assert names >= {f"grad[case weights].{p}" for p in parameters}


def test_every_kind_that_can_be_run_has_a_golden_case():
    assert {case_kind(path) for path in CASES} == set(KINDS)


# Exit statuses.


def rewrite(path, tmp_path, config=None, drop=(), **changed):
    """A copy of a case with some tensors or its config changed."""
    old, tensors = parity.load_case(path)
    tensors = {name: t for name, t in tensors.items() if name not in drop} | changed
    config = json.dumps(old) if config is None else config
    copy = tmp_path / "copy.safetensors"
    save_file(tensors, copy, metadata={"config": config} if config else None)
    return copy


def test_agreement_exits_0_and_shows_a_row_for_each_result(capsys):
    assert parity.main([str(SOLVER), str(GOLDEN / "flow_tables.safetensors")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    verdicts = {row[0]: row[-1] for row in rows if len(row) == 4 and row[0].startswith("out.")}
    assert verdicts["out.x"] == verdicts["out.resolution_shift"] == "ok"
    assert set(verdicts.values()) == {"ok"}


@pytest.mark.parametrize("spoil", [1.001, np.nan])
def test_a_result_over_its_tolerance_exits_1(spoil, tmp_path, capsys):
    _, tensors = parity.load_case(SOLVER)
    case = rewrite(SOLVER, tmp_path, **{"out.x": tensors["out.x"] * np.float32(spoil)})
    assert parity.main([str(case)]) == 1
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows if row.endswith("OVER")] == ["out.x"]


def test_tolerance_scale_moves_the_verdict(tmp_path):
    _, tensors = parity.load_case(SOLVER)
    case = rewrite(SOLVER, tmp_path, **{"out.x": tensors["out.x"] * np.float32(1.001)})
    assert parity.main(["--tolerance-scale", "1000", str(case)]) == 0
    assert parity.main(["--tolerance-scale", "1e-4", str(SOLVER)]) == 1


def test_result_of_another_shape_is_over(tmp_path):
    _, tensors = parity.load_case(SOLVER)
    case = rewrite(SOLVER, tmp_path, **{"out.sigmas": tensors["out.sigmas"][:-1]})
    assert parity.main([str(case)]) == 1


def test_other_types_can_be_computed_in(capsys):
    case = str(GOLDEN / "wan_t2v_forward.safetensors")
    assert parity.main(["--dtype", "bfloat16", case]) == 1
    assert parity.main(["--dtype", "bfloat16", "--tolerance-scale", "2000", case]) == 0
    assert "out.flow" in capsys.readouterr().out


def unreadable(tmp_path):
    path = tmp_path / "notes.safetensors"
    path.write_text("not safetensors at all")
    return path


def cut_off(tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(SOLVER.read_bytes()[:-40])
    return path


UNRUNNABLE = {
    "missing file": (lambda tmp: tmp / "none.safetensors", "not a readable safetensors file"),
    "foreign file": (unreadable, "not a readable safetensors file"),
    "cut off": (cut_off, "not a readable safetensors file"),
    "weights": (lambda tmp: rewrite(SOLVER, tmp, config=""), "no 'config' entry"),
    "not JSON": (lambda tmp: rewrite(SOLVER, tmp, config="{kind"), "not a JSON object"),
    "JSON list": (lambda tmp: rewrite(SOLVER, tmp, config="[1]"), "not a JSON object"),
    "unknown kind": (
        lambda tmp: rewrite(SOLVER, tmp, config='{"kind": "audio"}'), "'audio' is not there yet"
    ),
    "no steps": (lambda tmp: rewrite(SOLVER, tmp, config='{"kind": "solver"}'), "KeyError"),
    "no input": (lambda tmp: rewrite(SOLVER, tmp, drop=["in.velocity"]), "in.velocity"),
    "foreign result": (
        lambda tmp: rewrite(SOLVER, tmp, **{"out.y": np.ones(2, np.float32)}), "'out.y'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNRUNNABLE)
def test_a_case_that_cannot_be_run_exits_2_and_names_the_file(name, tmp_path, capsys):
    make, reason = UNRUNNABLE[name]
    case = make(tmp_path)
    assert parity.main([str(case)]) == 2
    error = capsys.readouterr().err
    assert str(case) in error and reason in error


def test_missing_and_foreign_parameters_of_a_model_are_listed(tmp_path, capsys):
    path = GOLDEN / "wan_t2v_forward.safetensors"
    case = rewrite(path, tmp_path, drop=["param.head.modulation"])
    assert parity.main([str(case)]) == 2
    assert "missing tensors: ['head.modulation']" in capsys.readouterr().err


def test_one_bad_case_does_not_hide_the_others(tmp_path, capsys):
    _, tensors = parity.load_case(SOLVER)
    over = rewrite(SOLVER, tmp_path, **{"out.x": tensors["out.x"] * np.float32(1.001)})
    assert parity.main([str(unreadable(tmp_path)), str(over), str(SOLVER)]) == 2
    out = capsys.readouterr().out
    assert "OVER" in out and SOLVER.name in out


def test_relative_error_is_relative_and_absolute_at_zero():
    expected = np.array([3.0, 4.0])
    assert parity.relative_error(expected * 1.01, expected) == pytest.approx(0.01)
    assert parity.relative_error([0.0, 0.5], [0.0, 0.0]) == 0.5
    assert parity.relative_error([[3.0, 4.0]], expected) == float("inf")
    assert not parity.Result("x", float("nan"), 1.0).ok
    assert parity.Result("x", 0.0, 0.0).ok
