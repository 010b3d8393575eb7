"""One config and one process per workdir.

Run as a script it holds a workdir until it is killed: `python test_workdir.py DIR`.
"""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lact_jax import workdir
from lact_jax.workdir import WorkdirError, flat_config, open_workdir, write_atomically

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "model": {"width": 128, "options": [{"muon": True}], "window": None},
    "train": {"steps": 100, "lr": 2e-5, "betas": (0.9, 0.95)},
    "wandb": {"mode": "disabled", "tags": {}},
}
MAY_DIFFER = {"train.steps", "wandb.*"}


def changed(**values) -> dict:
    """CONFIG with some values replaced: changed(train__lr=1)."""
    config = json.loads(json.dumps(CONFIG))
    for name, value in values.items():
        section, key = name.split("__")
        config.setdefault(section, {})[key] = value
    return config


def test_first_use_writes_the_config_and_later_use_accepts_it(tmp_path):
    with open_workdir(tmp_path / "a" / "run", CONFIG) as folder:
        assert folder == tmp_path / "a" / "run"
        assert json.loads((folder / "config.json").read_text()) == changed()
    before = (folder / "config.json").stat().st_mtime_ns
    with open_workdir(folder, CONFIG):
        assert (folder / "config.json").stat().st_mtime_ns == before


def test_another_config_lists_every_key_with_both_values_and_changes_nothing(tmp_path):
    with open_workdir(tmp_path, CONFIG, MAY_DIFFER):
        pass
    other = changed(train__lr=1e-4, train__steps=7, model__muon=False)
    del other["model"]["window"]
    with pytest.raises(WorkdirError) as error, open_workdir(tmp_path, other, MAY_DIFFER):
        pytest.fail("opened with another config")
    message = str(error.value)
    assert str(tmp_path) in message and "another workdir" in message
    assert [line for line in message.splitlines() if line.startswith("  ")] == [
        "  model.muon: absent there, False now",
        "  model.window: None there, absent now",
        "  train.lr: 2e-05 there, 0.0001 now",
    ]
    assert "train.steps, wandb.*" in message
    assert json.loads((tmp_path / "config.json").read_text()) == changed()


def test_keys_that_may_differ_are_updated(tmp_path):
    with open_workdir(tmp_path, CONFIG, MAY_DIFFER):
        pass
    longer = changed(train__steps=500, wandb__mode="offline", wandb__project="p")
    with open_workdir(tmp_path, longer, MAY_DIFFER):
        assert json.loads((tmp_path / "config.json").read_text()) == longer


def test_a_pattern_covers_no_other_key(tmp_path):
    with open_workdir(tmp_path, changed(train__steps_per_save=1), MAY_DIFFER):
        pass
    with pytest.raises(WorkdirError, match="train.steps_per_save: 1 there, 2 now"):
        with open_workdir(tmp_path, changed(train__steps_per_save=2), MAY_DIFFER):
            pytest.fail("opened with another config")


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}])
def test_a_value_that_json_cannot_hold_is_named(tmp_path, value):
    with pytest.raises(ValueError, match="model.width"):
        with open_workdir(tmp_path / "run", changed(model__width=1) | {"model": {"width": value}}):
            pytest.fail("opened with such a config")
    assert not (tmp_path / "run").exists()


def test_a_file_in_place_of_the_folder_and_a_damaged_config_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=f"{tmp_path / 'file'} is a file"):
        with open_workdir(tmp_path / "file", CONFIG):
            pytest.fail("opened a file")
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(WorkdirError, match=r"config.json is damaged"):
        with open_workdir(tmp_path, CONFIG):
            pytest.fail("opened with a damaged config")


def test_two_processes_cannot_share_a_workdir_and_a_kill_frees_it(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__)), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "open\n"
    with pytest.raises(WorkdirError, match=rf"in use by process {process.pid} on"):
        with open_workdir(tmp_path, CONFIG):
            pytest.fail("opened twice")
    process.kill()
    process.communicate()
    with open_workdir(tmp_path, CONFIG) as folder:
        assert (folder / "config.json").exists()


def test_one_process_cannot_open_a_workdir_twice_at_a_time(tmp_path):
    with open_workdir(tmp_path, CONFIG):
        with pytest.raises(WorkdirError, match=f"in use by process {os.getpid()} on"):
            with open_workdir(tmp_path, CONFIG):
                pytest.fail("opened twice")
    with open_workdir(tmp_path, CONFIG) as folder:
        assert folder == tmp_path


def test_a_write_that_fails_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "config.json"
    write_atomically(file, "old")
    monkeypatch.setattr(workdir.os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_flat_config_joins_keys_with_dots_and_keeps_empty_dicts():
    assert flat_config({"a": {"b": {"c": 1}, "d": {}}, "e": [{"f": 2}]}) == {
        "a.b.c": 1,
        "a.d": {},
        "e": [{"f": 2}],
    }


if __name__ == "__main__":
    with open_workdir(sys.argv[1], CONFIG):
        print("open", flush=True)
        sys.stdin.read()


def test_a_start_that_fails_before_it_wrote_anything_leaves_the_folder_free(tmp_path):
    with pytest.raises(KeyError), open_workdir(tmp_path, {"lr": 1.0}) as folder:
        (folder / "metrics.jsonl").touch()
        (folder / "wandb_id.txt").write_text("abc\n")
        (folder / "wandb").mkdir()
        (folder / "wandb" / "debug.log").write_text("no key")
        raise KeyError
    with open_workdir(tmp_path, {"lr": 2.0}):
        (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(WorkdirError, match="another config"), open_workdir(tmp_path, {"lr": 1.0}):
        pass


def test_a_failure_of_a_run_that_has_begun_keeps_its_config(tmp_path):
    with pytest.raises(KeyError), open_workdir(tmp_path, {"lr": 1.0}) as folder:
        (folder / "metrics.jsonl").write_text("{}")
        raise KeyError
    with pytest.raises(WorkdirError, match="another config"), open_workdir(tmp_path, {"lr": 2.0}):
        pass
