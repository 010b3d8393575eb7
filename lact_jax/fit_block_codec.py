"""Fits the demo's video codec (`lact_jax.models.block_codec`) on synthetic clips.

    python -m lact_jax.fit_block_codec --channels=16 --power=0.5 --out=FILE.npz

takes some minutes on two CPU cores and prints the quality that it reached on held-out clips.
Without --out it replaces the file that the package ships.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import trange

from lact_jax.data.synthetic import Settings, draw_clip
from lact_jax.models import block_codec

FAMILIES = ("shapes", "ring")


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """How the codec is fitted.

    Attributes:
      channels: latent channels C.
      power: channel c is divided by std_c ** power: 1 makes all channels equally loud, 0 leaves
        them as loud as they are in the pictures.
      coefficients: coefficients K of a cell that decoding restores.
      noise: largest noise on the latents while the decoder is fitted (a third of them has none).
      clips: clips of each family that are fitted to.
      width, layers: of the decoder's convolutions.
      steps, batch, learning_rate: of its fit; a batch is so many latent frames.
      measured_clips: held-out clips of each family that quality is measured on.
      seed: of clips, initial weights and batches.
    """

    channels: int = 16
    power: float = 0.5
    coefficients: int = 128
    noise: float = 0.5
    clips: int = 240
    width: int = 96
    layers: int = 3
    steps: int = 4000
    batch: int = 32
    learning_rate: float = 2e-3
    measured_clips: int = 24
    seed: int = 0


def fit(options: FitOptions) -> tuple[dict, dict]:
    """Fits basis, scales and decoder; returns (parameters, notes) for `block_codec.save`."""
    mean, basis, std = principal_basis(options)
    scale = std[: options.channels] ** -options.power
    scale /= np.sqrt(np.mean((std[: options.channels] * scale) ** 2))
    params = {"mean": mean, "basis": basis, "std": std, "scale": scale}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    params = fit_decoder(options, params)
    # What is measured is what is shipped, in half precision.
    params = jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), params)
    quality = measure(params, options.measured_clips, options.seed)
    return params, dataclasses.asdict(options) | quality


def clip_cells(family: str, index: int, split: str, seed: int) -> jax.Array:
    """Cells (F, h, w, P) of one clip."""
    frames, _ = draw_clip(Settings(seed=seed, split=split), family, index)
    return _cells(frames[None])[0]


def principal_basis(options: FitOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (P,), first K principal directions (P, K) and their standard deviations (K,)."""
    total, count = np.zeros(block_codec.SAMPLES), 0
    product = np.zeros((block_codec.SAMPLES, block_codec.SAMPLES))
    for family in FAMILIES:
        for index in range(options.clips):
            cell_NP = clip_cells(family, index, "train", options.seed).reshape(-1, total.size)
            total += np.asarray(cell_NP.sum(0))
            product += np.asarray(cell_NP.T @ cell_NP)
            count += len(cell_NP)
    mean = total / count
    variance, direction = np.linalg.eigh(product / count - np.outer(mean, mean))
    keep = slice(None, -options.coefficients - 1, -1)  # the largest, largest first
    basis = direction[:, keep]
    basis *= np.where(basis.sum(0) < 0, -1, 1)  # signs differ from machine to machine
    return mean, basis, np.sqrt(variance[keep])


