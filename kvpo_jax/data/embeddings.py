"""Prompt embeddings on disk, so that training never holds the text encoder.

A folder has sentences.json (what the embeddings are of, and the index) and a tfds dataset in array_record form, with
only the valid tokens of each sentence, in bfloat16. Both are read and written without TensorFlow; other programs read
them with `tfds.builder_from_directory(folder).as_data_source("prompts")`, after `import ml_dtypes`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from kvpo_jax import config as config_lib
from kvpo_jax.data import text

INDEX = "sentences.json"
SPLIT = "prompts"
SHARD = 64  # sentences; what a kill can cost
COMMAND = "python tools/encode_prompts.py --prompts=FILE --output=FOLDER --weights=FILE --tokenizer=FOLDER"


@dataclasses.dataclass(frozen=True)
class Embeddings(Mapping[str, np.ndarray]):
    """Sentence -> bfloat16[tokens, dim]; read from disk at each access. Sentences are cleaned before the look-up.

    Attributes:
      folder: that `write` has filled.
      index: cleaned sentence -> its record.
      source: the records.
      shards: the files that hold them, SHARD in each.
      text_len: K.
      dim: width of an embedding.
    """

    folder: Path
    index: Mapping[str, int]
    source: Sequence[Mapping[str, Any]]
    shards: Sequence[Path]
    text_len: int
    dim: int

    def __getitem__(self, sentence: str) -> np.ndarray:
        record = self.index.get(text.clean(sentence))
        if record is None:
            raise KeyError(f"{self.folder} has no embedding of {sentence!r}; a new folder with it is made by {COMMAND}")
        try:
            return self.source[record]["embedding"]
        except (RuntimeError, TypeError, ValueError) as error:  # what array_record and tfds make of damaged records
            raise _damaged(self.shards[record // SHARD], error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def check(self, sentences: Iterable[str]) -> None:
        """Raises a ValueError for sentences that have no embedding here, without reading any; names the first."""
        missing = [sentence for sentence in dict.fromkeys(map(text.clean, sentences)) if sentence not in self.index]
        if missing:
            raise ValueError(
                f"{self.folder} has no embedding of {missing[0]!r}, {len(missing)} sentences missing in all; a new "
                f"folder with them is made by {COMMAND}"
            )

    def lookup(self, sentences: Sequence[str]) -> np.ndarray:
        """bfloat16[n, K, dim], zero past a sentence's end; KeyError names a sentence that is not here."""
        out = np.zeros((len(sentences), self.text_len, self.dim), ml_dtypes.bfloat16)
        for row, sentence in zip(out, sentences, strict=True):
            embedding = self[sentence]
            row[: len(embedding)] = embedding
        return out


def open_embeddings(folder: Path | str) -> Embeddings:
    """The embeddings in `folder`; FileNotFoundError or ValueError says how to make or finish them."""
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} has no prompt embeddings; make them with {COMMAND}")
    if not (folder / "dataset_info.json").is_file():
        raise ValueError(f"{folder}: the embeddings are not finished; run the command that began them again, {COMMAND}")
    written = _read_index(folder)
    try:
        builder = tfds.builder_from_directory(folder)
        split, source = builder.info.splits[SPLIT], builder.as_data_source(SPLIT)
    except Exception as error:  # whatever tfds makes of the files
        raise _damaged(folder, error) from error
    shards = [Path(path) for path in split.filepaths]
    for shard in shards:
        try:
            ArrayRecordReader(str(shard)).close()  # it has read the footer
        except RuntimeError as error:
            raise _damaged(shard, error) from error
    index = {sentence: record for record, sentence in enumerate(written["sentences"])}
    return Embeddings(folder, index, source, shards, written["text_len"], written["dim"])


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / INDEX).read_text())
    except json.JSONDecodeError as error:
        raise _damaged(folder / INDEX, error) from error


def _damaged(path: Path, cause: Exception) -> ValueError:
    """The error of a file, or of the whole folder; what is still there is not made again."""
    return ValueError(f"{path} is damaged ({cause!r}); delete it and run the command that made it again, {COMMAND}")


def write(
    folder: Path | str,
    sentences: Sequence[str],
    encode: Callable[[slice], Iterable[np.ndarray]],
    text_len: int,
    dim: int,
    made_from: Mapping[str, str],
) -> None:
    """Fills `folder`, shard by shard; after a kill, the same call goes on with the first shard that is not there.

    Args:
      folder: a new one, or one that an earlier call has begun.
      sentences: cleaned and distinct; record i is sentence i.
      encode: a range of the sentences -> float[tokens, dim] of each.
      text_len: K, what tokens may number at most.
      dim: width of an embedding.
      made_from: checksums of what else the embeddings depend on.

    Raises:
      ValueError: if the folder was begun with something else; says with what.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index = {"text_len": text_len, "dim": dim, **made_from, "sentences": list(sentences)}
    if (folder / INDEX).is_file():
        begun = _read_index(folder)
        other = [name for name in index if begun.get(name) != index[name]]
        if other:
            raise ValueError(f"{folder} has embeddings with other {', '.join(other)}; name a new folder, or delete it")
    else:
        config_lib.write_json(index, folder / INDEX)

    embedding = tfds.features.Tensor(shape=(None, dim), dtype=ml_dtypes.bfloat16, encoding="bytes")
    features = tfds.features.FeaturesDict({"sentence": tfds.features.Text(), "embedding": embedding})
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="embeddings", split=SPLIT, filetype_suffix="array_record"
    )
    parts = [slice(start, min(start + SHARD, len(sentences))) for start in range(0, len(sentences), SHARD)]
    paths = [Path(template.sharded_filepath(shard_index=i, num_shards=len(parts))) for i in range(len(parts))]
    lengths = [part.stop - part.start for part in parts]
    done = sum(length for path, length in zip(paths, lengths, strict=True) if path.is_file())
    with tqdm(total=len(sentences), initial=done, unit="sentence") as progress:
        for path, part in zip(paths, parts, strict=True):
            if path.is_file():
                continue
            temporary = path.with_name(f"{path.name}.tmp")
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
            for sentence, valid in zip(sentences[part], encode(part), strict=True):
                record = {"sentence": sentence, "embedding": valid.astype(ml_dtypes.bfloat16)}
                example = serializer.get_tf_example(features.encode_example(record))
                # Without it, the order of the fields differs from one process to the next.
                writer.write(example.SerializeToString(deterministic=True))
                progress.update()
            writer.close()
            os.replace(temporary, path)
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=lengths,
        num_bytes=sum(path.stat().st_size for path in paths),
        filename_template=template,
    )
    # Checking would read the data with TensorFlow.
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[split], filename_template=template, check_data=False
    )
