"""Checkpoints: bit-equal, atomic, and clear about everything that does not fit.

Run as a script (`python test_checkpoint.py save_until_killed|fill_the_disk|reshard DIR`) it is the
process that the tests kill, starve of disk, or give several devices.
"""

import dataclasses
import functools
import gc
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore as ts

from lact_jax.checkpoint import (
    Checkpointer,
    CheckpointSaveError,
    CheckpointUnreadableError,
    complete_steps,
    restore_params,
)
from lact_jax.checkpoint_tree import CheckpointMismatchError

# TensorStore's reads of other arrays, still pending when one fails, are collected as unraisable.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = Path(__file__).resolve().parents[1]
DATA, META = {"epoch": 1, "next": [3, 4]}, {"seed": 0, "note": "ok"}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "frozen", "ema", "opt_state", "rng"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The layout of the trainer's state."""

    step: Any
    params: Any
    frozen: Any
    ema: Any
    opt_state: Any
    rng: Any


def make_state(step: int, width: int = 8, dtype=jnp.float32) -> TrainState:
    """A state that differs in every leaf from step to step; bf16, int and key leaves among them."""
    rng = np.random.default_rng(step)

    def normal(*shape: int, dtype=dtype):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def params():
        return {
            "blocks": {0: {"w": normal(3, width)}, 1: {"w": normal(3, width)}},
            "text": normal(5, dtype=jnp.bfloat16),
            "odd": jnp.asarray([np.nan, -0.0, np.inf, 1e-45 * step], jnp.float32),
        }

    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params(),
        frozen={"blocks": {0: {"fixed": normal(2, 2)}}},
        ema=params(),
        opt_state=optax.adamw(1e-3).init(params()),
        rng=jax.random.fold_in(jax.random.key(5), step),
    )


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_bit_equal(actual, expected) -> None:
    def raw(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for got, want in pairs:
        assert got.dtype == want.dtype and got.shape == want.shape
        assert raw(got).tobytes() == raw(want).tobytes()


def save_steps(directory, steps, keep=None, **kwargs) -> None:
    with Checkpointer(directory, save_every=1, keep_last_iterations=keep, **kwargs) as checkpointer:
        for step in steps:
            assert checkpointer.save(step, make_state(step), DATA, META)


def worker(mode: str, directory: Path, **kwargs) -> subprocess.Popen:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__)), mode, str(directory)]
    return subprocess.Popen(command, env=env | kwargs.pop("env", {}), text=True, **kwargs)


@pytest.mark.parametrize("async_", [True, False])
def test_state_comes_back_bit_equal_although_its_buffers_were_donated(tmp_path, async_):
    @functools.partial(jax.jit, donate_argnums=0)
    def overwrite(tree):
        return jax.tree.map(lambda x: x * 0 + 7, tree)

    state = make_state(3)
    arrays = {"params": state.params, "opt_state": state.opt_state}
    expected = jax.tree.map(np.array, arrays)
    with Checkpointer(tmp_path, 1, None, async_=async_) as checkpointer:
        assert checkpointer.save(3, arrays, DATA, META)
        overwrite(arrays)
        restored, data, meta = checkpointer.restore(abstract(expected))
        assert checkpointer.all_steps() == [3] and checkpointer.latest_step() == 3
    assert_bit_equal(restored, expected)
    assert (data, meta) == (DATA, META)


def test_whole_train_state_is_restored_in_another_checkpointer(tmp_path):
    save_steps(tmp_path, [1, 2])
    with Checkpointer(tmp_path, 1, None) as checkpointer:
        newest, _, _ = checkpointer.restore(abstract(make_state(0)))
        oldest, _, _ = checkpointer.restore(abstract(make_state(0)), step=1)
    assert_bit_equal(newest, make_state(2))
    assert_bit_equal(oldest, make_state(1))
    assert jax.random.key_impl(newest.rng) == jax.random.key_impl(make_state(2).rng)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(newest))


def test_without_a_target_the_arrays_come_back_by_path(tmp_path):
    save_steps(tmp_path, [4])
    with Checkpointer(tmp_path, 1, None) as checkpointer:
        state, _, _ = checkpointer.restore()
    weight = state["params"]["blocks"]["1"]["w"]
    assert isinstance(weight, np.ndarray)
    assert_bit_equal(weight, np.asarray(make_state(4).params["blocks"][1]["w"]))


