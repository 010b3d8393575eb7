"""Devices that are not there: cards described to XLA, to compile for and not to run on.

The CUDA plugin compiles for a card by its description. Three things that it would look for on a
machine with a card are replaced here, none of which changes what is planned: cuDNN (only its
version and the card's capability are asked for while tracing), ptxas (nothing that it makes is
ever run), and autotuning, which has no card to measure on: matmuls are left to cuBLAS, which it
mostly chooses for large ones, and whose workspaces are counted.
"""

import contextlib
import importlib.metadata
import stat
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from unittest import mock

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn_attention
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

from lact_jax.ops.target import capability, tracing_for
from lact_jax.planning.cards import GPUS_PER_NODE, Card

PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
CUDNN_VERSION = 91200
# Says its version, and writes a file where a cubin is asked for.
PTXAS = """#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0;; esac
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then echo none > "$2"; exit 0; fi
  shift
done
"""


def check_gpus(count: int) -> None:
    """Raises ValueError unless that many GPUs are one or several whole nodes, or part of one."""
    if count < 1 or (count > GPUS_PER_NODE and count % GPUS_PER_NODE):
        raise ValueError(
            f"--gpus={count}: give 1 to {GPUS_PER_NODE}, or a multiple of {GPUS_PER_NODE} (whole "
            "nodes)"
        )


def check_plugin() -> None:
    """Raises ImportError, which says how to install it, where JAX has no CUDA plugin."""
    installed = {name.lower().replace("_", "-") for name in _distributions()}
    if not installed.intersection(PLUGINS):
        version = importlib.metadata.version("jaxlib")
        raise ImportError(
            "the planner compiles with JAX's CUDA plugin, which is not installed. It needs no GPU "
            "and installs on any Linux machine: pip install 'lact-jax[cuda13]', or without "
            f"NVIDIA's own libraries (the planner does not use them): pip install --no-deps "
            f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
        )


def _distributions() -> Iterator[str]:
    return (found.metadata["Name"] or "" for found in importlib.metadata.distributions())


def gpu_devices(card: Card, count: int) -> Sequence[jax.Device]:
    """`count` devices of a kind, eight a node, to lower and compile for.

    Raises:
      ImportError: the CUDA plugin is missing.
      ValueError: no such number of cards can be put into nodes.
    """
    check_gpus(count)
    check_plugin()
    nodes = max(1, count // GPUS_PER_NODE)
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=card.name,
        topology=f"1x{nodes}x{count // nodes}",
        target_config=card.target,
    ).devices


@lru_cache
def _cuda_folder() -> tempfile.TemporaryDirectory:
    """A CUDA toolkit that has nothing but PTXAS; it goes when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="lact_jax_cuda_")
    ptxas = Path(folder.name) / "bin" / "ptxas"
    ptxas.parent.mkdir()
    ptxas.write_text(PTXAS)
    ptxas.chmod(ptxas.stat().st_mode | stat.S_IXUSR)
    return folder


def compiler_options(platform: str) -> dict[str, str | bool]:
    """What to compile with for a platform whose devices are not there."""
    if platform != "cuda":
        return {}
    return {"xla_gpu_cuda_data_dir": _cuda_folder().name, "xla_gpu_enable_triton_gemm": False}


@contextlib.contextmanager
def building_for(device: jax.Device) -> Iterator[None]:
    """What is traced and lowered meanwhile is for such devices: on a GPU with cuDNN's attention,
    and with the Triton kernels that the card takes."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(tracing_for(device))
        if device.platform == "gpu":
            answers = {
                "check_cudnn_version": lambda: CUDNN_VERSION,
                "check_compute_capability": lambda least: capability(device) >= float(least),
            }
            stack.enter_context(mock.patch.multiple(cudnn_attention, **answers))
            # Kernels are lowered for the device of the mesh; models see that it cuts nothing.
            card = AbstractDevice(device.device_kind, device.core_count, device.platform)
            mesh = AbstractMesh((), (), abstract_device=card)
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
        yield
