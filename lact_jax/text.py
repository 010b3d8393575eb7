"""Captions to text embeddings: cleaning, tokens, the UMT5 encoder, and its cache on disk.

Letters: B captions, L text tokens, D text width.
"""

import dataclasses
import hashlib
import html
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import ftfy
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from lact_jax.models.umt5 import UMT5Config, abstract_umt5, umt5_encode

TEXT_LEN = 512
BUCKET_LENGTHS = (64, 128, 256)
# Where checkpoint folders keep it: by itself, in Wan's folder, in a diffusers folder.
TOKENIZER_PLACES = (
    "tokenizer.json",
    "google/umt5-xxl/tokenizer.json",
    "tokenizer/tokenizer.json",
)
_EOS, _PAD = "</s>", "<pad>"
# safetensors' numpy side knows no bfloat16: the cache holds integers of the same width.
_INTEGERS = {np.dtype(np.float32): np.uint32, np.dtype(ml_dtypes.bfloat16): np.uint16}
_FLOATS = {np.dtype(bits): dtype for dtype, bits in _INTEGERS.items()}


def clean_caption(text: str) -> str:
    """As Wan cleans its captions: mojibake mended, HTML unescaped twice, white space collapsed."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def find_tokenizer(folder: str | os.PathLike) -> Path:
    """The tokenizer.json in a checkpoint folder (or the file itself, when that is given).

    Raises FileNotFoundError that lists the places looked at.
    """
    folder = Path(folder)
    if folder.is_file():
        return folder
    for place in TOKENIZER_PLACES:
        if (folder / place).is_file():
            return folder / place
    message = f"{folder}: no tokenizer, looked for {', '.join(TOKENIZER_PLACES)}"
    for place in TOKENIZER_PLACES:
        spiece = (folder / place).with_name("spiece.model")
        if spiece.is_file():
            message += (
                f". {spiece} alone is not enough: write tokenizer.json beside it (transformers "
                "with sentencepiece can: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR))"
            )
    raise FileNotFoundError(message)


class CaptionTokenizer:
    """The T5 tokenizer of a checkpoint folder: each caption's tokens, then </s>, then padding.

    A caption of more than `text_len` - 1 tokens is cut so that </s> is still its last one.
    """

    def __init__(self, folder: str | os.PathLike, text_len: int = TEXT_LEN):
        path = find_tokenizer(folder)
        content = path.read_bytes()
        try:
            tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise ValueError(f"{path}: damaged, or not a tokenizer.json: {error}") from error
        missing = [token for token in (_EOS, _PAD) if tokenizer.token_to_id(token) is None]
        if missing:
            raise ValueError(f"{path}: not a T5 tokenizer, it has no {' and no '.join(missing)}")
        eos_id = tokenizer.token_to_id(_EOS)
        # Some files leave </s> to the class that loads them, or carry settings of their own.
        tokenizer.post_processor = TemplateProcessing(
            single=f"$A {_EOS}", special_tokens=[(_EOS, eos_id)]
        )
        tokenizer.enable_truncation(max_length=text_len)
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._pad_id = tokenizer.token_to_id(_PAD)
        self.path = path
        self.text_len = text_len
        self.vocab_size = tokenizer.get_vocab_size()
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and attention mask, each (B, text_len) int32. Captions are taken as they are."""
        ids_BL = np.full((len(captions), self.text_len), self._pad_id, np.int32)
        mask_BL = np.zeros_like(ids_BL)
        for row, encoding in enumerate(self._tokenizer.encode_batch(list(captions))):
            ids_BL[row, : len(encoding.ids)] = encoding.ids
            mask_BL[row, : len(encoding.ids)] = 1
        return ids_BL, mask_BL


class EmbeddingCache:
    """Prompt embeddings on disk, one file each, found by the text and what encoded it.

    Many processes may share a folder: a file appears whole or not at all.
    """

    def __init__(self, folder: str | os.PathLike, identity: str):
        self.folder = Path(folder)
        self.identity = identity

    def path(self, text: str) -> Path:
        key = hashlib.sha256(f"{self.identity}\n{text}".encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, text: str) -> np.ndarray | None:
        """The embedding (tokens, D) of `text`, or None if there is none that can be used.

        A damaged file is warned about, by name; `put` then replaces it.
        """
        path = self.path(text)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "numpy") as file:
                header, bits = file.metadata(), file.get_tensor("bits")
        except (SafetensorError, OSError) as error:
            problem = str(error)
        else:
            if header == _cache_header(text, self.identity, bits):
                return bits.view(_FLOATS[bits.dtype])
            problem = "its content does not match its checksum"
        warnings.warn(
            f"{path}: damaged prompt embedding, encoding it again ({problem})", stacklevel=2
        )
        return None

    def put(self, text: str, embedding_LD: np.ndarray) -> None:
        """Writes the embedding (tokens, D), float32 or bfloat16, of `text`."""
        path = self.path(text)
        path.parent.mkdir(parents=True, exist_ok=True)
        bits = np.ascontiguousarray(embedding_LD).view(_INTEGERS[embedding_LD.dtype])
        content = save({"bits": bits}, metadata=_cache_header(text, self.identity, bits))
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def _cache_header(text: str, identity: str, bits: np.ndarray) -> dict[str, str]:
    checksum = hashlib.sha256(f"{bits.dtype}{bits.shape}".encode() + bits.tobytes()).hexdigest()
    return {"text": text, "encoder": identity, "sha256": checksum}


