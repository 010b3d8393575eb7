"""A small T5-like tokenizer folder, trained on a few captions, for the text tests."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CAPTIONS = (
    "A cat walks along a wooden fence at sunset, its tail raised.",
    "Two people dance in the rain under a yellow umbrella.",
    "The camera pans slowly over a snowy mountain range; clouds drift by.",
    "A red ball bounces on a green lawn while a small dog runs after it.",
    "Close-up of hands kneading bread dough on a floured table.",
    "Un chien court sur la plage pendant que les vagues se brisent.",
)


def write_tokenizer(folder: Path, captions=CAPTIONS, eos=True) -> Path:
    """Writes tokenizer.json (Unigram; <pad> 0, </s> 1, <unk> 2) and its config into `folder`."""
    specials = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    if eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "T5Tokenizer",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": 0,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
