"""Encode, train on it, stop, go on, sample: like one run without a stop."""

import json

import pytest
from run_fixtures import assert_same_end, quick_train, quickly_compiled, restore, tiny_config

from lact_jax.data.encoding import encode_dataset
from lact_jax.encoders import make_codec, make_text_encoder
from lact_jax.generate import generate
from lact_jax.video_io import read_video

pytest_plugins = ["run_plugin"]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, data_folder):
    """The six clips of the other runs' tests, encoded."""
    folder, config = tmp_path_factory.mktemp("encoded") / "dataset", tiny_config()
    codec = make_codec(config.codec.name, **config.codec.options)
    text = make_text_encoder(config.text.name, **config.text.options)
    with quickly_compiled():
        encode_dataset(config, codec, text, src=str(data_folder), dst=folder, shard_size=4)
    return folder


def encoded_config(folder, **changes):
    return tiny_config(folder, data__name="encoded", **changes)


def test_encode_train_resume_sample(dataset, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert quick_train(encoded_config(dataset, train__steps=5), whole) == 0
    assert quick_train(encoded_config(dataset, train__steps=3), halves) == 0
    position = restore(halves)[1]
    assert json.loads(json.dumps(position)) == {"next_index": 3}
    assert quick_train(encoded_config(dataset, train__steps=5, data__num_threads=2), halves) == 0
    assert_same_end(halves, whole)
    with quickly_compiled():
        generate(encoded_config(dataset), whole, ["a red circle"], tmp_path / "clips")
    (clip,) = json.loads((tmp_path / "clips" / "prompts.json").read_text())["clips"]
    assert read_video(tmp_path / "clips" / clip["file"], fps=16.0).shape == (21, 32, 32, 3)
