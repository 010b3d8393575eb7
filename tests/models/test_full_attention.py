"""Full block-causal attention against one masked softmax, and its growing cache."""

import numpy as np
import pytest
from mixer_fixtures import make_mixer, random_stream, run_twin, token_positions
from model_fixtures import TOKENS, tiny
from numpy_twins import as_float64, attention, linear, relative_error, rms_norm, rotate

from lact_jax.models.full_attention import FullAttention

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = tiny(mixer="full")


def twin_of(params):
    """Every chunk attends to the clean chunks before it and to itself."""
    p = as_float64(params)

    def project(x_SD, positions_S3):
        def heads(y):
            return y.reshape(len(y), CONFIG.num_heads, -1)

        q, k = (rms_norm(linear(p[n], x_SD), p[f"norm_{n}"]["scale"]) for n in ("q", "k"))
        rotated = (rotate(heads(y), positions_S3) for y in (q, k))
        return *rotated, heads(linear(p["v"], x_SD))

    def run(noise_RWSD, clean_WSD, positions_WS3):
        def output(x_SD, i):
            past = [project(clean_WSD[j], positions_WS3[j]) for j in range(i)]
            own = project(x_SD, positions_WS3[i])
            k, v = (np.concatenate([part[n] for part in [*past, own]]) for n in (1, 2))
            return linear(p["o"], attention(own[0], k, v).reshape(len(x_SD), -1))

        noise = [[output(x, i) for i, x in enumerate(copies)] for copies in noise_RWSD]
        return np.stack(noise), np.stack([output(x, i) for i, x in enumerate(clean_WSD[:-1])])

    return run


@pytest.mark.parametrize("repeats", [1, 2])
def test_sequence_is_one_block_causal_softmax(repeats):
    layer = make_mixer(FullAttention, CONFIG, None)
    stream = random_stream(2, repeats, CONFIG.dim)
    got, stats = layer.sequence(layer.params, *stream)
    for mine, plain in zip(got, run_twin(twin_of(layer.params), *stream), strict=True):
        assert relative_error(mine, plain) < 1e-5
    assert stats == {}


def test_one_chunk_is_bidirectional_attention():
    layer = make_mixer(FullAttention, CONFIG, None)
    noise, clean = random_stream(1, 1, CONFIG.dim)
    (out, rest), _ = layer.sequence(layer.params, noise[:, :, :1], clean[:, :1])
    assert rest.shape[1] == 0
    want, _ = run_twin(twin_of(layer.params), noise, clean)
    assert relative_error(out, want[:, :, :1]) < 1e-5


def test_cache_grows_by_a_chunk_and_gives_what_the_sequence_gives():
    layer = make_mixer(FullAttention, CONFIG, None)
    noise, clean = random_stream(2, 1, CONFIG.dim)
    (noise_out, clean_out), _ = layer.sequence(layer.params, noise, clean)
    cache = layer.init_cache(layer.params, 2)
    for i in range(len(token_positions())):
        assert cache.k_BTNK.shape[1] == cache.v_BTNK.shape[1] == i * TOKENS
        got = layer.denoise(layer.params, noise[:, 0, i], i, cache)
        assert relative_error(got, noise_out[:, 0, i]) < 1e-5
        if i < clean_out.shape[1]:
            y, cache = layer.commit(layer.params, clean[:, i], i, cache)
            assert relative_error(y, clean_out[:, i]) < 1e-5
