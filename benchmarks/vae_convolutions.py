"""The Wan VAE's large 3-D convolutions, each in several forms: which one a device runs fastest.

    python -m benchmarks.vae_convolutions

Forms: "default" as XLA lays a 3-D convolution out by itself; "channels_last" as WanCodec asks for;
"stacked" one 2-D convolution over three frames stacked in channels; "summed" three 2-D ones.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import common
from lact_jax.flops import count_flops
from lact_jax.models.vae_codec import compiler_options

SMALL = flags.DEFINE_bool("small", False, "Tiny shapes, to see that the script runs.")
JSON = flags.DEFINE_string("json", None, "Also write the result here.")

# (frames, height, width, channels): the levels of a decoder at 480x832, 4 latent frames a call.
SHAPES = ((16, 480, 832, 96), (16, 240, 416, 192), (8, 120, 208, 384))
SMALL_SHAPES = ((4, 8, 8, 8),)


def three_d(x_BTHWC, kernel):
    """The convolution itself; x has two more frames than the result."""
    padding = ((0, 0), (1, 1), (1, 1))
    layout = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(x_BTHWC, kernel, (1, 1, 1), padding, None, None, layout)


def _two_d(x_THWC, kernel):
    padding = ((1, 1), (1, 1))
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x_THWC, kernel, (1, 1), padding, None, None, layout)


def _shifted(x_BTHWC):
    frames = x_BTHWC.shape[1] - 2
    return [x_BTHWC[0, tap : tap + frames] for tap in range(3)]


def stacked(x_BTHWC, kernel):
    """One 2-D convolution over three frames, stacked in channels; batch 1."""
    stacked_kernel = jnp.concatenate(list(kernel), axis=2)
    return _two_d(jnp.concatenate(_shifted(x_BTHWC), axis=-1), stacked_kernel)[None]


def summed(x_BTHWC, kernel):
    """The sum of three 2-D convolutions; batch 1."""
    return sum(_two_d(x, tap) for x, tap in zip(_shifted(x_BTHWC), kernel, strict=True))[None]


class Form(NamedTuple):
    """A way to compute the convolution, and how XLA is to compile it."""

    function: Callable
    options: dict | None


def main(_):
    forms = {
        "default": Form(three_d, None),
        "channels_last": Form(three_d, compiler_options()),
        "stacked": Form(stacked, None),
        "summed": Form(summed, None),
    }
    result = {}
    for frames, height, width, channels in SMALL_SHAPES if SMALL.value else SHAPES:
        keys = jax.random.split(jax.random.key(0))
        x = jax.random.normal(keys[0], (1, frames + 2, height, width, channels), jnp.bfloat16)
        kernel = jax.random.normal(keys[1], (3, 3, 3, channels, channels), jnp.bfloat16)
        flops = count_flops(three_d, x, kernel)
        for name, form in forms.items():
            run = jax.jit(form.function, compiler_options=form.options)
            common.first_call_seconds(lambda run=run, x=x, kernel=kernel: run(x, kernel))
            seconds = common.median_seconds(lambda run=run, x=x, kernel=kernel: run(x, kernel), 10)
            key = f"{channels} ch {frames}x{height}x{width} {name}"
            result[f"{key} ms"] = 1e3 * seconds
            result[f"{key} TFLOP/s"] = flops / seconds / 1e12
    common.report("vae_convolutions", result, JSON.value)


if __name__ == "__main__":
    app.run(main)
