"""From a prompt to token ids, as Wan does it: cleaning, and the tokenizer of UMT5."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chex
import ftfy
import numpy as np

from kvpo_jax.errors import MissingPackageError, UsageError

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


def clean(text: str) -> str:
    """Mends the text's encoding, resolves HTML entities (twice) and collapses white space."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def load_tokenizer(
    folder: Path | str, files: Sequence[str], hint: str, kind: str = "AutoTokenizer"
) -> Any:
    """transformers' tokenizer in a local folder; nothing is downloaded.

    Args:
      folder: where it is.
      files: the folder must have one of them.
      hint: which folder to name instead, for the error.
      kind: transformers' class; AutoTokenizer finds it by files that not every folder has.

    Raises:
      FileNotFoundError: the folder has none of the files.
      MissingPackageError: transformers is not installed.
      UsageError: the files cannot be read.
    """
    if not any((Path(folder) / name).is_file() for name in files):
        raise FileNotFoundError(f"{folder} has no tokenizer ({' or '.join(files)}): name {hint}")
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            "prompts are tokenized by transformers: pip install 'kvpo_jax[data]'"
        ) from error
    try:
        tokenizer = getattr(transformers, kind)
        return tokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of the files
        reason = str(error).partition("\n")[0]
        if "trust_remote_code" in str(error):  # which transformers would advise to set
            reason = "it asks for code of its own, which is not run"
        raise UsageError(
            f"the tokenizer in {folder} cannot be read ({reason}): name {hint}"
        ) from error


def _umt5(folder: Path | str) -> Any:
    """UMT5's tokenizer; for the errors see `tokenizer`."""
    tokenize = load_tokenizer(
        folder, TOKENIZER_FILES, "the folder google/umt5-xxl of a Wan2.1 checkpoint"
    )
    if tokenize("a").input_ids[-1] != tokenize.eos_token_id:
        raise UsageError(
            f"the tokenizer in {folder} does not end a sentence with its eos token: it is not"
            " UMT5's"
        )
    return tokenize


def token_counter(folder: Path | str) -> Callable[[Sequence[str]], list[int]]:
    """A function of sentences, which it cleans -> tokens of each, uncut, with the last one.

    Args:
      folder: of the UMT5 tokenizer.

    Raises:
      FileNotFoundError, UsageError: see `tokenizer`.
    """
    tokenize = _umt5(folder)
    return lambda sentences: [
        len(ids) for ids in tokenize([clean(s) for s in sentences], verbose=False).input_ids
    ]


def tokenizer(
    folder: Path | str, text_len: int = 512
) -> Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]:
    """The UMT5 tokenizer in a local folder; nothing is downloaded.

    Args:
      folder: where it is, such as `google/umt5-xxl` in Wan2.1's checkpoints.
      text_len: K, the length at which prompts are cut.

    Returns:
      A function of sentences, which it cleans -> (ids int32[n, K], mask bool[n, K]). Every prompt
      ends with the end-of-sentence token; the mask is False in the padding behind it.

    Raises:
      FileNotFoundError, UsageError: see `load_tokenizer`; UsageError too if the tokenizer does not
        end sentences.
    """
    tokenize = _umt5(folder)

    def encode(sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        out = tokenize(
            [clean(sentence) for sentence in sentences],
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=text_len,
            return_tensors="np",
        )
        ids, mask = out["input_ids"].astype(np.int32), out["attention_mask"].astype(bool)
        chex.assert_shape([ids, mask], (len(sentences), text_len))
        return ids, mask

    return encode
