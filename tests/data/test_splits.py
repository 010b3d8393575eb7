"""Every data set's two splits: endless training, and one pass of validation in a fixed order."""

import numpy as np
import pytest
from encoded_fixtures import CountingCodec, EndedText, small_config

from lact_jax.data import make_dataset

CODEC, TEXT = CountingCodec(), EndedText()
COUNTS = {"num_shapes": 3, "num_rings": 1, "num_validation_shapes": 3, "num_validation_rings": 2}


def make(name, split, path="", **changes):
    config = small_config(path, data__name=name, **changes)
    return make_dataset(name, config, CODEC, TEXT, split)


def test_synthetic_validation_clips_are_others_and_written_when_asked_for(tmp_path):
    training = iter(make("synthetic", "train", tmp_path, data__options=COUNTS))
    shown = {
        n: f for _ in range(4) for n, f in zip(*_names_and_frames(next(training)), strict=True)
    }
    assert set(shown) == {f"shapes_{i:05d}.mp4" for i in range(3)} | {"ring_00000.mp4"}
    assert not (tmp_path / ".validation").exists()
    passes = [list(make("synthetic", "validation", tmp_path, data__options=COUNTS))
              for _ in range(2)]  # fmt: skip
    names = [name for batch in passes[0] for name in batch["name"]]
    assert names == [f"ring_{i:05d}.mp4" for i in range(2)] + [
        f"shapes_{i:05d}.mp4" for i in range(2)
    ]  # the fifth clip is no whole batch
    for first, second in zip(*passes, strict=True):
        assert set(first) == {"frames", "caption", "name"}
        np.testing.assert_array_equal(first["frames"], second["frames"])
        for name, frames in zip(*_names_and_frames(first), strict=True):
            if name in shown:
                error = np.linalg.norm(frames - shown[name]) / np.linalg.norm(shown[name])
                assert error > 0.1
    again = iter(make("synthetic", "train", tmp_path, data__options=COUNTS))
    assert set(next(again)["name"]) <= set(shown)  # the reader passes over the folder inside


def _names_and_frames(batch):
    return batch["name"], batch["frames"].astype(np.float64)


def test_random_validation_is_four_batches_of_its_own():
    first, second = (list(make("random", "validation")) for _ in range(2))
    assert len(first) == len(second) == 4
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a["latent"], b["latent"])
    training = iter(make("random", "train"))
    drawn = {next(training)["latent"].tobytes() for _ in range(4)}
    assert not drawn & {batch["latent"].tobytes() for batch in first}


@pytest.mark.parametrize("name", ["encoded", "mixture", "random", "synthetic", "video_folder"])
def test_a_split_that_does_not_exist(name):
    with pytest.raises(ValueError, match=r"split='test': unknown, choose one of \['train', 'val"):
        make(name, "test")
