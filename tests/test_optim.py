"""The optimiser beside a slow twin in numpy float64, its groups, its schedules, its skip rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lact_jax import optim
from lact_jax.models.dit import DiTConfig, abstract_params
from lact_jax.models.lact import LaCTConfig
from lact_jax.optim import OptimConfig, learning_rate, make_optimizer, merge, split_trainable

pytestmark = pytest.mark.usefixtures("quick_compile")

PARAMS = abstract_params(
    DiTConfig(
        dim=24, ffn_dim=32, num_heads=2, num_layers=4, freq_dim=8, text_dim=8, text_len=4,
        attn_every_n_layers=2, lact=(LaCTConfig(fw_head_dim=12, momentum=True),),
    )
)  # fmt: skip
# The official names of what Wan does not have (REFERENCE.md 5), and the momentum's projection.
NEW = {
    "w0", "w1", "w2", "qk_scale", "qk_offset", "lr_proj.kernel", "lr_proj.bias",
    "momentum_proj.kernel", "momentum_proj.bias", "output_norm.scale", "ttt_scale_proj.kernel",
    "ttt_scale_proj.bias",
}  # fmt: skip


def name(path) -> str:
    return ".".join(entry.key for entry in path)


def named(tree) -> dict:
    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def random_like(shapes, seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32), shapes
    )


def slow_adamw(config: OptimConfig, params: dict, grads_by_step: list[dict], lrs: list[float]):
    """AdamW with clipping in float64, tensor by tensor; dicts of name -> array."""
    params = {n: np.asarray(p, np.float64) for n, p in params.items()}
    m, v = ({n: np.zeros(p.shape) for n, p in params.items()} for _ in range(2))
    for t, (grads, lr) in enumerate(zip(grads_by_step, lrs, strict=True), start=1):
        grads = {n: np.asarray(g, np.float64) for n, g in grads.items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for n, p in params.items():
            g = grads[n] * min(1, config.clip_norm / norm)
            m[n] = config.b1 * m[n] + (1 - config.b1) * g
            v[n] = config.b2 * v[n] + (1 - config.b2) * g**2
            step = m[n] / (1 - config.b1**t) / (np.sqrt(v[n] / (1 - config.b2**t)) + config.eps)
            is_new = any(n.endswith("self_attn." + new) for new in NEW)
            dims = p.ndim - n.startswith("blocks.")
            rate = lr * (config.new_lr_multiplier if is_new else 1)
            params[n] = p - rate * (step + (config.weight_decay if dims >= 2 else 0) * p)
    return params


@pytest.mark.parametrize("clip_norm", [1.0, 1e6])
def test_steps_are_those_of_a_slow_adamw_with_groups(clip_norm):
    config = OptimConfig(weight_decay=0.3, clip_norm=clip_norm)
    params = random_like(PARAMS, 0)
    grads = [random_like(PARAMS, 1 + i, 0.1 * (i + 1)) for i in range(3)]
    lrs = [1e-2, 3e-2, 2e-2]
    optimizer = make_optimizer(config)
    expected = slow_adamw(config, named(params), [named(g) for g in grads], lrs)

    @jax.jit
    def step(params, state, grads, lr):
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: p - lr * u, params, updates), state

    first, state = params, jax.jit(optimizer.init)(params)
    for g, lr in zip(grads, lrs, strict=True):
        params, state = step(params, state, g, jnp.float32(lr))
    assert set(named(params)) == set(expected)
    for n, value in named(params).items():
        moved = expected[n] - np.asarray(named(first)[n], np.float64)
        error = np.linalg.norm(value - expected[n]) / np.linalg.norm(moved)
        assert error < 2e-5, n


def test_new_parameters_are_those_that_wan_does_not_have():
    found = {
        name(path).split("self_attn.")[-1]
        for path, _ in jax.tree_util.tree_leaves_with_path(PARAMS)
        if optim.is_new(path)
    }
    assert found == NEW
    inside = [n for n in named(PARAMS) if any(n.endswith("." + new) for new in NEW)]
    assert all(".self_attn." in n for n in inside)


def test_decay_is_on_matrices_and_the_layer_axis_does_not_make_one():
    rule = {
        name(path): optim.decays(path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(PARAMS)
    }
    for n, decays in rule.items():
        vector = n.endswith(("bias", "scale")) and not n.endswith("qk_scale")
        assert decays == (not vector), n
    assert rule["blocks.0.self_attn.qk_scale"] and rule["blocks.0.modulation"]
    assert not rule["blocks.0.self_attn.norm_q.scale"]  # (layers, D) here, (D,) officially


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("cosine", {10: 1.0, 35: (1 + np.cos(np.pi / 4)) / 2, 60: 0.5, 110: 0.0, 200: 0.0}),
        ("linear", {10: 1.0, 35: 0.75, 60: 0.5, 110: 0.0, 200: 0.0}),
        ("constant", {10: 1.0, 60: 1.0, 110: 1.0}),
    ],
)
def test_schedules_warm_up_from_zero_and_end_at_the_last_step(schedule, after):
    config = OptimConfig(lr=2e-3, schedule=schedule, warmup_steps=10)
    lr = learning_rate(config, steps=110)
    expected = {0: 0.0, 1: 0.1, 5: 0.5, **after}
    for step, share in expected.items():
        assert float(lr(step)) == pytest.approx(2e-3 * share, rel=1e-5, abs=1e-10), step


def test_without_warmup_the_first_step_has_the_peak():
    lr = learning_rate(OptimConfig(lr=1.0, schedule="linear", warmup_steps=0), steps=4)
    assert [float(lr(i)) for i in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_a_warmup_longer_than_the_run_never_leaves_it():
    lr = learning_rate(OptimConfig(lr=1.0, schedule="cosine", warmup_steps=100), steps=50)
    assert float(lr(49)) == pytest.approx(0.49)


@pytest.mark.parametrize(
    ("loss", "norm", "step", "skipped"),
    [
        (1.0, 5.0, 0, False),
        (1.0, 1e9, 199, False),
        (1.0, 1e9, 200, True),
        (1.0, 20.1, 200, True),
        (1.0, 19.9, 5000, False),
        (np.nan, 1.0, 0, True),
        (np.inf, 1.0, 300, True),
        (1.0, np.inf, 0, True),
        (1.0, np.nan, 0, True),
    ],
)
def test_which_updates_are_skipped(loss, norm, step, skipped):
    config = OptimConfig(clip_norm=2.0, skip_factor=10.0, skip_after=200)
    values = jnp.float32(loss), jnp.float32(norm), jnp.int32(step)
    assert bool(optim.should_skip(*values, config)) == skipped


@pytest.mark.parametrize("trainable", ["all", "attn_only"])
def test_merge_is_the_inverse_of_split(trainable):
    params = random_like(PARAMS, 0)
    trained, frozen = split_trainable(params, trainable)
    assert named(trained).keys().isdisjoint(named(frozen))
    merged = merge(trained, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (merged, params)), strict=True))


def test_attn_only_trains_the_self_attention_modules_whole():
    trained, frozen = split_trainable(PARAMS, "attn_only")
    assert named(trained).keys() == {n for n in named(PARAMS) if ".self_attn." in n}
    assert "blocks.0.cross_attn.q.kernel" in named(frozen)
    everything, nothing = split_trainable(PARAMS, "all")
    assert named(everything).keys() == named(PARAMS).keys() and nothing == {}
