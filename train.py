"""Trains a LaCT autoregressive video model.

    python train.py --config=configs/tiny.py --workdir=runs/tiny --config.train.lr=1e-3

Started again with the same workdir, it goes on from the newest checkpoint.
"""

from absl import app, flags
from ml_collections import config_flags

from lact_jax import cli
from lact_jax.config import parse
from lact_jax.trainer import train

CONFIG = config_flags.DEFINE_config_file("config", None, "The run's configuration.")
WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints, metrics and curves go here.")
DEBUG = flags.DEFINE_bool("debug", False, "Random data of the configured shapes, no data set.")
flags.mark_flags_as_required(["config", "workdir"])


def main(_):
    cli.finish(lambda: train(parse(CONFIG.value), WORKDIR.value, debug=DEBUG.value))


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
