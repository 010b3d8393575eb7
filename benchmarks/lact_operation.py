"""The LaCT operation alone, forward and backward: update with every clean chunk, read by all.

    python -m benchmarks.lact_operation --torch

The teacher-forced sequence of a clip of 7 chunks at 480x832 is 13 chunks of 4680 tokens: 6 of them
update the fast weights, all 13 read. FLOPs are those of the forward pass three times; what the
backward pass computes again is not counted. Alone, the operation keeps its hidden activations for
the backward pass (--keep_hidden, as PyTorch does beside it); a layer that is rematerialised does
not, and that form is timed as well.
"""

from functools import partial

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import common
from lact_jax.flops import count_flops
from lact_jax.ops import fast_weights as fw
from lact_jax.ops import swiglu_kernels
from lact_jax.ops.kernels import CHOICES, choose_backend

CHUNKS = flags.DEFINE_integer("chunks", 7, "Chunks of the clip.")
REPEATS = flags.DEFINE_integer("repeats", 20, "Timed runs; the median counts.")
KEEP_HIDDEN = flags.DEFINE_bool("keep_hidden", True, "Keep hidden activations (scan_chunks).")
KERNELS = flags.DEFINE_enum("kernels", "auto", CHOICES, "As model.kernels.")
MUON = flags.DEFINE_bool("muon", False, "Orthogonalise the updates.")
TORCH = flags.DEFINE_bool("torch", False, "Run the plain PyTorch form, compiled, beside it.")
SMALL = flags.DEFINE_bool("small", False, "Tiny shapes, to see that the script runs.")
JSON = flags.DEFINE_string("json", None, "Also write the result here.")

SIZES = dict(M=2, E=768, H=1536, S=4680)
SMALL_SIZES = dict(M=2, E=16, H=32, S=24)


def random_inputs(sizes: dict, chunks: int, dtype):
    """(initial weights, chunks that update, queries): what `operation` takes."""
    M, E, H, S = (sizes[name] for name in "MEHS")
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def unit(*shape):
        x = jax.random.normal(next(keys), (*shape, E), jnp.float32)
        return (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)

    def matrix(*shape):
        return jax.random.normal(next(keys), (1, M, *shape), jnp.float32) / shape[-1] ** 0.5

    initial = fw.from_matrices(matrix(H, E), matrix(E, H), matrix(H, E))
    v = jax.random.normal(next(keys), (chunks - 1, 1, M, S, E), dtype)
    lr = 1e-3 * jax.random.uniform(next(keys), (chunks - 1, 1, M, S, 3), jnp.float32)
    updates = fw.Chunk(unit(chunks - 1, 1, M, S), v, lr)
    queries = unit(1, M, S), unit(2, chunks - 1, 1, M, S)
    return initial, updates, queries


def operation(inputs, rule: fw.UpdateRule, *, kernels: str, keep_hidden: bool = False):
    """Outputs of the first chunk's queries, and of both streams behind the updates."""
    initial, updates, (first, streams) = inputs
    fits = swiglu_kernels.fits(initial.w1_BMEH.shape[-1])
    backend = choose_backend(kernels, first.dtype, fits)
    o_first = fw.read(initial, first, backend=backend)
    _, o_streams = fw.scan_chunks(
        initial,
        updates,
        (streams[0], streams[1]),
        rule,
        keep_hidden=keep_hidden,
        backend=backend,
    )
    return o_first, o_streams


def forward_and_backward(forward):
    """(inputs, cotangents of the outputs) -> (outputs, gradients of all inputs)."""

    def run(inputs, cotangents):
        outputs, transpose = jax.vjp(forward, inputs)
        return outputs, transpose(cotangents)

    return run


def beside_torch(inputs, cotangents, ours, flops, rate) -> dict:
    """The plain PyTorch form on the same inputs: time, share of the rate, difference."""
    from benchmarks import torch_operations as peers  # PyTorch is optional

    call, result = peers.lact(inputs, cotangents)
    seconds = common.median_seconds(call, REPEATS.value)
    return {
        "torch ms": 1e3 * seconds,
        "torch, share of the matmul rate": flops / seconds / rate,
        **peers.differences(ours, result),
    }


def timed(forward, inputs, cotangents, flops, rate) -> tuple[tuple, dict]:
    """(outputs and gradients, time and share of the rate), forward and backward."""
    step = jax.jit(forward_and_backward(forward))
    result, first = common.first_call_seconds(lambda: step(inputs, cotangents))
    seconds = common.median_seconds(lambda: step(inputs, cotangents), REPEATS.value)
    return result, {
        "first call s": first,
        "forward and backward ms": 1e3 * seconds,
        "share of the matmul rate": flops / seconds / rate,
    }


def main(_):
    sizes = SMALL_SIZES if SMALL.value else SIZES
    inputs = random_inputs(sizes, CHUNKS.value, jnp.bfloat16)
    compute = partial(operation, rule=fw.UpdateRule(muon=MUON.value), kernels=KERNELS.value)
    shapes = jax.eval_shape(compute, inputs)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    cotangents = tree.unflatten(
        [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )
    rate = common.measured_matmul_rate(jnp.bfloat16, 256 if SMALL.value else 8192)
    forward = count_flops(compute, inputs)
    chosen, other = KEEP_HIDDEN.value, not KEEP_HIDDEN.value
    keeping = partial(compute, keep_hidden=chosen)
    ours, times = timed(keeping, inputs, cotangents, 3 * forward, rate)
    peak = common.peak_gigabytes()
    changed = partial(compute, keep_hidden=other)
    _, other_times = timed(changed, inputs, cotangents, 3 * forward, rate)
    only = jax.jit(compute)
    common.first_call_seconds(lambda: only(inputs))
    forward_seconds = common.median_seconds(lambda: only(inputs), REPEATS.value)
    exact = jax.jit(forward_and_backward(keeping), compiler_options=common.untuned())(
        *jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, cotangents))
    )
    result = {
        "sizes": str({**sizes, "chunks": CHUNKS.value}),
        "muon": MUON.value,
        "kernels": KERNELS.value,
        "forward TFLOP": forward / 1e12,
        "matmul TFLOP/s": rate / 1e12,
        "keep_hidden": chosen,
        "forward ms": 1e3 * forward_seconds,
        "forward, share of the matmul rate": forward / forward_seconds / rate,
        **times,
        **{f"keep_hidden={other}, {name}": value for name, value in other_times.items()},
        "forward error of bfloat16": common.largest_error(ours[0], exact[0]),
        "gradient error of bfloat16": common.largest_error(ours[1], exact[1]),
        "peak GB": peak,
    }
    if TORCH.value:
        result |= beside_torch(inputs, cotangents, ours, 3 * forward, rate)
    common.report("lact_operation", result, JSON.value)


if __name__ == "__main__":
    app.run(main)
