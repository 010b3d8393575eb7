"""Noise levels, shift, loss weight and noising, against golden tables and plain float64 twins."""

import json
import math
from pathlib import Path
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from lact_jax.diffusion import flow

GOLDEN = Path(__file__).parents[1] / "golden"
BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 below 1


def read_case(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "np") as case:
        tensors = {k: case.get_tensor(k) for k in case.keys() if k.startswith(("in.", "out."))}
        return json.loads(case.metadata()["config"]), tensors


def error(got, want):
    """Relative L2 error."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def weight_by_integration(bin_index, std):
    """The density of sigmoid(N(0, std²)), integrated over a bin (midpoints), times 1000."""
    low, high = max(bin_index / 1000, 1e-7), min((bin_index + 1) / 1000, 1 - 1e-7)
    edges = np.linspace(low, high, 20001)
    u = (edges[1:] + edges[:-1]) / 2
    logit = np.log(u / (1 - u))
    density = np.exp(-0.5 * (logit / std) ** 2) / (std * math.sqrt(2 * math.pi)) / (u * (1 - u))
    return 1000 * np.sum(density) * (high - low) / len(u)


def kolmogorov_distance(samples, cdf):
    """Largest gap between the samples' distribution and `cdf`; about 1.6/√n at the 1 % level."""
    ordered = np.sort(np.asarray(samples, np.float64).ravel())
    expected = np.array([cdf(x) for x in ordered])
    below = np.arange(len(ordered)) / len(ordered)
    return max(np.max(expected - below), np.max(below + 1 / len(ordered) - expected))


@pytest.mark.parametrize("shift", ["1.0", "2.1135", "3.0", "5.0"])
def test_shifted_times_are_the_official_ones(shift):
    _, case = read_case("flow_tables")
    assert error(flow.shift_time(case["in.u"], float(shift)), case[f"out.shifted_{shift}"]) < 1e-6


def test_resolution_shift_is_the_official_one():
    _, case = read_case("flow_tables")
    got = [flow.resolution_shift(int(n)) for n in case["in.tokens"]]
    assert error(got, case["out.resolution_shift"]) < 1e-6


@pytest.mark.parametrize("std", ["0.5", "1.0", "1.5"])
def test_loss_weights_are_the_official_ones(std):
    _, case = read_case("flow_tables")
    got = flow.logit_normal_weight(case["in.u"], float(std))
    assert error(got, case[f"out.weight_std{std}"]) < 2e-4


@pytest.mark.parametrize("name", ["train_repeat1", "train_repeat2"])
def test_training_inputs_are_the_official_ones(name):
    config, case = read_case(name)
    u_RW, eps_RWCfhw = case["in.u"], case["in.noise"]
    x0_WCfhw = case["in.latent"].reshape(eps_RWCfhw.shape[1], 3, *case["in.latent"].shape[2:])
    t_RW = flow.shift_time(u_RW, config["timestep_shift"])

    assert error(flow.MODEL_TIME_SCALE * t_RW, case["out.timestep"]) < 1e-6
    assert error(flow.add_noise(x0_WCfhw, eps_RWCfhw, t_RW), case["out.noisy"]) < 1e-5
    weight_RW = flow.logit_normal_weight(u_RW, config["logit_normal_std"])
    assert error(weight_RW, case["out.loss_weight"]) < 2e-4

    v_RWCfhw = flow.velocity_target(x0_WCfhw, eps_RWCfhw)
    loss_RW = np.mean((case["out.flow_pred"] - v_RWCfhw) ** 2, axis=(2, 3, 4, 5))
    assert error(np.mean(loss_RW, axis=0), case["out.chunk_loss"]) < 1e-5
    assert error(np.mean(weight_RW * loss_RW), case["out.loss"]) < 2e-4


def test_shift_keeps_the_ends_and_is_undone_by_its_inverse():
    u = np.concatenate([[0.0, 1.0], np.random.default_rng(0).uniform(size=500)]).astype(np.float32)
    t = np.asarray(flow.shift_time(u, 3.0))
    assert t[0] == 0.0 and t[1] == 1.0
    assert np.all(t[2:] > u[2:])
    assert error(flow.shift_time(t, 1 / 3), u) < 1e-6
    np.testing.assert_array_equal(flow.shift_time(u, 1.0), u)


@pytest.mark.parametrize("std", [0.3, 1.0, 3.0])
def test_loss_weight_is_the_integral_of_the_density(std):
    bins = np.array([0, 1, 17, 250, 499, 500, 803, 998, 999])
    got = flow.logit_normal_weight((bins + 0.5) / 1000, std)
    want = [weight_by_integration(i, std) for i in bins]
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("std", [0.5, 1.0, 1.5])
def test_loss_weights_are_symmetric_average_to_one_and_are_not_quantised(std):
    weights = np.asarray(flow.logit_normal_weight((np.arange(1000) + 0.5) / 1000, std), np.float64)
    assert abs(weights.mean() - 1.0) < 1e-6
    np.testing.assert_allclose(weights, weights[::-1], rtol=1e-5, atol=1e-9)
    upper_tail = weights[900:]
    upper_tail = upper_tail[upper_tail > 1e-9]  # a float32 CDF tells none of these below 6e-5
    assert np.all(np.diff(upper_tail) < 0)