def fit_decoder(options: FitOptions, params: dict) -> dict:
    """Adds the convolutions, fitted so that noisy latents give clean coefficients."""
    fixed = params
    trained = init_decoder(options)
    schedule = optax.cosine_decay_schedule(options.learning_rate, options.steps)
    optimiser = optax.adam(schedule)
    state = optimiser.init(trained)

    def loss(trained, coef, before, key):
        level_key, *noise_keys = jax.random.split(key, 3)
        level = jax.random.uniform(level_key, (len(coef), 1, 1, 1), jnp.float32, -0.5, 1.0)
        level = options.noise * jnp.maximum(level, 0)
        latent, before = (
            x[..., : options.channels] * fixed["scale"]
            + level * jax.random.normal(k, (*x.shape[:-1], options.channels), jnp.float32)
            for x, k in zip((coef, before), noise_keys, strict=True)
        )
        error = block_codec.refine(fixed | trained, latent, before) - coef
        return jnp.sum(error**2, -1).mean() / block_codec.SAMPLES

    @jax.jit
    def step(trained, state, coef, before, key):
        value, grads = jax.value_and_grad(loss)(trained, coef, before, key)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(trained, updates), state, value

    coefs = [_coefficients(options, params, family) for family in FAMILIES]
    rng = np.random.default_rng(options.seed)
    with trange(options.steps, desc="decoder", unit="step") as bar:
        for number in bar:
            pairs = [_draw(rng, coef, options.batch // len(coefs)) for coef in coefs]
            coef, before = (np.concatenate(x).astype(np.float32) for x in zip(*pairs, strict=True))
            key = jax.random.fold_in(jax.random.key(options.seed), number)
            trained, state, value = step(trained, state, coef, before, key)
            if number % 100 == 0:
                bar.set_postfix(psnr=f"{psnr(value):.2f}")
    return fixed | trained


def init_decoder(options: FitOptions) -> dict:
    """Weights of the convolutions, such that at first they add nothing."""
    rng = np.random.default_rng(options.seed)
    trained = {
        "out": jnp.zeros((options.width, options.coefficients), jnp.float32),
        "out_bias": jnp.zeros(options.coefficients, jnp.float32),
    }
    inputs = 2 * options.channels
    for layer in range(options.layers):
        shape = (3, 3, inputs, options.width)
        kernel = rng.normal(size=shape) * np.sqrt(2 / (9 * inputs))
        trained[f"kernel{layer}"] = jnp.asarray(kernel, jnp.float32)
        trained[f"bias{layer}"] = jnp.zeros(options.width, jnp.float32)
        inputs = options.width
    return trained


def psnr(squared_error) -> float:
    """Decibels of a mean squared error of samples in [-1, 1]."""
    return float(-10 * np.log10(np.asarray(squared_error) / 4))


def measure(params: dict, clips: int, seed: int) -> dict[str, float]:
    """PSNR in dB, by family, on that many held-out clips: mean over clips of each clip's own.

    Keys "FAMILY block" (the latents straight through the basis), "FAMILY" (decoded) and
    "FAMILY noise 0.2" (decoded from latents with that noise).
    """
    channels = params["scale"].size
    rng = np.random.default_rng(seed)
    results = {}
    for family in FAMILIES:
        rows = []
        for index in range(clips):
            frames, _ = draw_clip(Settings(seed=seed, split="held_out"), family, index)
            latent = block_codec.encode(params, frames[None])
            noisy = latent + 0.2 * rng.standard_normal(latent.shape, np.float32)
            basis = params["basis"][:, :channels]
            block = (latent / params["scale"]) @ basis.T + params["mean"]
            picture = np.asarray(block_codec.pixels(block)).reshape(-1, *frames.shape[1:])[3:]
            decoded = [
                np.asarray(block_codec.decode(params, z, z[:, :1], begins=True))[0] / 127.5 - 1
                for z in (latent, noisy)
            ]
            target = frames / 127.5 - 1
            rows.append(
                [psnr(np.mean((np.clip(x, -1, 1) - target) ** 2)) for x in (picture, *decoded)]
            )
        names = (f"{family} block", family, f"{family} noise 0.2")
        results |= dict(zip(names, np.mean(rows, 0).round(2).tolist(), strict=True))
    return results


_cells = jax.jit(block_codec.cells)


@jax.jit
def _project(cell, mean, basis):
    return ((cell - mean) @ basis).astype(jnp.float16)


def _coefficients(options: FitOptions, params: dict, family: str) -> np.ndarray:
    """(clips, F, h, w, K), half precision to save memory."""
    rows = (clip_cells(family, i, "train", options.seed) for i in range(options.clips))
    return np.stack([np.asarray(_project(x, params["mean"], params["basis"])) for x in rows])


def _draw(rng: np.random.Generator, coef: np.ndarray, number: int):
    clip, time = rng.integers(len(coef), size=number), rng.integers(coef.shape[1], size=number)
    return coef[clip, time], coef[clip, np.maximum(time - 1, 0)]


def main(argv: list[str] | None = None) -> None:
    """Fits, saves and prints."""
    parser = argparse.ArgumentParser(description="Fit the demo's video codec.")
    parser.add_argument("--out", help="file to write; by default the one in the package")
    for field in dataclasses.fields(FitOptions):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    args = vars(parser.parse_args(argv))
    out = args.pop("out") or block_codec.asset_path(args["channels"])
    params, notes = fit(FitOptions(**args))
    block_codec.save(out, params, notes)
    for name, value in notes.items():
        print(f"{name:>20}  {value}")


if __name__ == "__main__":
    main()
