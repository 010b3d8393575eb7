import json
import os
import shutil
from collections import Counter

import numpy as np
import pytest
from batch_checks import assert_same_batches, assert_shares_make, take
from encoded_fixtures import CountingCodec, EndedText, encode, small_config

from lact_jax.data import empty_text, encoded, make_dataset
from lact_jax.data.encoded_format import MANIFEST, read_manifest
from lact_jax.video_io import write_video

CODEC, TEXT = CountingCodec(), EndedText()


def options(dataset, **changes):
    return encoded.Options(path=str(dataset), text_len=4, **{"batch_size": 2, **changes})


def make(path, split="train", **changes):
    config = small_config(path, data__name="encoded", **changes)
    return make_dataset("encoded", config, CODEC, TEXT, split)


def test_batches_are_what_encoding_the_videos_at_every_step_gives(videos, dataset):
    """Also the same clips in the same order, validation included."""
    for split in ("train", "validation"):
        raw = small_config(videos, data__name="video_folder", data__holdout=2)
        raw = iter(make_dataset("video_folder", raw, CODEC, TEXT, split))
        cached = iter(make(dataset, split))
        for _ in range(5 if split == "train" else 1):
            there, here = next(raw), next(cached)
            assert here["name"] == there["name"] and here["caption"] == there["caption"]
            latent = np.asarray(CODEC.encode(there["frames"]))
            assert here["latent"].shape == latent.shape == (2, 3, 4, 4, 16)
            error = np.linalg.norm(here["latent"] - latent) / np.linalg.norm(latent)
            assert 0 < error < 3e-3  # bfloat16
            np.testing.assert_array_equal(here["text"], TEXT.encode(there["caption"]))


def test_every_epoch_has_every_clip_in_another_order(dataset):
    names = [n for b in take(iter(encoded.make(options(dataset))), 12) for n in b["name"]]
    epochs = [tuple(names[start : start + 4]) for start in range(0, 24, 4)]
    assert all(len(set(epoch)) == 4 for epoch in epochs) and len(set(epochs)) > 1
    other = take(iter(encoded.make(options(dataset, seed=1))), 12)
    assert names != [n for b in other for n in b["name"]]


def test_the_position_is_json_and_the_same_batches_follow(dataset):
    batches = iter(encoded.make(options(dataset)))
    take(batches, 3)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 4)
    for resumed in (batches, iter(encoded.make(options(dataset, num_threads=3)))):
        resumed.set_state(state)
        assert_same_batches(take(resumed, 4), expected)


@pytest.mark.parametrize("workers", [1, 4])
def test_worker_processes_change_nothing(workers, dataset):
    """A position saved by threads is gone on from by processes, and the other way round."""
    batches = iter(encoded.make(options(dataset)))
    expected = take(batches, 9)
    batches.set_state({"next_index": 3})
    in_processes = iter(encoded.make(options(dataset, num_workers=workers)))
    in_processes.set_state(batches.get_state())
    assert_same_batches(take(in_processes, 5), expected[3:8])
    batches.set_state(in_processes.get_state())
    assert_same_batches(take(batches, 1), expected[8:])
    in_processes.close()


def test_processes_share_each_batch(dataset):
    together = take(iter(encoded.make(options(dataset, batch_size=4))), 3)
    shares = [
        take(iter(encoded.make(options(dataset, process_index=i, process_count=2))), 3)
        for i in range(2)
    ]
    assert_shares_make(together, shares)


def test_validation_is_one_pass_in_order_of_whole_batches(videos, tmp_path):
    encode(tmp_path / "dataset", videos, holdout=5)
    first, second = (list(encoded.make(options(tmp_path / "dataset", split="validation",
                                               seed=seed))) for seed in (0, 1))  # fmt: skip
    names = [name for batch in first for name in batch["name"]]
    assert len(first) == 2 and names == sorted(set(names))
    assert_same_batches(first, second)


def test_the_empty_caption_comes_from_the_data_set(dataset):
    class Unused(EndedText):
        def encode(self, captions):
            raise AssertionError("the text encoder was asked")

    config = small_config(dataset, data__name="encoded")
    embedding = empty_text("encoded", config, Unused())
    np.testing.assert_array_equal(embedding, TEXT.encode([""])[0])
    assert embedding.any()
    np.testing.assert_array_equal(empty_text("random", config, TEXT), embedding)


