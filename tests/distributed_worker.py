"""One process of several, for the tests: does the jobs it is given as JSON, one after the other.

    python distributed_worker.py '[{"train": WORKDIR, "config": {"mesh.data": 2}}, …]'

Jobs: train (with "signal": [process, batch, number], that process sends itself the signal when it
gets that batch of the run) and sample. The last one's status is the script's. A line is printed for
each job that is done.
"""

import json
import os
import sys

import jax
import tiny_run

from lact_jax import batch_encoder, cli, generate, trainer
from lact_jax.config import parse

PROMPTS = ["a red circle", "a blue square", "a green triangle moving up"]


def read_config(changes):
    config = tiny_run.get_config()
    config.update_from_flattened_dict(changes)
    return parse(config)


class SignallingEncoder(batch_encoder.BatchEncoder):
    """Sends its own process a signal when it is given batch number `batch`."""

    process, batch, number = None, 0, 0
    seen = 0

    def __call__(self, batch):
        cls = type(self)
        cls.seen += 1
        if cls.seen == cls.batch and jax.process_index() == cls.process:
            os.kill(os.getpid(), cls.number)
        return super().__call__(batch)


def train(job) -> int:
    SignallingEncoder.seen = 0
    SignallingEncoder.process, SignallingEncoder.batch, SignallingEncoder.number = job.get(
        "signal", [None, 0, 0]
    )
    return trainer.train(read_config(job["config"]), job["train"])


def sample(job) -> int:
    generate.generate(read_config(job["config"]), job["sample"], PROMPTS, job["out"])
    return 0


def main() -> int:
    trainer.BatchEncoder = SignallingEncoder
    for job in json.loads(sys.argv[1]):
        status = train(job) if "train" in job else sample(job)
        print(f"process {jax.process_index()} of {jax.process_count()}: {status}", flush=True)
    return status


if __name__ == "__main__":
    cli.finish(main)
