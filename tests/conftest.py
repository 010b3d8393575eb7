"""What all tests share: the platform, the order, a compilation cache, quick compilation."""

import gc
import os

import jax
import pytest

# Tests compile much and compute little. Level 1 of LLVM takes two thirds of the time for code that
# is as fast; without the fusion emitters, which later versions can't switch off, it takes half.
# Cutting a program into pieces for other threads to compile and to run is a quarter of the rest:
# in vain, for the other cores run other tests.
QUICK_XLA = [
    "--xla_backend_optimization_level=1",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_multi_thread_eigen=false",
]
if jax.__version_info__ < (0, 11):
    QUICK_XLA.append("--xla_cpu_use_fusion_emitters=false")

# Files that take half a minute or more.
LONG = {
    "test_bad_input", "test_benchmarks", "test_distributed_run", "test_dit", "test_dit_backward",
    "test_encoded_run", "test_lact", "test_memory", "test_notebook", "test_parity", "test_pipeline",
    "test_plan", "test_resume", "test_sharded_layers", "test_sharded_model",
    "test_sharded_training", "test_train_state", "test_watch",
}  # fmt: skip


def pytest_configure(config):
    """Runs on the CPU unless JAX_PLATFORMS names another platform, and keeps compiled code.

    All of it goes into the environment as well, so that scripts the tests start do the same.
    """
    if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
        jax.config.update("jax_platforms", "cpu")
        os.environ["XLA_FLAGS"] = " ".join([*QUICK_XLA, os.environ.get("XLA_FLAGS", "")])
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and hasattr(config, "cache"):
        folder = str(config.cache.mkdir("jax"))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # xdist would hand out files of many tests first; the longest may have one (see LONG).
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Long files first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish():
    """Leaves what is imported out of the search for garbage: a quarter of the time of tracing."""
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture
def quick_compile():
    """Compiles with the fewest optimisations, for tests of small models that run them once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def float32_matmuls():
    """For tests whose own references multiply matrices: an accelerator would shorten float32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_code_goes_with_its_module():
    """Drops a module's compiled code after it: all of the suite's would take many gigabytes."""
    yield
    jax.clear_caches()
