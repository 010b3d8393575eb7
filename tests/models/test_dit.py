"""The whole model: what is cached, scanned or stacked equals its plain form."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_fixtures import (
    FITS_KERNELS,
    FRAMES,
    MODELS,
    NUM_CHUNKS,
    TEXT_LEN,
    compiled,
    lact,
    random_inputs,
    random_params,
    tiny,
)
from numpy_twins import relative_error

from lact_jax.models import layers
from lact_jax.models.dit import DiT, DiTConfig, abstract_params, bind, init_params
from lact_jax.models.gla import GLAConfig
from lact_jax.ops.rope import rope_rotations
from lact_jax.ops.sequence import SequenceLayout, frame_positions, pack, unpack_noise

pytestmark = pytest.mark.usefixtures("quick_compile")

DEFAULT = MODELS["default"]
MIXED = tiny({"momentum": True, "muon": True}, num_layers=4, attn_every_n_layers=2)


def run_sequence(config, x, params=None):
    params = random_params(config) if params is None else params
    return compiled(config).sequence(params, x.clean, x.noise, x.timestep, x.text)


def cached_predictions(config, x):
    """`denoise` of every noise copy after committing the clean chunks before it.

    Returns the predictions (B, R, W, ...) and those of a model that forgets what it committed.
    """
    run, params = compiled(config), random_params(config)
    text_kv = run.text_kv(params, x.text)
    cache = fresh = run.init_cache(params, x.clean.shape[0])
    predictions, forgetful = [], []
    for i in range(NUM_CHUNKS):
        for store, memory in ((predictions, cache), (forgetful, fresh)):
            memory = replace(memory, num_committed=cache.num_committed)
            store.append([
                run.denoise(params, x.noise[:, r, i], x.timestep[:, r, i], text_kv, memory)
                for r in range(x.noise.shape[1])
            ])  # fmt: skip
        if i < NUM_CHUNKS - 1:
            cache = run.commit(params, x.clean[:, i], text_kv, cache)
    predictions, forgetful = (
        np.array(p).transpose(2, 1, 0, *range(3, 7)) for p in (predictions, forgetful)
    )
    return predictions, forgetful


def sample_of(x, b):
    """Sample b alone, as a batch of one."""
    return type(x)(**{name: value[b : b + 1] for name, value in vars(x).items()})


# The layer's own tests go through every option; these are the ways to put layers together.
CASES = [
    ("default", 1), ("momentum and muon", 2), ("two sets cycled", 1), ("two sets cycled", 2),
    ("mixed", 2), ("full attention", 1), ("full attention", 2), ("window alone", 1),
    ("window alone", 2), ("gated linear", 1), ("gated linear in two heads", 2),
    ("position embedding", 1),
]  # fmt: skip
# One of each mixer, and how many chunks a clean chunk reaches: a window knows the last one alone.
REACH = {
    "default": NUM_CHUNKS, "momentum and muon": NUM_CHUNKS, "mixed": NUM_CHUNKS,
    "full attention": NUM_CHUNKS, "gated linear": NUM_CHUNKS, "window alone": 1,
}  # fmt: skip


@pytest.mark.parametrize(("name", "repeats"), CASES)
def test_cached_prediction_of_one_sample_is_the_teacher_forced_one_in_a_batch(name, repeats):
    config = MODELS[name]
    x = random_inputs(2, repeats)
    taught, _ = run_sequence(config, x)
    for b in range(2):
        cached, forgetful = cached_predictions(config, sample_of(x, b))
        assert relative_error(cached[0], taught[b]) < 1e-5
        assert relative_error(forgetful[0, :, 1:], taught[b, :, 1:]) > 1e-2


ONE_CHUNK = {name: MODELS[name] for name in ("momentum and muon", "full attention", "gated linear")}


@pytest.mark.parametrize("config", [*ONE_CHUNK.values(), FITS_KERNELS], ids=[*ONE_CHUNK, "kernels"])
def test_a_video_may_be_one_chunk(config):
    x, params, run = random_inputs(2, 2, chunks=1), random_params(config), compiled(config)
    text_kv, cache = run.text_kv(params, x.text), run.init_cache(params, 2)

    @partial(jax.value_and_grad, has_aux=True)
    def taught(params):
        out, _ = run.sequence_raw(params, x.clean, x.noise, x.timestep, x.text)
        return jnp.mean(jnp.square(out)), out

    (_, out), gradients = jax.jit(taught)(params)
    for r in range(2):
        alone = run.denoise(params, x.noise[:, r, 0], x.timestep[:, r, 0], text_kv, cache)
        assert relative_error(out[:, r, 0], alone) < 1e-5
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


def test_a_sample_does_not_feel_the_others():
    x = random_inputs(2, 2)
    before, _ = run_sequence(DEFAULT, x)
    spoiled = type(x)(**{name: value.at[1].set(jnp.nan) for name, value in vars(x).items()})
    after, _ = run_sequence(DEFAULT, spoiled)
    assert np.array_equal(after[0], before[0])
    assert np.all(np.isnan(after[1]))


@pytest.mark.parametrize("name", REACH)
def test_clean_chunks_reach_later_chunks_only(name):
    """NaN spreads to everything that depends on it, whatever the weights are."""
    x = random_inputs(2, 2)
    before, _ = run_sequence(MODELS[name], x)
    for i in range(NUM_CHUNKS):
        x_spoiled = type(x)(**vars(x) | {"clean": x.clean.at[:, i].set(jnp.nan)})
        after, _ = run_sequence(MODELS[name], x_spoiled)
        reached = np.zeros(NUM_CHUNKS, bool)
        reached[i + 1 : i + 1 + REACH[name]] = True
        assert np.array_equal(after[:, :, ~reached], before[:, :, ~reached])
        assert np.all(np.isnan(after[:, :, reached]))


@pytest.mark.parametrize("name", ["default", "mixed"])
def test_noise_copies_see_no_other_noise_copy(name):
    x = random_inputs(2, 2)
    before, _ = run_sequence(MODELS[name], x)
    for r, i in ((0, 0), (1, 0), (0, 1), (1, 2)):
        x_spoiled = type(x)(**vars(x) | {"noise": x.noise.at[:, r, i].set(jnp.nan)})
        after = np.array(run_sequence(MODELS[name], x_spoiled)[0])
        assert np.all(np.isnan(after[:, r, i]))
        after[:, r, i] = before[:, r, i]
        assert np.array_equal(after, before)


GRADIENTS = {"mixed": MIXED} | {
    name: MODELS[name] for name in ("full attention", "window alone", "gated linear")
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_loss_of_a_chunk_has_no_gradient_in_the_chunks_from_it_on(name):
    """The clean copies of chunk i and later; those before it have one."""
    config = GRADIENTS[name]
    x, params = random_inputs(1, 1), random_params(config)

    @jax.jit
    def gradient(clean, chunk):
        def loss(clean):
            out, _ = compiled(config).sequence_raw(params, clean, x.noise, x.timestep, x.text)
            return jnp.sum(jnp.square(jnp.take(out, chunk, axis=2)))

        return jax.grad(loss)(clean)

    for i in range(NUM_CHUNKS):
        by_chunk = gradient(x.clean, jnp.int32(i))[0]
        first = max(i - REACH[name], 0)
        assert np.all(by_chunk[i:] == 0) and np.all(by_chunk[:first] == 0)
        for earlier in by_chunk[first:i]:
            assert np.all(np.isfinite(earlier)) and np.any(earlier != 0)


def unstacked_sequence(config, params, x):
    """The same model layer by layer: a Python loop over blocks of their own."""
    model = bind(config, params)
    layout = SequenceLayout(NUM_CHUNKS, x.noise.shape[1])
    t = pack(x.timestep, jnp.zeros(x.clean.shape[:2], jnp.float32), layout)
    frames = jnp.asarray(frame_positions(layout, FRAMES))
    tokens = pack(x.noise, x.clean, layout)
    shape = tokens.shape[2:5]
    angle = rope_rotations(frames, shape[1] // 2, shape[2] // 2, config.dim // config.num_heads)
    e = model.time_embedding(layers.timestep_embedding(t, config.freq_dim))
    e0 = model.time_projection(jax.nn.silu(e)).reshape(*e.shape[:2], 6, -1)
    text = jnp.pad(x.text, ((0, 0), (0, TEXT_LEN - x.text.shape[1]), (0, 0)))
    text = model.text_embedding(text)
    h = model.patch_embedding(layers.patchify(tokens, config.patch_size))
    stats = []
    for i in range(config.num_layers):
        graph, state = nnx.split(model.blocks[str(i % config.period)])
        block = nnx.merge(graph, jax.tree.map(lambda w, n=i // config.period: w[n], state))
        kv = block.cross_attn.text_kv(text)
        h, aux = block(h, e0, kv, lambda mixer, y: mixer.sequence(y, angle, layout))
        stats.append(aux)
    out = layers.unpatchify(model.head(h, e), config.patch_size, *shape)
    return unpack_noise(out, layout), stats


TWO_STACKS = {
    "lact and full": MIXED,
    "window": tiny({}, {"kv_cache_size": 5}, num_layers=4, mixer="window"),
    "gated linear": tiny({}, {"o_norm": False}, num_layers=4, mixer="gla"),
}


@pytest.mark.parametrize("name", TWO_STACKS)
def test_scan_over_layers_is_a_loop_over_blocks(name):
    """Two stacks of two layers, so that both the scan and the period have an order to get wrong."""
    config = TWO_STACKS[name]
    x = random_inputs(2, 1)
    scanned, stats = run_sequence(config, x)
    plain = jax.jit(lambda params, x: unstacked_sequence(config, params, SimpleNamespace(**x)))
    looped, by_layer = plain(random_params(config), vars(x))
    assert relative_error(scanned, looped) < 1e-5
    assert all(value.shape == (config.num_layers,) for value in stats.values())
    for i, (mixer, _) in enumerate(config.layer_specs):
        for name, values in stats.items():
            if mixer == "full":
                assert np.isnan(values[i])
            else:
                np.testing.assert_allclose(values[i], by_layer[i][name], rtol=1e-5)


def test_bfloat16_stays_near_float32():
    config = replace(MODELS["momentum and muon"], dtype="bfloat16")
    x = random_inputs(2, 2)
    half, _ = run_sequence(config, x)
    full, _ = run_sequence(MODELS["momentum and muon"], x)
    assert half.dtype == jnp.float32
    assert relative_error(half, full) < 2e-2


def test_bfloat16_keeps_the_memory_in_float32():
    config = replace(MODELS["momentum"], dtype="bfloat16")
    x, params = random_inputs(2, 1), random_params(MODELS["momentum"])
    run = compiled(config)

    def two_chunks(params, clean, text):
        text_kv = run.text_kv(params, text)
        cache = run.commit(params, clean[:, 0], text_kv, run.init_cache(params, 2))
        return run.commit(params, clean[:, 1], text_kv, cache)

    cache = jax.eval_shape(two_chunks, params, x.clean, x.text)
    for layer in cache.layers:
        assert {leaf.dtype for leaf in jax.tree.leaves(layer.fast)} == {jnp.dtype("float32")}
        assert layer.past.k_BTNK.dtype == layer.past.v_BTNK.dtype == jnp.bfloat16


def test_text_may_be_shorter_than_the_model_takes_but_not_longer():
    params, x = random_params(DEFAULT), random_inputs(1, 1)
    padded = jnp.pad(x.text, ((0, 0), (0, TEXT_LEN - x.text.shape[1]), (0, 0)))
    run = compiled(DEFAULT).text_kv
    assert jax.tree.all(jax.tree.map(np.array_equal, run(params, x.text), run(params, padded)))
    with pytest.raises(ValueError, match=f"{TEXT_LEN + 1} tokens, the model takes {TEXT_LEN}"):
        run(params, jnp.zeros((1, TEXT_LEN + 1, x.text.shape[2]), jnp.float32))


# Parameters.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_strongly_typed_float32(dtype):
    config = replace(MIXED, dtype=dtype)
    initial = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert jax.tree.structure(initial) == jax.tree.structure(abstract_params(config))
    for leaf in jax.tree.leaves(initial):
        assert leaf.dtype == jnp.float32 and not leaf.weak_type


def test_layers_start_different_from_each_other():
    params = nnx.to_pure_dict(nnx.state(DiT(DEFAULT, rngs=nnx.Rngs(0)), nnx.Param))
    for name in ("w0", "w1", "w2"):
        first, second = params["blocks"]["0"]["self_attn"][name]
        assert relative_error(first, second) > 1
    assert np.all(params["head"]["head"]["kernel"] == 0)


def wan_parameters(dim, ffn, layers, text_dim=4096, freq_dim=256, channels=16):
    """Parameters of Wan2.1 T2V, counted from its architecture."""

    def linear(d_in, d_out):
        return d_in * d_out + d_out

    patch = 4 * channels
    embeddings = (
        linear(patch, dim)
        + linear(text_dim, dim) + linear(dim, dim)
        + linear(freq_dim, dim) + linear(dim, dim) + linear(dim, 6 * dim)
    )  # fmt: skip
    attention = 4 * linear(dim, dim) + 2 * dim  # q, k, v, o and the norms of q and k
    block = 6 * dim + 2 * attention + 2 * dim + linear(dim, ffn) + linear(ffn, dim)
    head = 2 * dim + linear(dim, patch)
    return embeddings + layers * block + head


def lact_parameters(dim, layers, fw_head_dim, inter_multi=2):
    """What LaCT adds: w0, w1, w2, scale and offset of q and k, rates, norm, gate."""
    heads = dim // fw_head_dim
    weights = 3 * heads * fw_head_dim * int(inter_multi * fw_head_dim)
    rates = 3 * heads * (dim + 1)
    return layers * (weights + 4 * dim + rates + fw_head_dim + dim + 1)


# 14B's width is not a multiple of 1.3B's fast-weight head width of 768: 1280 gives it four heads.
WIDE = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, lact=(lact(fw_head_dim=1280),))
SIZES = {"1.3B": (DiTConfig(), 1_418_996_800), "14B": (DiTConfig(**WIDE), 14_288_491_584)}


@pytest.mark.parametrize("name", SIZES)
def test_real_sizes_have_the_parameters_of_wan_and_of_lact(name):
    config, published = SIZES[name]
    size = config.dim, config.ffn_dim, config.num_layers

    def count(config):
        return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))

    assert wan_parameters(*size) == published
    assert count(replace(config, mixer="full")) == published
    added = lact_parameters(config.dim, config.num_layers, config.lact[0].fw_head_dim)
    assert count(config) == published + added


def test_real_size_runs_abstractly():
    """One step of 1.3B at 81 x 480 x 832: shapes only."""
    config = DiTConfig()
    layout = SequenceLayout(7, 1)
    frames = jnp.asarray(frame_positions(layout, 3))

    def step(params, x, timestep, text):
        return bind(config, params).sequence(x, timestep, text, frames, layout)

    x = jax.ShapeDtypeStruct((1, layout.length, 3, 60, 104, 16), jnp.float32)
    timestep = jax.ShapeDtypeStruct((1, layout.length), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 512, 4096), jnp.float32)
    velocity, stats = jax.eval_shape(step, abstract_params(config), x, timestep, text)
    assert velocity.shape == x.shape and velocity.dtype == jnp.float32
    assert {s.shape for s in stats.values()} == {(30,)}


# Configuration.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "mamba"}, r"model\.mixer='mamba'.*full.*gla.*lact.*window"),
        ({"gla": GLAConfig(head_dim=36)}, r"model\.gla\.head_dim=36 .* model\.dim=48"),
        ({"remat": "some"}, r"model\.remat='some'.*attention.*dots.*full.*none.*selective"),
        ({"last_remat": "some"}, r"model\.last_remat='some'.*attention.*dots"),
        ({"last_layers": 1}, r"model\.last_layers=1: .*model\.unroll_layers=True"),
        ({"unroll_layers": True, "last_layers": 5}, r"model\.last_layers=5: .*num_layers=2"),
        (
            {"unroll_layers": True, "last_layers": 1, "lact": (lact(), lact(momentum=True))},
            r"model\.last_layers=1: choose a multiple of 2",
        ),
        ({"dtype": "float16"}, r"model\.dtype='float16'"),
        ({"num_heads": 5}, r"model\.dim=48 over model\.num_heads=5"),
        ({"num_heads": 16}, r"model\.num_heads=16.*even"),
        ({"dim": 42, "num_heads": 3, "position_embedding": True}, r"model\.dim=42 .* of 4"),
        ({"lact": ()}, r"model\.lact"),
        ({"lact": (lact(fw_head_dim=36),)}, r"fw_head_dim=36 does not divide model\.dim=48"),
    ],
)
def test_bad_options_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_options_cycle_over_layers_and_every_nth_is_full_attention():
    a, b = lact(momentum=True), lact(muon=True)
    config = tiny(lact=(a, b), num_layers=6, attn_every_n_layers=3)
    lact_a, lact_b, full = ("lact", a), ("lact", b), ("full", None)
    assert config.layer_specs == (lact_a, lact_b, full, lact_b, lact_a, full)
    assert config.period == 6
    assert tiny(lact=(a, b), num_layers=6).period == 2
    assert tiny(lact=(a, b), num_layers=5).period == 5
    assert tiny(lact=(a, a), num_layers=6).period == 1
    assert tiny(mixer="full", lact=(a, b), num_layers=6).period == 1
    assert tiny(num_layers=6, attn_every_n_layers=2).layer_specs[1::2] == (full,) * 3


def test_parameters_that_do_not_fit_are_refused():
    params = random_params(DEFAULT)
    without = {name: leaf for name, leaf in params.items() if name != "time_projection"}
    with pytest.raises(ValueError, match="missing: time_projection/bias, time_projection/kernel"):
        bind(DEFAULT, without)
    with pytest.raises(ValueError, match="unexpected: extra/bias, extra/kernel"):
        bind(DEFAULT, params | {"extra": params["time_projection"]})
    wide = params["head"] | {"modulation": np.zeros((2, 50), np.float32)}
    with pytest.raises(ValueError, match=r"head/modulation \(2, 50\), not \(2, 48\)"):
        bind(DEFAULT, params | {"head": wide})
