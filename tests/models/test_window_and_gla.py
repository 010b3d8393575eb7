"""The mixers one compares LaCT with: what they share with it, and the recurrence of the state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixer_fixtures import make_mixer, random_stream, run_twin
from model_fixtures import lact, tiny
from numpy_twins import LaCTTwin, linear, relative_error, rms_norm, rotate, silu

from lact_jax.models.dit import abstract_params
from lact_jax.models.gla import GatedLinearAttention, GLAConfig
from lact_jax.models.lact import LaCT
from lact_jax.models.window import WindowAttention
from lact_jax.ops import gated_linear

pytestmark = pytest.mark.usefixtures("quick_compile")

DIM, HEADS = tiny().dim, tiny().num_heads


@pytest.mark.parametrize("size", [None, 0, 5])
@pytest.mark.parametrize("repeats", [1, 2])
def test_window_is_lact_without_its_fast_output(size, repeats):
    options = dict(kv_cache_size=size, learnable_ttt_scale=False, ttt_scale=0.0)
    switched_off = make_mixer(LaCT, tiny(), lact(**options))
    window = make_mixer(WindowAttention, tiny(mixer="window"), lact(kv_cache_size=size))
    params = {name: switched_off.params[name] for name in window.params}
    assert set(params) == {"q", "k", "v", "o", "norm_q", "norm_k"}
    stream = random_stream(2, repeats, DIM)
    got, stats = window.sequence(params, *stream)
    want, want_stats = switched_off.sequence(switched_off.params, *stream)
    for mine, theirs in zip(got, want, strict=True):
        assert relative_error(mine, theirs) < 1e-6
    for name, value in stats.items():
        np.testing.assert_allclose(value, want_stats[name], rtol=1e-6)


class GLATwin(LaCTTwin):
    """LaCT's twin with the state in place of the fast weights; one head after the other."""

    def __init__(self, params, options, num_heads, gla):
        weights = {name: np.zeros((1, 1, 1)) for name in ("w0", "w1", "w2")}
        super().__init__(params | weights, options, num_heads)
        self.gla = gla

    def state_output(self, clean_WSD, query_SD, past, at, positions_WS3):
        """Gated output of the state after `past` chunks, for queries of chunk number `at`."""
        heads = DIM // (self.gla.head_dim or DIM)

        def qk(name, x_SD, positions_S3, column):
            y = rms_norm(linear(self.p[name], x_SD), self.p[f"norm_{name}"]["scale"])
            y = y * self.p["qk_scale"][:, column] + self.p["qk_offset"][:, column]
            y = rotate(y.reshape(len(y), self.num_heads, -1), positions_S3)
            y = y.reshape(len(y), heads, -1)
            return y / (np.linalg.norm(y, axis=-1, keepdims=True) + 1e-5)

        states = [s.copy() for s in self.p["initial_state"]]
        for j in range(past):
            x = clean_WSD[j]
            logits = linear(self.p["decay_up"], linear(self.p["decay_down"], x))
            log_sigmoid = -np.log1p(np.exp(-logits))
            decay = np.exp(log_sigmoid.mean(0) / self.gla.gate_temperature).reshape(heads, -1)
            k = qk("k", x, positions_WS3[j], 1)
            v = linear(self.p["v"], x).reshape(len(x), heads, -1)
            for m in range(heads):
                states[m] = decay[m][:, None] * states[m]
                for s in range(len(x)):
                    states[m] = states[m] + np.outer(k[s, m], v[s, m])
        q = qk("q", query_SD, positions_WS3[at], 0)
        o = np.stack([q[:, m] @ states[m] for m in range(heads)], axis=1)
        o = rms_norm(o, self.p["output_norm"]["scale"])
        return o.reshape(len(query_SD), -1) * silu(linear(self.p["ttt_scale_proj"], query_SD))


@pytest.mark.parametrize("gla", [GLAConfig(), GLAConfig(head_dim=24, gate_temperature=2.0)])
def test_state_is_the_recurrence_written_out(gla):
    """What the state adds before the last projection: that less what the window alone gives."""
    layer = make_mixer(GatedLinearAttention, tiny(mixer="gla", gla=gla), lact())
    window = make_mixer(WindowAttention, tiny(mixer="window"), lact())
    shared = {name: layer.params[name] for name in window.params}
    noise, clean = random_stream(1, 2, DIM)
    (noise_out, clean_out), stats = layer.sequence(layer.params, noise, clean)
    (noise_window, clean_window), _ = window.sequence(shared, noise, clean)
    twin = GLATwin(layer.params, lact(), HEADS, gla)

    def plain(noise_RWSD, clean_WSD, positions_WS3):
        def added(x_SD, past, at):
            o = twin.state_output(clean_WSD, x_SD, past, at, positions_WS3)
            return o @ twin.p["o"]["kernel"]

        copies = [[added(x, i, i) for i, x in enumerate(row)] for row in noise_RWSD]
        return np.stack(copies), np.stack(
            [added(x, i + 1, i) for i, x in enumerate(clean_WSD[:-1])]
        )

    noise_want, clean_want = run_twin(plain, noise, clean)
    assert relative_error(noise_out - noise_window, noise_want) < 1e-4
    assert relative_error(clean_out - clean_window, clean_want) < 1e-4
    assert 0 < stats["gla_decay"] < 1


def test_state_ops_stay_in_float32_where_inputs_are_bfloat16():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    state, k, v, q = normal(2, 3, 4, 4), *(normal(2, 3, 5, 4) for _ in range(3))
    decay = jax.nn.sigmoid(normal(2, 3, 4))
    exact = gated_linear.update(state, gated_linear.Chunk(k, v, decay))
    half = (y.astype(jnp.bfloat16) for y in (k, v))
    rounded = gated_linear.update(state, gated_linear.Chunk(*half, decay))
    assert rounded.dtype == jnp.float32 and relative_error(rounded, exact) < 1e-2
    o = gated_linear.read(exact, q.astype(jnp.bfloat16))
    assert o.dtype == jnp.bfloat16 and relative_error(o, gated_linear.read(exact, q)) < 2e-2


def test_a_state_has_about_the_parameters_of_fast_weights():
    def added(**changes):
        model = tiny(dict(fw_head_dim=12), num_layers=1, **changes)
        layer = abstract_params(model)["blocks"]["0"]["self_attn"]
        return sum(leaf.size for leaf in jax.tree.leaves(layer))

    window, fast, linear_state = (added(mixer=m) for m in ("window", "lact", "gla"))
    assert window < linear_state < 1.5 * (fast - window) + window


@pytest.mark.parametrize(
    "options", [{"head_dim": -1}, {"gate_rank": 0}, {"gate_temperature": 0.0}]
)
def test_bad_options_are_named(options):
    (name, _), = options.items()
    with pytest.raises(ValueError, match=rf"model\.gla.*{name}"):
        GLAConfig(**options)
