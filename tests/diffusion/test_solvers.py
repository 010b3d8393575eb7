"""Solvers against the official trajectories, and against their formulas with Python branches."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from lact_jax.diffusion import solvers

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [f"solver_{name}_{n}" for name in ("dpmpp", "unipc") for n in ("4_3", "20_5", "50_3")]
NAMES = sorted(solvers.SOLVERS)


def read_case(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "np") as case:
        tensors = {k: case.get_tensor(k) for k in case.keys() if k.startswith(("in.", "out."))}
        return json.loads(case.metadata()["config"]), tensors


def error(got, want):
    """Relative L2 error."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def run_loop(solver, coefficients, x, velocities):
    """All samples (steps + 1, ...), by a Python loop over the jitted step."""
    step = jax.jit(solver.step)
    state = solver.init(x)
    samples = [state.x]
    for i, velocity in enumerate(velocities):
        c = jax.tree.map(lambda field, i=i: field[i], coefficients)
        state = step(state, velocity, c)
        samples.append(state.x)
    return np.stack(samples)


# The twins: the solvers' formulas step by step, in float64, orders by `if`.


def log_snr(sigma):
    return math.inf if sigma == 0 else -math.inf if sigma == 1 else math.log((1 - sigma) / sigma)


def base_step(x, x0, sigma, sigma_next):
    h = log_snr(sigma_next) - log_snr(sigma)
    return sigma_next / sigma * x - (1 - sigma_next) * math.expm1(-h) * x0


def euler_twin(sigmas, x, velocities):
    samples = [x]
    for i, v in enumerate(velocities):
        x = x + (sigmas[i + 1] - sigmas[i]) * v
        samples.append(x)
    return np.stack(samples)


def dpmpp_twin(sigmas, x, velocities):
    samples, x0_before = [x], None
    for i, v in enumerate(velocities):
        x0 = x - sigmas[i] * v
        x_next = base_step(x, x0, sigmas[i], sigmas[i + 1])
        if 0 < i < len(velocities) - 1:
            lam = [log_snr(s) for s in sigmas[i - 1 : i + 2]]
            h, r0 = lam[2] - lam[1], (lam[1] - lam[0]) / (lam[2] - lam[1])
            d1 = (x0 - x0_before) / r0
            x_next = x_next - 0.5 * (1 - sigmas[i + 1]) * math.expm1(-h) * d1
        x, x0_before = x_next, x0
        samples.append(x)
    return np.stack(samples)


def unipc_rhs(h, order):
    """b_k = φ_{k+1}·k!/B, φ_1 = B = e^-h - 1, φ_{k+1} = φ_k/(-h) - 1/k!."""
    phi, b = math.expm1(-h), []
    for k in range(1, order + 1):
        phi = (0.0 if math.isinf(h) else phi / -h) - 1 / math.factorial(k)
        b.append(phi * math.factorial(k) / math.expm1(-h))
    return b


def unipc_twin(sigmas, x, velocities):
    n = len(velocities)
    samples, x0s, last, order = [x], [], None, 0
    for i, v in enumerate(velocities):
        x0 = x - sigmas[i] * v
        if i > 0:  # correct the step from i - 1 to i, with the order it was predicted with
            h = log_snr(sigmas[i]) - log_snr(sigmas[i - 1])
            gain = -(1 - sigmas[i]) * math.expm1(-h)
            correction = 0.5 * (x0 - x0s[-1])
            if order == 2:
                r = (log_snr(sigmas[i - 2]) - log_snr(sigmas[i - 1])) / h
                b = unipc_rhs(h, 2)
                rho = (0.0, b[0]) if math.isinf(r) else np.linalg.solve([[1, 1], [r, 1]], b)
                correction = rho[0] * (x0s[-2] - x0s[-1]) / r + rho[1] * (x0 - x0s[-1])
            x = base_step(last, x0s[-1], sigmas[i - 1], sigmas[i]) + gain * correction
        order = min(2, i + 1, n - i)
        x_next = base_step(x, x0, sigmas[i], sigmas[i + 1])
        if order == 2:
            h = log_snr(sigmas[i + 1]) - log_snr(sigmas[i])
            r = (log_snr(sigmas[i - 1]) - log_snr(sigmas[i])) / h
            gain = -(1 - sigmas[i + 1]) * math.expm1(-h)
            x_next = x_next + gain * 0.5 * (x0s[-1] - x0) / r
        last, x = x, x_next
        x0s.append(x0)
        samples.append(x)
    return np.stack(samples)


