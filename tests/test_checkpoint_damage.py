"""Checkpoints that are damaged, or whose writing is cut off by a kill or a full disk."""

import gc
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from checkpoint_fixtures import (
    DATA,
    META,
    abstract,
    assert_bit_equal,
    make_state,
    save_steps,
    worker,
)

from lact_jax.checkpoint import (
    Checkpointer,
    CheckpointSaveError,
    CheckpointUnreadableError,
    complete_steps,
)
from lact_jax.checkpoint_tree import CheckpointMismatchError

# TensorStore's reads of other arrays, still pending when one fails, are collected as unraisable.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_any_damaged_file_is_an_error_or_harmless(tmp_path):
    """Deletes and truncates every file of the newest step, one at a time."""
    save_steps(tmp_path / "good", [1, 2])
    good = tmp_path / "good" / "2"
    outcomes = {}
    for path in sorted(p.relative_to(good) for p in good.rglob("*") if p.is_file()):
        for size in (None, (good / path).stat().st_size // 2):
            run = tmp_path / "run"
            shutil.copytree(tmp_path / "good", run)
            (run / "2" / path).unlink() if size is None else os.truncate(run / "2" / path, size)
            with Checkpointer(run, 1, None) as checkpointer:
                try:
                    restored, data, meta = checkpointer.restore(abstract(make_state(0)))
                except CheckpointMismatchError:  # the random key has lost its kind
                    assert path.parts[:2] == ("state", "array_metadatas")
                    outcomes[path, size] = "error"
                except CheckpointUnreadableError as error:
                    assert f"{run / '2'} is damaged" in str(error)
                    assert "Move this folder" in str(error) and "step 1" in str(error)
                    outcomes[path, size] = "error"
                else:
                    assert_bit_equal(restored, make_state(2))
                    assert (data, meta) == (DATA, META)
                    outcomes[path, size] = "harmless"
            shutil.rmtree(run)
    arrays = max((p for p, _ in outcomes), key=lambda path: (good / path).stat().st_size)
    damaging = [key for key, outcome in outcomes.items() if outcome == "error"]
    gc.collect()  # the pending reads, now that their warnings are filtered
    assert {(arrays, None), (arrays, (good / arrays).stat().st_size // 2)} < set(damaging)
    assert {(Path(item) / "metadata", None) for item in ("data", "meta")} < set(damaging)


def test_damaged_only_checkpoint_says_that_there_is_no_other(tmp_path):
    save_steps(tmp_path, [2])
    (tmp_path / "2" / "data" / "metadata").write_text("{")
    with Checkpointer(tmp_path, 1, None) as checkpointer:
        with pytest.raises(CheckpointUnreadableError, match="would start from the beginning"):
            checkpointer.restore(abstract(make_state(0)))


def test_after_moving_the_damaged_step_away_the_run_goes_on_from_the_older_one(tmp_path):
    save_steps(tmp_path / "ckpt", [1, 2])
    shutil.rmtree(tmp_path / "ckpt" / "2" / "state")
    with Checkpointer(tmp_path / "ckpt", 1, None) as checkpointer:
        with pytest.raises(CheckpointUnreadableError):
            checkpointer.restore(abstract(make_state(0)))
    (tmp_path / "ckpt" / "2").rename(tmp_path / "damaged")
    with Checkpointer(tmp_path / "ckpt", 1, None) as checkpointer:
        assert_bit_equal(checkpointer.restore(abstract(make_state(0)))[0], make_state(1))
        assert checkpointer.save(2, make_state(2), DATA, META)
    assert complete_steps(tmp_path / "ckpt") == [1, 2]


def test_leftovers_of_a_killed_save_are_no_checkpoint_and_go_away(tmp_path):
    save_steps(tmp_path, [1])
    leftover = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", leftover)
    assert complete_steps(tmp_path) == [1]
    with Checkpointer(tmp_path, 1, None) as checkpointer:
        assert checkpointer.latest_step() == 1
        assert checkpointer.save(2, make_state(2), DATA, META)
        assert_bit_equal(checkpointer.restore(abstract(make_state(0)))[0], make_state(2))
    assert not leftover.exists()


@pytest.mark.parametrize("trial", [0, 1])
def test_killed_at_a_random_moment_the_newest_complete_one_is_bit_equal(tmp_path, trial):
    moment = random.Random()
    process = worker("save_until_killed", tmp_path, stdout=subprocess.PIPE)
    lines = moment.randrange(2, 6)
    begun = [int(process.stdout.readline()) for _ in range(lines)]
    time.sleep(moment.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    begun += [int(line) for line in process.stdout]
    assert process.wait() == -signal.SIGKILL
    with Checkpointer(tmp_path, 1, 3) as checkpointer:
        newest = checkpointer.latest_step()
        assert begun[-1] - 1 <= newest <= begun[-1] + 1
        assert_bit_equal(checkpointer.restore(abstract(make_state(0)))[0], make_state(newest))
        assert checkpointer.save(newest + 1, make_state(newest + 1), DATA, META)
    assert complete_steps(tmp_path)[-1] == newest + 1
    assert not list(tmp_path.glob("*tmp*"))


def test_disk_full_names_the_directory_and_leaves_the_earlier_ones_whole(tmp_path):
    process = worker("fill_the_disk", tmp_path, stdout=subprocess.PIPE)
    output, _ = process.communicate()
    assert process.returncode == 1
    for directory, message in zip(("async", "sync"), output.splitlines(), strict=True):
        assert f"step 3 could not be written to {tmp_path / directory}" in message
        assert "(File too large)" in message and "[1, 2] are kept" in message
        with Checkpointer(tmp_path / directory, 1, None) as checkpointer:
            assert checkpointer.all_steps() == [1, 2]
            for step in (1, 2):
                restored, _, _ = checkpointer.restore(abstract(make_state(0)), step)
                assert_bit_equal(restored, make_state(step))
            assert checkpointer.save(3, make_state(3), DATA, META)
        assert complete_steps(tmp_path / directory) == [1, 2, 3]


def test_nothing_is_begun_when_the_disk_has_too_little_room(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, 1, None) as checkpointer:
        assert checkpointer.save(1, make_state(1), DATA, META)
        checkpointer.wait()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 100))
        for step in (2, 3):  # the failure is raised again, whatever is called
            with pytest.raises(CheckpointSaveError, match=r"step 2 .*MiB to write.*\[1\] are kept"):
                checkpointer.save(step, make_state(step), DATA, META)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
