"""When Triton kernels are chosen."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from lact_jax.ops.kernels import choose_backend
from lact_jax.ops.target import target_device, tracing_for

HOPPER = SimpleNamespace(platform="gpu", compute_capability="9.0")
VOLTA = SimpleNamespace(platform="gpu", compute_capability="7.0")
ROCM = SimpleNamespace(platform="gpu", compute_capability="gfx942")
CPU = SimpleNamespace(platform="cpu")


@pytest.mark.parametrize(
    ("device", "choice", "dtype", "fits", "backend"),
    [
        (HOPPER, "auto", jnp.bfloat16, True, "triton"),
        (HOPPER, "auto", "bfloat16", True, "triton"),
        (HOPPER, "auto", jnp.bfloat16, False, "xla"),
        (HOPPER, "auto", jnp.float32, True, "xla"),
        (VOLTA, "auto", jnp.bfloat16, True, "xla"),
        (ROCM, "auto", jnp.bfloat16, True, "xla"),
        (CPU, "auto", jnp.bfloat16, True, "xla"),
        (HOPPER, "xla", jnp.bfloat16, True, "xla"),
        (CPU, "interpret", jnp.float32, True, "interpret"),
        (HOPPER, "interpret", jnp.bfloat16, False, "xla"),
    ],
)
def test_kernels_are_for_bfloat16_on_nvidia_cards_where_they_fit(
    monkeypatch, device, choice, dtype, fits, backend
):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert choose_backend(choice, dtype, fits) == backend


def test_a_program_for_another_device_has_that_devices_kernels(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [CPU])
    with tracing_for(HOPPER):
        assert choose_backend("auto", jnp.bfloat16, True) == "triton"
        with tracing_for(VOLTA):
            assert choose_backend("auto", jnp.bfloat16, True) == "xla"
        assert target_device() is HOPPER
    assert target_device() is CPU