class UMT5TextEncoder:
    """The TextEncoder protocol over UMT5: captions to zero-padded embeddings.

    The weights are loaded at the first caption that the cache doesn't hold and stay until `drop`
    (or the end of a `with` block); a run whose prompts are all cached never loads them.
    An embedding is rounded to the config's compute dtype, whether cached or not. What else is in
    a batch moves it only by float rounding.
    """

    def __init__(
        self,
        tokenizer: CaptionTokenizer,
        load_params: Callable[[], dict],
        weights_id: str,
        *,
        config: UMT5Config | None = None,
        cache_dir: str | os.PathLike | None = None,
        batch_size: int = 8,
        bucket_lengths: Sequence[int] = BUCKET_LENGTHS,
    ):
        """`load_params()` gives a tree of abstract_umt5(config)'s shapes and dtypes, whose arrays
        this object then owns, on the devices and shardings they have. `weights_id` names their
        content (a checkpoint's path and step, or a hash): it is part of the cache's keys.
        The default config is UMT5-XXL in bfloat16. Raises ValueError if the tokenizer has more
        tokens than the config.
        """
        config = config or UMT5Config(param_dtype="bfloat16", compute_dtype="bfloat16")
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"{tokenizer.path} has {tokenizer.vocab_size} tokens, the text encoder only "
                f"{config.vocab_size}: they are not of one checkpoint"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.text_len = tokenizer.text_len
        self.text_dim = config.dim
        self._lengths = (*sorted(n for n in bucket_lengths if n < self.text_len), self.text_len)
        self._load_params = load_params
        self._params = None
        description = {
            "weights": weights_id,
            "tokenizer": tokenizer.fingerprint,
            "text_len": self.text_len,
            "config": dataclasses.asdict(config),
        }
        identity = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
        self._cache = EmbeddingCache(cache_dir, identity) if cache_dir is not None else None

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """(B, text_len, text_dim) float32, 0 after each text's end (its </s>).

        Raises TypeError for a single string, ValueError when an embedding isn't finite.
        """
        if isinstance(captions, str):
            raise TypeError(f"encode takes a list of captions, got the string {captions!r}")
        texts = [clean_caption(caption) for caption in captions]
        found = dict.fromkeys(texts)
        if self._cache is not None:
            found = {text: self._cache.get(text) for text in found}
        for text, embedding_LD in self._compute([t for t, e in found.items() if e is None]):
            found[text] = embedding_LD
            if self._cache is not None:
                self._cache.put(text, embedding_LD)
        out_BLD = np.zeros((len(texts), self.text_len, self.text_dim), np.float32)
        for row, text in enumerate(texts):
            out_BLD[row, : len(found[text])] = found[text]
        return out_BLD

    def drop(self) -> None:
        """Frees the weights' device memory at once. The next `encode` that needs them reloads."""
        for array in jax.tree.leaves(self._params):
            array.delete()
        self._params = None

    def __enter__(self) -> "UMT5TextEncoder":
        return self

    def __exit__(self, *_) -> None:
        self.drop()

    def _compute(self, texts: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        if not texts:
            return
        if self._params is None:
            self._params = _checked_params(self.config, self._load_params())
        ids_BL, mask_BL = self.tokenizer(texts)
        counts = mask_BL.sum(axis=1)
        for rows, length in _batches(counts, self._lengths, self.batch_size):
            # The last row is repeated up to a power of two: few shapes, so few compilations.
            padded = rows + [rows[-1]] * ((1 << (len(rows) - 1).bit_length()) - len(rows))
            y_BLD = umt5_encode(
                self.config, self._params, ids_BL[padded, :length], mask_BL[padded, :length]
            )
            y_BLD = np.asarray(y_BLD.astype(self.config.compute_dtype))
            for row, y_LD in zip(rows, y_BLD, strict=False):
                if not np.isfinite(y_LD.astype(np.float32)).all():
                    raise ValueError(
                        f"the text encoder gives NaN or infinity for {texts[row]!r}: "
                        "its weights are damaged"
                    )
                yield texts[row], y_LD[: counts[row]]


def _batches(
    counts: np.ndarray, lengths: Sequence[int], batch_size: int
) -> Iterable[tuple[list[int], int]]:
    """Rows grouped by the shortest bucket that holds them, at most `batch_size` at a time."""
    bucket = np.searchsorted(lengths, counts)
    for i, length in enumerate(lengths):
        rows = np.flatnonzero(bucket == i).tolist()
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size], length


def _checked_params(config: UMT5Config, params: dict) -> dict:
    """`params` as device arrays. Raises ValueError listing all that differs from the config."""
    want = _specs(abstract_umt5(config)[1])
    got = _specs(params)
    problems = [
        f"{path}: have {got.get(path, 'nothing')}, need {want.get(path, 'nothing')}"
        for path in sorted(want.keys() | got.keys())
        if got.get(path) != want.get(path)
    ]
    if problems:
        raise ValueError("text encoder weights do not fit its config:\n" + "\n".join(problems))
    return jax.tree.map(jnp.asarray, params)


def _specs(tree: dict) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        "/".join(str(key.key) for key in path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }
