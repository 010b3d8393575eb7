"""Starts several processes on this machine, each as a cluster's launcher would, for the tests."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from convert.convert_fixtures import CONFIG_JSON, random_tensors, write_wan
from run_fixtures import script_env

from lact_jax.convert import Import, import_checkpoint
from lact_jax.models.dit import DiTConfig

WORKER = Path(__file__).parent / "distributed_worker.py"
LAST_PORTS = 65536 - 4096  # JAX puts SLURM's and Open MPI's coordinators here, by the job's number


def free_port(at_least: int = 1024) -> int:
    """A port that nothing listens at."""
    while True:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            if free.getsockname()[1] >= at_least:
                return free.getsockname()[1]


def free_last_port() -> int:
    """As `free_port`, among LAST_PORTS."""
    for port in range(LAST_PORTS + os.getpid() % 2048, 65536):
        with socket.socket() as free:
            if free.connect_ex(("localhost", port)):
                return port
    raise RuntimeError("no port is free")


# What a launcher tells process `index` of two on one host.


def slurm(port: int) -> Callable[[int], Mapping[str, str]]:
    return lambda index: {
        "SLURM_JOB_ID": str(port - LAST_PORTS),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
    }


def open_mpi(port: int) -> Callable[[int], Mapping[str, str]]:
    return lambda index: {
        "OMPI_MCA_orte_hnp_uri": f"{(port - LAST_PORTS) * 4096}.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }


def kubernetes(port: int) -> Callable[[int], Mapping[str, str]]:
    return lambda index: {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JOB_COMPLETION_INDEX": str(index),
    }


def alone(index: int) -> Mapping[str, str]:
    return {}


def start(
    arguments: Sequence[str], told: Callable[[int], Mapping[str, str]], devices: Sequence[int]
) -> list[subprocess.Popen]:
    """A Python process for each of `devices`, with that many simulated devices."""
    processes = []
    for index, count in enumerate(devices):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        processes.append(subprocess.Popen(
            [sys.executable, *arguments],
            env=script_env(XLA_FLAGS=flags, **told(index)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ))  # fmt: skip
    return processes


def finish(processes: Sequence[subprocess.Popen], seconds: float) -> list[tuple[int, str]]:
    """(status, output) of each; none is left running, and one that takes longer is an error."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def converted_wan(folder: Path, model: DiTConfig) -> Path:
    """A converted folder in `folder`: a random Wan of a model's sizes, without its fast weights."""
    tensors = random_tensors("dit", replace(model, mixer="full"), dtype=np.float32)
    sizes = {name: getattr(model, name) for name in ("num_layers", "ffn_dim", "freq_dim")}
    sizes |= {"in_dim": model.latent_channels, "out_dim": model.latent_channels}
    config_json = CONFIG_JSON | sizes | {"text_len": model.text_len}
    source = write_wan(folder / "source", {k: 0.2 * x for k, x in tensors.items()}, config_json)
    import_checkpoint(Import(source, folder / "converted"), log=lambda *_: None)
    return folder / "converted"
