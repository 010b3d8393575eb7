"""Six videos, and the data set that they are encoded to, for all tests of encoded data."""

import pytest
from encoded_fixtures import encode, write_videos
from run_fixtures import quickly_compiled


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Not to be written to."""
    return write_videos(tmp_path_factory.mktemp("videos") / "clips")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, videos):
    """Four training clips in two shards, two for validation. Not to be written to."""
    folder = tmp_path_factory.mktemp("encoded") / "dataset"
    with quickly_compiled():
        assert encode(folder, videos) is not None
    return folder
