"""ODE solvers for sampling: Euler, UniPC and DPM-Solver++, init/step pairs in one table, SOLVERS.

All three are linear: the corrected sample and the next one are weighted sums of what the step has
at hand (the sample, the corrected sample before, this and the last two predictions of x0). What
tells them, their orders and their steps apart is the weights, so these are computed on the host in
float64 from the noise levels, and the step is one pure function that compiles once: no branch on
the step's number, orders that don't apply have zero weights. It runs in a loop or in `lax.scan`.

    schedule = make_schedule("unipc", steps=50, shift=3.0)
    state = schedule.solver.init(noise)
    for i, timestep in enumerate(schedule.timesteps):
        velocity = model(state.x, timestep)
        state = schedule.solver.step(state, velocity, schedule.coefficients_at(i))
    state.x  # the sample

Notation: σ noise level, α = 1 - σ, λ = log α - log σ, h the step in λ, v the model's velocity,
x0 = x - σ·v the data it points at; a prime means after the step.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lact_jax.diffusion.flow import MODEL_TIME_SCALE

_SIGMA_MAX = 0.999  # where the grid starts, before the shift

Weights = dict[str, np.ndarray]  # fields of Coefficients -> (steps,) float64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolverState:
    """All that a step needs of the ones before. Every array has the sample's shape, float32."""

    x: jax.Array  # the sample, at which the model is evaluated next
    last: jax.Array  # the corrected sample that the step before started from
    x0_1: jax.Array  # the prediction of x0 one step ago
    x0_2: jax.Array  # and two steps ago


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coefficients:
    """Noise level and weights of each step: every field is (steps,) float32, or one step's scalar.

    corrected = correct_x·x + correct_last·last
                + correct_x0·x0 + correct_x0_1·x0_1 + correct_x0_2·x0_2
    x' = predict_x·corrected + predict_x0·x0 + predict_x0_1·x0_1
    """

    sigma: np.ndarray
    correct_x: np.ndarray
    correct_last: np.ndarray
    correct_x0: np.ndarray
    correct_x0_1: np.ndarray
    correct_x0_2: np.ndarray
    predict_x: np.ndarray
    predict_x0: np.ndarray
    predict_x0_1: np.ndarray


@dataclasses.dataclass(frozen=True)
class Solver:
    """`init(x) -> state`, `step(state, velocity, coefficients of the step) -> state`, and the
    weights for noise levels (steps + 1,), float64; fields it leaves out are 0 (correct_x: 1)."""

    init: Callable[[jax.Array], SolverState]
    step: Callable[[SolverState, jax.Array, Coefficients], SolverState]
    weights: Callable[[np.ndarray], Weights]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A solver and its steps: noise levels (steps + 1,) float64 from near 1 down to 0, the model's
    timesteps (steps,) int32, and the coefficients of every step."""

    solver: Solver
    sigmas: np.ndarray
    timesteps: np.ndarray
    coefficients: Coefficients

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def coefficients_at(self, i: int) -> Coefficients:
        """The scalars of step `i`, for a Python loop; to `lax.scan` pass `coefficients` whole."""
        return jax.tree.map(lambda field: field[i], self.coefficients)


def init(x: jax.Array) -> SolverState:
    """The state before the first step, from noise `x` of any shape."""
    x = jnp.asarray(x, jnp.float32)
    nothing_yet = jnp.zeros_like(x)
    return SolverState(x=x, last=nothing_yet, x0_1=nothing_yet, x0_2=nothing_yet)


def step(state: SolverState, velocity: jax.Array, c: Coefficients) -> SolverState:
    """One step. `velocity` is the model's at `state.x`, any float type; `c` holds scalars."""
    x0 = state.x - c.sigma * velocity.astype(jnp.float32)
    corrected = (
        c.correct_x * state.x
        + c.correct_last * state.last
        + c.correct_x0 * x0
        + c.correct_x0_1 * state.x0_1
        + c.correct_x0_2 * state.x0_2
    )
    x = c.predict_x * corrected + c.predict_x0 * x0 + c.predict_x0_1 * state.x0_1
    return SolverState(x=x, last=corrected, x0_1=x0, x0_2=state.x0_1)


def euler_weights(sigmas: np.ndarray) -> Weights:
    """Euler: x' = x + (σ' - σ)·v, which in terms of x0 is (σ'/σ)·x + (1 - σ'/σ)·x0."""
    ratio = sigmas[1:] / sigmas[:-1]
    return {"predict_x": ratio, "predict_x0": 1.0 - ratio}


def dpmpp_weights(sigmas: np.ndarray) -> Weights:
    """DPM-Solver++, second-order multistep in its midpoint form (Lu et al., arXiv:2211.01095):

    x' = (σ'/σ)·x + α'·(1 - e^-h)·(x0 + ½·q·(x0 - x0_1)), q = h/h_before,

    first order (q = 0) at the first step, which has no x0_1, and at the last, where x' = x0.
    """
    ratio, gain, _, q = _step_terms(sigmas)
    return {
        "predict_x": ratio,
        "predict_x0": gain * (1.0 + 0.5 * q),
        "predict_x0_1": -0.5 * gain * q,
    }


