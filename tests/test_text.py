"""Captions to embeddings: cleaning, tokens, batching, the weights' lifetime, the cache on disk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from text_fixtures import CAPTIONS, write_tokenizer

from lact_jax.models.umt5 import UMT5Config, abstract_umt5, umt5_encode
from lact_jax.text import (
    CaptionTokenizer,
    EmbeddingCache,
    UMT5TextEncoder,
    clean_caption,
    find_tokenizer,
)

CONFIG = UMT5Config(
    vocab_size=160, dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=2, num_buckets=8,
    max_distance=16,
)  # fmt: skip
TEXT_LEN = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return CaptionTokenizer(folder, TEXT_LEN)


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    spread = {"kernel": 0.2, "embedding": 1.0, "scale": 0.3}

    def draw(path, x):
        noise = spread[path[-1].key] * rng.standard_normal(x.shape)
        return (noise + (path[-1].key == "scale")).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_umt5(CONFIG)[1])


class Loads:
    """Hands out the weights, and counts how often it was asked."""

    def __init__(self, weights):
        self.weights, self.count = weights, 0

    def __call__(self):
        self.count += 1
        return jax.tree.map(jnp.array, self.weights)


def make_encoder(tokenizer, loads, *, config=CONFIG, weights_id="w", **options):
    options = {"bucket_lengths": (16, 32), "batch_size": 4, **options}
    return UMT5TextEncoder(tokenizer, loads, weights_id, config=config, **options)


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize(
    "dirty, clean",
    [
        ("schÃ¶n â€” a cafÃ©", "schön — a café"),
        ("Tom &amp;amp; Jerry &amp;lt;3", "Tom & Jerry <3"),
        ("  two\t\tspaces \n and\u00a0a line\r\n", "two spaces and a line"),
        ("&nbsp;edge&nbsp;", "edge"),
        ("\u201cquoted\u201d", '"quoted"'),
        (" \n ", ""),
    ],
)
def test_captions_are_cleaned(dirty, clean):
    assert clean_caption(dirty) == clean
    assert clean_caption(clean) == clean


def test_every_caption_ends_in_eos_and_padding_follows(tokenizer):
    ids_BL, mask_BL = tokenizer([*CAPTIONS[:2], ""])
    assert ids_BL.shape == mask_BL.shape == (3, TEXT_LEN)
    assert ids_BL.dtype == mask_BL.dtype == np.int32
    for ids, mask in zip(ids_BL, mask_BL, strict=True):
        count = mask.sum()
        assert mask[:count].all() and not mask[count:].any()
        assert ids[count - 1] == 1 and 1 not in ids[: count - 1]
        assert not ids[count:].any()
    assert mask_BL[2].sum() == 1


def test_long_caption_is_cut_before_its_eos(tokenizer, folder):
    long = " ".join(CAPTIONS)
    ids_BL, mask_BL = tokenizer([long])
    assert mask_BL.all() and ids_BL[0, -1] == 1
    longer_BL, _ = CaptionTokenizer(folder, 2 * TEXT_LEN)([long])
    np.testing.assert_array_equal(ids_BL[0, :-1], longer_BL[0, : TEXT_LEN - 1])
    assert longer_BL[0, TEXT_LEN - 1] != 1


def test_eos_is_added_where_the_file_leaves_it_to_its_class(tokenizer, tmp_path):
    bare = CaptionTokenizer(write_tokenizer(tmp_path, eos=False), TEXT_LEN)
    for caption in CAPTIONS:
        ids_BL, mask_BL = bare([caption])
        np.testing.assert_array_equal(mask_BL, tokenizer([caption])[1])
        assert ids_BL[0, mask_BL.sum() - 1] == 1


@pytest.mark.parametrize("place", ["", "google/umt5-xxl", "tokenizer"])
def test_tokenizer_is_found_in_each_kind_of_folder(tmp_path, place):
    write_tokenizer(tmp_path / place)
    assert find_tokenizer(tmp_path) == tmp_path / place / "tokenizer.json"
    assert find_tokenizer(tmp_path / place / "tokenizer.json") == find_tokenizer(tmp_path)


def test_folder_without_a_usable_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="google/umt5-xxl/tokenizer.json"):
        CaptionTokenizer(tmp_path)
    spiece = tmp_path / "google" / "umt5-xxl" / "spiece.model"
    spiece.parent.mkdir(parents=True)
    spiece.write_bytes(b"\x0a")
    with pytest.raises(FileNotFoundError, match=r"spiece\.model alone.*save_pretrained"):
        CaptionTokenizer(tmp_path)
    broken = spiece.with_name("tokenizer.json")
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: damaged"):
        CaptionTokenizer(tmp_path)


def test_tokenizer_without_eos_is_an_error(tmp_path, folder):
    content = (folder / "tokenizer.json").read_text().replace("</s>", "[SEP]")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a T5 tokenizer.*no </s>"):
        CaptionTokenizer(tmp_path)


def test_encode_equals_the_model_run_on_each_caption_whole(tokenizer, weights):
    captions = [*CAPTIONS, "", CAPTIONS[0], f"  {CAPTIONS[1]}\n", "A cat on a fence at sunset"]
    encoder = make_encoder(tokenizer, Loads(weights))
    assert (encoder.text_len, encoder.text_dim) == (TEXT_LEN, CONFIG.dim)
    got_BLD = encoder.encode(captions)
    assert got_BLD.dtype == np.float32 and got_BLD.shape == (len(captions), TEXT_LEN, 16)
    ids_BL, mask_BL = tokenizer([clean_caption(caption) for caption in captions])
    buckets = np.searchsorted((16, 32), mask_BL.sum(axis=1))
    assert set(buckets) == {0, 1, 2} and max(np.bincount(buckets)) > 4
    for row in range(len(captions)):
        want = umt5_encode(CONFIG, weights, ids_BL[row : row + 1], mask_BL[row : row + 1])[0]
        assert relative_error(got_BLD[row], want) <= 2e-6
        assert not got_BLD[row, mask_BL[row].sum() :].any()
    np.testing.assert_array_equal(got_BLD[0], got_BLD[7])
    np.testing.assert_array_equal(got_BLD[1], got_BLD[8])


def test_no_captions_give_an_empty_batch_and_load_nothing(tokenizer, weights):
    loads = Loads(weights)
    assert make_encoder(tokenizer, loads).encode([]).shape == (0, TEXT_LEN, 16)
    assert loads.count == 0
    with pytest.raises(TypeError, match="list of captions, got the string 'a cat'"):
        make_encoder(tokenizer, loads).encode("a cat")


def test_few_shapes_are_compiled(tokenizer, weights, monkeypatch):
    shapes = set()

    def spy(config, params, ids_BL, mask_BL):
        shapes.add(ids_BL.shape)
        return jnp.ones((*ids_BL.shape, config.dim), jnp.float32)

    monkeypatch.setattr("lact_jax.text.umt5_encode", spy)
    encoder = make_encoder(tokenizer, Loads(weights))
    words = " ".join(CAPTIONS).split()
    for count in range(1, 12):
        encoder.encode([" ".join(words[i : i + count]) for i in range(count)])
    assert {batch for batch, _ in shapes} <= {1, 2, 4}
    assert {length for _, length in shapes} <= {16, 32, TEXT_LEN}


def test_weights_load_once_leave_on_drop_and_come_back(tokenizer, weights, monkeypatch):
    loads = Loads(weights)
    live = []
    real = umt5_encode

    def spy(config, params, *args):
        live.append(jax.tree.leaves(params))
        return real(config, params, *args)

    monkeypatch.setattr("lact_jax.text.umt5_encode", spy)
    with make_encoder(tokenizer, loads) as encoder:
        first = encoder.encode(CAPTIONS[:1])
        encoder.encode(CAPTIONS[1:2])
        assert loads.count == 1
    assert all(array.is_deleted() for array in live[-1])
    np.testing.assert_array_equal(encoder.encode(CAPTIONS[:1]), first)
    assert loads.count == 2


def test_cached_prompts_need_no_weights_and_are_equal(tokenizer, weights, tmp_path):
    uncached = make_encoder(tokenizer, Loads(weights)).encode(CAPTIONS)
    first = make_encoder(tokenizer, Loads(weights), cache_dir=tmp_path)
    np.testing.assert_array_equal(first.encode(CAPTIONS), uncached)
    loads = Loads(weights)
    second = make_encoder(tokenizer, loads, cache_dir=tmp_path)
    dirty = [f" {caption}\n" for caption in CAPTIONS]
    np.testing.assert_array_equal(second.encode(dirty), uncached)
    assert loads.count == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == len(CAPTIONS) and all(p.suffix == ".safetensors" for p in files)


def test_bfloat16_embeddings_are_cached_as_they_are(tokenizer, weights, tmp_path):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    first = make_encoder(tokenizer, Loads(weights), config=config, cache_dir=tmp_path)
    fresh = first.encode(CAPTIONS[:2])
    again = make_encoder(tokenizer, Loads(weights), config=config, cache_dir=tmp_path)
    np.testing.assert_array_equal(again.encode(CAPTIONS[:2]), fresh)
    np.testing.assert_array_equal(fresh, fresh.astype(jnp.bfloat16).astype(np.float32))
    float32 = make_encoder(tokenizer, Loads(weights)).encode(CAPTIONS[:2])
    assert 1e-4 < relative_error(fresh, float32) <= 3e-2


def test_anything_that_changes_the_embedding_changes_the_cache_key(tokenizer, folder, tmp_path):
    other_tokens = CaptionTokenizer(write_tokenizer(tmp_path / "t", CAPTIONS[:3]), TEXT_LEN)
    bfloat16 = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    encoders = [
        make_encoder(tokenizer, None, cache_dir=tmp_path),
        make_encoder(tokenizer, None, cache_dir=tmp_path, weights_id="v"),
        make_encoder(tokenizer, None, cache_dir=tmp_path, config=bfloat16),
        make_encoder(CaptionTokenizer(folder, 24), None, cache_dir=tmp_path),
        make_encoder(other_tokens, None, cache_dir=tmp_path),
    ]
    paths = {encoder._cache.path("a cat") for encoder in encoders}
    assert len(paths) == len(encoders)
    same = make_encoder(tokenizer, None, cache_dir=tmp_path, batch_size=2, bucket_lengths=())
    assert same._cache.path("a cat") in paths


@pytest.mark.parametrize("damage", ["truncated", "flipped", "garbage", "other text"])
def test_damaged_cache_entry_is_named_and_written_again(tmp_path, damage):
    cache = EmbeddingCache(tmp_path, "encoder")
    embedding = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    cache.put("a cat", embedding)
    path = cache.path("a cat")
    content = path.read_bytes()
    if damage == "other text":
        cache.put("a dog", embedding)
        damaged = cache.path("a dog").read_bytes()
    else:
        damaged = {
            "truncated": content[:-9],
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
            "garbage": b"not safetensors",
        }[damage]
    path.write_bytes(damaged)
    with pytest.warns(UserWarning, match=path.name):
        assert cache.get("a cat") is None
    cache.put("a cat", embedding)
    np.testing.assert_array_equal(cache.get("a cat"), embedding)


def test_encoder_repairs_a_damaged_entry(tokenizer, weights, tmp_path):
    encoder = make_encoder(tokenizer, Loads(weights), cache_dir=tmp_path)
    want = encoder.encode(CAPTIONS[:1])
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.warns(UserWarning, match=path.name):
        np.testing.assert_array_equal(encoder.encode(CAPTIONS[:1]), want)
    encoder.drop()
    np.testing.assert_array_equal(encoder.encode(CAPTIONS[:1]), want)


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    cache = EmbeddingCache(tmp_path, "encoder")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lact_jax.text.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.put("a cat", np.ones((2, 3), np.float32))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert cache.get("a cat") is None


def test_weights_of_another_shape_are_listed(tokenizer, weights):
    norm = {"scale": np.ones(17, np.float32), "bias": np.ones(16, np.float32)}
    wrong = {**weights, "norm": norm}
    with pytest.raises(ValueError) as error:
        make_encoder(tokenizer, lambda: wrong).encode(["a cat"])
    assert "norm/scale: have float32[17], need float32[16]" in str(error.value)
    assert "norm/bias: have float32[16], need nothing" in str(error.value)


def test_tokenizer_of_another_checkpoint_is_an_error(tokenizer):
    small = dataclasses.replace(CONFIG, vocab_size=40)
    with pytest.raises(ValueError, match=r"tokenizer\.json has \d+ tokens.*only 40"):
        make_encoder(tokenizer, None, config=small)


def test_damaged_weights_never_reach_the_cache(tokenizer, weights, tmp_path):
    spoiled = {**weights, "norm": {"scale": np.full(16, np.nan, np.float32)}}
    encoder = make_encoder(tokenizer, lambda: spoiled, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="NaN or infinity for 'a cat'"):
        encoder.encode(["a cat"])
    assert not list(tmp_path.rglob("*.safetensors"))


def test_default_is_xxl_in_bfloat16(tokenizer):
    encoder = UMT5TextEncoder(tokenizer, None, "w")
    _, tree = abstract_umt5(encoder.config)
    assert encoder.text_dim == 4096
    gigabytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e9
    assert 11.3 < gigabytes < 11.4
