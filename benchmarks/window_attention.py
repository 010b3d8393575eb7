"""Window attention of the teacher-forced sequence, forward and backward, beside PyTorch's SDPA.

    python -m benchmarks.window_attention --torch

13 chunks of 4680 tokens, 12 heads of 128: 7 attend to themselves, 6 noise copies to the clean chunk
before as well. Both are given what a layer's kernels give: queries of these two groups, keys of the
second joined with those of the chunk before, and values whole. FLOPs are those of the forward pass
three times, as for a dense product.
"""

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import common
from lact_jax.models.mixer import KeysWithPast, window_attention_parts, window_parts
from lact_jax.ops.sequence import SequenceLayout

CHUNKS = flags.DEFINE_integer("chunks", 7, "Chunks of the clip.")
REPEATS = flags.DEFINE_integer("repeats", 20, "Timed runs; the median counts.")
TORCH = flags.DEFINE_bool("torch", False, "Run scaled_dot_product_attention beside it.")
SMALL = flags.DEFINE_bool("small", False, "Tiny shapes, to see that the script runs.")
JSON = flags.DEFINE_string("json", None, "Also write the result here.")


def as_in_a_layer(layout: SequenceLayout, q, k, v, cotangent) -> tuple:
    """(B, C, S, N, K) each, as the layer has them before the forward and the backward pass."""

    def parts(x):
        return tuple(x[:, part] for part in window_parts(layout))

    joined = jnp.concatenate([k[:, layout.clean], k[:, layout.later]], axis=2)
    return parts(q), KeysWithPast(parts(k)[0], joined), v, parts(cotangent)


def main(_):
    tokens, heads, width = (16, 2, 8) if SMALL.value else (4680, 12, 128)
    layout = SequenceLayout(CHUNKS.value, 1)
    chunks = 2 * CHUNKS.value - 1
    shape = (1, chunks, tokens, heads, width)
    keys = jax.random.split(jax.random.key(0), 4)
    whole = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
    inputs = as_in_a_layer(layout, *whole)

    def only(q, k, v):
        return window_attention_parts(q, k, v, layout, None)

    def run(q, k, v, cotangent):
        o, transpose = jax.vjp(only, q, k, v)
        return o, transpose(cotangent)

    pairs = CHUNKS.value * tokens**2 + 2 * (CHUNKS.value - 1) * tokens**2
    forward = 4 * pairs * heads * width
    rate = common.measured_matmul_rate(jnp.bfloat16, 256 if SMALL.value else 8192)
    step = jax.jit(run)
    ours, first = common.first_call_seconds(lambda: step(*inputs))
    seconds = common.median_seconds(lambda: step(*inputs), REPEATS.value)
    only_step = jax.jit(only)
    common.first_call_seconds(lambda: only_step(*inputs[:3]))
    forward_seconds = common.median_seconds(lambda: only_step(*inputs[:3]), REPEATS.value)
    few = slice(0, min(tokens, 512))  # float32 attention of whole chunks would not fit
    cut = as_in_a_layer(layout, *(x[:, :, few] for x in whole))
    in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), cut)
    exact = jax.jit(run, compiler_options=common.untuned())(*in_float32)
    got = step(*cut)
    result = {
        "q, k, v": str(shape),
        "forward TFLOP": forward / 1e12,
        "matmul TFLOP/s": rate / 1e12,
        "first call s": first,
        "forward ms": 1e3 * forward_seconds,
        "forward, share of the matmul rate": forward / forward_seconds / rate,
        "forward and backward ms": 1e3 * seconds,
        "share of the matmul rate": 3 * forward / seconds / rate,
        "forward error of bfloat16": common.largest_error(got[0], exact[0]),
        "gradient error of bfloat16": common.largest_error(got[1], exact[1]),
        "peak GB": common.peak_gigabytes(),
    }
    if TORCH.value:
        from benchmarks import torch_operations as peers  # PyTorch is optional

        call, theirs = peers.window_attention(*inputs, layout)
        torch_seconds = common.median_seconds(call, REPEATS.value)
        result |= {
            "torch ms": 1e3 * torch_seconds,
            "torch, share of the matmul rate": 3 * forward / torch_seconds / rate,
            **peers.differences(ours, theirs),
        }
    common.report("window_attention", result, JSON.value)


if __name__ == "__main__":
    app.run(main)
