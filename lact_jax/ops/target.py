"""The device that a program is traced for: one of this process, or one that is not there."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_TARGET: ContextVar[jax.Device | None] = ContextVar("target device", default=None)


@contextlib.contextmanager
def tracing_for(device: jax.Device) -> Iterator[None]:
    """What is traced meanwhile is to be compiled for such a device, whatever runs here."""
    before = _TARGET.set(device)
    try:
        yield
    finally:
        _TARGET.reset(before)


def target_device() -> jax.Device:
    """What `tracing_for` names; outside of it the first device of this process."""
    return _TARGET.get() or jax.devices()[0]


def capability(device: jax.Device) -> float:
    """The compute capability of a CUDA device; 0 for another."""
    found = str(getattr(device, "compute_capability", ""))
    is_cuda = device.platform == "gpu" and found.replace(".", "", 1).isdigit()
    return float(found) if is_cuda else 0.0
