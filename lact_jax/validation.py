"""Validation during training: the loss at fixed noise levels and fixed noise, on held-out clips.

Every clip is validated on the same noise at every level and every time, each chunk behind its
clean predecessors as in training. What differs between two validations is the weights alone.

Letters: N clips, V noise levels, B clips at a time, W chunks, F latent frames, f latent frames of a
chunk, h, w latent size, c channels, L text tokens, Q text width.
"""

import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce

from lact_jax.batch_encoder import BatchEncoder
from lact_jax.config import Config
from lact_jax.diffusion import flow
from lact_jax.distributed import share_of_batch
from lact_jax.models.dit import bind
from lact_jax.objective import Draws, build_sequence, split_chunks
from lact_jax.ops.sequence import SequenceLayout, frame_positions, unpack_noise
from lact_jax.optim import merge
from lact_jax.sharding import batch_sharding, on_mesh, replicated
from lact_jax.workdir import write_atomically

NOISE_LEVELS = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
PICTURE = "validation.png"


def make_evaluate(config: Config) -> Callable[..., jax.Array]:
    """The loss of every noise level, clip and chunk.

    Returns:
      A function (trained parameters, frozen ones, latent (B, F, h, w, c), text (B, L, Q), number of
      each clip (B,), which its noise depends on) -> mean squared error (V, B, W) of the velocity.
      Not jitted.
    """
    frames = config.objective.frames_per_chunk
    key = jax.random.key(config.validation.seed)

    def evaluate(trained, frozen, latent_BFhwc, text_BLQ, clip_B):
        """See `make_evaluate`."""
        model = bind(config.model, merge(trained, frozen))
        chunks = split_chunks(latent_BFhwc, frames)
        batch, num_chunks = chunks.shape[:2]
        layout = SequenceLayout(num_chunks)
        frame_CF = jnp.asarray(frame_positions(layout, frames))
        noise_B1Wfhwc = jax.vmap(
            lambda clip: jax.random.normal(
                jax.random.fold_in(key, clip), (1, *chunks.shape[1:]), jnp.float32
            )
        )(clip_B)
        target = flow.velocity_target(chunks[:, None], noise_B1Wfhwc)

        def at_level(_, level):
            level_B1W = jnp.full((batch, 1, num_chunks), level, jnp.float32)
            draws = Draws(noise_B1Wfhwc, level_B1W, jnp.zeros((batch,), bool))
            # A shift of 1 leaves the level as it is.
            x, timestep_BC = build_sequence(chunks, draws, 1.0, layout)
            velocity, _ = model.sequence(x, timestep_BC, text_BLQ, frame_CF, layout)
            error = jnp.square(unpack_noise(velocity, layout) - target)
            return None, reduce(error, "b 1 w ... -> b w", "mean")

        return jax.lax.scan(at_level, None, jnp.asarray(NOISE_LEVELS, jnp.float32))[1]

    return evaluate


