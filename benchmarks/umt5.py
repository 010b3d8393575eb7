"""UMT5-XXL on a batch of captions of 512 tokens, random weights: time, matmul rate, memory.

    python -m benchmarks.umt5 --torch
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import traverse_util

from benchmarks import common
from lact_jax.flops import count_flops
from lact_jax.models.umt5 import UMT5Config, abstract_umt5, umt5_encode
from lact_jax.umt5_weights import config_to_transformers, rows
from lact_jax.wan_weights import TRANSPOSED

BATCH = flags.DEFINE_integer("batch", 1, "Captions encoded together.")
LENGTH = flags.DEFINE_integer("length", 512, "Tokens of a caption, padding included.")
REPEATS = flags.DEFINE_integer("repeats", 10, "Timed runs; the median counts.")
TORCH = flags.DEFINE_bool("torch", False, "Run transformers' encoder with these weights beside it.")
SMALL = flags.DEFINE_bool("small", False, "A toy model, to see that the script runs.")
JSON = flags.DEFINE_string("json", None, "Also write the result here.")

_SMALL = dict(vocab_size=64, dim=32, dim_attn=32, dim_ffn=64, num_heads=2, num_layers=2)


def random_params(config: UMT5Config) -> dict:
    """Parameters that keep activations of order one, drawn tensor by tensor on the device."""
    _, abstract = abstract_umt5(config)
    flat = traverse_util.flatten_dict(abstract)
    draw = jax.jit(
        lambda key, shape, dtype, std: (std * jax.random.normal(key, shape, jnp.float32)).astype(
            dtype
        ),
        static_argnums=(1, 2),
    )

    def leaf(index, path, x):
        if path[-1] == "scale":
            return jnp.ones(x.shape, x.dtype)
        fan_in = x.shape[-2] if path[-1] == "kernel" else 1
        gain = (config.dim_attn // config.num_heads) ** -0.5 if path[-2] == "q" else 1.0
        return draw(jax.random.key(index), x.shape, x.dtype, jnp.float32(gain * fan_in**-0.5))

    return traverse_util.unflatten_dict(
        {path: leaf(i, path, x) for i, (path, x) in enumerate(flat.items())}
    )


def beside_transformers(config, params, ids, mask, ours, flops) -> dict:
    """Time, memory and difference of `UMT5EncoderModel` with the same weights."""
    import torch  # PyTorch is optional
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = config_to_transformers(config)
    with torch.device("meta"):
        peer = transformers.UMT5EncoderModel(transformers.UMT5Config(**fields))
    flat = traverse_util.flatten_dict(params)
    state = {}
    for row in rows(config, "diffusers"):
        leaf = flat[row.path] if row.layer is None else flat[row.path][row.layer]
        tensor = torch.from_dlpack(leaf).to(device)
        tensor = tensor.mT.contiguous() if row.layout == TRANSPOSED else tensor.clone()
        state[row.torch_name] = tensor
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    peer.load_state_dict(state, assign=True)
    peer.to(getattr(torch, config.param_dtype)).eval()
    ids, mask = (torch.tensor(np.asarray(x)).to(device) for x in (ids, mask))

    @torch.no_grad()
    def call():
        result = peer(input_ids=ids, attention_mask=mask).last_hidden_state
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    theirs = call().float().cpu().numpy()
    real = np.asarray(mask.cpu(), bool)
    seconds = common.median_seconds(call, REPEATS.value)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return {
        "torch seconds": seconds,
        "torch TFLOP/s": flops / seconds / 1e12,
        "torch peak GB": peak,
        "difference from torch": common.relative_error(np.asarray(ours)[real], theirs[real]),
    }


def main(_):
    config = UMT5Config(param_dtype="bfloat16", compute_dtype="bfloat16")
    length = LENGTH.value
    if SMALL.value:
        config, length = dataclasses.replace(config, **_SMALL), 16
    params = random_params(config)
    generator = np.random.default_rng(0)
    ids = generator.integers(0, config.vocab_size, (BATCH.value, length))
    ids, mask = jnp.asarray(ids, jnp.int32), jnp.ones((BATCH.value, length), jnp.int32)
    flops = count_flops(lambda p, i, m: umt5_encode(config, p, i, m), params, ids, mask)
    ours, first = common.first_call_seconds(lambda: umt5_encode(config, params, ids, mask))
    seconds = common.median_seconds(lambda: umt5_encode(config, params, ids, mask), REPEATS.value)
    rate = common.measured_matmul_rate(config.compute_dtype, 256 if SMALL.value else 8192)
    result = {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "tokens": str(ids.shape),
        "type": config.compute_dtype,
        "TFLOP": flops / 1e12,
        "first call s": first,
        "seconds": seconds,
        "TFLOP/s": flops / seconds / 1e12,
        "share of the matmul rate": flops / seconds / rate,
        "peak GB": common.peak_gigabytes(),
    }
    exact = dataclasses.replace(config, compute_dtype="float32")
    want = umt5_encode(exact, params, ids, mask)
    result["error against float32 matmuls"] = common.relative_error(ours, want)
    if TORCH.value:
        result |= beside_transformers(config, params, ids, mask, ours, flops)
    common.report("umt5", result, JSON.value)


if __name__ == "__main__":
    app.run(main)
