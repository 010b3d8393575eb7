"""The LaCT layer, option by option, against a float64 twin; what it is before training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mixer_fixtures import make_mixer, random_stream, run_twin
from model_fixtures import (
    HEAD_DIM,
    LACT_OPTIONS,
    NUM_CHUNKS,
    TOKENS,
    equations,
    identity_fast_weights,
    kernels_of,
    lact,
    tiny,
)
from numpy_twins import LaCTTwin, relative_error

from lact_jax.models.dit import abstract_params
from lact_jax.models.lact import LaCT, LaCTConfig
from lact_jax.models.mixer import can_join_past
from lact_jax.models.remat import REMAT_POLICIES
from lact_jax.ops import parallel
from lact_jax.ops.sequence import SequenceLayout

pytestmark = pytest.mark.usefixtures("quick_compile")

DIM, HEADS = tiny().dim, tiny().num_heads


def make_layer(dtype="float32", kernels="auto", **options):
    layer = make_mixer(LaCT, tiny(dtype=dtype, kernels=kernels), lact(**options))
    if options.get("w_init") == "identity":
        layer.params = identity_fast_weights(layer.params)
    return layer


def run_cached(layer, noise_BRWSD, clean_BWSD):
    """Outputs of `denoise` for all noise copies and of `commit` for the clean chunks."""
    cache = layer.init_cache(layer.params, noise_BRWSD.shape[0])
    noise_out, clean_out = [], []
    for i in range(noise_BRWSD.shape[2]):
        copies = noise_BRWSD[:, :, i].swapaxes(0, 1)
        noise_out.append([layer.denoise(layer.params, x, i, cache) for x in copies])
        if i < noise_BRWSD.shape[2] - 1:
            y, cache = layer.commit(layer.params, clean_BWSD[:, i], i, cache)
            clean_out.append(y)
    return np.array(noise_out).transpose(2, 1, 0, 3, 4), np.stack(clean_out, axis=1)


CASES = [(name, 2) for name in LACT_OPTIONS] + [("default", 1), ("window 5", 1)]


@pytest.mark.parametrize(("name", "repeats"), CASES)
def test_sequence_and_cache_are_the_plain_algorithm(name, repeats):
    options = LACT_OPTIONS[name]
    layer = make_layer(**options)
    stream = random_stream(1, repeats, DIM)
    taught, stats = layer.sequence(layer.params, *stream)
    cached = run_cached(layer, *stream)
    twin = LaCTTwin(layer.params, lact(**options), HEADS)
    plain = run_twin(twin, *stream)
    for got in (taught, cached):
        for mine, want in zip(got, plain, strict=True):
            assert relative_error(mine, want) < 1e-5
    assert stats.keys() == twin.stats.keys()
    for key, value in twin.stats.items():
        np.testing.assert_allclose(stats[key], value, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize(("size", "kept"), [(None, TOKENS), (0, 0), (5, 5), (1000, TOKENS)])
def test_window_cache_holds_the_last_tokens_of_the_chunk(size, kept):
    layer, whole = make_layer(kv_cache_size=size), make_layer()
    x = random_stream(2, 1, DIM)[1][:, 0]
    _, cache = layer.commit(layer.params, x, 0, layer.init_cache(layer.params, 2))
    _, full = whole.commit(whole.params, x, 0, whole.init_cache(whole.params, 2))
    assert cache.past.k_BTNK.shape == (2, kept, HEADS, HEAD_DIM)
    assert np.array_equal(cache.past.k_BTNK, full.past.k_BTNK[:, TOKENS - kept :])
    assert np.array_equal(cache.past.v_BTNK, full.past.v_BTNK[:, TOKENS - kept :])


@pytest.mark.parametrize("name", ["default", "momentum and muon"])
def test_layer_starts_as_window_attention(name):
    """With the gate at zero nothing of the fast weights is seen, whatever they are."""
    layer = make_layer(**LACT_OPTIONS[name])
    gate = jax.tree.map(np.zeros_like, layer.params["ttt_scale_proj"])
    initial = layer.params | {"ttt_scale_proj": gate}
    stream = random_stream(1, 1, DIM)
    (out, _), _ = layer.sequence(initial, *stream)
    others = {w: -3 * initial[w] for w in ("w0", "w1", "w2", "qk_scale", "qk_offset")}
    (changed, _), _ = layer.sequence(initial | others, *stream)
    assert np.array_equal(out, changed)
    twin = LaCTTwin(initial, lact(learnable_ttt_scale=False, ttt_scale=0.0), HEADS)
    assert relative_error(out, run_twin(twin, *stream)[0]) < 1e-5
    (trained, _), _ = layer.sequence(layer.params, *stream)
    assert relative_error(trained, out) > 0.05


@pytest.mark.parametrize("w_init", ["normal", "identity"])
def test_new_parameters_start_as_documented(w_init):
    options = lact(w_init=w_init, inter_multi=40)
    layer = LaCT(tiny(), options, rngs=nnx.Rngs(0))
    for param, fan_in in ((layer.w0, 24), (layer.w1, 960), (layer.w2, 24)):
        w = np.asarray(param[...])
        if w_init == "identity":
            assert np.array_equal(w, np.broadcast_to(np.eye(*w.shape[-2:]), w.shape))
        else:
            assert abs(w.std() * fan_in**0.5 - 1) < 0.02
            assert abs(w.mean()) < 0.02 / fan_in**0.5
    assert np.all(layer.qk_scale[...] == 1) and np.all(layer.qk_offset[...] == 0)
    assert np.all(layer.ttt_scale_proj.kernel[...] == 0)
    assert np.all(layer.lr_proj.bias[...] == 0)


def test_learning_rates_start_at_the_base_rate():
    layer = make_layer(base_lr=0.02)
    layer.params["lr_proj"] = jax.tree.map(np.zeros_like, layer.params["lr_proj"])
    _, stats = layer.sequence(layer.params, *random_stream(1, 1, DIM))
    np.testing.assert_allclose(stats["fw_lr_norm"], 0.02 * 3**0.5, rtol=1e-5)


@pytest.mark.parametrize("method", ["sequence", "commit"])
def test_narrow_projections_are_one_matmul(method):
    """x is read once for learning rates, gate and momentum, and the gate's statistic."""
    layer = make_layer(momentum=True)
    noise, clean = random_stream(1, 1, DIM)
    arguments = {
        "sequence": (noise, clean),
        "commit": (clean[:, 0], 0, layer.init_cache(layer.params, 1)),
    }[method]
    program = jax.make_jaxpr(lambda params: getattr(layer, method)(params, *arguments))
    products = equations(program(layer.params).jaxpr, "dot_general")
    heads = DIM // lact().fw_head_dim
    widths = [product.outvars[0].aval.shape[-1] for product in products]
    assert [n for n in widths if n <= 4 * heads + 1] == [3 * heads + 1 + heads]


