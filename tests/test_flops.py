"""The FLOPs counted from the config, against the jaxpr's matmuls and against XLA's own count."""

import math

import jax
import jax.numpy as jnp
import pytest

from lact_jax.flops import (
    MIXER_MATMULS,
    count_flops,
    count_sequence,
    peak_flops,
    sequence_sizes,
    step_flops,
)
from lact_jax.models.block import MIXERS
from lact_jax.models.dit import DiTConfig, abstract_params, bind
from lact_jax.models.gla import GLAConfig
from lact_jax.models.lact import LaCTConfig
from lact_jax.objective import ObjectiveConfig
from lact_jax.ops.sequence import SequenceLayout, frame_positions
from lact_jax.optim import merge, split_trainable

FRAMES, HEIGHT, WIDTH = 3, 8, 10  # latents of a chunk: 60 tokens
TOKENS = FRAMES * HEIGHT * WIDTH // 4
MUON = {"muon": True, "momentum": True, "inter_multi": 1.5, "kv_cache_size": 25}
CASES = {
    "lact": {},
    "lact with muon, momentum and a short window": {"lact": MUON},
    "lact, constant gate": {"lact": {"learnable_ttt_scale": False}},
    "full": {"mixer": "full"},
    "window": {"mixer": "window", "lact": {"kv_cache_size": 25}},
    "gla": {"mixer": "gla"},
    "gla of two heads": {"mixer": "gla", "gla": GLAConfig(head_dim=32, gate_rank=3)},
    "lact and full": {"attn_every_n_layers": 2},
}


def small(lact=None, **changes) -> DiTConfig:
    sizes = dict(
        dim=64, ffn_dim=96, num_heads=4, num_layers=2, freq_dim=8, text_dim=12, text_len=7,
        latent_channels=5, dtype="float32", remat="none",
    )  # fmt: skip
    options = LaCTConfig(**{"fw_head_dim": 32, "inter_multi": 2.0, **(lact or {})})
    return DiTConfig(**{**sizes, "lact": (options,), **changes})


def forward(model, layout):
    """(a function of parameters, shapes of its parameters) that runs the training sequence."""
    shape = (1, layout.length, FRAMES, HEIGHT, WIDTH, model.latent_channels)
    frame_CF = frame_positions(layout, FRAMES)

    def run(params, x, timestep_BC, text_BLQ):
        frames = jnp.asarray(frame_CF)
        return bind(model, params).sequence(x, timestep_BC, text_BLQ, frames, layout)[0]

    data = [shape, shape[:2], (1, model.text_len, model.text_dim)]
    return run, [jax.ShapeDtypeStruct(s, jnp.float32) for s in data]


def gradient(model, layout, trainable):
    run, data = forward(model, layout)
    trained, frozen = split_trainable(abstract_params(model), trainable)

    def loss(trained, frozen, *data):
        return jnp.sum(jnp.square(run(merge(trained, frozen), *data)))

    return jax.grad(loss), [trained, frozen, *data]


