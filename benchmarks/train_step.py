"""One training step on random weights and latents: time, FLOPs, peak memory, compile time.

    python -m benchmarks.train_step --config=configs/ar_chunk3f.py --config.train.trainable=all
"""

import dataclasses

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from benchmarks import common
from lact_jax.config import parse
from lact_jax.flops import count_sequence, sequence_sizes
from lact_jax.models.dit import init_params
from lact_jax.train_state import init_state, jit_train_step

CONFIG = config_flags.DEFINE_config_file("config", "configs/ar_chunk3f.py")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed steps.")
SMALL = flags.DEFINE_bool("small", False, "A toy model, to see that the script runs.")
JSON = flags.DEFINE_string("json", None, "Also write the result here.")


class Step:
    """A train step with its state and random inputs, for the flags above."""

    def __init__(self):
        config = parse(CONFIG.value)
        latent_hw = config.data.height // 8, config.data.width // 8
        if SMALL.value:
            lact = dataclasses.replace(config.model.lact[0], fw_head_dim=32)
            model = dataclasses.replace(config.model, **common.SMALL_MODEL, lact=(lact,))
            config, latent_hw = dataclasses.replace(config, model=model), (4, 4)
        self.config, model, batch = config, config.model, config.data.batch_size
        keys = jax.random.split(jax.random.key(1), 2)
        shape = batch, 1 + (config.data.num_frames - 1) // 4, *latent_hw, model.latent_channels
        latent = jax.random.normal(keys[0], shape, jnp.float32)
        text = jax.random.normal(keys[1], (batch, model.text_len, model.text_dim), jnp.float32)
        self._inputs = latent, text, jnp.zeros(text.shape[1:], jnp.float32)
        params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
        # The head starts at zero, and with it every gradient behind it.
        params["head"]["head"]["kernel"] = params["patch_embedding"]["kernel"].T
        self.state = jax.jit(lambda p: init_state(config, p), donate_argnums=0)(params)
        self._step = jit_train_step(config)

    def compile(self, options: dict | None = None):
        """Traces and compiles the step, with XLA's options; returns the compiled program."""
        lowered = self._step.trace(self.state, *self._inputs).lower()
        self._compiled = lowered.compile(compiler_options=options)
        return self._compiled

    def advance(self) -> dict:
        """Runs a step; returns its metrics."""
        self.state, metrics = self._compiled(self.state, *self._inputs)
        return metrics

    def flops(self) -> tuple[int, int]:
        """(forward, forward and backward) of the model, for the batch."""
        config, (latent, *_) = self.config, self._inputs
        layout, tokens = sequence_sizes(config.model, config.objective, latent.shape[1:4])
        parts = count_sequence(config.model, layout, tokens, config.train.trainable).values()
        forward, backward = (len(latent) * sum(each) for each in zip(*parts, strict=True))
        return forward, forward + backward


def main(_):
    step = Step()
    _, compile_seconds = common.first_call_seconds(lambda: step.compile() and ())
    metrics, first_seconds = common.first_call_seconds(step.advance)
    seconds = common.median_seconds(step.advance, REPEATS.value)
    peak = common.peak_gigabytes()
    rate = common.measured_matmul_rate(step.config.model.dtype, 256 if SMALL.value else 8192)
    forward, total = step.flops()
    common.report(
        "train_step",
        {
            "parameters": sum(x.size for x in jax.tree.leaves(step.state.params))
            + sum(x.size for x in jax.tree.leaves(step.state.frozen)),
            "trained": step.config.train.trainable,
            "remat": step.config.model.remat,
            "forward TFLOP": forward / 1e12,
            "forward and backward TFLOP": total / 1e12,
            "seconds per step": seconds,
            "TFLOP/s": total / seconds / 1e12,
            "matmul TFLOP/s": rate / 1e12,
            "share of the matmul rate": total / seconds / rate,
            "first step with compilation": compile_seconds + first_seconds,
            "peak GB": peak,
            "loss": float(metrics["loss"]),
            "grad_norm": float(metrics["grad_norm"]),
        },
        JSON.value,
    )


if __name__ == "__main__":
    app.run(main)
