"""The teacher-forcing sequence: its order, its positions, and packing both ways."""

import jax.numpy as jnp
import numpy as np
import pytest

from lact_jax.ops.sequence import SequenceLayout, frame_positions, pack, unpack_noise

SIZES = [(1, 1), (1, 3), (2, 1), (3, 1), (3, 2), (4, 3), (7, 1)]


def labelled(chunks, repeats):
    """noise (1, R, W) and clean (1, W) whose entries say what they are: 100·kind + 10·r + i."""
    index = np.arange(chunks)
    noise = 100 + 10 * np.arange(repeats)[:, None] + index
    return jnp.asarray(noise[None], jnp.int32), jnp.asarray(200 + index[None], jnp.int32)


@pytest.mark.parametrize(("chunks", "repeats"), SIZES)
def test_interleaved_order_is_the_official_one(chunks, repeats):
    layout = SequenceLayout(chunks, repeats)
    noise, clean = labelled(chunks, repeats)
    official = [100 + 10 * r for r in range(repeats)]
    for i in range(1, chunks):
        official += [200 + i - 1] + [100 + 10 * r + i for r in range(repeats)]
    packed = pack(noise, clean, layout)[0]
    assert packed[layout.interleaved()].tolist() == official
    assert len(official) == layout.length == (repeats + 1) * chunks - 1


@pytest.mark.parametrize(("chunks", "repeats"), SIZES)
def test_groups_hold_what_their_names_say(chunks, repeats):
    layout = SequenceLayout(chunks, repeats)
    packed = pack(*labelled(chunks, repeats), layout)[0]
    copies = 100 + 10 * np.arange(repeats)
    assert packed[layout.first].tolist() == copies.tolist()
    assert packed[layout.clean].tolist() == [200 + i for i in range(chunks - 1)]
    later = [(copies + i).tolist() for i in range(1, chunks)]
    assert packed[layout.later].tolist() == sum(later, [])
    assert layout.num_clean == chunks - 1


@pytest.mark.parametrize(("chunks", "repeats"), SIZES)
def test_unpacking_gives_the_noise_copies_back(chunks, repeats):
    rng = np.random.default_rng(0)
    noise = jnp.asarray(rng.standard_normal((2, repeats, chunks, 3, 2)), jnp.float32)
    clean = jnp.asarray(rng.standard_normal((2, chunks, 3, 2)), jnp.float32)
    layout = SequenceLayout(chunks, repeats)
    assert np.array_equal(unpack_noise(pack(noise, clean, layout), layout), noise)


@pytest.mark.parametrize(("chunks", "repeats"), SIZES)
def test_every_copy_stands_at_the_true_frames_of_its_chunk(chunks, repeats):
    layout = SequenceLayout(chunks, repeats)
    packed = pack(*labelled(chunks, repeats), layout)[0]
    assert np.array_equal(layout.video_chunk(), packed % 10)
    frames = frame_positions(layout, frames_per_chunk=3)
    assert frames.tolist() == [[3 * i, 3 * i + 1, 3 * i + 2] for i in packed % 10]
    assert frames.dtype == np.int32