def test_clips_of_one_batch_are_of_one_size(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "videos"
    folder.mkdir()
    for name, shape in (("a", (32, 32)), ("b", (64, 32)), ("c", (32, 32)), ("d", (96, 48))):
        frames = rng.integers(0, 255, (9, *shape, 3)).astype(np.uint8)
        write_video(folder / f"{name}.mp4", frames, fps=16)
        (folder / f"{name}.txt").write_text(f"clip {name}")
    sizes = {"data__buckets": ((32, 32), (64, 32))}
    encode(tmp_path / "dataset", folder, holdout=0, config=small_config(**sizes))
    batches = take(iter(make(tmp_path / "dataset", **sizes)), 8)
    shapes = {tuple(sorted(set(b["name"]))): b["latent"].shape[2:4] for b in batches}
    assert shapes == {("a.mp4", "c.mp4"): (4, 4), ("b.mp4", "d.mp4"): (8, 4)}
    with pytest.raises(ValueError, match=r"clip\.sizes: \[\[32, 32\], \[64, 32\]\] there"):
        make(tmp_path / "dataset")


class OtherCodec(CountingCodec):
    def encode(self, frames_BTHW3):
        return super().encode(frames_BTHW3) * 1.05


def test_all_that_differs_from_the_config_is_listed(dataset):
    config = small_config(
        dataset, data__name="encoded", data__height=48, data__num_frames=21, data__fps=8.0,
        text__options={"text_len": 4}, objective__frames_per_chunk=2,
    )  # fmt: skip
    with pytest.raises(ValueError) as raised:
        make_dataset("encoded", config, OtherCodec(), TEXT)
    lines = str(raised.value).splitlines()
    assert str(dataset) in lines[0] and "encode_dataset.py" in lines[-1]
    assert {line.strip() for line in lines[1:-1]} == {
        "codec.probe: the codec there makes other latents of the same picture",
        "text.options.text_dim: 8 there, absent here",
        "clip.num_frames: 9 there, 21 here",
        "clip.sizes: [[32, 32]] there, [[48, 32]] here",
        "clip.fps: 16.0 there, 8.0 here",
        "objective.frames_per_chunk: 3 latent frames there are not whole chunks of 2",
    }


def test_rounding_does_not_make_another_codec(dataset):
    class Rounding(CountingCodec):
        def encode(self, frames_BTHW3):
            return super().encode(frames_BTHW3).astype("bfloat16").astype("float32")

    config = small_config(dataset, data__name="encoded")
    assert next(iter(make_dataset("encoded", config, Rounding(), TEXT)))["latent"].any()


def edit_manifest(folder, **changes):
    (folder / MANIFEST).write_text(json.dumps(read_manifest(folder) | changes))


def drop_key(folder, name):
    manifest = read_manifest(folder)
    del manifest[name]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def shard_of(folder):
    return folder / read_manifest(folder)["splits"]["train"][1]["file"]


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda d: edit_manifest(d, version=7), ValueError, "version 7; this program reads"),
        (lambda d: edit_manifest(d, format="x"), ValueError, "format 'x', version 1"),
        (lambda d: (d / MANIFEST).write_text("{"), ValueError, r"manifest\.json: damaged"),
        (lambda d: (d / MANIFEST).unlink(), FileNotFoundError, "not an encoded data set"),
        (lambda d: os.truncate(shard_of(d), 5000), ValueError, "00001-of-00002: 5000 bytes"),
        (lambda d: shard_of(d).unlink(), FileNotFoundError, "00001-of-00002: missing"),
        (shutil.rmtree, FileNotFoundError, "not an encoded data set"),
        (lambda d: drop_key(d, "splits"), ValueError, r"manifest\.json: damaged \(has no splits\)"),
        (lambda d: (d / "features.json").unlink(), ValueError, r"features\.json is missing"),
        (lambda d: (d / "dataset_info.json").write_text("{"), ValueError, "or damaged"),
    ],
)
def test_data_sets_that_can_not_be_read(spoil, error, message, dataset, tmp_path):
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    spoil(folder)
    with pytest.raises(error, match=message) as raised:
        make(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_of_full_length_that_is_half_written_is_named_when_it_is_read(
    workers, dataset, tmp_path
):
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    for shard in read_manifest(folder)["splits"]["train"]:
        content = (folder / shard["file"]).read_bytes()
        whole = len(content) // 2
        (folder / shard["file"]).write_bytes(content[:whole] + bytes(len(content) - whole))
    with pytest.raises(ValueError, match="split 'train' can't be read, their shards are damaged"):
        for _, _ in zip(range(20), make(folder, data__num_workers=workers), strict=False):
            pass


def test_a_damaged_empty_caption_is_named(dataset, tmp_path):
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    os.truncate(folder / "empty_text.npy", 20)
    with pytest.raises(ValueError, match=r"empty_text\.npy: damaged"):
        encoded.empty_text(str(folder), 8)


def test_splits_that_are_not_there_or_too_small(dataset, videos, tmp_path):
    encode(tmp_path / "dataset", videos, holdout=0)
    with pytest.raises(ValueError, match=r"has no split 'validation', only \['train'\].*holdout"):
        make(tmp_path / "dataset", "validation")
    with pytest.raises(ValueError, match="2 validation clips, fewer than the 4 of one batch"):
        make(dataset, "validation", data__batch_size=4)
    with pytest.raises(ValueError, match=r"data\.path is empty: give the folder of the encoded"):
        make("")


def test_names_stay_with_their_latents(dataset):
    """A clip met twice has the same latent, and two clips have two."""
    seen, counts = {}, Counter()
    for batch in take(iter(encoded.make(options(dataset))), 8):
        for name, latent in zip(batch["name"], batch["latent"], strict=True):
            assert seen.setdefault(name, latent.tobytes()) == latent.tobytes()
            counts[name] += 1
    assert len(set(seen.values())) == 4 and set(counts.values()) == {4}
