"""One training step on random weights and latents: time, peak memory, compile time.

    python -m benchmarks.train_step --config=configs/ar_chunk3f.py --config.train.trainable=all
"""

import dataclasses

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from benchmarks import common
from lact_jax.config import parse
from lact_jax.models.dit import init_params
from lact_jax.train_state import init_state, make_train_step

CONFIG = config_flags.DEFINE_config_file("config", "configs/ar_chunk3f.py")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed steps.")
SMALL = flags.DEFINE_bool("small", False, "A toy model, to see that the script runs.")
JSON = flags.DEFINE_string("json", None, "Also write the result here.")


def main(_):
    config = parse(CONFIG.value)
    data, latent_hw = config.data, (config.data.height // 8, config.data.width // 8)
    if SMALL.value:
        lact = dataclasses.replace(config.model.lact[0], fw_head_dim=32)
        model = dataclasses.replace(config.model, **common.SMALL_MODEL, lact=(lact,))
        config, latent_hw = dataclasses.replace(config, model=model), (4, 4)
    model, frames = config.model, 1 + (data.num_frames - 1) // 4
    keys = jax.random.split(jax.random.key(1), 2)
    latent = jax.random.normal(
        keys[0], (data.batch_size, frames, *latent_hw, model.latent_channels), jnp.float32
    )
    text = jax.random.normal(
        keys[1], (data.batch_size, model.text_len, model.text_dim), jnp.float32
    )
    empty = jnp.zeros(text.shape[1:], jnp.float32)
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    # The head starts at zero, and with it every gradient behind it.
    params["head"]["head"]["kernel"] = params["patch_embedding"]["kernel"].T
    state = jax.jit(lambda p: init_state(config, p), donate_argnums=0)(params)
    step = jax.jit(make_train_step(config), donate_argnums=0)
    (state, metrics), compile_seconds = common.first_call_seconds(
        lambda: step(state, latent, text, empty)
    )

    def timed():
        nonlocal state, metrics
        state, metrics = step(state, latent, text, empty)
        return metrics

    seconds = common.median_seconds(timed, REPEATS.value)
    count = sum(x.size for x in jax.tree.leaves((state.params, state.frozen)))
    common.report(
        "train_step",
        {
            "parameters": count,
            "trained": config.train.trainable,
            "latent": str(latent.shape),
            "remat": model.remat,
            "seconds per step": seconds,
            "first step with compilation": compile_seconds,
            "peak GB": common.peak_gigabytes(),
            "loss": float(metrics["loss"]),
            "grad_norm": float(metrics["grad_norm"]),
        },
        JSON.value,
    )


if __name__ == "__main__":
    app.run(main)
