import collections
import json
import types

import numpy as np
import odd_videos
import pytest
from batch_checks import assert_same_batches, assert_shares_make, take
from odd_videos import RED, pictures, write
from run_fixtures import quick_train, tiny_config

from lact_jax.data import make_dataset, video_folder
from lact_jax.data.buckets import Order, check_buckets, nearest
from lact_jax.run_logging import read_metrics

CODEC = types.SimpleNamespace(temporal_stride=4, spatial_stride=8)
WIDE, SQUARE, TALL = (16, 32), (16, 16), (32, 16)


@pytest.mark.parametrize("size, bucket", [
    ((480, 832), WIDE), ((90, 160), WIDE), ((832, 480), TALL), ((100, 90), SQUARE),
    ((1000, 1), TALL), ((141, 100), SQUARE), ((142, 100), TALL), ((100, 142), WIDE),
])  # fmt: skip
def test_the_nearest_bucket_is_that_of_the_nearest_aspect_ratio(size, bucket):
    buckets = (WIDE, SQUARE, TALL)
    assert buckets[nearest(size, buckets)] == bucket


def test_of_equal_shapes_the_nearest_in_area():
    buckets = ((16, 32), (64, 128), (256, 512))
    assert [nearest(size, buckets) for size in [(9, 16), (60, 120), (1080, 1920)]] == [0, 1, 2]


def test_every_clip_is_seen_equally_often_in_batches_of_one_bucket():
    members = [[0, 1, 2, 3, 4], [5], [6, 7, 8]]
    order = Order(members, batch_size=4, seed=3)
    cycle = [order.training_batch(number) for number in range(9)]  # as many batches as clips
    assert collections.Counter(bucket for bucket, _ in cycle) == {0: 5, 1: 1, 2: 3}
    seen = collections.Counter()
    for bucket, draws in cycle:
        assert len(draws) == 4 and {draw.clip for draw in draws} <= set(members[bucket])
        seen.update(draws)
    assert seen == {(clip, epoch): 1 for clip in range(9) for epoch in range(4)}
    later = [order.training_batch(number) for number in range(9, 18)]
    assert {draw.epoch for _, draws in later for draw in draws} == {4, 5, 6, 7}
    assert [bucket for bucket, _ in later] != [bucket for bucket, _ in cycle]


def test_the_order_is_computed_from_the_number_and_the_seed():
    members = [list(range(7)), list(range(7, 20))]
    straight = [Order(members, 2, seed=1).training_batch(number) for number in range(60)]
    backwards = Order(members, 2, seed=1)
    assert [backwards.training_batch(number) for number in range(59, -1, -1)] == straight[::-1]
    assert [Order(members, 2, seed=2).training_batch(number) for number in range(60)] != straight


def test_a_single_pass_is_whole_batches_in_the_order_of_the_list():
    order = Order([[0, 2, 5], [1], [3, 4]], batch_size=2, seed=3)
    clips = [(bucket, [draw.clip for draw in draws]) for bucket, draws in order.single_pass()]
    assert clips == [(0, [0, 2]), (2, [3, 4])]


