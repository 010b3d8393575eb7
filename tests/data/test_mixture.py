import json

import numpy as np
import pytest
from batch_checks import take
from encoded_fixtures import CountingCodec, EndedText, small_config

from lact_jax.data import empty_text, make_dataset
from lact_jax.data.mixture import join, parts

CODEC, TEXT = CountingCodec(), EndedText()


def config_of(datasets, **changes):
    options = {"datasets": datasets}
    return small_config(data__name="mixture", data__options=options, **changes)


def two(dataset, weights=(0.75, 0.25), **changes):
    """The encoded clips twice."""
    part = {"name": "encoded", "path": str(dataset)}
    named = zip(("first", "second"), weights, strict=True)
    return config_of({key: part | {"weight": weight} for key, weight in named}, **changes)


def make(config, split="train"):
    return make_dataset("mixture", config, CODEC, TEXT, split)


@pytest.mark.parametrize("weights", [(0.75, 0.25), (0.5, 0.5), (0.07, 0.93)])
def test_each_data_set_has_its_share_of_any_run_of_clips(weights, dataset):
    """Which data set a clip is from shows in how far each of the two was read."""
    batches = iter(make(two(dataset, weights, data__batch_size=4)))
    for clips in range(4, 401, 4):
        assert next(batches)["latent"].shape == (4, 3, 4, 4, 16)
        read = [parent["next_index"] for parent in batches.get_state()["parents"]]
        assert sum(read) == clips
        assert np.abs(np.subtract(read, np.multiply(weights, clips))).max() < 1.5


def test_the_clips_of_a_batch_are_those_of_the_data_sets_in_order(dataset):
    batches = take(iter(make(two(dataset, (0.5, 0.5)))), 6)
    alone = small_config(dataset, data__name="encoded", data__batch_size=1)
    alone = take(iter(make_dataset("encoded", alone, CODEC, TEXT)), 6)
    for mixed, clip in zip(batches, alone, strict=True):
        assert mixed["name"] == 2 * clip["name"] and mixed["caption"] == 2 * clip["caption"]
        for key in ("latent", "text"):
            np.testing.assert_array_equal(mixed[key], np.concatenate(2 * [clip[key]]))


def test_the_position_is_json_and_the_same_batches_follow(dataset):
    batches = iter(make(two(dataset)))
    take(batches, 5)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 6)
    resumed = iter(make(two(dataset)))
    resumed.set_state(state)
    for a, b in zip(take(resumed, 6), expected, strict=True):
        assert a["name"] == b["name"]
        np.testing.assert_array_equal(a["latent"], b["latent"])


def test_videos_are_mixed_too_and_a_data_set_may_have_options_of_its_own(videos, tmp_path):
    drawn = {"num_shapes": 1, "num_rings": 0, "num_validation_shapes": 2, "num_validation_rings": 0}
    config = config_of({
        "films": {"name": "video_folder", "path": str(videos), "weight": 0.5,
                  "holdout": 4, "options": {"shuffle": False}},
        "drawn": {"name": "synthetic", "path": str(tmp_path), "weight": 0.5, "options": drawn},
    }, data__batch_size=4)  # fmt: skip
    batches = take(iter(make(config)), 2)
    assert batches[0]["frames"].shape == (4, 9, 32, 32, 3)
    assert batches[0]["frames"].dtype == np.uint8
    names = [name for batch in batches for name in batch["name"]]
    assert names.count("shapes_00000.mp4") >= 4 and len(set(names) - {"shapes_00000.mp4"}) >= 1
    validation = list(make(config, "validation"))
    assert len(validation) == 1  # two clips of each: then one of the two has no more
    assert {"shapes_00000.mp4", "shapes_00001.mp4"} <= set(validation[0]["name"])


def test_the_empty_caption_of_a_mixture_of_encoded_clips(dataset):
    class Unused(EndedText):
        def encode(self, captions):
            raise AssertionError("the text encoder was asked")

    embedding = empty_text("mixture", two(dataset), Unused())
    np.testing.assert_array_equal(embedding, TEXT.encode([""])[0])


PART = {"name": "random", "weight": 1.0}


@pytest.mark.parametrize(
    "datasets, message",
    [
        ({}, "names no data set"),
        ({"a": {}}, r"datasets\.a: must name a data set"),
        ({"a": 0.5}, r"datasets\.a: must name a data set"),
        ({"a": PART | {"weigth": 1}}, r"datasets\.a: unknown \['weigth'\]; it takes"),
        ({"a": PART | {"height": 64}}, r"datasets\.a: unknown \['height'\]"),
        ({"a": {"name": "random"}}, r"datasets\.a\.weight=None: must be a number above 0"),
        ({"a": PART | {"weight": -0.5}, "b": PART | {"weight": 1.5}}, r"a\.weight=-0\.5"),
        ({"a": PART, "b": PART | {"weight": 0}}, r"datasets\.b\.weight=0"),
        ({"a": PART | {"weight": float("nan")}}, r"datasets\.a\.weight=nan"),
        ({"a": PART | {"weight": "half"}}, r"datasets\.a\.weight='half'"),
        ({"a": PART | {"weight": 0.5}, "b": PART | {"weight": 0.4}}, r"sum to 0\.9, not 1 \(a: 0"),
        ({"a": PART | {"weight": 0.5}, "b": PART | {"weight": 0.50001}}, r"sum to 1\.00001"),
        ({"a": PART | {"name": "films"}}, r"datasets\.a: data\.name='films': unknown"),
        ({"a": PART | {"name": "encoded", "path": "nowhere"}}, r"datasets\.a: nowhere: not an"),
        ({"a": PART | {"num_threads": -1}}, r"num_threads=-1"),
        ({"a": PART | {"path": 5}}, r"datasets\.a\.path=5: expected str"),
        ({"a": PART | {"options": "none"}}, r"datasets\.a\.options='none': expected Mapping"),
    ],
)
def test_senseless_mixtures(datasets, message):
    with pytest.raises(ValueError, match=message):
        make(config_of(datasets))


def test_weights_may_be_off_by_rounding():
    third = {"name": "random", "weight": 1 / 3}
    assert set(parts(config_of({"a": third, "b": third, "c": third}).data)) == {"a", "b", "c"}


def test_other_options_and_size_buckets_are_refused(dataset):
    config = small_config(data__name="mixture", data__options={"weights": [1.0]})
    with pytest.raises(ValueError, match=r"unknown \['weights'\]; it takes \['datasets'\]"):
        make(config)
    with pytest.raises(ValueError, match="a mixture draws clip by clip"):
        make(two(dataset, data__buckets=((32, 32), (64, 32))))


def test_videos_and_encoded_clips_do_not_mix(videos, dataset):
    config = config_of({
        "a": {"name": "video_folder", "path": str(videos), "weight": 0.5},
        "b": {"name": "encoded", "path": str(dataset), "weight": 0.5},
    })  # fmt: skip
    with pytest.raises(ValueError, match="batches of different forms.*frames.*latent"):
        next(iter(make(config)))
    assert join([{"name": ["a"]}, {"name": ["b"]}]) == {"name": ["a", "b"]}
    with pytest.raises(ValueError, match="gave a batch of 2 clips where data.batch_size asked for"):
        join([{"name": ["a"]}, {"name": ["b", "c"]}])
