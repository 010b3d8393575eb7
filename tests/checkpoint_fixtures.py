"""States to save, and processes that save them, for the tests of checkpoints.

Run as a script (`python checkpoint_fixtures.py save_until_killed|fill_the_disk|reshard DIR`) it is
the process that the tests kill, starve of disk, or give several devices.
"""

import dataclasses
import functools
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lact_jax.checkpoint import (
    Checkpointer,
    CheckpointSaveError,
)

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
