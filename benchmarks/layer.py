"""One LaCT block of the training sequence, forward and backward, on random weights and inputs.

    python -m benchmarks.layer

13 chunks of 4680 tokens of Wan2.1 1.3B: window attention, fast weights, cross-attention, FFN.
FLOPs are those of the forward pass three times, as for a step that trains everything; what the
backward pass computes again is not counted.
"""

import dataclasses
import statistics
from functools import partial

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from benchmarks import common
from lact_jax.flops import count_flops
from lact_jax.models.block import Block
from lact_jax.models.dit import REMAT_POLICIES, DiTConfig
from lact_jax.models.lact import LaCTConfig
from lact_jax.ops.sequence import SequenceLayout

CHUNKS = flags.DEFINE_integer("chunks", 7, "Chunks of the clip.")
REMAT = flags.DEFINE_enum("remat", "selective", ["none", *REMAT_POLICIES], "What is kept.")
REPEATS = flags.DEFINE_integer("repeats", 10, "Timed runs; the median counts.")
SMALL = flags.DEFINE_bool("small", False, "Tiny shapes, to see that the script runs.")
JSON = flags.DEFINE_string("json", None, "Also write the result here.")

TOKENS, FEW_TOKENS, SMALL_TOKENS = 4680, 256, 12
NO_GRADIENT = 1e-6  # of the largest norm: what is smaller is rounding


def random_inputs(config: DiTConfig, chunks: int, tokens: int):
    """(residual stream, time modulation, rotations, text after its embedding)."""
    keys = jax.random.split(jax.random.key(1), 4)
    dim, head_dim = config.dim, config.dim // config.num_heads
    x_BCSD = jax.random.normal(keys[0], (1, chunks, tokens, dim), jnp.float32)
    e0_BC6D = 0.1 * jax.random.normal(keys[1], (1, chunks, 6, dim), jnp.float32)
    angle_CSP = jax.random.normal(keys[2], (chunks, tokens, head_dim // 2), jnp.float32)
    rotation_CSP2 = jnp.stack([jnp.cos(angle_CSP), jnp.sin(angle_CSP)], axis=-1)
    text_BLD = jax.random.normal(keys[3], (1, config.text_len, dim), jnp.float32)
    return x_BCSD, e0_BC6D, rotation_CSP2, text_BLD


def block_of(config: DiTConfig, layout: SequenceLayout, remat: str):
    """(random parameters, a function of them and of `random_inputs` that runs the block)."""

    def make():
        return Block(config, config.layer_specs[0], rngs=nnx.Rngs(0))

    graph, abstract = nnx.split(nnx.eval_shape(make))
    del abstract
    params = jax.jit(lambda: nnx.split(make())[1])()
    # Gates start at zero, and with them the gradients of the fast weights.
    gate = params["self_attn"]["ttt_scale_proj"]["kernel"]
    gate[...] = 0.02 * jax.random.normal(jax.random.key(2), gate.shape, jnp.float32)

    def run(params, x_BCSD, e0_BC6D, rotation_CSP2, text_BLD):
        block = nnx.merge(graph, params)
        # Positions are not learned, and the q and k kernels give them no gradient.
        rotation_CSP2 = jax.lax.stop_gradient(rotation_CSP2)
        text_kv = block.cross_attn.text_kv(text_BLD.astype(config.dtype))
        return block(
            x_BCSD, e0_BC6D, text_kv, lambda mixer, y: mixer.sequence(y, rotation_CSP2, layout)
        )[0]

    if remat != "none":
        run = jax.checkpoint(run, policy=REMAT_POLICIES[remat])
    return params, run


def forward_and_backward(run):
    """(parameters, inputs, cotangent) -> (output, gradients of parameters and inputs)."""

    def step(params, inputs, cotangent):
        output, transpose = jax.vjp(lambda params, inputs: run(params, *inputs), params, inputs)
        return output, transpose(cotangent)

    return step


def errors_of_bfloat16(config: DiTConfig, layout: SequenceLayout, tokens: int) -> dict:
    """How far the type is from float32, on fewer tokens: float32 attention of all needs too much
    memory."""
    inputs = random_inputs(config, layout.length, tokens)
    cotangent = jax.random.normal(jax.random.key(3), inputs[0].shape, jnp.float32)

    def result(dtype, options=None):
        params, run = block_of(dataclasses.replace(config, dtype=dtype), layout, REMAT.value)
        step = jax.jit(forward_and_backward(run), compiler_options=options)
        return step(params, inputs, cotangent)

    (output, gradients), (exact_output, exact_gradients) = common.at_once(
        partial(result, config.dtype), partial(result, "float32", common.untuned())
    )
    largest = max(float(jnp.linalg.norm(x)) for x in jax.tree.leaves(exact_gradients))
    exact = jax.tree_util.tree_leaves_with_path(exact_gradients)
    errors = {
        jax.tree_util.keystr(path, simple=True, separator="/"): common.relative_error(got, want)
        for got, (path, want) in zip(jax.tree.leaves(gradients), exact, strict=True)
        if jnp.linalg.norm(want) > NO_GRADIENT * largest
    }
    worst = max(errors, key=errors.get)
    return {
        "forward error of bfloat16": common.relative_error(output, exact_output),
        "gradient error of bfloat16": errors[worst],
        "in the gradient of": worst,
        "gradient error of bfloat16, median": statistics.median(errors.values()),
    }


def main(_):
    config, tokens = DiTConfig(), TOKENS
    if SMALL.value:
        lact = (LaCTConfig(fw_head_dim=32),)
        config = dataclasses.replace(config, **common.SMALL_MODEL, lact=lact)
        tokens = SMALL_TOKENS
    layout = SequenceLayout(CHUNKS.value)
    params, run = block_of(config, layout, REMAT.value)
    inputs = random_inputs(config, layout.length, tokens)
    cotangent = jax.random.normal(jax.random.key(3), inputs[0].shape, jnp.float32)
    forward = count_flops(run, params, *inputs)
    rate = common.measured_matmul_rate(config.dtype, 256 if SMALL.value else 8192)
    only, step = jax.jit(run), jax.jit(forward_and_backward(run))
    common.first_call_seconds(lambda: only(params, *inputs))
    forward_seconds = common.median_seconds(lambda: only(params, *inputs), REPEATS.value)
    _, first = common.first_call_seconds(lambda: step(params, inputs, cotangent))
    seconds = common.median_seconds(lambda: step(params, inputs, cotangent), REPEATS.value)
    peak = common.peak_gigabytes()
    result = {
        "x": str(inputs[0].shape),
        "remat": REMAT.value,
        "forward TFLOP": forward / 1e12,
        "matmul TFLOP/s": rate / 1e12,
        "first call s": first,
        "forward ms": 1e3 * forward_seconds,
        "forward, share of the matmul rate": forward / forward_seconds / rate,
        "forward and backward ms": 1e3 * seconds,
        "share of the matmul rate": 3 * forward / seconds / rate,
        "peak GB": peak,
        **errors_of_bfloat16(config, layout, SMALL_TOKENS if SMALL.value else FEW_TOKENS),
    }
    common.report("layer", result, JSON.value)


if __name__ == "__main__":
    app.run(main)
