"""Flow matching: noise levels, their shift, the noised input, the target and the loss weight.

A noise level t in [0, 1] mixes data and noise on a straight line, x_t = (1 - t)·x0 + t·eps, and the
model predicts its slope, eps - x0. Levels start as a draw u in (0, 1), which `shift_time` pushes
towards noise; the model is told MODEL_TIME_SCALE·t. Everything is float32.
"""

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np

MODEL_TIME_SCALE = 1000.0  # the model's timestep for t = 1

# The two (tokens, shift) points through which log(shift) is linear in the number of tokens.
_SHIFT_POINTS = ((32760, 3.0), (73710, 5.0))

_WEIGHT_BINS = 1000
_WEIGHT_EDGE = 1e-7  # outermost bin edges stay this far from 0 and 1, where the logit is infinite

_SMALLEST_U = float(np.finfo(np.float32).tiny)
_LARGEST_U = 1.0 - 2.0**-24  # the float32 number below 1


def shift_time(u: jax.Array, shift: float) -> jax.Array:
    """Noise level t = s·u / (1 + (s - 1)·u) for draws `u` in [0, 1], any shape; t has its shape.

    `shift` s > 1 spends more of the draws near noise; 1 leaves them alone. Raises ValueError for a
    shift that is not positive (a shift by resolution comes from `resolution_shift`).
    """
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"the time shift must be a positive number, got {shift}")
    u = jnp.asarray(u, jnp.float32)
    return shift * u / (1.0 + (shift - 1.0) * u)


def resolution_shift(num_tokens: int) -> float:
    """The shift for chunks of `num_tokens` tokens: more tokens need more noise to be as hidden.

    log(shift) is the line through (32760 tokens, log 3) and (73710, log 5), on both sides of them;
    a chunk of 4680 tokens gives 2.1135. Raises ValueError for fewer than one token.
    """
    if num_tokens < 1:
        raise ValueError(f"a chunk has at least one token, got {num_tokens}")
    (n_low, s_low), (n_high, s_high) = _SHIFT_POINTS
    slope = math.log(s_high / s_low) / (n_high - n_low)
    return s_low * math.exp(slope * (num_tokens - n_low))


def sample_uniform(
    key: jax.Array, shape: Sequence[int], *, mean: float = 0.0, std: float = 1.0
) -> jax.Array:
    """u ~ U(0, 1), both ends open, float32. Has no use for `mean` and `std` (see TIME_SAMPLERS)."""
    del mean, std
    return jax.random.uniform(key, shape, jnp.float32, minval=_SMALLEST_U)


def sample_logit_normal(
    key: jax.Array, shape: Sequence[int], *, mean: float = 0.0, std: float = 1.0
) -> jax.Array:
    """u = sigmoid(z), z ~ N(mean, std²), both ends open, float32.

    The official code takes a plain normal here, which leaves (0, 1); this is the true logit-normal.
    Raises ValueError for a std that is not positive.
    """
    _check_std(std)
    z = mean + std * jax.random.normal(key, shape, jnp.float32)
    return jnp.clip(jax.nn.sigmoid(z), _SMALLEST_U, _LARGEST_U)  # float32 sigmoid saturates at 1


# How training draws u: name -> sampler(key, shape, *, mean, std). One signature for all, so that
# a caller picks by name and passes its options without asking which one it got.
TIME_SAMPLERS = {"uniform": sample_uniform, "logit_normal": sample_logit_normal}


def sample_time(
    name: str, key: jax.Array, shape: Sequence[int], *, mean: float = 0.0, std: float = 1.0
) -> jax.Array:
    """Draws u in (0, 1), one for each sample, repeat and chunk of `shape`, with a named sampler.

    Raises ValueError, listing TIME_SAMPLERS, for a name that is not in it.
    """
    if name not in TIME_SAMPLERS:
        raise ValueError(f"unknown time sampler {name!r}: choose from {sorted(TIME_SAMPLERS)}")
    return TIME_SAMPLERS[name](key, shape, mean=mean, std=std)


def logit_normal_weight(u: jax.Array, std: float) -> jax.Array:
    """Loss weight of *unshifted* draws `u` in [0, 1], any shape: the logit-normal density, binned.

    The probability mass of [floor(1000u), floor(1000u) + 1]/1000 under sigmoid(N(0, std²)), times
    1000, so that the weights average to 1 over uniform u. u = 1 lies in an empty bin of weight 0.
    The masses are differences of a CDF near 1, which float32 would round to multiples of 6e-5:
    they are tabulated once in float64. Raises ValueError for a std that is not positive.
    """
    _check_std(std)
    u = jnp.asarray(u, jnp.float32)
    bins = jnp.clip(jnp.floor(_WEIGHT_BINS * u), 0, _WEIGHT_BINS).astype(jnp.int32)
    return jnp.asarray(_weight_table(float(std)), jnp.float32)[bins]


@functools.cache
def _weight_table(std: float) -> np.ndarray:
    """Bin masses times 1000, float64 (1001,); the last is the empty bin that u = 1 falls in."""
    edges = np.arange(_WEIGHT_BINS + 2) / _WEIGHT_BINS
    edges = np.clip(edges, _WEIGHT_EDGE, 1.0 - _WEIGHT_EDGE)
    normal = NormalDist(0.0, std)
    cdf = np.array([normal.cdf(logit) for logit in np.log(edges / (1.0 - edges))])
    return np.diff(cdf) * _WEIGHT_BINS


def _check_std(std: float) -> None:
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"the logit-normal std must be a positive number, got {std}")


def add_noise(x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """x_t = (1 - t)·x0 + t·eps, float32, of the shape that x0 and eps broadcast to.

    `t` holds levels in [0, 1] for the *leading* axes: (B, R, W) beside (B, R, W, f, h, w, C), say.
    Raises ValueError where t has more axes than x_t or sizes that don't broadcast to them.
    """
    x0, eps, t = (jnp.asarray(a, jnp.float32) for a in (x0, eps, t))
    shape = jnp.broadcast_shapes(x0.shape, eps.shape)
    leading = shape[: t.ndim]
    if t.ndim > len(shape) or any(n not in (1, m) for n, m in zip(t.shape, leading, strict=True)):
        raise ValueError(f"noise levels of shape {t.shape} don't fit the leading axes of {shape}")
    t = t.reshape(t.shape + (1,) * (len(shape) - t.ndim))
    return (1.0 - t) * x0 + t * eps


def velocity_target(x0: jax.Array, eps: jax.Array) -> jax.Array:
    """What the model predicts, d x_t / d t = eps - x0, float32."""
    return jnp.asarray(eps, jnp.float32) - jnp.asarray(x0, jnp.float32)
