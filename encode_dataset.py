"""Encodes videos and captions once, for training runs to read.

    python encode_dataset.py --config=configs/ar_chunk3f.py --src=VIDEOS --dst=DATASET --holdout=64
    python encode_dataset.py --config=configs/tiny.py --dst=runs/data/encoded

The second encodes the data set that the config names. Started again with the same flags, it goes
on where it was stopped. Several processes may share the work: start each with its --process_index
of the same --process_count (under jax.distributed they are known). Train on the result with
--config.data.name=encoded --config.data.path=DATASET.
"""

import jax
from absl import app, flags
from ml_collections import config_flags

from lact_jax import cli
from lact_jax.config import parse
from lact_jax.data.encoding import SHARD_SIZE, encode_dataset
from lact_jax.encoders import make_codec, make_text_encoder
from lact_jax.interrupt import leave_on_signal

CONFIG = config_flags.DEFINE_config_file("config", None, "The run's configuration.")
SRC = flags.DEFINE_string("src", None, "A folder of videos; without it, the config's data set.")
DST = flags.DEFINE_string("dst", None, "The encoded data set's folder.")
HOLDOUT = flags.DEFINE_integer("holdout", None, "Validation clips. Default: config.data.holdout.")
SHARD = flags.DEFINE_integer("shard_size", SHARD_SIZE, "Clips a file; what a kill costs at most.")
INDEX = flags.DEFINE_integer("process_index", None, "Default: jax.process_index().")
COUNT = flags.DEFINE_integer("process_count", None, "Default: jax.process_count().")
flags.mark_flags_as_required(["config", "dst"])


def main(_):
    def run():
        config = parse(CONFIG.value)
        with leave_on_signal() as interrupt:
            summary = encode_dataset(
                config,
                make_codec(config.codec.name, **config.codec.options),
                make_text_encoder(config.text.name, **config.text.options),
                src=SRC.value,
                dst=DST.value,
                holdout=config.data.holdout if HOLDOUT.value is None else HOLDOUT.value,
                shard_size=SHARD.value,
                process_index=jax.process_index() if INDEX.value is None else INDEX.value,
                process_count=jax.process_count() if COUNT.value is None else COUNT.value,
                stop=lambda: interrupt.requested,
            )
        for split, found in (summary or {}).items():
            print(f"{split}: {found['num_kept']} clips, {found['num_skipped']} skipped")
        print(f"{DST.value} is {'whole' if summary else 'not whole yet: shards are missing'}")
        return interrupt.exit_code

    cli.finish(run)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