@pytest.mark.parametrize("buckets, match", [
    (((16, 32), (24, 16)), r"data\.buckets\[1\]=\(24, 16\): its height .*multiple of 16.*16 or 32"),
    (((16, 8),), r"data\.buckets\[0\]=\(16, 8\): its width .*use 16$"),
    (((16, 0),), r"data\.buckets\[0\]=\(16, 0\): its width"),
    (((16, 32), (16, 32)), "names a size twice"),
])  # fmt: skip
def test_buckets_that_do_not_fit(buckets, match):
    with pytest.raises(ValueError, match=match):
        check_buckets(buckets, (16, 16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four wide clips, three tall ones (one by its rotation), a square one, of ten frames each."""
    path = tmp_path_factory.mktemp("videos")
    for number, (height, width) in enumerate([(32, 64), (32, 60), (36, 64), (18, 32), (64, 32),
                                              (80, 40), (32, 32)]):  # fmt: skip
        write(path / f"{number}.mp4", pictures(10, height, width), fps=16)
    odd_videos.write_turned(path / "7.mp4", pictures(10, 32, 64), "90 clockwise")
    for number in range(8):
        (path / f"{number}.txt").write_text(f"clip {number}")
    return path


SHAPES = {0: WIDE, 1: WIDE, 2: WIDE, 3: WIDE, 4: TALL, 5: TALL, 7: TALL, 6: SQUARE}


def options(path, **changes):
    given = {"num_frames": 5, "height": 16, "width": 16, "batch_size": 2, "num_threads": 2,
             "buckets": (WIDE, TALL, SQUARE)}  # fmt: skip
    return video_folder.Options(path=str(path), **given | changes)


def test_batches_have_the_size_of_their_clips_bucket(folder):
    seen = collections.Counter()
    for batch in take(iter(video_folder.make(options(folder))), 8):
        shape = batch["frames"].shape
        assert shape[:2] == (2, 5) and shape[4] == 3
        for name in batch["name"]:
            assert SHAPES[int(name[0])] == shape[2:4]
            seen[name] += 1
    assert seen == {f"{number}.mp4": 2 for number in range(8)}


def test_a_turned_clip_is_upright_in_its_bucket(folder):
    batches = video_folder.make(options(folder, batch_size=1, shuffle=False))
    by_name = {batch["name"][0]: batch["frames"][0] for batch in take(iter(batches), 8)}
    corner = by_name["7.mp4"][:, 2:6, -3:].astype(float).mean((0, 1, 2))  # what was above left
    assert np.abs(corner - RED).max() < 16


@pytest.mark.parametrize("num_threads", [0, 4])
def test_the_position_is_a_number_and_resumes_bit_for_bit(folder, num_threads):
    straight = take(iter(video_folder.make(options(folder, num_threads=1))), 12)
    batches = iter(video_folder.make(options(folder, num_threads=num_threads)))
    take(batches, 5)
    resumed = iter(video_folder.make(options(folder, num_threads=num_threads)))
    resumed.set_state(json.loads(json.dumps(batches.get_state())))
    assert_same_batches(take(resumed, 7), straight[5:])


def test_processes_see_the_same_bucket_and_other_clips_of_one_batch(folder):
    together = take(iter(video_folder.make(options(folder, batch_size=4))), 9)
    shares = [
        take(iter(video_folder.make(options(folder, process_index=i, process_count=2))), 9)
        for i in range(2)
    ]
    assert_shares_make(together, shares)


def test_validation_is_one_pass_over_whole_batches(folder):
    batches = list(video_folder.make(options(folder, split="validation")))
    assert [batch["name"] for batch in batches] == [
        ["0.mp4", "1.mp4"], ["2.mp4", "3.mp4"], ["4.mp4", "5.mp4"]
    ]  # fmt: skip
    with pytest.raises(ValueError, match="8 validation clips don't fill a batch of 5 of one b"):
        video_folder.make(options(folder, split="validation", batch_size=5))


def test_a_run_over_buckets_trains_on_each_size(tmp_path):
    buckets = ((32, 32), WIDE)  # the first is the size of the other tests' runs
    videos = tmp_path / "videos"
    videos.mkdir()
    for number, (height, width) in enumerate(buckets):
        write(videos / f"{number}.mp4", pictures(25, height, width), fps=16)
        (videos / f"{number}.txt").write_text(f"clip {number}")
    config = tiny_config(
        videos, data__name="video_folder", data__options={}, data__buckets=buckets,
        data__random_crop_time=True, train__steps=2,
    )  # fmt: skip
    drawn = take(iter(make_dataset("video_folder", config, CODEC, None)), 2)
    assert {batch["frames"].shape[2:4] for batch in drawn} == set(buckets)
    assert quick_train(config, tmp_path / "run") == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) and not row["skipped"] for row in rows)
    # Two clips, three chunks of three latent frames of 2 x 2 or 1 x 2 tokens.
    rates = read_metrics(tmp_path / "run" / "throughput.jsonl")
    tokens = [rate["tokens_per_second"] / rate["steps_per_second"] for rate in rates]
    assert sorted(tokens) == pytest.approx([36, 72])
