"""Window attention of the teacher-forced sequence, forward and backward, beside PyTorch's SDPA.

    python -m benchmarks.window_attention --torch

13 chunks of 4680 tokens, 12 heads of 128: 7 attend to themselves, 6 noise copies to the clean chunk
before as well. FLOPs are those of the forward pass three times, as for a dense product.
"""

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import common
from lact_jax.models.mixer import window_attention
from lact_jax.ops.sequence import SequenceLayout

CHUNKS = flags.DEFINE_integer("chunks", 7, "Chunks of the clip.")
REPEATS = flags.DEFINE_integer("repeats", 20, "Timed runs; the median counts.")
TORCH = flags.DEFINE_bool("torch", False, "Run scaled_dot_product_attention beside it.")
SMALL = flags.DEFINE_bool("small", False, "Tiny shapes, to see that the script runs.")
JSON = flags.DEFINE_string("json", None, "Also write the result here.")


def main(_):
    tokens, heads, width = (16, 2, 8) if SMALL.value else (4680, 12, 128)
    layout = SequenceLayout(CHUNKS.value, 1)
    chunks = 2 * CHUNKS.value - 1
    shape = (1, chunks, tokens, heads, width)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, cotangent = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)

    def run(q, k, v, cotangent):
        o, transpose = jax.vjp(lambda *qkv: window_attention(*qkv, layout, None), q, k, v)
        return o, transpose(cotangent)

    pairs = CHUNKS.value * tokens**2 + 2 * (CHUNKS.value - 1) * tokens**2
    forward = 4 * pairs * heads * width
    rate = common.measured_matmul_rate(jnp.bfloat16, 256 if SMALL.value else 8192)
    step = jax.jit(run)
    ours, first = common.first_call_seconds(lambda: step(q, k, v, cotangent))
    seconds = common.median_seconds(lambda: step(q, k, v, cotangent), REPEATS.value)
    only = jax.jit(lambda *qkv: window_attention(*qkv, layout, None))
    common.first_call_seconds(lambda: only(q, k, v))
    forward_seconds = common.median_seconds(lambda: only(q, k, v), REPEATS.value)
    few = slice(0, min(tokens, 512))  # float32 attention of whole chunks would not fit
    cut = tuple(x[:, :, few] for x in (q, k, v, cotangent))
    exact = jax.jit(run, compiler_options=common.untuned())(*(x.astype(jnp.float32) for x in cut))
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

        call, theirs = peers.window_attention(q, k, v, cotangent, layout)
        torch_seconds = common.median_seconds(call, REPEATS.value)
        result |= {
            "torch ms": 1e3 * torch_seconds,
            "torch, share of the matmul rate": 3 * forward / torch_seconds / rate,
            **peers.differences(ours, theirs),
        }
    common.report("window_attention", result, JSON.value)


if __name__ == "__main__":
    app.run(main)
