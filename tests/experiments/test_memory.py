"""The memory experiment, run small: what it writes, that a second start goes on, and that what is
measured does not depend on how."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_twins import relative_error
from run_fixtures import quickly_compiled

from lact_jax.experiments import memory, memory_report, training
from lact_jax.train_state import init_state, make_train_step
from lact_jax.validation import NOISE_LEVELS

ARGUMENTS = ["--small", "--seeds", "0", "3", "--mixers", "window", "lact"]
CHUNKS = 4


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    with quickly_compiled():
        assert memory.main([f"--out={folder}", *ARGUMENTS]) == 0
    return folder


def test_results_hold_a_loss_for_every_seed_level_and_chunk(out):
    content = json.loads((out / memory_report.RESULTS).read_text())
    assert content["seeds"] == [0, 3] and tuple(content["noise_levels"]) == NOISE_LEVELS
    assert list(content["rows"]) == ["window", "lact"]
    for name, row in content["rows"].items():
        loss_GVW = np.array(row["loss"])
        assert loss_GVW.shape == (2, len(NOISE_LEVELS), CHUNKS)
        assert np.all(np.isfinite(loss_GVW)) and np.all(loss_GVW > 0)
        assert not np.any(loss_GVW[0] == loss_GVW[1])  # other seeds are other models
        assert row["changes"] == {"model.mixer": name} and row["skipped"] == 0
    window, lact = content["rows"].values()
    assert lact["parameters"] > window["parameters"] and lact["memory"] > window["memory"]


def test_table_has_a_line_for_every_model_and_its_ratio_to_the_window(out):
    lines = (out / memory_report.TABLE).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| model"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:][:4]]
    assert [row[0] for row in rows] == ["model", "---", "window", "lact"]
    assert len({len(row) for row in rows}) == 1
    content = json.loads((out / memory_report.RESULTS).read_text())["rows"]
    level = NOISE_LEVELS.index(0.95)
    window, lact = (np.array(content[name]["loss"])[:, level, 3:].mean() for name in content)
    assert rows[2][-2] == "+0.0%" and rows[3][-2] == f"{lact / window - 1:+.1%}"
    assert rows[3][5].startswith(f"{lact:.3f} ± ")
    assert (out / memory_report.PLOT).read_bytes().startswith(b"\x89PNG")


def test_a_second_start_trains_only_what_is_missing(out, monkeypatch, capsys):
    def no_training(*_):
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(memory, "Experiment", no_training)
    assert memory.main([f"--out={out}", *ARGUMENTS]) == 0
    assert (out / memory_report.TABLE).read_text().strip() in capsys.readouterr().out
    with pytest.raises(AssertionError, match="nothing is missing"):
        memory.main([f"--out={out}", *ARGUMENTS, "--variants", "momentum"])
    with pytest.raises(ValueError, match="has 'window' with other settings .* another --out"):
        memory.main([f"--out={out}", *ARGUMENTS, "--steps=5"])
    with pytest.raises(ValueError, match=r"of seeds \[0, 3\], not \[0\]: give another --out"):
        memory.main([f"--out={out}", "--small", "--seeds", "0"])


def test_rows_from_before_a_setting_existed_are_those_of_its_default(tmp_path, out, monkeypatch):
    content = json.loads((out / memory_report.RESULTS).read_text())
    for row in content["rows"].values():
        del row["config"]["model"]["kernels"], row["config"]["model"]["lact"][0]["muon_iters"]
    (tmp_path / memory_report.RESULTS).write_text(json.dumps(content))
    monkeypatch.setattr(memory, "Experiment", None)  # nothing is trained
    same = memory.main([f"--out={tmp_path}", *ARGUMENTS])
    assert same == 0
    for row in content["rows"].values():
        row["config"]["model"]["kernels"] = "xla"
    (tmp_path / memory_report.RESULTS).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="with other settings"):
        memory.main([f"--out={tmp_path}", *ARGUMENTS])


def test_a_model_that_diverged_says_so_and_stands_in_the_way_of_none(tmp_path, out):
    content = json.loads((out / memory_report.RESULTS).read_text())
    broken = json.loads(json.dumps(content["rows"]["lact"]))
    broken["loss"][1][NOISE_LEVELS.index(0.95)][3] = float("nan")
    content["rows"]["lact: broken"] = broken
    (tmp_path / memory_report.RESULTS).write_text(json.dumps(content))
    report = memory_report.Report(tmp_path, (0, 3))
    row = next(line for line in report.table().splitlines() if line.startswith("| lact: broken"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[5] == "diverged" and cells[7] == ""
    assert cells[3] not in ("", "diverged") and cells[6].endswith("%")
    mixers, variants = report.plot().axes
    assert [line.get_label() for line in mixers.lines] == ["window", "lact"]
    widths = [bar.get_width() for bar in variants.patches]
    assert np.isfinite(widths[:2]).all() and np.isnan(widths[2])


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((5, 12, 8, 8, 16))
    text = rng.standard_normal((3, 16))
    return jnp.asarray(latent, jnp.float32), jnp.asarray(text, jnp.float32)


def test_seeds_side_by_side_are_the_train_step_one_after_another(clips, quick_compile):
    latent, text = clips
    config = memory.make_config(memory.SMALL, {"model.mixer": "window"})
    states, metrics = training.train_seeds(config, latent, text, (0, 7))
    step = jax.jit(make_train_step(config))
    text_BLQ = jnp.broadcast_to(text, (2, *text.shape))
    for g, seed in enumerate((0, 7)):
        state, losses = init_state(replace(config, seed=seed)), []
        for index in training.batch_indices(seed, 5, 2, config.train.steps):
            state, own = step(state, latent[index], text_BLQ, text)
            losses.append(own["loss"])
        np.testing.assert_allclose(metrics["loss"][:, g], losses, rtol=1e-5)
        kernel = states.params["head"]["head"]["kernel"][g]
        assert relative_error(kernel, state.params["head"]["head"]["kernel"]) < 1e-4
    loss = training.validation_losses(config, states, latent, text)
    again = training.validation_losses(config, states, latent, text)
    assert loss.shape == (2, len(NOISE_LEVELS), CHUNKS) and np.array_equal(loss, again)


def test_batches_go_through_all_clips_before_any_comes_again():
    order = training.batch_indices(3, 10, 4, 5).reshape(-1)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert not np.array_equal(order, training.batch_indices(4, 10, 4, 5).reshape(-1))


@pytest.mark.parametrize("name", memory.ABLATION)
def test_every_variant_changes_the_config(name):
    plain = memory.make_config(memory.FULL, {})
    assert memory.make_config(memory.FULL, memory.ABLATION[name]) != plain
