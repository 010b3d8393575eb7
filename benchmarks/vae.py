"""Wan VAE encode and decode of a clip on random weights: time, share of the matmul rate, memory.

python -m benchmarks.vae --frames=81 --height=480 --width=832 --torch
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx, traverse_util

from benchmarks import common
from lact_jax.flops import count_flops
from lact_jax.models import vae_codec
from lact_jax.models.vae import SPATIAL_STRIDE, TEMPORAL_STRIDE, VAEConfig
from lact_jax.vae_weights import TRANSFORMS, rows

FRAMES = flags.DEFINE_integer("frames", 81, "Frames of the clip, 1 + 4k.")
HEIGHT = flags.DEFINE_integer("height", 480, "Pixels, a multiple of 8.")
WIDTH = flags.DEFINE_integer("width", 832, "Pixels, a multiple of 8.")
PER_CALL = flags.DEFINE_list("latents_per_call", None, "Latent frames a call, one or more to try.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Type of convolutions.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs; the median counts.")
TORCH = flags.DEFINE_bool("torch", False, "Run the same network in PyTorch beside it.")
TORCH_COMPILE = flags.DEFINE_bool("torch_compile", False, "Compile the PyTorch form.")
SMALL = flags.DEFINE_bool("small", False, "A toy model, to see that the script runs.")
JSON = flags.DEFINE_string("json", None, "Also write the result here.")


def start_of_video(config, method):
    """(params, x) -> result of `encode_chunk` or `decode_chunk` with no frames before."""
    graphdef, _ = vae_codec.abstract_vae(config)
    return lambda params, x: getattr(nnx.merge(graphdef, params), method)(None, x)[1]


def counted_flops(config, frames, latent) -> dict[str, int]:
    """FLOPs of encoding and decoding the clip; cutting it into calls changes none."""
    _, params = vae_codec.abstract_vae(config)
    video = jax.ShapeDtypeStruct(frames.shape, jnp.float32)
    return {
        "encode": count_flops(start_of_video(config, "encode_chunk"), params, video),
        "decode": count_flops(start_of_video(config, "decode_chunk"), params, latent),
    }


def measure(name, call, flops, rate) -> dict:
    """First call, median time and rate of `call`, which does `flops` operations."""
    _, first = common.first_call_seconds(call)
    seconds = common.median_seconds(call, REPEATS.value)
    return {
        f"{name}, first call s": first,
        f"{name} s": seconds,
        f"{name} TFLOP/s": flops / seconds / 1e12,
        f"{name}, share of the matmul rate": flops / seconds / rate,
    }


def check_types(params, config, frames, latent) -> dict:
    """How far the benchmarked type is from float32, on the clip's first three latent frames."""
    inputs = {
        "encode": vae_codec.to_unit_range(frames[:, : 1 + 2 * TEMPORAL_STRIDE]),
        "decode": latent[:, :3],
    }
    exact = dataclasses.replace(config, dtype="float32")

    def run(each, name):
        form = start_of_video(each, f"{name}_chunk")
        return jax.jit(form, compiler_options=vae_codec.compiler_options())(params, inputs[name])

    got_and_want = common.at_once(
        *(partial(run, each, name) for name in inputs for each in (config, exact))
    )
    pairs = zip(inputs, got_and_want[::2], got_and_want[1::2], strict=True)
    return {
        f"{name} error of {config.dtype}": common.relative_error(got, want)
        for name, got, want in pairs
    }


def beside_torch(params, codec, frames, latent, per_call, flops, rate) -> dict:
    """The same clip and weights through the PyTorch form, and how far its results are from ours."""
    from benchmarks import vae_torch  # PyTorch is optional

    flat = traverse_util.flatten_dict(params, sep="/")
    state = {
        row.wan: TRANSFORMS[row.transform].to_torch(np.asarray(flat[row.jax]))
        for row in rows(codec.config)
    }
    encode, decode = vae_torch.codec(state, codec.config, per_call, TORCH_COMPILE.value)
    result = {}
    for name, prepare, x, ours in (
        ("encode", encode, frames, codec.encode(frames)),
        ("decode", decode, latent, codec.decode(latent)),
    ):
        call = prepare(np.asarray(x))
        result |= measure(f"torch {name}", call, flops[name], rate)
        theirs = np.moveaxis(call().cpu().numpy(), 1, -1)
        result[f"{name}, difference from torch"] = common.relative_error(ours, theirs)
    return result | {"torch peak GB": vae_torch.peak_gigabytes()}


def main(_):
    config = VAEConfig(dtype=DTYPE.value)
    frames_shape = (1, FRAMES.value, HEIGHT.value, WIDTH.value, 3)
    if SMALL.value:
        config = dataclasses.replace(config, dim=8, num_res_blocks=1)
        frames_shape = (1, 9, 16, 24, 3)
        jax.config.update("jax_disable_most_optimizations", True)
    params = vae_codec.random_params(config, 0)
    frames = np.random.default_rng(0).integers(0, 256, frames_shape, dtype=np.uint8)
    frames = jnp.asarray(frames)
    rate = common.measured_matmul_rate(config.dtype, 256 if SMALL.value else 8192)
    latents = 1 + (frames_shape[1] - 1) // TEMPORAL_STRIDE
    sides = (side // SPATIAL_STRIDE for side in frames_shape[2:4])
    latent = jax.random.normal(jax.random.key(1), (1, latents, *sides, config.z_dim), jnp.float32)
    default = min(latents, vae_codec.default_latents_per_call(config, *frames_shape[2:4]))
    per_calls = [int(n) for n in PER_CALL.value or [default]]
    flops = counted_flops(config, frames, latent)
    result = {
        "clip": str(frames_shape),
        "type": config.dtype,
        "encode TFLOP": flops["encode"] / 1e12,
        "decode TFLOP": flops["decode"] / 1e12,
        "matmul TFLOP/s": rate / 1e12,
    }
    codecs = [vae_codec.WanCodec(params, config, latents_per_call=n) for n in per_calls]
    for per_call, codec in zip(per_calls, codecs, strict=True):
        for name, call, x in (("encode", codec.encode, frames), ("decode", codec.decode, latent)):
            result |= measure(f"{name} by {per_call}", partial(call, x), flops[name], rate)
            result[f"peak GB after {name} by {per_call}"] = common.peak_gigabytes()
    result |= check_types(params, config, frames, latent)
    if TORCH.value:
        result |= beside_torch(params, codecs[0], frames, latent, per_calls[0], flops, rate)
    common.report("vae", result, JSON.value)


if __name__ == "__main__":
    app.run(main)