TWINS = {"euler": euler_twin, "dpm++": dpmpp_twin, "unipc": unipc_twin}


@pytest.mark.parametrize("name", CASES)
def test_trajectory_is_the_official_one(name):
    config, case = read_case(name)
    schedule = solvers.make_schedule(config["solver"], config["steps"], config["shift"])
    np.testing.assert_array_equal(schedule.timesteps, case["out.timesteps"])
    assert error(schedule.sigmas, case["out.sigmas"]) < 1e-6
    got = run_loop(schedule.solver, schedule.coefficients, case["in.x"], case["in.velocity"])
    assert error(got, case["out.x"]) < 1e-5


@pytest.mark.parametrize("name", ["rollout_unipc", "rollout_dpmpp"])
def test_rollout_schedule_is_the_official_one(name):
    config, case = read_case(name)
    schedule = solvers.make_schedule(config["solver"], config["steps"], config["shift"])
    np.testing.assert_array_equal(schedule.timesteps, case["out.timesteps"])
    assert error(schedule.sigmas, case["out.sigmas"]) < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps, shift", [(1, 3.0), (2, 1.0), (3, 5.0), (4, 0.5), (11, 8.0)])
def test_weights_are_the_formula_with_branches(name, steps, shift):
    rng = np.random.default_rng(steps)
    x, *velocities = rng.normal(size=(steps + 1, 2, 3, 4))
    schedule = solvers.make_schedule(name, steps, shift)
    got = run_loop(schedule.solver, schedule.coefficients, x, np.float32(velocities))
    assert error(got, TWINS[name](schedule.sigmas, x, velocities)) < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_that_starts_at_pure_noise_has_finite_weights(name):
    sigmas = np.array([1.0, 0.8, 0.55, 0.3, 0.1, 0.0])
    x, *velocities = np.random.default_rng(1).normal(size=(6, 40))
    solver = solvers.SOLVERS[name]
    got = run_loop(solver, solvers.tabulate(solver, sigmas), x, np.float32(velocities))
    assert error(got, TWINS[name](sigmas, x, velocities)) < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_scan_is_the_loop(name):
    schedule = solvers.make_schedule(name, 7, 3.0)
    rng = np.random.default_rng(2)
    x, drift = rng.normal(size=(2, 3, 5)).astype(np.float32)

    def velocity(x, timestep):
        return jnp.tanh(x + drift) * (1.0 + timestep.astype(jnp.float32) / 1000)

    def body(state, per_step):
        timestep, c = per_step
        return schedule.solver.step(state, velocity(state.x, timestep), c), state.x

    scanned = jax.jit(
        lambda state: jax.lax.scan(
            body, state, (jnp.asarray(schedule.timesteps), schedule.coefficients)
        )
    )
    final, visited = scanned(schedule.solver.init(x))

    state = schedule.solver.init(x)
    for i, timestep in enumerate(schedule.timesteps):
        assert error(visited[i], state.x) < 1e-6
        state = schedule.solver.step(
            state, velocity(state.x, timestep), schedule.coefficients_at(i)
        )
    assert error(final.x, state.x) < 1e-6


