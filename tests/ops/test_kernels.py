"""When Triton kernels are chosen."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from lact_jax.ops import kernels
from lact_jax.ops.attention import tracing_for

HOPPER = SimpleNamespace(platform="gpu", compute_capability="9.0")
VOLTA = SimpleNamespace(platform="gpu", compute_capability="7.0")
ROCM = SimpleNamespace(platform="gpu", compute_capability="gfx942")
CPU = SimpleNamespace(platform="cpu")


@pytest.mark.parametrize(
    ("device", "choice", "dtype", "chosen"),
    [
        (HOPPER, "auto", jnp.bfloat16, True),
        (HOPPER, "auto", "bfloat16", True),
        (HOPPER, "xla", jnp.bfloat16, False),
        (HOPPER, "auto", jnp.float32, False),
        (VOLTA, "auto", jnp.bfloat16, False),
        (ROCM, "auto", jnp.bfloat16, False),
        (CPU, "auto", jnp.bfloat16, False),
    ],
)
def test_kernels_are_for_bfloat16_on_nvidia_cards(monkeypatch, device, choice, dtype, chosen):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert kernels.wanted(choice, dtype) is chosen


def test_a_program_for_a_device_that_is_not_there_has_none(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [HOPPER])
    with tracing_for("cuda"):
        assert not kernels.wanted("auto", jnp.bfloat16)
