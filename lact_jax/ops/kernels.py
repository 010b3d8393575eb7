"""When the hand-written Triton kernels take the place of plain JAX."""

import jax.numpy as jnp

from lact_jax.ops.target import capability, target_device

CHOICES = ("auto", "xla", "interpret")
MIN_CAPABILITY = 8.0  # of an NVIDIA card: Ampere


def choose_backend(choice: str, dtype, fits: bool) -> str:
    """How an operation that has a kernel is computed: 'triton', 'interpret' or 'xla'.

    Args:
      choice: one of CHOICES: 'auto' for Triton on the cards that take it, in bfloat16; 'xla' for
        plain JAX; 'interpret' for the kernels run as plain JAX, on any device, slowly.
      dtype: of the matmuls around the kernel.
      fits: whether the kernel takes these sizes and options; what does not fit is left to XLA.
    """
    if not fits or choice == "xla":
        return "xla"
    if choice == "interpret":
        return "interpret"
    takes = capability(target_device()) >= MIN_CAPABILITY
    return "triton" if takes and jnp.dtype(dtype) == jnp.bfloat16 else "xla"