def test_restored_to_the_shardings_asked_for_on_other_device_counts(tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    process = worker("reshard", tmp_path, env=flags, stdout=subprocess.PIPE)
    output, _ = process.communicate()
    assert process.returncode == 0
    assert output.split() == ["4->2", "2->4", "4->1"]


def test_every_mismatch_is_listed(tmp_path):
    save_steps(tmp_path, [1])
    asked = abstract(make_state(1))
    asked.params["blocks"][0]["w"] = jax.ShapeDtypeStruct((3, 9), jnp.float32)
    asked.params["text"] = jax.ShapeDtypeStruct((5,), jnp.float32)
    asked.params["new"] = jax.ShapeDtypeStruct((1,), jnp.float32)
    del asked.params["odd"]
    with Checkpointer(tmp_path, 1, None) as checkpointer:
        with pytest.raises(CheckpointMismatchError) as error:
            checkpointer.restore(asked)
    lines = str(error.value).splitlines()
    assert str(tmp_path / "1") in lines[0] and "4 of" in lines[0]
    assert sorted(line.strip() for line in lines[1:]) == [
        "params/blocks/0/w: float32[3, 8] in the checkpoint, float32[3, 9] asked for",
        "params/new: nothing in the checkpoint, float32[1] asked for",
        "params/odd: float32[4] in the checkpoint, nothing asked for",
        "params/text: bfloat16[5] in the checkpoint, float32[5] asked for",
    ]


@pytest.mark.parametrize("other", [jax.random.key(0, impl="unsafe_rbg"), jnp.zeros(4, jnp.uint32)])
def test_random_key_of_another_kind_is_a_mismatch(tmp_path, other):
    with Checkpointer(tmp_path, 1, None) as checkpointer:
        checkpointer.save(1, {"rng": jax.random.key(0, impl="rbg")}, DATA, META)
        with pytest.raises(CheckpointMismatchError, match=r"rng: key<rbg>\[\]"):
            checkpointer.restore(abstract({"rng": other}))


def test_keeps_those_of_the_last_iterations(tmp_path):
    with Checkpointer(tmp_path, save_every=10, keep_last_iterations=20) as checkpointer:
        begun = [
            step for step in range(1, 52) if checkpointer.save(step, make_state(step), DATA, META)
        ]
        assert begun == [10, 20, 30, 40, 50]
        checkpointer.save(51, make_state(51), DATA, META, force=True)
    assert complete_steps(tmp_path) == [40, 50, 51]


def test_a_step_that_is_there_is_left_and_a_later_one_is_an_error(tmp_path):
    save_steps(tmp_path, [5])
    with Checkpointer(tmp_path, 1, None) as checkpointer:
        assert not checkpointer.save(5, make_state(6), DATA, META, force=True)
        with pytest.raises(ValueError, match="already holds step 5, later than step 4"):
            checkpointer.save(4, make_state(4), DATA, META)
        restored, _, _ = checkpointer.restore(abstract(make_state(0)))
    assert_bit_equal(restored, make_state(5))
    assert complete_steps(tmp_path) == [5]


def test_leaves_that_would_change_are_refused_together(tmp_path):
    state = {
        "count": 3,
        "big": np.zeros(2, np.float64),
        "none": jnp.zeros((0, 2), jnp.float32),
        "fine": jnp.zeros(2, jnp.float32),
    }
    with Checkpointer(tmp_path, 1, None) as checkpointer:
        with pytest.raises(ValueError) as error:
            checkpointer.save(1, state, DATA, META)
    named = [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]]
    assert named == ["big", "count", "none"]
    assert complete_steps(tmp_path) == []


@pytest.mark.parametrize("value", [{"a": (1, 2)}, {3: 1}, {"a": float("nan")}, {"a": b"x"}])
def test_data_state_that_json_changes_is_refused(tmp_path, value):
    with Checkpointer(tmp_path, 1, None) as checkpointer:
        with pytest.raises(ValueError, match="data_state"):
            checkpointer.save(1, make_state(1), value, META)


def test_data_state_is_that_of_the_call_not_of_the_write(tmp_path):
    data = {"next": [1]}
    with Checkpointer(tmp_path, 1, None) as checkpointer:
        checkpointer.save(1, make_state(1), data, META)
        data["next"].append(2)
        assert checkpointer.restore(abstract(make_state(1)))[1] == {"next": [1]}