def unipc_weights(sigmas: np.ndarray) -> Weights:
    """UniPC of order 2 with B(h) = e^-h - 1 ("bh2"), predicting x0 (Zhao et al., arXiv:2302.04867).

    Its predictor is DPM-Solver++'s. Once the model has spoken at x', its x0' corrects the step:

    x' = (σ'/σ)·x + α'·(1 - e^-h)·(x0 + ρ1·q·(x0 - x0_1) + ρ2·(x0' - x0)),

    where ρ2 = ½ alone after a first-order step; after one of second order (1, 1; -1/q, 1)·ρ = b,
    b the moments of e^-s over the step (`_bh2_moments`). The last step is never corrected.
    """
    ratio, gain, h, q = _step_terms(sigmas)
    b1, b2 = _bh2_moments(h)
    rho1 = (b1 - b2) * q / (1.0 + q)
    rho2 = np.where(_second_order(len(h)), b1 - rho1, 0.5)

    def delayed(w: np.ndarray, first: float = 0.0) -> np.ndarray:
        """Step i's weight as used at the start of step i + 1, where its result is corrected."""
        return np.concatenate([[first], w[:-1]])

    return {
        "correct_x": delayed(np.zeros_like(h), first=1.0),
        "correct_last": delayed(ratio),
        "correct_x0": delayed(gain * rho2),
        "correct_x0_1": delayed(gain * (1.0 - rho2 + rho1 * q)),
        "correct_x0_2": delayed(-gain * rho1 * q),
        **dpmpp_weights(sigmas),
    }


def _step_terms(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each step σ'/σ, α'·(1 - e^-h), h, and q = h/h_before (0 where the step is first order).

    h is infinite at the last step (σ' = 0), and at the first where σ = 1; then the second's q is 0.
    """
    with np.errstate(divide="ignore"):
        lam = np.log1p(-sigmas) - np.log(sigmas)
    h = np.diff(lam)
    gain = -(1.0 - sigmas[1:]) * np.expm1(-h)
    q = np.zeros_like(h)
    second = np.flatnonzero(_second_order(len(h)))
    q[second] = h[second] / h[second - 1]
    return sigmas[1:] / sigmas[:-1], gain, h, q


def _second_order(steps: int) -> np.ndarray:
    """Which steps are second order, bool (steps,): all but the first and the last."""
    i = np.arange(steps)
    return (i > 0) & (i < steps - 1)


def _bh2_moments(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """UniPC's right-hand sides b1 = φ2/B and b2 = 2·φ3/B for steps `h`, B = φ1 = e^-h - 1.

    φ2 = φ1/(-h) - 1 and φ3 = φ2/(-h) - ½; both b tend to 1 as h grows, to ½ and ⅓ as it vanishes.
    """
    phi1 = np.expm1(-h)
    phi2 = phi1 / -h - 1.0
    phi3 = phi2 / -h - 0.5
    return phi2 / phi1, 2.0 * phi3 / phi1


# Name -> solver. All share init and step; one with a state of its own would bring its own pair.
SOLVERS = {
    "euler": Solver(init, step, euler_weights),
    "unipc": Solver(init, step, unipc_weights),
    "dpm++": Solver(init, step, dpmpp_weights),
}


def sigma_grid(steps: int, shift: float) -> np.ndarray:
    """Noise levels (steps + 1,), float64, falling to 0: sh(linspace(sh(0.999), 0, steps + 1)) with
    sh(σ) = s·σ / (1 + (s - 1)·σ). The shift acts twice, as in the official schedulers.

    Raises ValueError for steps < 1, a shift that is not positive, and one so extreme that the
    levels coincide in float64.
    """
    if steps < 1:
        raise ValueError(f"sampling takes at least one step, got steps={steps}")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"the time shift must be a positive number, got shift={shift}")

    def sh(sigma):
        return shift * sigma / (1.0 + (shift - 1.0) * sigma)

    sigmas = sh(np.linspace(sh(_SIGMA_MAX), 0.0, steps + 1, dtype=np.float64))
    if not np.all(np.diff(sigmas) < 0):
        raise ValueError(f"shift={shift} is too extreme for {steps} steps: noise levels coincide")
    return sigmas


def tabulate(solver: Solver, sigmas: np.ndarray) -> Coefficients:
    """The coefficients of every step, rounded once from float64 to float32.

    `sigmas` (steps + 1,) fall strictly to 0, from at most 1 (a start at exactly 1 is fine).
    """
    sigmas = np.asarray(sigmas, np.float64)
    steps = len(sigmas) - 1
    weights = {"sigma": sigmas[:-1], "correct_x": np.ones(steps), **solver.weights(sigmas)}
    none = np.zeros(steps)
    names = [field.name for field in dataclasses.fields(Coefficients)]
    return Coefficients(**{name: weights.get(name, none).astype(np.float32) for name in names})


def make_schedule(name: str, steps: int, shift: float) -> Schedule:
    """The schedule of a solver in SOLVERS, by name. A step's timestep is floor(1000·σ), exactly: in
    float64, while the solver itself goes on with the unrounded σ.

    Raises ValueError for an unknown name (listing SOLVERS) and as `sigma_grid` does.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}: choose from {sorted(SOLVERS)}")
    sigmas = sigma_grid(steps, shift)
    timesteps = np.floor(MODEL_TIME_SCALE * sigmas[:-1]).astype(np.int32)
    return Schedule(SOLVERS[name], sigmas, timesteps, tabulate(SOLVERS[name], sigmas))