def test_one_compilation_serves_every_step_and_solver():
    traces = []

    @jax.jit
    def step(state, velocity, c):
        traces.append(c)
        return solvers.step(state, velocity, c)

    x = np.ones((2, 3), np.float32)
    for name in NAMES:
        schedule = solvers.make_schedule(name, 5, 3.0)
        assert schedule.solver.step is solvers.step
        state = schedule.solver.init(x)
        for i in range(schedule.steps):
            state = step(state, jnp.ones_like(state.x), schedule.coefficients_at(i))
    assert len(traces) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_a_straight_path_is_followed_to_its_data(name, steps):
    x0, eps = np.random.default_rng(steps).normal(size=(2, 64))
    schedule = solvers.make_schedule(name, steps, 3.0)
    start = (1 - schedule.sigmas[0]) * x0 + schedule.sigmas[0] * eps
    velocities = np.float32([eps - x0] * steps)
    got = run_loop(schedule.solver, schedule.coefficients, start, velocities)
    assert error(got[-1], x0) < 3e-6
    middle = schedule.sigmas[steps // 2]
    assert error(got[steps // 2], (1 - middle) * x0 + middle * eps) < 3e-6


@pytest.mark.parametrize("name, rate", [("euler", 1), ("dpm++", 2), ("unipc", 3)])
def test_error_falls_with_the_order_of_the_solver(name, rate):
    """Unit Gaussian data has the exact flow x(t) ∝ √((1 - t)² + t²). Steps from σ = 0.9 to 0.1 are
    even in λ; UniPC's corrector is worth an order."""

    def variance(sigma):
        return (1 - sigma) ** 2 + sigma**2

    def miss(steps):
        sigmas = np.append(1 / (1 + np.exp(np.linspace(-1, 1, steps + 1) * math.log(9))), 0.0)
        solver = solvers.SOLVERS[name]
        coefficients = solvers.tabulate(solver, sigmas)
        state = solver.init(jnp.asarray([math.sqrt(variance(sigmas[0]))], jnp.float32))
        for i, sigma in enumerate(sigmas[:-2]):
            velocity = state.x * (2 * sigma - 1) / variance(sigma)
            c = jax.tree.map(lambda field, i=i: field[i], coefficients)
            state = solver.step(state, velocity, c)
        return abs(float(state.x[0]) / math.sqrt(variance(sigmas[-2])) - 1.0)

    assert abs(math.log(miss(16) / miss(48), 3) - rate) < 0.15


def test_half_precision_velocity_keeps_the_state_in_float32():
    schedule = solvers.make_schedule("unipc", 3, 3.0)
    x = jnp.linspace(-1, 1, 8, dtype=jnp.bfloat16)
    state = schedule.solver.init(x)
    state = schedule.solver.step(state, x, schedule.coefficients_at(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    x, sigma = np.asarray(x, np.float64), schedule.sigmas
    assert error(state.x, euler_twin(sigma[:2], x, [x])[-1]) < 1e-6


@pytest.mark.parametrize("steps, shift", [(1, 3.0), (37, 1.0), (50, 5.0), (1000, 3.0)])
def test_timesteps_are_whole_floors_in_float64(steps, shift):
    schedule = solvers.make_schedule("euler", steps, shift)
    assert schedule.timesteps.dtype == np.int32 and len(schedule.timesteps) == steps
    assert schedule.sigmas.dtype == np.float64 and schedule.sigmas[-1] == 0.0
    top = shift * 0.999 / (1 + (shift - 1) * 0.999)
    for i, timestep in enumerate(schedule.timesteps):
        u = top * (steps - i) / steps
        exact = 1000 * shift * u / (1 + (shift - 1) * u)
        assert abs(1000 * schedule.sigmas[i] - exact) < 1e-9
        assert timestep == math.floor(1000 * schedule.sigmas[i])


def test_bad_options_are_refused_by_name():
    with pytest.raises(ValueError, match=r"unknown solver 'heun'.*dpm\+\+.*euler.*unipc"):
        solvers.make_schedule("heun", 10, 3.0)
    for steps in (0, -2):
        with pytest.raises(ValueError, match=f"at least one step, got steps={steps}"):
            solvers.make_schedule("unipc", steps, 3.0)
    for shift in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="shift must be a positive number"):
            solvers.make_schedule("unipc", 10, shift)
    with pytest.raises(ValueError, match="too extreme"):
        solvers.make_schedule("unipc", 10, 1e20)
