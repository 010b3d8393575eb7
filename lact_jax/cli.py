"""What the scripts share: how errors end, and the compilation cache."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, logging

from lact_jax import distributed
from lact_jax.checkpoint_tree import CheckpointError
from lact_jax.workdir import WorkdirError

# Errors whose message says what to do. Others are bugs and keep their traceback.
EXPECTED = (ValueError, OSError, CheckpointError, WorkdirError, ImportError)
TRACEBACK_VARIABLE = "LACT_JAX_TRACEBACK"
CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX is told another place."""
    if CACHE_VARIABLE not in os.environ:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(base / "lact_jax" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def parse_flags(argv: list[str]) -> list[str]:
    """For `app.run(flags_parser=…)`: an override of a key that the config file lacks ends like any
    other flag that is wrong, in a message and not in a traceback."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:  # what ml_collections raises
        said = str(error).replace("\\n", ". ")
        said = "".join(c for c in said if c not in "\\'")
        print(f"error: the command line does not fit the config file: {said}", file=sys.stderr)
        sys.exit(1)


def _hide_closed_loops() -> None:
    """Where one write of a checkpoint fails, TensorStore reports every other one to an event loop
    that Orbax has closed: dozens of tracebacks around the one message that says what happened
    (the error that `checkpoint.py` raises)."""
    told = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            told(unraisable)

    sys.unraisablehook = hook
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def finish(main: Callable[[], int]) -> None:
    """Runs `main` and exits with its status; an expected error ends with its message and 1.

    An error in a run of several processes ends this one at once; the others end when they see that.
    """
    use_compilation_cache()
    _hide_closed_loops()
    logging.set_verbosity(logging.WARNING)  # Orbax tells dozens of lines about each checkpoint
    try:
        status = main()
    except KeyboardInterrupt:
        print("interrupted: finished clips and files are whole", file=sys.stderr)
        status = _failed(130)
    except Exception as error:
        expected = isinstance(error, EXPECTED) and not os.environ.get(TRACEBACK_VARIABLE)
        if not (expected or jax.distributed.is_initialized()):
            raise
        if expected:
            print(f"error: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
            print(f"(set {TRACEBACK_VARIABLE}=1 to see where)", file=sys.stderr)
        else:
            traceback.print_exc()
            print("error: this process, or one that it exchanges with, failed", file=sys.stderr)
        status = _failed(1)
    sys.exit(status)


def _failed(status: int) -> int:
    if jax.distributed.is_initialized():
        distributed.leave_at_once(status)
    return status
