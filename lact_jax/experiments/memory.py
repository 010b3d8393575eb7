"""What is a memory worth? python -m lact_jax.experiments.memory --out=DIR [--ablation]

Trains a small model with each mixer on clips of a camera that pans round a ring (data/ring.py), and
compares their losses on clips of worlds that none has seen, chunk by chunk. The ring is three views
wide: chunks 1 and 2 show what is new, later ones what was last seen three chunks before. Window
attention can't know it, a memory can. At high noise the difference is all that matters: at low
noise the answer is in the input.

    DIR/results.json         all numbers, written after every model; a second start goes on
    DIR/table.md             the tables
    DIR/loss_by_chunk.png    the plot
"""

import argparse
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lact_jax import cli, encoders
from lact_jax.config import Config, default, parse
from lact_jax.data import ring
from lact_jax.data.synthetic import Settings, draw_clip
from lact_jax.experiments.memory_report import VARIANT_PREFIX, Report
from lact_jax.experiments.training import train_seeds, validation_losses
from lact_jax.models.dit import DiTConfig, abstract_params, bind

MIXERS = ("window", "lact", "gla", "full")
CHUNK_FRAMES = 3
CODEC_BATCH = 16
POOL_FROM = 64  # clips; fewer are drawn sooner than a process starts

# What is taken from or added to the model named "lact", as in --config.KEY=VALUE: one at a time.
ABLATION: dict[str, dict[str, Any]] = {
    "1 head": {"model.lact.fw_head_dim": 128},
    "4 heads": {"model.lact.fw_head_dim": 32},
    "8 heads": {"model.lact.fw_head_dim": 16},
    "base lr 0.001": {"model.lact.base_lr": 0.001},
    "base lr 1": {"model.lact.base_lr": 1.0},
    "base lr 1, no weight norm": {"model.lact.base_lr": 1.0, "model.lact.weight_norm": False},
    "no weight norm": {"model.lact.weight_norm": False},
    "momentum": {"model.lact.momentum": True},
    "new parameters at the others' lr": {"train.new_lr_multiplier": 1.0},
    "gate starts closed": {"model.lact.learnable_ttt_scale": True},
    "Muon": {"model.lact.muon": True},
    "Muon, 4 heads": {"model.lact.muon": True, "model.lact.fw_head_dim": 32},
    "Muon, no weight norm": {"model.lact.muon": True, "model.lact.weight_norm": False},
    "Muon, momentum": {"model.lact.muon": True, "model.lact.momentum": True},
    "Muon, momentum, 1 head": {
        "model.lact.muon": True, "model.lact.momentum": True, "model.lact.fw_head_dim": 128,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the experiment is. Clips are of 64 x 64 pixels in chunks of three latent frames.

    Attributes:
      num_train, num_held_out: clips.
      num_frames: of a clip.
      changes: of the config, by dotted key.
    """

    num_train: int
    num_held_out: int
    num_frames: int
    changes: Mapping[str, Any]


FULL = Size(1536, 128, 81, {})
SMALL = Size(
    8, 3, 45, {
        "model.dim": 32, "model.ffn_dim": 64, "model.num_layers": 1, "model.patch_size": (1, 4, 4),
        "model.lact.fw_head_dim": 8, "data.batch_size": 2, "train.warmup_steps": 1,
        "train.ema_decay": 0.5, "train.steps": 3,
    },
)  # fmt: skip


def base_config() -> ConfigDict:
    """The model and its training, alike for all mixers: two layers of width 128, 48 tokens a chunk.

    A token is 2 x 2 latents: 64 numbers, which the width must not be below.
    """
    config = default()
    config.model.update(
        dim=128, ffn_dim=512, num_heads=4, num_layers=2, freq_dim=64, text_dim=16, text_len=12,
        patch_size=(1, 2, 2), remat="none", dtype="float32",
    )  # fmt: skip
    # A chunk's write is a sum over its tokens: at Wan's base rate of 0.001 the 48 of a chunk hardly
    # move the fast weights (4680 do), and what has not been written can't teach the rates to grow.
    config.model.lact.update(
        fw_head_dim=64, inter_multi=2.0, base_lr=0.1, learnable_ttt_scale=False, ttt_scale=1.0
    )
    config.objective.update(
        frames_per_chunk=CHUNK_FRAMES, timestep_shift=3.0, logit_normal_weighting=False,
        drop_text_prob=0.0,
    )  # fmt: skip
    config.codec.name, config.text.name = "pca", "words"
    config.text.options = ConfigDict({"text_len": 12, "text_dim": 16})
    config.data.batch_size = 16
    config.train.update(
        steps=2000, lr=2e-3, schedule="cosine", warmup_steps=50, new_lr_multiplier=6.0,
        trainable="all", ema_decay=0.98,
    )  # fmt: skip
    return config


def make_config(size: Size, changes: Mapping[str, Any]) -> Config:
    """The experiment's config with the changes of its size and of a trial, by dotted key."""
    config = base_config()
    config.update_from_flattened_dict({**size.changes, **changes})
    return parse(config)


def trials(mixers: Sequence[str], variants: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name -> changes of the config, in the order they are run in."""
    named = {mixer: {"model.mixer": mixer} for mixer in mixers}
    return named | {f"{VARIANT_PREFIX}{name}": ABLATION[name] for name in variants}


def _draw(settings: Settings, index: int) -> np.ndarray:
    return draw_clip(settings, "ring", index)[0]


def draw_latents(codec: encoders.VideoCodec, settings: Settings) -> np.ndarray:
    """All ring clips of `settings`, encoded: (N, F, h, w, c) float32."""
    numbers, draw = range(settings.num_rings), partial(_draw, settings)
    if settings.num_rings < POOL_FROM:
        clips = [draw(i) for i in numbers]
    else:
        context = multiprocessing.get_context("spawn")  # a fork of a process with JAX in it hangs
        with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), mp_context=context) as pool:
            clips = list(pool.map(draw, numbers, chunksize=8))
    parts = (clips[i : i + CODEC_BATCH] for i in range(0, len(clips), CODEC_BATCH))
    return np.concatenate([np.asarray(codec.encode(np.stack(part))) for part in parts])


def memory_size(model: DiTConfig, latent_FhwC: jax.Array, frames: int) -> int:
    """Numbers that a layer keeps of a clip when its last chunk is denoised, keys and values too."""
    chunks = latent_FhwC.shape[0] // frames

    def commit_all(params, chunk_1FhwC, text_1LQ):
        bound = bind(model, params)
        text_kv, cache = bound.text_kv(text_1LQ), bound.init_cache(1)
        for _ in range(chunks - 1):
            cache = bound.commit(chunk_1FhwC, text_kv, cache)
        return cache.layers

    chunk = jax.ShapeDtypeStruct((1, frames, *latent_FhwC.shape[1:]), jnp.float32)
    text = jax.ShapeDtypeStruct((1, model.text_len, model.text_dim), jnp.float32)
    layers = jax.eval_shape(commit_all, abstract_params(model), chunk, text)
    return sum(leaf.size for leaf in jax.tree.leaves(layers)) // model.num_layers


class Experiment:
    """The clips, and how one model is trained and measured on them."""

    def __init__(self, size: Size, seeds: tuple[int, ...], stills: bool):
        config = make_config(size, {})
        codec = encoders.make_codec(config.codec.name, **config.codec.options)
        text = encoders.make_text_encoder(config.text.name, **config.text.options)
        self.seeds, self._text_LQ = seeds, jnp.asarray(text.encode([ring.CAPTION])[0])
        common = dict(num_shapes=0, num_frames=size.num_frames, chunk_frames=CHUNK_FRAMES)
        splits = (
            Settings(num_rings=size.num_train, split="train", **common),
            Settings(num_rings=size.num_held_out, split="held_out", seed=1, **common),
        )
        latents = (draw_latents(codec, settings) for settings in splits)
        if stills:  # the last latent frame of a chunk stands for all of it
            latents = (latent[:, CHUNK_FRAMES - 1 :: CHUNK_FRAMES] for latent in latents)
        self._train, self._held_out = (jnp.asarray(latent) for latent in latents)

    def run(self, name: str, config: Config) -> dict[str, Any]:
        """Trains from every seed; returns a row of the report."""
        started, steps = time.monotonic(), config.train.steps

        def progress(step, loss_G):
            losses = " ".join(f"{loss:.4f}" for loss in loss_G)
            took = time.monotonic() - started
            print(f"{name:<36} step {step}/{steps}  loss {losses}  {took:.0f} s", flush=True)

        model, latents = config.model, (self._train, self._text_LQ)
        states, metrics = train_seeds(config, *latents, self.seeds, progress)
        seconds = time.monotonic() - started
        loss_GVW = validation_losses(config, states, self._held_out, self._text_LQ)
        frames = config.objective.frames_per_chunk
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model))),
            "memory": memory_size(model, self._held_out[0], frames),
            "seconds": seconds,
            "skipped": int(metrics["skipped"].sum()),
            "train_loss": metrics["loss"][-50:].mean(0).tolist(),
            "loss": loss_GVW.tolist(),
        }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lact_jax.experiments.memory", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--mixers", nargs="+", default=MIXERS, choices=MIXERS)
    parser.add_argument("--ablation", action="store_true", help="all variants of lact as well")
    parser.add_argument("--variants", nargs="+", default=[], choices=ABLATION, metavar="NAME",
                        help=f"some of them: {', '.join(map(repr, ABLATION))}")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of every training")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--stills", action="store_true", help="chunks of one latent frame")
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args(argv)

    args.variants = list(ABLATION) if args.ablation else args.variants
    size = SMALL if args.small else FULL
    common = {"model.dtype": args.dtype} | ({"train.steps": args.steps} if args.steps else {})
    if args.stills:
        common["objective.frames_per_chunk"] = 1
    wanted = {
        name: (changes, make_config(size, common | changes))
        for name, changes in trials(args.mixers, args.variants).items()
    }
    report = Report(args.out, tuple(args.seeds))
    missing = [n for n, (_, config) in wanted.items() if not report.has(n, config)]
    experiment = Experiment(size, tuple(args.seeds), args.stills) if missing else None
    for name in missing:
        changes, config = wanted[name]
        report.add(name, changes, config, experiment.run(name, config))
    print(report.table())
    return 0


if __name__ == "__main__":
    cli.finish(main)
