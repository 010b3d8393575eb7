"""When the hand-written Triton kernels take the place of plain JAX."""

import jax
import jax.numpy as jnp

from lact_jax.ops.attention import target_platform

CHOICES = ("auto", "xla")
MIN_CAPABILITY = 8.0  # of an NVIDIA card: Ampere


def wanted(choice: str, dtype) -> bool:
    """Whether a computation in `dtype` is to use the kernels.

    They take bfloat16 on the card that this process has; a float32 computation, another kind of
    device, and a program for a device that is not there are left to XLA.

    Args:
      choice: one of CHOICES, 'xla' for never.
      dtype: of the matmuls around the kernel.
    """
    if choice == "xla" or jnp.dtype(dtype) != jnp.bfloat16 or target_platform() is not None:
        return False
    device = jax.devices()[0]
    return device.platform == "gpu" and capability(device) >= MIN_CAPABILITY


def capability(device: jax.Device) -> float:
    """The compute capability of a CUDA device; 0 for another."""
    found = str(getattr(device, "compute_capability", ""))
    return float(found) if found.replace(".", "", 1).isdigit() else 0.0
