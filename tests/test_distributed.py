"""Who is who among several processes, from config and environment, and what is refused."""

import logging
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from distributed_fixtures import (
    finish,
    free_last_port,
    free_port,
    kubernetes,
    open_mpi,
    slurm,
    start,
)

from lact_jax import data_position
from lact_jax.config import DataConfig
from lact_jax.data.batch import check_clip_count, process_share
from lact_jax.distributed import DistributedConfig, Job, recognise, share_of_batch
from lact_jax.distributed import start as join

TWO = DistributedConfig("node1:8476", 2, 1)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        (slurm(62000)(1), Job("SLURM", None, 2, 1, None, "slurm")),
        (slurm(62000)(1) | {"CUDA_VISIBLE_DEVICES": "5"}, Job("SLURM", None, 2, 1, (), "slurm")),
        (slurm(62000)(1) | {"SLURM_STEP_NUM_NODES": "2"}, Job("SLURM", None, 2, 1, (), "slurm")),
        (slurm(62000)(0) | {"SLURM_NTASKS": "1"}, None),
        (open_mpi(62000)(1), Job("Open MPI", None, 2, 1, None, "ompi")),
        (
            open_mpi(62000)(1) | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            Job("Open MPI", None, 2, 1, (), "ompi"),
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
            Job("Open MPI 5", None, 2, 0, None, "mpi4py"),
        ),
        (kubernetes(8476)(1), Job("Kubernetes", "localhost:8476", 2, 1)),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"},
            Job("environment", "a:1", 3, 2),
        ),
        # An indexed job whose pods work apart.
        ({"JOB_COMPLETION_INDEX": "3", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_the_launcher_says_who_this_is(env, expected):
    assert recognise(DistributedConfig(), env) == expected


def test_the_config_goes_before_the_launcher():
    assert recognise(TWO, slurm(62000)(0)) == Job("config", "node1:8476", 2, 1)
    assert recognise(DistributedConfig(num_processes=1), slurm(62000)(0)) is None


@pytest.mark.parametrize(
    ("config", "env", "message"),
    [
        (DistributedConfig("node1:8476", 2, 2), {}, r"process 2 of 2 \(by config\)"),
        (DistributedConfig("node1", 2, 0), {}, "coordinator 'node1': must be HOST:PORT"),
        (DistributedConfig(), slurm(1)(0) | {"SLURM_PROCID": "7"}, r"process 7 of 2 \(by SLURM\)"),
        (DistributedConfig(), slurm(1)(0) | {"SLURM_NTASKS": "x"}, "SLURM_NTASKS='x'.*a number"),
    ],
)
def test_numbers_that_cannot_be_are_refused(config, env, message):
    with pytest.raises(ValueError, match=message):
        recognise(config, env)


def test_half_a_config_is_refused():
    with pytest.raises(ValueError, match="give all three"):
        DistributedConfig(coordinator="node1:8476", num_processes=2)
    with pytest.raises(ValueError, match=r"distributed\.start_timeout=0: must be at least 1"):
        DistributedConfig(start_timeout=0)


def test_an_unreachable_coordinator_is_an_error_that_names_it():
    config = DistributedConfig(f"localhost:{free_port()}", 2, 1, start_timeout=1)
    with pytest.raises(TimeoutError, match=rf"process 1 of 2 .*{config.coordinator}.*refused"):
        join(config)
    assert not jax.distributed.is_initialized()


JOIN = """
import sys
from lact_jax import cli, distributed
config = distributed.DistributedConfig(start_timeout=int(sys.argv[1]))
cli.finish(lambda: distributed.start(config))
"""


def test_processes_that_do_not_come_and_unequal_devices_are_errors():
    port = free_last_port()
    waiting = start(["-c", JOIN, "4"], lambda _: slurm(port)(0), [1])
    unequal = start(["-c", JOIN, "200"], kubernetes(free_port()), [1, 2])
    ((status, output),) = finish(waiting, 100)
    assert status == 1
    assert "process 0 of 2 (by SLURM): not all processes came together" in output
    for status, output in finish(unequal, 100):
        assert status == 1
        assert "different numbers of devices (1 in process 0, 2 in process 1)" in output


class Device:
    def __init__(self, process_index: int):
        self.process_index = process_index


class Cut:
    """The sharding of a batch on a mesh whose devices belong to processes in order."""

    def __init__(self, shape: tuple[int, int, int], processes: int):
        self.mesh = SimpleNamespace(shape=dict(zip(("data", "fsdp", "seq"), shape, strict=True)))
        self._parts, self._seq = shape[0] * shape[1], shape[2]
        self._of_each = np.prod(shape) // processes

    def devices_indices_map(self, shape):
        assert shape == (self._parts,)
        return {
            Device(i // self._of_each): (
                slice(None) if self._parts == 1 else slice(i // self._seq, i // self._seq + 1),
            )
            for i in range(self._parts * self._seq)
        }


@pytest.mark.parametrize(
    ("shape", "processes", "shares"),
    [
        ((4, 1, 1), 2, [(0, 2), (1, 2)]),
        ((2, 2, 2), 2, [(0, 2), (1, 2)]),
        ((1, 1, 4), 2, [(0, 1), (0, 1)]),  # a clip over both: they load the same
        ((1, 2, 4), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((8, 1, 1), 1, [(0, 1)]),
    ],
)
def test_processes_that_share_clips_load_the_same_part(monkeypatch, shape, processes, shares):
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda p=process: p)
        assert share_of_batch(Cut(shape, processes), shape[0] * shape[1]) == share


def test_a_mesh_that_cuts_clips_unevenly_over_processes_is_refused():
    with pytest.raises(ValueError, match=r"mesh=\(3, 1, 2\).*process 1 of 2.*\[1, 2\] of 3"):
        share_of_batch(Cut((3, 1, 2), 2), 3)


def test_too_few_clips_for_the_processes_are_named():
    data = DataConfig(batch_size=6, share=(1, 3))
    assert process_share(data) == (2, 1, 3)
    with pytest.raises(ValueError, match=r"data\.batch_size=6: must be a multiple of 4"):
        process_share(DataConfig(batch_size=6, share=(1, 4)))
    with pytest.raises(ValueError, match="videos: 3 clips, but 4 processes"):
        check_clip_count("videos", 3, 4)


class Batches:
    """Counts; its position is the number of batches."""

    position = 0

    def __next__(self):
        self.position += 1

    def set_state(self, state):
        self.position = state["next"]


@pytest.mark.parametrize(
    ("saved", "readers", "name", "share", "position", "said"),
    [
        ({"next": 5}, 2, "synthetic", (1, 2), 5, ""),
        ({"parts": [{"next": 5}, {"next": 6}]}, 2, "module", (1, 2), 6, ""),
        ({"next": 5}, 4, "encoded", (1, 2), 5, "with 4 parts.*goes on with 2.*at batch 5"),
        ({"next": 9}, 1, "mixture", (1, 2), 5, "data.name='mixture'.*5 batches are dropped"),
    ],
)
def test_the_data_go_on_for_any_number_of_processes(
    caplog, saved, readers, name, share, position, said
):
    batches = Batches()
    with caplog.at_level(logging.WARNING):
        data_position.restore(batches, saved, readers, 5, name, share)
    assert batches.position == position
    assert bool(caplog.text) is bool(said)
    if said:
        assert re.search(said, caplog.text)


def test_a_position_that_all_share_is_stored_once(monkeypatch):
    def of_two(states):
        monkeypatch.setattr(data_position.distributed, "from_all", lambda _: enumerate(states))
        return data_position.gather(states[0], (0, 2))

    assert of_two([{"next": 5}, {"next": 5}]) == {"next": 5}
    assert of_two([{"next": 5}, {"next": 6}]) == {"parts": [{"next": 5}, {"next": 6}]}