class Validator:
    """Held-out clips, encoded once, and the compiled function that is run over them.

    One clip for each replica is evaluated at a time, so that the numbers do not depend on the batch
    size of the training.

    Args:
      config: the run.
      batches: the validation split (see `validation_config`), read here.
      encoder: of the run's batches.
      replicas: devices that share a batch.
      replicated: the sharding of the result, on the run's mesh.
      fewer: take fewer than `validation.num_clips` clips where there are no more.

    Raises:
      ValueError: fewer clips than asked for.
    """

    def __init__(
        self,
        config: Config,
        batches: Iterable[Mapping[str, Any]],
        encoder: BatchEncoder,
        mesh: jax.sharding.Mesh,
        together: int | None = None,
        fewer: bool = False,
    ):
        self._encoder = encoder
        evaluate = on_mesh(mesh, make_evaluate(config))
        self._evaluate = jax.jit(evaluate, out_shardings=replicated(mesh))
        replicas = mesh.shape["data"] * mesh.shape["fsdp"]
        self._share, readers = share_of_batch(batch_sharding(mesh), replicas)
        self._readers = readers
        together = together or replicas
        wanted = -(-config.validation.num_clips // readers)
        clips = _first_clips(batches, wanted)
        self._groups = list(_encoded_groups(clips, encoder, max(together // readers, 1)))
        found = sum(len(numbers) for *_, numbers in self._groups)
        if found < wanted and not fewer:
            raise ValueError(
                f"validation.num_clips={config.validation.num_clips}, but the validation split of "
                f"data.name={config.data.name!r} has {found * readers} clips: hold out more, or "
                "validate on fewer"
            )
        self.num_clips = found * readers

    def __call__(
        self, trained: dict, frozen: dict, stop: Callable[[], bool] = lambda: False
    ) -> np.ndarray | None:
        """Mean loss by noise level and chunk, float64 (V, W); None if `stop` said so on the way."""
        errors = []
        for latent, text, numbers in self._groups:
            if stop():
                return None
            errors.append(self._group(trained, frozen, latent, text, numbers))
        return np.concatenate(errors, axis=1).mean(axis=1)

    def _group(self, trained, frozen, latent, text, numbers) -> np.ndarray:
        padding = len(latent) - len(numbers)
        clip_B = np.asarray(numbers) * self._readers + self._share
        clip_B = np.pad(clip_B, (0, padding), mode="edge")
        place = self._encoder.place
        error_VBW = self._evaluate(
            trained, frozen, place(latent, jnp.float32), place(text, jnp.float32),
            place(clip_B, jnp.int32),
        )  # fmt: skip
        error_VPBW = np.asarray(error_VBW, np.float64)
        error_VPBW = error_VPBW.reshape(len(NOISE_LEVELS), self._readers, len(latent), -1)
        kept = error_VPBW[:, :, : len(numbers)]
        return kept.reshape(len(NOISE_LEVELS), -1, kept.shape[-1])


def validation_config(config: Config) -> Config:
    """The config to make the validation split with: clip by clip, whatever the training's batch."""
    _, readers = config.data.share or (0, jax.process_count())
    data = dataclasses.replace(config.data, batch_size=readers, cache_in_memory=False)
    return dataclasses.replace(config, data=data)


def _first_clips(batches: Iterable[Mapping[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """The first clips of the batches, as batches of one."""
    found = 0
    for batch in batches:
        for i in range(len(next(iter(batch.values())))):
            yield {name: values[i : i + 1] for name, values in batch.items()}
            found += 1
            if found == count:
                return


def _encoded_groups(clips: Iterable[Mapping[str, Any]], encoder: BatchEncoder, together: int):
    """Yields (latent (B, …), text (B, …), numbers) in host memory, clips of one size together; the
    arrays of what is left over are padded to B with the last clip, for the same compiled program.
    """
    waiting: dict[tuple[int, ...], list[tuple[np.ndarray, np.ndarray, int]]] = {}

    def group(members):
        padded = members + members[-1:] * (together - len(members))
        latent, text = (np.concatenate([clip[i] for clip in padded]) for i in range(2))
        return latent, text, [number for *_, number in members]

    for number, clip in enumerate(clips):
        latent, text = (np.asarray(x, np.float32) for x in encoder.encode(clip))
        members = waiting.setdefault(latent.shape, [])
        members.append((latent, text, number))
        if len(members) == together:
            yield group(waiting.pop(latent.shape))
    yield from (group(members) for members in waiting.values())


def summary(loss_VW: np.ndarray, num_clips: int) -> dict[str, Any]:
    """The row of validation.jsonl: the mean, and means by noise level, by chunk and by both."""
    return {
        "loss": loss_VW.mean(),
        "loss_by_noise": loss_VW.mean(axis=1),
        "loss_by_chunk": loss_VW.mean(axis=0),
        "loss_by_noise_and_chunk": loss_VW,
        "num_clips": num_clips,
    }


def heat_map(loss_VW: np.ndarray, title: str):
    """A matplotlib figure of the losses: chunks from left to right, noise levels upwards."""
    # Imported here: it takes half a second, and a run without validation should not need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    levels, chunks = loss_VW.shape
    figure = Figure(figsize=(1.6 + 0.75 * chunks, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    drawn = np.ma.masked_where(~(np.isfinite(loss_VW) & (loss_VW > 0)), loss_VW)
    norm = LogNorm(drawn.min(), drawn.max()) if drawn.count() else None
    image = axes.imshow(drawn, origin="lower", aspect="auto", cmap="viridis", norm=norm)
    for (level, chunk), value in np.ndenumerate(loss_VW):
        dark = norm is not None and norm(value) < 0.6 if value > 0 else False
        axes.text(
            chunk, level, f"{value:.3g}", ha="center", va="center", fontsize=8,
            color="white" if dark else "black",
        )  # fmt: skip
    axes.set_xticks(range(chunks))
    axes.set_yticks(range(levels), [f"{level:.2f}" for level in NOISE_LEVELS])
    axes.set(xlabel="chunk", ylabel="noise level", title=title)
    figure.colorbar(image, ax=axes, label="loss")
    return figure


def write_heat_map(folder: Path, loss_VW: np.ndarray, step: int) -> Path:
    """Replaces validation.png whole; returns its path."""
    png = io.BytesIO()
    heat_map(loss_VW, f"validation loss at step {step}: {loss_VW.mean():.4g}").savefig(png, dpi=110)
    write_atomically(folder / PICTURE, png.getvalue())
    return folder / PICTURE
