"""What the benchmarks share: timing, memory, versions, and the report."""

import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

# A run on a CPU only shows that the script works; its numbers mean nothing.
SMALL_MODEL = dict(
    dim=64, ffn_dim=128, num_heads=2, num_layers=2, freq_dim=32, text_dim=32, text_len=8
)


def median_seconds(call: Callable, repeats: int) -> float:
    """Median wall time of `call()`, which must return what it computes; each is waited for."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def first_call_seconds(call: Callable):
    """(result, wall time) of a first call, compilation included."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - start


def at_once(*calls: Callable) -> list:
    """What each call returns. Those that compile for long do so beside one another."""
    with ThreadPoolExecutor() as pool:
        return [job.result() for job in [pool.submit(call) for call in calls]]


def untuned() -> dict[str, str] | None:
    """compiler_options for a float32 program that only tells errors: on a GPU its tuning takes
    minutes."""
    return {"xla_gpu_autotune_level": "0"} if jax.default_backend() == "gpu" else None


def peak_gigabytes() -> float | None:
    """Peak device memory of this process in GB, None where the backend does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 1e9 if stats else None


def held_gigabytes() -> float | None:
    """Device memory in use now in GB, None where the backend does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_in_use"] / 1e9 if stats else None


def relative_error(got, want) -> float:
    """‖got − want‖ / ‖want‖ in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def largest_error(got, want) -> float:
    """The largest relative error of any array of two trees."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(relative_error(jnp.asarray(a, jnp.float32), b) for a, b in pairs)


def measured_matmul_rate(dtype, size: int = 8192, warm_seconds: float = 0.5) -> float:
    """FLOP/s of a square matmul on random data; the default size fills a large device.

    The device runs it for `warm_seconds` before it is timed, so that its clock is what work makes
    of it. What is timed is a queue of products: the host is not waited for between them.
    """
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    product = jax.jit(jnp.matmul)

    def queue():
        for _ in range(20):
            last = product(a, b)  # memory of the others is free again
        return last

    start = time.perf_counter()
    while time.perf_counter() - start < warm_seconds:
        jax.block_until_ready(queue())
    return 20 * 2 * size**3 / median_seconds(queue, 5)


def versions() -> dict[str, str]:
    """The backend, and what of the packages that decide about speed is installed."""
    names = ("jaxlib", "torch", "nvidia-cudnn", "nvidia-cublas", "nvidia-cuda-nvcc")
    found = {
        dist.metadata["Name"]: dist.version
        for dist in importlib.metadata.distributions()
        if dist.metadata["Name"].startswith(names)
    }
    return {"backend": jax.devices()[0].client.platform_version, **dict(sorted(found.items()))}


def report(name: str, rows: dict, json_path: str | None = None) -> None:
    """Prints a table and one JSON line, and writes the JSON to a file if one is named."""
    device = jax.devices()[0]
    result = {
        "benchmark": name,
        "device": device.device_kind,
        "jax": jax.__version__,
        "versions": versions(),
        **rows,
    }
    print(f"\n{name} on {device.device_kind}, jax {jax.__version__}")
    for key, value in rows.items():
        print(f"  {key:36} {value:.4g}" if isinstance(value, float) else f"  {key:36} {value}")
    print(json.dumps(result))
    if json_path:
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n")
