"""Encodes the sentences of prompt files with UMT5, once, into a dataset that training and generation read.

    python tools/encode_prompts.py --prompts=prompts.txt --output=data/embeddings \
        --weights=weights/umt5.safetensors --tokenizer=Wan2.1-T2V-1.3B/google/umt5-xxl

A run that was killed goes on where it stopped when the same command is given again, and leaves the same files.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from kvpo_jax import checkpoint
from kvpo_jax.data import embeddings, prompts, text
from kvpo_jax.models import umt5

_PROMPTS = flags.DEFINE_multi_string("prompts", None, "prompt file (.txt or .jsonl); may be repeated", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "folder of the embeddings", required=True)
_WEIGHTS = flags.DEFINE_string("weights", None, "UMT5 weights that tools/convert_weights.py wrote", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "folder of the UMT5 tokenizer", required=True)
_BATCH = flags.DEFINE_integer("batch", 16, "sentences per forward pass", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 512, "tokens per sentence, the model's text_len", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["bfloat16", "float32"], "arithmetic; that of the weights by default, float32 in the PyTorch release"
)


def header_checksum(path: Path) -> str:
    """Of a safetensors file's header, in which the converter has noted the checksums of its sources."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read(int.from_bytes(file.read(8), "little"))).hexdigest()


def encode_prompts(
    prompt_files: Sequence[Path],
    output: Path,
    weights: Path,
    tokenizer: Path,
    batch: int = 16,
    max_length: int = 512,
    dtype: str | None = None,
) -> None:
    """What the command does; its errors name the file that is wrong."""
    sequences = [sequence for path in prompt_files for sequence in prompts.load(path)]
    cleaned = {text.clean(sentence): sentence for sequence in sequences for sentence in sequence.sentences}
    cfg = umt5.UMT5Config(**checkpoint.metadata_config(weights, "umt5"))
    cfg = dataclasses.replace(cfg, dtype=dtype or cfg.dtype)
    ids, mask = text.tokenizer(tokenizer, max_length)(list(cleaned.values()))
    if ids.max() >= cfg.vocab:
        raise ValueError(f"{tokenizer} makes token {ids.max()}, {weights} has {cfg.vocab}: they do not belong together")
    lengths = mask.sum(axis=1)
    print(
        f"{len(cleaned)} sentences of {len(sequences)} prompts, {lengths.mean():.0f} tokens on average; "
        f"{np.sum(lengths == max_length)} fill all {max_length} and may be cut",
        flush=True,
    )

    # A run with nothing left to do loads nothing.
    load = functools.cache(lambda: checkpoint.load_weights(weights, umt5.abstract_params(cfg)))
    network = jax.jit(functools.partial(umt5.embed, cfg))

    def encode(part: slice) -> Iterator[np.ndarray]:
        return umt5.embed_valid(functools.partial(network, load()), ids[part], mask[part], batch)

    made_from = {
        "weights": header_checksum(weights),
        "tokens": hashlib.sha256(ids.tobytes() + mask.tobytes()).hexdigest(),
        "dtype": cfg.dtype,
    }
    embeddings.write(output, list(cleaned), encode, max_length, cfg.dim, made_from)
    print(f"wrote {output}", flush=True)


def main(_):
    try:
        encode_prompts(
            [Path(path) for path in _PROMPTS.value],
            Path(_OUTPUT.value),
            Path(_WEIGHTS.value),
            Path(_TOKENIZER.value),
            _BATCH.value,
            _MAX_LENGTH.value,
            _DTYPE.value,
        )
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
