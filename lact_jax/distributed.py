"""Several processes as one run: how they find each other, agree, and end.

Each process drives the devices it sees and computes the same program as all others; the first,
process 0, writes logs and pages. `start` joins them with `jax.distributed`, which needs three
things: where process 0 listens, how many processes there are, and which one this is. They come
from `config.distributed`, or from the launcher's environment:

    SLURM        srun: SLURM_NTASKS, SLURM_PROCID …
    Open MPI     mpirun: OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK …
    Kubernetes   an indexed Job or a JobSet: JOB_COMPLETION_INDEX, and the two below
    any other    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID

With none of these, or with one process, nothing is started. Every function here can be called in a
run of one process, too, where it does nothing or is the identity.

A process that dies ends the others: process 0's JAX service misses its heartbeats (or the others
miss the service), and stops them with a message, also inside a collective that hangs.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_BLOCK = 1024  # texts are exchanged in multiples of so many bytes: few programs to compile
_SPARE_SECONDS = 60  # JAX gives up so long after us, by aborting the process


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other; the defaults leave it to the launcher.

    Attributes:
      coordinator: HOST:PORT where process 0 listens (any free port of its host).
      num_processes: of the run; 0: as the launcher says; 1: this process alone, whatever it says.
      process_id: of this process, from 0.
      start_timeout: seconds within which all processes must have come.
      heartbeat_timeout: seconds of silence after which a process counts as dead, and all end.
    """

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    start_timeout: int = 300
    heartbeat_timeout: int = 30

    def __post_init__(self):
        for name, least in (("start_timeout", 1), ("heartbeat_timeout", 1), ("num_processes", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"distributed.{name}={getattr(self, name)}: must be at least {least}"
                )
        if self.num_processes == 1:
            return
        given = bool(self.coordinator), self.num_processes > 1, self.process_id >= 0
        if any(given) and not all(given):
            raise ValueError(
                f"distributed.coordinator={self.coordinator!r}, num_processes={self.num_processes},"
                f" process_id={self.process_id}: give all three, or none of them where the launcher"
                " is SLURM, Open MPI or Kubernetes"
            )


class Job(NamedTuple):
    """What `jax.distributed.initialize` is told; None is for JAX's own detection to find."""

    launcher: str
    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    device_ids: tuple[int, ...] | None = ()  # (): all that are visible
    method: str | None = None


# Launchers. Where JAX knows how to find process 0 it does, by `method`.


class _Launcher(NamedTuple):
    needs: tuple[str, ...]  # the variables by which it is recognised
    count: str
    index: str
    method: str | None = None
    nodes: str | None = None  # number of nodes
    on_node: str | None = None  # processes on this node


_LAUNCHERS = {
    "environment": _Launcher((ADDRESS, COUNT, INDEX), COUNT, INDEX),
    "Kubernetes": _Launcher(
        (ADDRESS, COUNT, "JOB_COMPLETION_INDEX"), COUNT, "JOB_COMPLETION_INDEX"
    ),
    "SLURM": _Launcher(
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
        "SLURM_NTASKS", "SLURM_PROCID", "slurm", nodes="SLURM_STEP_NUM_NODES",
    ),
    "Open MPI": _Launcher(
        ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "ompi",
        on_node="OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    # It no longer says where it was started; mpi4py asks it.
    "Open MPI 5": _Launcher(
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpi4py",
        on_node="OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
}  # fmt: skip


def recognise(config: DistributedConfig, env: Mapping[str, str] = os.environ) -> Job | None:
    """The job this process is part of; None if it is alone.

    Raises ValueError for a process id out of range, and for variables that are no numbers.
    """
    if config.num_processes == 1:
        return None
    if config.num_processes:
        job = Job("config", config.coordinator, config.num_processes, config.process_id)
    else:
        found = (k for k, row in _LAUNCHERS.items() if all(name in env for name in row.needs))
        name = next(found, None)
        if name is None:
            return None
        row = _LAUNCHERS[name]
        job = Job(
            name, env.get(ADDRESS), _number(env, row.count), _number(env, row.index),
            _device_ids(row, env), row.method,
        )  # fmt: skip
    if job.num_processes < 1 or not 0 <= job.process_id < job.num_processes:
        raise ValueError(
            f"process {job.process_id} of {job.num_processes} (by {job.launcher}): the processes "
            "are numbered from 0 to one below their number"
        )
    if job.coordinator is not None:
        _host_and_port(job.coordinator)
    return job if job.num_processes > 1 else None


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError as error:
        raise ValueError(f"environment variable {name}={env[name]!r}: must be a number") from error


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(f"coordinator {address!r}: must be HOST:PORT, such as node001:8476")
    return host.strip("[]"), int(port)


def _device_ids(row: _Launcher, env: Mapping[str, str]) -> tuple[int, ...] | None:
    """() for all visible devices; None for JAX to take the one with this process's number on its
    node, as it would even where the node has one process, or the launcher has shared them out."""
    of_node = {row.nodes: env[row.count], row.on_node: "1"}  # their values for its only process
    alone = row.method is None or any(name and env.get(name) == x for name, x in of_node.items())
    given = env.get("CUDA_VISIBLE_DEVICES", "")
    shared_out = given != "" and "," not in given
    return () if (alone or shared_out) and "JAX_LOCAL_DEVICE_IDS" not in env else None


# The start.


def start(config: DistributedConfig) -> None:
    """Joins the processes of the run, if there are several. Before anything asks for a device.

    Raises:
      ValueError: as `recognise`; processes with different numbers of devices.
      TimeoutError: process 0 could not be reached, or not all processes came; says which.
      OSError: process 0 can't listen at its address.
    """
    job = None if jax.distributed.is_initialized() else recognise(config)
    if job is None:
        return
    # JAX's own notice of SIGTERM would take the place of interrupt.py's, and leaves out Ctrl-C.
    jax.config.update("jax_enable_preemption_service", False)
    deadline = time.monotonic() + config.start_timeout
    if job.coordinator is not None and job.process_id == 0:
        _check_port(job.coordinator)
    elif job.coordinator is not None:
        _wait_for(job, config, deadline)
    _join(job, config, deadline)
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        jax.distributed.shutdown()  # in order, for every process comes here
        listed = ", ".join(f"{count} in process {i}" for i, count in sorted(devices.items()))
        raise ValueError(
            f"the processes have different numbers of devices ({listed}): a mesh needs as many in "
            "each; start as many processes on every node, or the same CUDA_VISIBLE_DEVICES"
        )


def _check_port(coordinator: str) -> None:
    """Raises OSError if another program listens at the port of process 0."""
    _, port = _host_and_port(coordinator)
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise OSError(
            f"process 0 can't listen at {coordinator} ({error}): choose another port"
        ) from error


def _wait_for(job: Job, config: DistributedConfig, deadline: float) -> None:
    """Returns when process 0 listens; JAX would abort the process where it never does."""
    pause = 0.1
    while True:
        try:
            with socket.create_connection(_host_and_port(job.coordinator), timeout=5):
                return
        except OSError as error:
            if time.monotonic() + pause > deadline:
                raise TimeoutError(
                    f"process {job.process_id} of {job.num_processes} could not reach process 0 at "
                    f"{job.coordinator} within distributed.start_timeout={config.start_timeout} "
                    f"seconds ({error}): is it started, is the address right, and does a firewall "
                    "let the port through?"
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, 5)


def _join(job: Job, config: DistributedConfig, deadline: float) -> None:
    """`jax.distributed.initialize`, in a thread: when its own time is up it aborts the process."""
    failures: list[BaseException] = []

    def initialize():
        try:
            jax.distributed.initialize(
                job.coordinator, job.num_processes, job.process_id,
                local_device_ids=None if job.device_ids is None else list(job.device_ids),
                cluster_detection_method=job.method,
                initialization_timeout=config.start_timeout + _SPARE_SECONDS,
                heartbeat_timeout_seconds=config.heartbeat_timeout,
                shutdown_timeout_seconds=config.start_timeout,
            )  # fmt: skip
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(max(deadline - time.monotonic(), 1))
    if thread.is_alive():
        where = job.coordinator or f"the address that {job.launcher} gives"
        raise TimeoutError(
            f"process {job.process_id} of {job.num_processes} (by {job.launcher}): not all "
            f"processes came together at {where} within distributed.start_timeout="
            f"{config.start_timeout} seconds: is each of them started, and can it reach process 0 "
            "there?"
        )
    if failures:
        raise RuntimeError(
            f"process {job.process_id} of {job.num_processes} (by {job.launcher}) could not be "
            f"started: {failures[0]}"
        ) from failures[0]


# Who is who.


def several() -> bool:
    """Whether this run has more than one process."""
    return jax.process_count() > 1


def is_main() -> bool:
    """Whether this is process 0, the one that writes what all would write alike."""
    return jax.process_index() == 0


def share_of_batch(sharding: jax.sharding.Sharding, parts: int) -> tuple[int, int]:
    """Which part of a batch this process loads: (index, number of different parts).

    Processes whose devices hold the same clips, as they share those clips' tokens, load the same
    part.

    Args:
      sharding: of a batch. parts: into how many it cuts one.

    Raises:
      ValueError: the mesh gives two processes parts that overlap but are not the same.
    """
    owned: dict[int, set[int]] = defaultdict(set)
    for device, (rows, *_) in sharding.devices_indices_map((parts,)).items():
        owned[device.process_index] |= set(range(*rows.indices(parts)))
    size = len(owned[jax.process_index()])
    for process, part in owned.items():
        first = min(part)
        if first % size or part != set(range(first, first + size)):
            raise ValueError(
                f"mesh={tuple(sharding.mesh.shape.values())}: process {process} of {len(owned)} "
                f"would hold the parts {sorted(part)} of {parts} of a batch, which it shares with "
                "another process only partly; choose a mesh.seq that divides the devices of a "
                "process, or is a multiple of them"
            )
    return min(owned[jax.process_index()]) // size, parts // size


# Agreeing.


def from_main(value: Any) -> Any:
    """Process 0's value, in every process. Values are JSON's."""
    if not several():
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_main() else np.zeros(0)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    return _decoded(multihost_utils.broadcast_one_to_all(_padded(data, length)), length)


def from_all(value: Any) -> list[Any]:
    """Every process's value, in their order. Values are JSON's."""
    if not several():
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(data.size))
    rows = multihost_utils.process_allgather(_padded(data, int(lengths.max())))
    return [_decoded(row, int(length)) for row, length in zip(rows, lengths, strict=True)]


def _padded(data: np.ndarray, length: int) -> np.ndarray:
    out = np.zeros(-(-length // _BLOCK) * _BLOCK, np.uint8)
    out[: data.size] = data
    return out


def _decoded(data: np.ndarray, length: int) -> Any:
    return json.loads(np.asarray(data, np.uint8)[:length].tobytes())


def rows_of_all(x: np.ndarray) -> np.ndarray:
    """The rows of every process, in their order, from each one's own; as many in each."""
    return multihost_utils.process_allgather(x, tiled=True) if several() else x


def wait_for_all(what: str) -> None:
    """Returns when every process has come here; `what` names the place."""
    if several():
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def main_first(what: str) -> Iterator[None]:
    """Process 0 runs the block before the others do: they find what it has written."""
    if not is_main():
        wait_for_all(what)
    yield
    if is_main():
        wait_for_all(what)


# The end.


def leave_at_once(status: int) -> None:
    """Ends a process of several after an error, its message being printed.

    An orderly end would first wait for the others, who wait for this one in a collective. They see
    that it is gone and end too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