def test_identity_weights_can_be_trained():
    layer = make_layer(w_init="identity")
    stream = random_stream(1, 1, DIM)
    loss = jax.jit(jax.grad(lambda params: jnp.sum(layer.sequence(params, *stream)[0][0] ** 2)))
    gradients = loss(layer.params)
    for name in ("w0", "w1", "w2", "qk_scale", "lr_proj"):
        for leaf in jax.tree.leaves(gradients[name]):
            assert np.all(np.isfinite(leaf)) and np.any(leaf != 0), name


def test_bfloat16_keeps_the_memory_in_float32_and_the_window_in_bfloat16():
    half, full = make_layer("bfloat16", momentum=True), make_layer(momentum=True)
    noise, clean = random_stream(2, 1, DIM)
    outputs = []
    for layer in (half, full):
        y, cache = layer.commit(layer.params, clean[:, 0], 0, layer.init_cache(layer.params, 2))
        outputs.append((y, layer.denoise(layer.params, noise[:, 0, 1], 1, cache), cache))
    (y, o, cache), (y_full, o_full, cache_full) = outputs
    assert y.dtype == o.dtype == cache.past.k_BTNK.dtype == cache.past.v_BTNK.dtype == jnp.bfloat16
    pairs = zip(jax.tree.leaves(cache.fast), jax.tree.leaves(cache_full.fast), strict=True)
    for mine, exact in pairs:
        assert mine.dtype == jnp.float32
        assert relative_error(mine, exact) < 2e-2
    assert relative_error(y, y_full) < 2e-2
    assert relative_error(o, o_full) < 2e-2