def test_loss_weight_at_the_ends_of_the_interval():
    weight = jax.jit(lambda u: flow.logit_normal_weight(u, 1.5))
    first, last = weight(np.float32(0.0005)), weight(np.float32(0.9995))
    assert first > 0 and last > 0
    assert weight(np.float32(0.0)) == first
    assert weight(np.float32(BELOW_ONE)) == last
    assert weight(np.float32(1.0)) == 0.0


@pytest.mark.parametrize("name", ["uniform", "logit_normal"])
def test_samplers_are_float32_open_at_both_ends_and_follow_their_key(name):
    key = jax.random.key(3)
    u = np.asarray(flow.sample_time(name, key, (50, 4, 100)))
    assert u.shape == (50, 4, 100) and u.dtype == np.float32
    assert np.all((u > 0) & (u < 1))
    np.testing.assert_array_equal(u, flow.sample_time(name, key, (50, 4, 100)))
    assert np.mean(u == flow.sample_time(name, jax.random.key(4), (50, 4, 100))) < 0.01
    assert len(np.unique(u)) > 0.98 * u.size  # no draw is shared between samples or chunks


def test_uniform_sampler_is_uniform():
    u = flow.sample_time("uniform", jax.random.key(0), (20000,))
    assert kolmogorov_distance(u, lambda x: x) < 0.012


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.7, 0.5), (1.2, 2.0)])
def test_logit_normal_sampler_is_the_sigmoid_of_a_normal(mean, std):
    u = flow.sample_time("logit_normal", jax.random.key(1), (20000,), mean=mean, std=std)
    u = np.asarray(u, np.float64)
    assert kolmogorov_distance(np.log(u / (1 - u)), NormalDist(mean, std).cdf) < 0.012


@pytest.mark.parametrize("mean", [-500.0, 500.0])
def test_logit_normal_sampler_never_reaches_the_ends(mean):
    u = flow.sample_time("logit_normal", jax.random.key(2), (100,), mean=mean, std=1.0)
    assert np.all((np.asarray(u) > 0) & (np.asarray(u) < 1))


def test_noise_levels_apply_by_their_leading_axes():
    rng = np.random.default_rng(5)
    x0 = rng.normal(size=(2, 1, 3, 4, 5)).astype(np.float32)
    eps = rng.normal(size=(2, 6, 3, 4, 5)).astype(np.float32)
    t = rng.uniform(size=(2, 6, 3)).astype(np.float32)
    got = flow.add_noise(x0, eps, t)
    assert got.shape == eps.shape
    for b, r, w in [(0, 0, 0), (1, 5, 2), (0, 3, 1)]:
        want = (1 - np.float64(t[b, r, w])) * x0[b, 0, w] + np.float64(t[b, r, w]) * eps[b, r, w]
        assert error(got[b, r, w], want) < 1e-6


def test_noise_level_zero_is_data_and_one_is_noise_exactly():
    x0, eps = np.random.default_rng(6).normal(size=(2, 3, 7)).astype(np.float32)
    np.testing.assert_array_equal(flow.add_noise(x0, eps, np.zeros(3)), x0)
    np.testing.assert_array_equal(flow.add_noise(x0, eps, np.ones(3)), eps)


def test_target_is_the_slope_of_the_noised_input():
    x0, eps = np.random.default_rng(7).normal(size=(2, 3, 7)).astype(np.float32)
    t = jnp.asarray([0.1, 0.5, 0.9], jnp.float32)
    _, slope = jax.jvp(lambda t: flow.add_noise(x0, eps, t), (t,), (jnp.ones_like(t),))
    assert error(flow.velocity_target(x0, eps), slope) < 1e-6


def test_half_precision_inputs_are_noised_in_float32():
    x0 = jnp.asarray(np.random.default_rng(8).normal(size=(4, 9)), jnp.bfloat16)
    eps, t = x0[::-1], np.full(4, 1 / 3, np.float32)
    got = flow.add_noise(x0, eps, t)
    assert got.dtype == jnp.float32 and flow.velocity_target(x0, eps).dtype == jnp.float32
    want = np.asarray(x0, np.float64) * 2 / 3 + np.asarray(eps, np.float64) / 3
    assert error(got, want) < 1e-6


@pytest.mark.parametrize("t_shape", [(3, 2), (2, 3, 4, 1), (4,)])
def test_noise_levels_that_do_not_fit_are_refused(t_shape):
    with pytest.raises(ValueError, match="leading axes"):
        flow.add_noise(np.zeros((2, 3, 4)), np.zeros((2, 3, 4)), np.zeros(t_shape))


def test_bad_options_are_refused_by_name():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"'gaussian'.*logit_normal.*uniform"):
        flow.sample_time("gaussian", key, (2,))
    for std in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="std must be a positive number"):
            flow.logit_normal_weight(np.zeros(2), std)
        with pytest.raises(ValueError, match="std must be a positive number"):
            flow.sample_time("logit_normal", key, (2,), std=std)
    for shift in (0.0, -3.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="shift must be a positive number"):
            flow.shift_time(np.zeros(2), shift)
    with pytest.raises(ValueError, match="at least one token, got 0"):
        flow.resolution_shift(0)
