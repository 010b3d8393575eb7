"""Fixtures of the tests of whole runs: the data folder and one finished run (see run_fixtures)."""

from pathlib import Path

import pytest
import tiny_run
from run_fixtures import quick_train, tiny_config

from lact_jax.data.synthetic import Settings, write_folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """Six clips of 21 frames at 32 x 32."""
    options = tiny_run.get_config().data.options
    settings = Settings(num_frames=21, size=32, chunk_frames=3, **options.to_dict())
    return write_folder(tmp_path_factory.mktemp("data") / "clips", settings)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, data_folder) -> Path:
    """The workdir of an uninterrupted run of all 8 steps. Not to be written to."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    assert quick_train(tiny_config(data_folder), workdir) == 0
    return workdir