@pytest.mark.parametrize("repeats", [1, 2])
def test_sequence_by_kernels_is_the_plain_one_with_a_constant_gate_and_remat(repeats):
    stream = random_stream(2, repeats, DIM)

    def outputs(kernels):
        layer = make_layer(kernels=kernels, learnable_ttt_scale=False, ttt_scale=0.5)
        run = jax.checkpoint(
            lambda params: layer.sequence(params, *stream), policy=REMAT_POLICIES["selective"]
        )
        y, transpose = jax.vjp(run, layer.params)
        return y, transpose(jax.tree.map(jnp.cos, y))[0]

    want, got = outputs("xla"), outputs("interpret")
    for mine, plain in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.dtype == plain.dtype
        if np.linalg.norm(plain) > 1e-4:
            assert relative_error(mine, plain) < 1e-5
        else:  # a bias of keys moves all scores of a query alike
            assert np.linalg.norm(mine) < 1e-4


@pytest.mark.parametrize(
    ("options", "taken"),
    [({"momentum": True}, {"qk_forward", "merge_forward"}), ({"qkv_silu": True}, {"merge_forward"}),
     ({"qk_l2_norm": False}, {"merge_forward"}), ({"o_norm": False}, {"qk_forward"})],
)  # fmt: skip
def test_kernels_leave_other_options_to_the_plain_form(options, taken):
    layer = make_layer(kernels="interpret", **options)
    program = jax.make_jaxpr(layer.sequence)(layer.params, *random_stream(1, 1, DIM))
    assert kernels_of(program.jaxpr) == taken


@pytest.mark.parametrize(
    ("options", "repeats", "joined"),
    [({}, 1, True), ({}, 2, False), ({"kv_cache_size": 5}, 1, False)],
)
def test_a_kernel_joins_the_keys_of_a_whole_clean_chunk_to_its_only_reader(
    options, repeats, joined
):
    layer = make_layer(kernels="interpret", **options)
    program = jax.make_jaxpr(layer.sequence)(layer.params, *random_stream(1, repeats, DIM))
    made = [equation.outvars[0].aval.shape for equation in equations(program.jaxpr, "concatenate")]
    later = repeats * (NUM_CHUNKS - 1)
    seen = TOKENS + (options.get("kv_cache_size") or TOKENS)
    # Of values, and of keys.
    assert made.count((1, later, seen, HEADS, HEAD_DIM)) == (1 if joined else 2)


def test_devices_that_share_tokens_exchange_keys_before_the_past_is_joined(monkeypatch):
    layout = SequenceLayout(3)
    assert can_join_past(layout, None) and not can_join_past(SequenceLayout(1), None)
    monkeypatch.setattr(parallel, "seq_size", lambda: 2)
    assert not can_join_past(layout, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_init": "zeros"}, r"lact\.w_init='zeros'.*identity.*normal"),
        ({"kv_cache_size": -1}, r"lact\.kv_cache_size=-1"),
        ({"base_lr": 0.0}, r"lact\.base_lr=0\.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LaCTConfig(**options)


def test_options_decide_which_parameters_exist():
    def names(**options):
        attention = abstract_params(tiny(options))["blocks"]["0"]["self_attn"]
        return set(attention) - {"q", "k", "v", "o", "norm_q", "norm_k"}

    fast = {"w0", "w1", "w2", "qk_scale", "qk_offset", "lr_proj"}
    assert names() == fast | {"output_norm", "ttt_scale_proj"}
    assert names(o_norm=False, learnable_ttt_scale=False) == fast
    assert names(momentum=True) == fast | {"output_norm", "ttt_scale_proj", "momentum_proj"}
