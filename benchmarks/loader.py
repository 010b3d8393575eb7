"""Clips a second from videos and from encoded clips, and how long a training step waits for them.

    python -m benchmarks.loader --config=configs/tiny.py --steps=20
    python -m benchmarks.loader --config=configs/tiny.py --workers=2

Draws synthetic clips into a temporary folder and encodes them. A step's share of waiting is the
time in `next(batches)` over the time of the whole step, each step waited for; the first, which
compiles, is not counted.
"""

import dataclasses
import tempfile
import time
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from benchmarks import common
from lact_jax.config import Config, parse
from lact_jax.data import empty_text, make_dataset
from lact_jax.data.encoding import encode_dataset
from lact_jax.encoders import make_codec, make_text_encoder
from lact_jax.train_state import init_state, jit_train_step
from lact_jax.trainer import BatchEncoder

CONFIG = config_flags.DEFINE_config_file("config", "configs/tiny.py")
CLIPS = flags.DEFINE_integer("clips", 64, "Clips of the data set.")
BATCHES = flags.DEFINE_integer("batches", 40, "Batches read to time the loaders alone.")
STEPS = flags.DEFINE_integer("steps", 10, "Timed training steps.")
WORKERS = flags.DEFINE_integer("workers", 0, "Processes that read encoded clips; 0: threads.")
SMALL = flags.DEFINE_bool("small", False, "Toy sizes, to see that the script runs.")
JSON = flags.DEFINE_string("json", None, "Also write the result here.")


def toy(config: Config) -> Config:
    """Clips of two chunks, and a model to match."""
    text = {"text_len": config.model.text_len, "text_dim": config.model.text_dim}
    lact = dataclasses.replace(config.model.lact[0], fw_head_dim=32)
    model = dataclasses.replace(
        config.model, **common.SMALL_MODEL | text | {"num_layers": 1}, lact=(lact,)
    )
    data = dataclasses.replace(config.data, num_frames=21, height=32, width=32, batch_size=2)
    return dataclasses.replace(config, model=model, data=data)


def of_videos(config: Config, folder: Path, clips: int) -> Config:
    """The config of synthetic clips in a folder, each decoded whenever it is read."""
    data = dataclasses.replace(
        config.data,
        name="synthetic",
        path=str(folder / "videos"),
        options={"num_shapes": clips - clips // 4, "num_rings": clips // 4,
                 "num_validation_shapes": 1, "num_validation_rings": 0},
        cache_in_memory=False,
    )  # fmt: skip
    return dataclasses.replace(config, data=data)


def clips_per_second(batches, batch_size: int, count: int) -> float:
    """The first batch, which starts the readers, is not timed."""
    next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * batch_size / (time.perf_counter() - start)


class Stepper:
    """Training steps on one device, compiled once for all loaders."""

    def __init__(self, config: Config, codec, text):
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self._encode = BatchEncoder(codec, text, device)
        self._empty = jax.device_put(empty_text(config.data.name, config, text), device)
        self._state = jax.jit(lambda: init_state(config), out_shardings=device)()
        self._step = jit_train_step(config)

    def seconds(self, batches, count: int) -> tuple[float, float]:
        """(seconds a step, those of them that `next(batches)` takes), after one step untimed."""
        waited, begin = 0.0, 0.0
        for number in range(count + 1):
            if number == 1:
                waited, begin = 0.0, time.perf_counter()
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            latent, text = self._encode(batch)
            self._state, metrics = self._step(self._state, latent, text, self._empty)
            jax.block_until_ready(metrics)
        return (time.perf_counter() - begin) / count, waited / count


def main(_):
    config = parse(CONFIG.value)
    config, clips = (toy(config), 8) if SMALL.value else (config, CLIPS.value)
    codec = make_codec(config.codec.name, **config.codec.options)
    text = make_text_encoder(config.text.name, **config.text.options)
    rows = {"clip": f"{config.data.num_frames} x {config.data.height} x {config.data.width}",
            "batch": config.data.batch_size, "threads": config.data.num_threads,
            "workers": WORKERS.value}  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        videos = of_videos(config, folder, clips)
        make_dataset("synthetic", videos, codec, text)  # draws the clips
        start = time.perf_counter()
        encode_dataset(videos, codec, text, dst=folder / "encoded")
        rows["encoding clips/s"] = clips / (time.perf_counter() - start)
        data = dataclasses.replace(
            videos.data,
            name="encoded",
            path=str(folder / "encoded"),
            num_workers=WORKERS.value,
        )
        stepper = Stepper(config, codec, text)
        for run in (videos, dataclasses.replace(videos, data=data)):
            name = {"synthetic": "raw", "encoded": "cached"}[run.data.name]
            batches = iter(make_dataset(run.data.name, run, codec, text))
            rows[f"{name} clips/s"] = clips_per_second(batches, run.data.batch_size, BATCHES.value)
            seconds, waited = stepper.seconds(batches, STEPS.value)
            rows[f"{name} seconds per step"] = seconds
            rows[f"{name} share of waiting"] = waited / seconds
            batches.close()
    common.report("loader", rows, JSON.value)


if __name__ == "__main__":
    app.run(main)