def beyond_the_count(model, layout) -> int:
    """FLOPs of a program that are no work of the model's.

    GLA writes the gate down twice, for its statistic too; XLA computes it once. LaCT's momentum
    comes out of a matmul of all tokens, though only clean ones need it.
    """
    columns = 0
    for mixer, options in model.layer_specs:
        if mixer == "gla" and options.learnable_ttt_scale:
            columns += layout.length
        if mixer == "lact" and options.momentum:
            columns += (layout.length - layout.num_clean) * (model.dim // options.fw_head_dim)
    return 2 * columns * TOKENS * model.dim


def total(work, passes=("forward", "backward")) -> int:
    return sum(getattr(part, name) for part in work.values() for name in passes)


def test_every_mixer_is_counted():
    assert MIXER_MATMULS.keys() == MIXERS.keys()
    assert {small(**changes).mixer for changes in CASES.values()} == MIXERS.keys()


@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_matmuls_of_the_jaxpr(case):
    model, layout = small(**CASES[case]), SequenceLayout(3, 2)
    run, data = forward(model, layout)
    counted = total(count_sequence(model, layout, TOKENS), ["forward"])
    counted += beyond_the_count(model, layout)
    assert counted == count_flops(run, abstract_params(model), *data)


@pytest.mark.parametrize(
    ("case", "trainable"),
    [
        ("lact", "all"),
        ("lact with muon, momentum and a short window", "attn_only"),
        ("full", "attn_only"),
        ("gla", "all"),
    ],
)
def test_forward_and_backward_are_nearly_those_of_the_jaxpr(case, trainable, monkeypatch):
    # What is computed again to save memory is no work of the model's.
    monkeypatch.setattr(jax, "checkpoint", lambda function, **_: function)
    model, layout = small(**CASES[case]), SequenceLayout(3, 1)
    function, arguments = gradient(model, layout, trainable)
    counted = total(count_sequence(model, layout, TOKENS, trainable))
    assert counted == pytest.approx(count_flops(function, *arguments), rel=0.01)


# XLA counts what is inside a loop once: one layer, one update (two chunks), one Muon iteration. It
# counts elementwise work too, which is little at this width.
WIDE = dict(dim=256, num_heads=2, ffn_dim=512, num_layers=1, text_len=40, text_dim=32)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    ("mixer", "backward"), [("lact", False), *((mixer, True) for mixer in MIXERS)]
)
def test_xla_counts_the_same_within_a_few_percent(mixer, backward):
    lact = {"fw_head_dim": 256, "muon": True, "muon_iters": 1}
    model, layout = small(lact, **WIDE, mixer=mixer), SequenceLayout(2, 1)
    work = count_sequence(model, layout, TOKENS)
    if backward:
        function, arguments = gradient(model, layout, "all")
        counted = total(work)
    else:
        function, data = forward(model, layout)
        arguments = [abstract_params(model), *data]
        counted = total(work, ["forward"])
    compiled = jax.jit(function).lower(*arguments).compile()
    assert counted == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)


def test_the_real_model_does_what_was_counted_by_hand():
    """Wan2.1 1.3B with LaCT, 81 x 480 x 832, one clip."""
    model, objective = DiTConfig(), ObjectiveConfig()
    layout, tokens = sequence_sizes(model, objective, (21, 60, 104))
    assert (layout.length, tokens) == (13, 4680)
    counted = count_sequence(model, layout, tokens)
    forward = total(counted, ["forward"])
    assert forward / 1e12 == pytest.approx(284, abs=1)
    assert total(counted) / 1e12 == pytest.approx(853, abs=1)
    assert step_flops(model, objective, (21, 60, 104), "all") == total(counted)
    shares = {part: work.forward / forward for part, work in counted.items()}
    assert shares == pytest.approx(
        {
            "dense": 0.53,
            "window attention": 0.27,
            "fast weights": 0.175,
            "cross-attention": 0.02,
        },
        abs=0.006,
    )


def test_frozen_parts_cost_less_backward():
    model, layout = small(), SequenceLayout(3, 1)
    every, attention = (count_sequence(model, layout, TOKENS, t) for t in ("all", "attn_only"))
    assert attention["dense"].forward == every["dense"].forward
    assert attention["dense"].backward < every["dense"].backward
    assert attention["fast weights"] == every["fast weights"]


def test_peaks_are_known_by_the_beginning_of_the_name():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("cpu") is None and peak_flops("NVIDIA H100 something else") is None


def test_a_scan_counts_its_steps_and_a_convolution_its_kernel():
    def function(x, w, kernel):
        y, _ = jax.lax.scan(lambda c, _: (c @ w, None), x, length=5)
        image = jnp.ones((1, 6, 6, 3), jnp.float32)
        out = jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y, out

    shapes = [(4, 8), (8, 8), (2, 2, 3, 7)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    convolution = 2 * math.prod((5, 5, 7)) * math.prod((2, 2, 3))
    assert count_flops(function, *arrays) == 5 * 2 * 4 * 8 * 8 + convolution
