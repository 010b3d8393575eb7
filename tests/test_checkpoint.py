"""Checkpoints: bit-equal, and clear about everything that does not fit."""

import dataclasses
import functools
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
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
    complete_steps,
    restore_params,
)
from lact_jax.checkpoint_tree import CheckpointMismatchError

# TensorStore's reads of other arrays, still pending when one fails, are collected as unraisable.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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
    message = "no parameters 'raw': choose 'ema' or 'params' .*'opt_state'"
    with pytest.raises(CheckpointMismatchError, match=message):
        restore_params(tmp_path, which="raw")
    asked = abstract(make_state(1).ema)
    with pytest.raises(CheckpointMismatchError, match="frozen/blocks/0/fixed: float32"):
        restore_params(tmp_path, abstract_params=asked)
    with Checkpointer(tmp_path / "no_ema", 1, None) as checkpointer:
        checkpointer.save(1, dataclasses.replace(make_state(1), ema={}), DATA, META)
    with pytest.raises(CheckpointMismatchError, match=r"'ema': choose 'params' \("):
        restore_params(tmp_path / "no_ema")
