"""The train step: accumulation, averages, skipped updates, precision, and one compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_fixtures import assert_same_bits, tiny_config

from lact_jax.config import Config
from lact_jax.models.dit import abstract_params
from lact_jax.train_state import TrainState, init_state, jit_train_step, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compile")

EMPTY = jnp.zeros((4, 8), jnp.float32)
CONFIG = tiny_config()


def batch(seed: int = 0, size: int = 2):
    rng = np.random.default_rng(seed)
    latent, text = rng.standard_normal((size, 6, 4, 4, 16)), rng.standard_normal((size, 4, 8))
    return jnp.asarray(latent, jnp.float32), jnp.asarray(text, jnp.float32)


def changed(config: Config, **train) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


_STEPS: dict = {}
_FIRST: dict = {}


def step_of(config: Config):
    """The compiled step; made once for each config."""
    key = repr(config)
    if key not in _STEPS:
        _STEPS[key] = jax.jit(make_train_step(config), donate_argnums=0)
    return _STEPS[key]


def first_state(config: Config) -> TrainState:
    """From parameters none of which is zero, so that every one has a gradient at once."""
    rng = np.random.default_rng(config.seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32),
        abstract_params(config.model),
    )
    init = _FIRST.setdefault(repr(config), jax.jit(lambda given: init_state(config, given)))
    return init(params)


def host(tree):
    return jax.tree.map(np.array, jax.device_get(tree))


def distance(a, b) -> float:
    """Relative L2 distance of two trees."""
    pairs = list(zip(*map(jax.tree.leaves, (a, b)), strict=True))
    off = sum(float(np.sum(np.square(np.float64(x) - y))) for x, y in pairs)
    return np.sqrt(off / sum(float(np.sum(np.square(np.float64(y)))) for _, y in pairs))


def at_step(number: int, state: TrainState) -> TrainState:
    return dataclasses.replace(state, step=jnp.asarray(number, jnp.int32))


def test_two_microbatches_are_one_batch_of_double_size():
    results = {}
    for parts in (1, 2):
        # Adam's first step is a sign: only with a large eps does it show the gradients.
        config = changed(CONFIG, accumulation=parts, eps=1.0)
        state = at_step(5, first_state(config))
        state, metrics = step_of(config)(state, *batch(size=4), EMPTY)
        results[parts] = host((state.params, state.opt_state, metrics))
    start = host(first_state(CONFIG).params)
    moved = [jax.tree.map(lambda p, s: p - s, results[n][0], start) for n in (2, 1)]
    assert distance(*moved) < 1e-4
    assert distance(results[2][0], results[1][0]) < 1e-6
    assert distance(results[2][1], results[1][1]) < 1e-4
    assert distance(results[2][2], results[1][2]) < 1e-5


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_in_pieces_is_the_step_as_one_program(parts):
    # Layers of two kinds: the last keeps more than the first.
    whole = changed(CONFIG, accumulation=parts, eps=1.0)
    model = dataclasses.replace(
        whole.model, remat="selective", unroll_layers=True, last_layers=whole.model.period
    )
    pieces = dataclasses.replace(whole, model=model)
    assert model.num_layers > model.period
    states, step = [first_state(whole), first_state(whole)], jit_train_step(pieces)
    for seed in range(2):
        given = batch(seed, size=4)
        (states[0], metrics), (states[1], want) = (
            run(state, *given, EMPTY)
            for run, state in zip((step, step_of(whole)), states, strict=True)
        )
        assert distance(host(metrics), host(want)) < 1e-5
    got, want = (host((state.params, state.ema, state.opt_state)) for state in states)
    assert distance(got, want) < 1e-5
    assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(want)]


def test_averages_are_of_the_new_parameters_and_frozen_ones_stay():
    config = changed(CONFIG, trainable="attn_only", ema_decay=0.75)
    state = first_state(config)
    ema, frozen = host((state.ema, state.frozen))
    assert_same_bits(ema, host(state.params))
    for seed in range(4):
        state, _ = step_of(config)(state, *batch(seed), EMPTY)
        ema = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, ema, host(state.params))
    assert distance(host(state.ema), ema) < 1e-6
    assert distance(ema, host(state.params)) > 1e-4
    assert_same_bits(host(state.frozen), frozen)
    assert int(state.step) == 4


def test_without_an_average_training_is_the_same():
    def trained(**train):
        config = changed(CONFIG, **train)
        return step_of(config)(first_state(config), *batch(0), EMPTY)[0]

    state = trained(ema_decay=0.0)
    assert state.ema == {}
    assert_same_bits(host(state.params), host(trained(ema_decay=0.75).params))


def test_the_state_is_donated_and_the_step_is_compiled_once():
    step, state = step_of(CONFIG), first_state(CONFIG)
    for seed in range(3):
        before = state
        state, metrics = step(state, *batch(seed), EMPTY)
        assert np.isfinite(float(metrics["loss"]))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.ema)))
    assert step._cache_size() == 1
    weak = [leaf for leaf in jax.tree.leaves(state) if leaf.weak_type]
    assert weak == []


def test_a_seed_is_a_run_and_another_seed_another_one():
    def run(seed: int):
        state = first_state(dataclasses.replace(CONFIG, seed=seed))
        for i in range(3):
            state, metrics = step_of(CONFIG)(state, *batch(i), EMPTY)
        return host((state, metrics))

    first, second, other = run(0), run(0), run(1)
    assert_same_bits(second, first)
    assert distance(other[0].params, first[0].params) > 0.1


def test_every_step_draws_its_own_noise():
    losses = []
    for number in (5, 6):
        state = at_step(number, first_state(CONFIG))
        losses.append(float(step_of(CONFIG)(state, *batch(), EMPTY)[1]["loss"]))
    assert losses[0] != losses[1]


def test_parameters_and_moments_are_float32_under_bfloat16_compute():
    model = dataclasses.replace(CONFIG.model, dtype="bfloat16")
    config = dataclasses.replace(CONFIG, model=model)
    state = at_step(5, first_state(config))
    state, metrics = step_of(config)(state, *batch(), EMPTY)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and all(x.dtype == jnp.float32 for x in floats)
    assert metrics["loss"].dtype == jnp.float32
    reference, exact = step_of(CONFIG)(at_step(5, first_state(CONFIG)), *batch(), EMPTY)
    assert 0 < abs(float(metrics["loss"]) / float(exact["loss"]) - 1) < 0.05
    # A step much smaller than a bfloat16 rounding still moves the parameters.
    assert distance(host(state.params), host(reference.params)) < 0.1


@pytest.mark.parametrize(
    ("poison", "step", "skipped"),
    [(np.nan, 5, True), (np.inf, 5, True), (None, 5, False), (None, 6, True)],
)
def test_a_skipped_update_keeps_everything_but_the_step(poison, step, skipped):
    config = changed(CONFIG, skip_after=6, clip_norm=1e-3)  # every norm is a spike
    latent, text = batch()
    if poison is not None:
        latent = latent.at[1, 2, 0, 0, 0].set(poison)
    state = at_step(step, first_state(config))
    before = host(state)
    state, metrics = step_of(config)(state, latent, text, EMPTY)
    after = host(state)
    assert bool(metrics["skipped"]) == skipped
    assert np.isfinite(float(metrics["loss"])) == (poison is None)
    assert int(after.step) == step + 1
    if skipped:
        assert_same_bits(dataclasses.replace(after, step=before.step), before)
    else:
        assert distance(after.params, before.params) > 1e-5
        assert distance(after.ema, before.ema) > 1e-6
        assert int(after.opt_state[1].count) == 1
