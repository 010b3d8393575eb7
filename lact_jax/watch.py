"""What is looked at during training: validation and samples, when they are due.

What is due at a step and is not there yet is made, before the next step or when the run is resumed
from that step: so nothing is lost to Ctrl-C or a kill, and nothing is made twice.
"""

from collections.abc import Callable
from pathlib import Path

import jax

from lact_jax.batch_encoder import BatchEncoder
from lact_jax.config import Config
from lact_jax.data import make_dataset
from lact_jax.distributed import from_main, is_main
from lact_jax.encoders import TextEncoder, VideoCodec
from lact_jax.loop_samples import SHEET, LoopSampler
from lact_jax.optim import merge
from lact_jax.train_state import TrainState
from lact_jax.training_log import Log, NoLog
from lact_jax.validation import Validator, summary, validation_config, write_heat_map


class Watch:
    """Validates and samples a run.

    Args:
      config: the run; `config.validation` says when and what.
      data: the data set's name.
      codec, text: the run's encoders. encoder: of its batches. mesh: its devices.
      workdir: its folder. step: where it starts.
      debug: take as many validation clips as there are.

    Raises:
      ValueError, FileNotFoundError: no validation split or too few clips in it, no prompts, sizes
        that do not fit.
    """

    def __init__(
        self,
        config: Config,
        data: str,
        codec: VideoCodec,
        text: TextEncoder,
        encoder: BatchEncoder,
        mesh: jax.sharding.Mesh,
        workdir: Path,
        step: int,
        *,
        debug: bool = False,
    ):
        self._options, self._workdir = config.validation, workdir
        self._validate = self._sample = None
        if self._options.every:
            try:
                clips = make_dataset(data, validation_config(config), codec, text, "validation")
                self._validate = Validator(config, clips, encoder, mesh, fewer=debug)
            except ValueError as error:
                raise ValueError(
                    f"validation.every={self._options.every}: {error}. To train without "
                    "validation, give --config.validation.every=0"
                ) from error
        if self._options.sample_every:
            self._sample = LoopSampler(config, codec, text, workdir, step)

    def look(
        self, step: int, state: TrainState, log: Log | NoLog, stop: Callable[[], bool]
    ) -> None:
        """Makes what is due at this step and not there yet, unless `stop` says to leave."""
        # What is there already, process 0 knows.
        validate = _due(step, self._options.every) and from_main(log.validated < step)
        sample = _due(step, self._options.sample_every) and from_main(not self._sample.done(step))
        if not (validate or sample) or stop():
            return
        weights = getattr(state, self._options.weights)
        with log.untimed():
            if validate:
                self._validation(step, weights, state.frozen, log, stop)
            if sample and not stop():
                self._samples(step, merge(weights, state.frozen), log, stop)

    def _validation(self, step, weights, frozen, log, stop) -> None:
        loss_VW = self._validate(weights, frozen, stop)
        if loss_VW is not None and is_main():
            picture = write_heat_map(self._workdir, loss_VW, step)
            log.validation(step, summary(loss_VW, self._validate.num_clips), picture)

    def _samples(self, step, params, log, stop) -> None:
        folder = self._sample(step, params, stop)
        if folder is not None and is_main():
            log.samples(step, folder / SHEET, self._sample.videos(folder))


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
