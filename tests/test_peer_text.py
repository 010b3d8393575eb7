"""Cleaning, tokens and embeddings against diffusers' Wan pipeline and transformers."""

import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from text_fixtures import CAPTIONS, write_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from lact_jax import umt5_weights
from lact_jax.models.umt5 import abstract_umt5
from lact_jax.text import CaptionTokenizer, UMT5TextEncoder, clean_caption
from lact_jax.wan_weights import get

DIRTY = (
    "schÃ¶ne  GrÃ¼ÃŸe &amp;amp; mehr\n",
    "A &quot;cat&quot; &amp;lt;walks&amp;gt;\t along…",
    "\u3000ｆｕｌｌ　ｗｉｄｔｈ\u00a0",
    "l&#39;eau &amp;#233;tait \u2018claire\u2019",
    "emoji 🐈 and zero\u200bwidth",
)
UNSEEN = ("漢字 unseen", "Quixotic zebras!", "", "a", "x y" * 100)


def peer_params(peer, config):
    params = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), abstract_umt5(config)[1])
    state = peer.state_dict()
    for row in umt5_weights.rows(config, "diffusers"):
        array = get(params, row.path)
        layer = ... if row.layer is None else row.layer
        array[layer] = row.layout.to_jax(state[row.torch_name].numpy(), config)
    return params


def test_cleaning_equals_wan_pipeline():
    for text in DIRTY + CAPTIONS:
        assert clean_caption(text) == prompt_clean(text)


@pytest.mark.parametrize("text_len", [4, 16, 64])
def test_tokens_equal_transformers(tmp_path, text_len):
    folder = write_tokenizer(tmp_path)
    ours = CaptionTokenizer(folder, text_len)
    texts = [clean_caption(text) for text in CAPTIONS + DIRTY + UNSEEN]
    ids_BL, mask_BL = ours(texts)
    specials = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    for peer in (
        AutoTokenizer.from_pretrained(folder),
        PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **specials),
    ):
        want = peer(
            texts, padding="max_length", max_length=text_len, truncation=True, return_tensors="np"
        )
        np.testing.assert_array_equal(ids_BL, want["input_ids"])
        np.testing.assert_array_equal(mask_BL, want["attention_mask"])
    assert mask_BL.all(axis=1).any()


def test_embeddings_equal_the_wan_pipeline_recipe(tmp_path):
    folder = write_tokenizer(tmp_path)
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=160, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    peer = UMT5EncoderModel(config).eval()
    ours = umt5_weights.config_from_transformers(config.to_dict())
    encoder = UMT5TextEncoder(
        CaptionTokenizer(folder, 40), lambda: peer_params(peer, ours), "w",
        config=ours, batch_size=4, bucket_lengths=(16,),
    )  # fmt: skip
    texts = [*CAPTIONS, *DIRTY]
    tokens = AutoTokenizer.from_pretrained(folder)(
        [prompt_clean(text) for text in texts],
        padding="max_length", max_length=40, truncation=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        want = peer(tokens.input_ids, tokens.attention_mask).last_hidden_state.numpy()
    want = want * tokens.attention_mask.numpy()[..., None]
    got = encoder.encode(texts)
    for row in range(len(texts)):
        error = np.linalg.norm(got[row] - want[row]) / np.linalg.norm(want[row])
        assert error <= 2e-6
