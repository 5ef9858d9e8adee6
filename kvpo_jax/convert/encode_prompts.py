"""Encodes the sentences of prompt files with UMT5, once, into a dataset.

    kvpo-encode --prompts=prompts.txt --output=data/embeddings \\
        --weights=weights/umt5.safetensors --tokenizer=Wan2.1-T2V-1.3B/google/umt5-xxl

In a checkout, `python tools/encode_prompts.py` is the same as `kvpo-encode`.

Training and generation read the dataset instead of holding the text encoder. A command that was
killed continues where it stopped when it is given again, and leaves the same files.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from kvpo_jax import programs
from kvpo_jax.data import prompts, text
from kvpo_jax.errors import MissingPackageError, UsageError
from kvpo_jax.models import umt5
from kvpo_jax.runtime import checkpoint, command
from kvpo_jax.runtime.weight_file import sums_of
from kvpo_jax.types import PyTree


def encode_prompts(
    prompt_files: Sequence[Path],
    output: Path,
    weights: Path,
    tokenizer: Path,
    batch: int = 16,
    max_length: int = 512,
    dtype: str | None = None,
) -> None:
    """Encodes every sentence of some prompt files; the arguments are the flags.

    Raises:
      UsageError, OSError: a file is not what it should be; the message names it.
    """
    try:
        from kvpo_jax.data import embeddings
    except ImportError as error:
        raise MissingPackageError(
            "prompt embeddings are written with: pip install 'kvpo_jax[data]'"
        ) from error
    sequences = [sequence for path in prompt_files for sequence in prompts.load(path)]
    cleaned = {
        text.clean(sentence): sentence for sequence in sequences for sentence in sequence.sentences
    }
    cfg = checkpoint.noted_config(weights, "umt5", umt5.UMT5Config)
    cfg = dataclasses.replace(cfg, dtype=dtype or cfg.dtype)
    ids, mask = text.tokenizer(tokenizer, max_length)(list(cleaned.values()))
    if ids.max() >= cfg.vocab:
        raise UsageError(
            f"{tokenizer} makes token {ids.max()}, {weights} has {cfg.vocab}: they do not belong"
            " together"
        )
    lengths = mask.sum(axis=1)
    print(
        f"{len(cleaned)} sentences of {len(sequences)} prompts, {lengths.mean():.0f} tokens on"
        f" average; {np.sum(lengths == max_length)} fill all {max_length} and may be cut",
        flush=True,
    )

    @functools.cache
    def load() -> PyTree:
        """The weights, which a command that has nothing left to do does not load."""
        return checkpoint.load_weights(weights, umt5.abstract_params(cfg))

    network = programs.text_encoder(cfg)

    def encode(part: slice) -> Iterator[np.ndarray]:
        """float[tokens, dim] of each sentence in a range."""
        return umt5.embed_valid(functools.partial(network, load()), ids[part], mask[part], batch)

    made_from = {
        "weights": sums_of(weights),
        "tokens": hashlib.sha256(ids.tobytes() + mask.tobytes()).hexdigest(),
        "dtype": cfg.dtype,
    }
    embeddings.write(output, list(cleaned), encode, max_length, cfg.dim, made_from)
    print(f"wrote {output}", flush=True)


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    if arguments[1:]:
        raise UsageError(f"unexpected argument {arguments[1]!r}")
    encode_prompts(
        [Path(path) for path in given.prompts],
        Path(given.output),
        Path(given.weights),
        Path(given.tokenizer),
        given.batch,
        given.max_length,
        given.dtype,
    )


def define_flags() -> None:
    """The flags of the command."""
    command.define_path(
        "prompts", None, "prompt file (.txt or .jsonl); may be repeated", required=True, multi=True
    )
    command.define_path("output", None, "folder of the embeddings", required=True)
    command.define_path("weights", None, "UMT5 weights that kvpo-convert wrote", required=True)
    command.define_path("tokenizer", None, "folder of the UMT5 tokenizer", required=True)
    flags.DEFINE_integer("batch", 16, "sentences per forward pass", lower_bound=1)
    flags.DEFINE_integer(
        "max_length", 512, "tokens per sentence, the model's text_len", lower_bound=1
    )
    flags.DEFINE_enum(
        "dtype",
        None,
        ["bfloat16", "float32"],
        "arithmetic; that of the weights by default, float32 in the PyTorch release",
    )


def cli() -> None:
    """Entry point."""
    command.run("kvpo_jax.convert.encode_prompts", define_flags, main)


if __name__ == "__main__":
    cli()