def test_missing_directory_and_step_are_named(tmp_path):
    with Checkpointer(tmp_path / "new", 1, None) as checkpointer:
        assert checkpointer.latest_step() is None
        with pytest.raises(FileNotFoundError, match="no complete checkpoint in .*new"):
            checkpointer.restore(abstract(make_state(0)))
    with pytest.raises(FileNotFoundError, match="no complete checkpoint in .*elsewhere"):
        restore_params(tmp_path / "elsewhere")
    save_steps(tmp_path / "new", [2])
    with pytest.raises(FileNotFoundError, match=r"step 7 .* holds \[2\]"):
        restore_params(tmp_path / "new", step=7)


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


@pytest.mark.parametrize("which", ["ema", "params"])
def test_params_alone_are_the_chosen_tree_with_the_frozen_one(tmp_path, which):
    save_steps(tmp_path, [1, 2])
    state = make_state(2)
    expected = jax.tree.map(np.asarray, getattr(state, which))
    expected["blocks"][0]["fixed"] = np.asarray(state.frozen["blocks"][0]["fixed"])
    assert_bit_equal(restore_params(tmp_path, which=which), expected)
    on_device = restore_params(tmp_path, which=which, abstract_params=abstract(expected))
    assert_bit_equal(on_device, expected)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(on_device))


def test_params_alone_read_no_optimiser_state(tmp_path):
    def bytes_read():
        metric = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return metric[0]["values"][0]["value"] if metric else 0

    def noise(n):  # does not compress
        return jnp.asarray(np.random.default_rng(n).normal(size=n), jnp.float32)

    state = {"ema": {"w": noise(10_000)}, "params": {"w": noise(70_000)}, "opt": noise(300_000)}
    with Checkpointer(tmp_path, 1, None) as checkpointer:
        checkpointer.save(1, state, DATA, META)
    before = bytes_read()
    restore_params(tmp_path)
    assert 10_000 < bytes_read() - before < 100_000


def test_params_that_are_not_there_or_do_not_fit(tmp_path):
    save_steps(tmp_path, [1])
    with pytest.raises(CheckpointMismatchError, match="no parameters 'raw'.*'opt_state'"):
        restore_params(tmp_path, which="raw")
    asked = abstract(make_state(1).ema)
    with pytest.raises(CheckpointMismatchError, match="frozen/blocks/0/fixed: float32"):
        restore_params(tmp_path, abstract_params=asked)
    with Checkpointer(tmp_path / "no_ema", 1, None) as checkpointer:
        checkpointer.save(1, dataclasses.replace(make_state(1), ema={}), DATA, META)
    with pytest.raises(CheckpointMismatchError, match="choose 'ema' or 'params'"):
        restore_params(tmp_path / "no_ema")


def _save_until_killed(directory: str) -> None:
    checkpointer = Checkpointer(directory, 1, 3)
    for step in range(1, 10_000):
        state = make_state(step)
        checkpointer.save(step, state, DATA, META)
        print(step, flush=True)


def _fill_the_disk(directory: str) -> None:
    checkpointers = [
        Checkpointer(Path(directory) / name, 1, 2, async_=name == "async")
        for name in ("async", "sync")
    ]
    for checkpointer in checkpointers:
        for step in (1, 2):
            checkpointer.save(step, make_state(step), DATA, META)
        checkpointer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    messages = []
    for checkpointer in checkpointers:
        try:
            checkpointer.save(3, make_state(3, width=20_000), DATA, META)
            checkpointer.wait()
        except CheckpointSaveError as error:
            messages.append(str(error))
    print(*messages, sep="\n")
    sys.exit(len(messages) == len(checkpointers))


def _reshard(directory: str) -> None:
    auto = jax.sharding.AxisType.Auto
    value = jnp.arange(32, dtype=jnp.float32).reshape(8, 4)
    with Checkpointer(directory, 1, None) as checkpointer:
        for step, (saved, restored) in enumerate([(4, 2), (2, 4), (4, 1)], start=1):
            source, target = (
                jax.sharding.NamedSharding(
                    jax.make_mesh((n,), ("x",), axis_types=(auto,), devices=jax.devices()[:n]),
                    jax.sharding.PartitionSpec("x"),
                )
                for n in (saved, restored)
            )
            checkpointer.save(step, {"w": jax.device_put(value, source)}, DATA, META)
            asked = {"w": jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=target)}
            weight = checkpointer.restore(asked)[0]["w"]
            if weight.sharding == target and bool((np.asarray(weight) == np.asarray(value)).all()):
                print(f"{saved}->{restored}")


if __name__ == "__main__":
    {
        "save_until_killed": _save_until_killed,
        "fill_the_disk": _fill_the_disk,
        "reshard": _reshard,
    }[sys.argv[1]](sys.argv[2])
