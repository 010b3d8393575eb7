"""A run killed at random moments and started again ends like one that was left alone."""


import shutil

from run_fixtures import CONFIG_FILE, assert_same_end, quick_train, script_env, tiny_config

from scripts import kill_and_resume

pytest_plugins = ["run_plugin"]

STEPS = 24


def test_killed_twice_it_ends_like_the_uninterrupted_run(tmp_path, data_folder, monkeypatch):
    for name, value in script_env().items():
        monkeypatch.setenv(name, value)
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    assert quick_train(tiny_config(data_folder, train__steps=STEPS), reference) == 0
    options = [
        f"--config.data.path={data_folder}",
        f"--config.train.steps={STEPS}",
        "--config.train.save_every=6",
    ]
    kills = kill_and_resume.kill_and_resume(CONFIG_FILE, killed, 2, STEPS, options)
    assert len(kills) == 2 and "inside a save" in kills[0]
    assert kill_and_resume.differences(killed, reference) == []
    assert_same_end(killed, reference)


def test_differences_are_named(tmp_path, finished_run):
    other = tmp_path / "other"
    shutil.copytree(finished_run, other)
    assert kill_and_resume.differences(other, finished_run) == []
    shutil.rmtree(other / "checkpoints" / "8")
    with open(other / "metrics.jsonl", "a") as file:
        file.write("\n")
    found = kill_and_resume.differences(other, finished_run)
    assert {"['step']", "['params']['head']['head']['kernel']", "metrics.jsonl"} <= set(found)
    assert "['rng']" not in found
