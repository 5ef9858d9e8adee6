"""Prompt embeddings on disk, so that training never holds the text encoder.

A folder has sentences.json (the index, and what the embeddings were made from) and a tfds dataset
in array_record form, with only the valid tokens of each sentence, in bfloat16. Both are read and
written without TensorFlow; other programs read them with
`tfds.builder_from_directory(folder).as_data_source("prompts")`, after `import ml_dtypes`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import chex
import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from kvpo_jax.data import text
from kvpo_jax.errors import MissingKeyError, UsageError, listed
from kvpo_jax.runtime import progress
from kvpo_jax.runtime.atomic import replacing, write_json

INDEX = "sentences.json"
SPLIT = "prompts"
SHARD = 64  # sentences in a file; a kill loses at most these
COMMAND = "kvpo-encode --prompts=FILE --output=FOLDER --weights=FILE --tokenizer=FOLDER"
# What helps where a sentence has no embedding.
ADVICE = (
    f"a new folder is made by {COMMAND}, and without one sentences are encoded on the fly:"
    " --config.paths.embeddings= --config.paths.umt5=FILE --config.paths.tokenizer=FOLDER"
)


# ---------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class Embeddings(Mapping[str, np.ndarray]):
    """Sentence -> bfloat16[tokens, dim], read from disk at each access.

    Sentences are cleaned before they are looked up.

    Attributes:
      folder: a folder that `write` has filled.
      index: cleaned sentence -> the number of its record.
      source: the records.
      shards: the files that hold the records, SHARD in each.
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
            raise MissingKeyError(f"{self.folder} has no embedding of {sentence!r}; {ADVICE}")
        try:
            return self.source[record]["embedding"]
        except (RuntimeError, TypeError, ValueError) as error:
            # array_record and tfds raise these for damaged records.
            raise _damaged(self.shards[record // SHARD], error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def check(self, sentences: Iterable[str]) -> None:
        """UsageError, which names the first, for sentences without an embedding; reads none."""
        cleaned = dict.fromkeys(map(text.clean, sentences))
        missing = [sentence for sentence in cleaned if sentence not in self.index]
        if missing:
            raise UsageError(f"{self.folder} has no embedding of {listed(missing)}; {ADVICE}")

    def lookup(self, sentences: Sequence[str]) -> np.ndarray:
        """bfloat16[n, K, dim], zero past a sentence's end.

        Raises:
          MissingKeyError: it names a sentence that has no embedding.
        """
        out = np.zeros((len(sentences), self.text_len, self.dim), ml_dtypes.bfloat16)
        for row, sentence in zip(out, sentences, strict=True):
            embedding = self[sentence]
            chex.assert_shape(embedding, (None, self.dim))
            row[: len(embedding)] = embedding
        return out


def open_embeddings(folder: Path | str) -> Embeddings:
    """The embeddings in a folder.

    Raises:
      FileNotFoundError, UsageError: there are none, or not all; the message says how to make them.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} has no prompt embeddings; make them with {COMMAND}")
    if not (folder / "dataset_info.json").is_file():
        raise UsageError(
            f"{folder}: the embeddings are not finished; run the command that began them again,"
            f" {COMMAND}"
        )
    written = _read_index(folder)
    _check_features(folder, written["dim"])
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


def _features(dim: int) -> tfds.features.FeaturesDict:
    """What a record has: a sentence, and its embedding of width `dim`."""
    tensor = tfds.features.Tensor(shape=(None, dim), dtype=ml_dtypes.bfloat16, encoding="bytes")
    return tfds.features.FeaturesDict({"sentence": tfds.features.Text(), "embedding": tensor})


def _check_features(folder: Path, dim: int) -> None:
    """UsageError if a folder names other classes than `write` does: tfds imports what is named."""
    path = folder / "features.json"

    def dotted(value: Any) -> set[str]:
        """The strings with a dot, as the names of classes have, anywhere in a JSON value."""
        if isinstance(value, Mapping):
            value = [*value.keys(), *value.values()]
        if isinstance(value, list):
            return {name for item in value for name in dotted(item)}
        return {value} if isinstance(value, str) and "." in value else set()

    try:
        named = dotted(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if unknown := named - dotted(_features(dim).to_json()):
        raise UsageError(
            f"{path} names {min(unknown)}, which is not of prompt embeddings and is not imported;"
            f" make a new folder with {COMMAND}"
        )


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text())
        return {name: index[name] for name in ("text_len", "dim", "sentences")} | index
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / INDEX, error) from error


def _damaged(path: Path, cause: Exception) -> UsageError:
    """The error for a file, or for the whole folder. The command makes again what is deleted."""
    return UsageError(
        f"{path} is damaged ({cause!r}); delete it and run the command that made it again,"
        f" {COMMAND}"
    )


# ---------------------------------------------------------------- writing


def write(
    folder: Path | str,
    sentences: Sequence[str],
    encode: Callable[[slice], Iterable[np.ndarray]],
    text_len: int,
    dim: int,
    made_from: Mapping[str, str],
) -> None:
    """Fills a folder with embeddings, shard by shard.

    After a kill, the same call continues with the first shard that is not there.

    Args:
      folder: a new one, or one that an earlier call has begun.
      sentences: cleaned and distinct; record i is sentence i.
      encode: a range of the sentences -> float[tokens, dim] of each.
      text_len: K, the most tokens that a sentence may have.
      dim: width of an embedding.
      made_from: checksums of whatever else the embeddings depend on.

    Raises:
      UsageError: the folder was begun with something else, which the message names.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index = {"text_len": text_len, "dim": dim, **made_from, "sentences": list(sentences)}
    _write_index(folder, index)
    features = _features(dim)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="embeddings", split=SPLIT, filetype_suffix="array_record"
    )
    starts = range(0, len(sentences), SHARD)
    parts = [slice(start, min(start + SHARD, len(sentences))) for start in starts]
    paths = [
        Path(template.sharded_filepath(shard_index=i, num_shards=len(parts)))
        for i in range(len(parts))
    ]
    with progress.bar("encoding sentences", len(sentences)) as advance:
        for path, part in zip(paths, parts, strict=True):
            if path.is_file():
                advance(part.stop - part.start)
            else:
                embeddings = _checked(encode(part), text_len, dim, advance)
                _write_shard(path, features, sentences[part], embeddings)
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[part.stop - part.start for part in parts],
        num_bytes=sum(path.stat().st_size for path in paths),
        filename_template=template,
    )
    # Checking would read the data with TensorFlow.
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[split],
        filename_template=template,
        check_data=False,
    )


def _write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Writes the index of a new folder, or checks that a folder was begun with the same one."""
    if not (folder / INDEX).is_file():
        write_json(index, folder / INDEX)
        return
    begun = _read_index(folder)
    if other := [name for name in index if begun.get(name) != index[name]]:
        raise UsageError(
            f"{folder} has embeddings with other {', '.join(other)}; name a new folder, or delete"
            " it"
        )


def _checked(
    embeddings: Iterable[np.ndarray], text_len: int, dim: int, advance: Callable[[], None]
) -> Iterator[np.ndarray]:
    """The embeddings of a shard, each of which advances the bar once it is written."""
    for embedding in embeddings:
        chex.assert_shape(embedding, (None, dim))
        chex.assert_axis_dimension_lteq(embedding, 0, text_len)
        yield embedding
        advance()


def _write_shard(
    path: Path,
    features: tfds.features.FeaturesDict,
    sentences: Sequence[str],
    embeddings: Iterable[np.ndarray],
) -> None:
    """Writes the records of a shard, whole or not at all."""
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    with replacing(path) as temporary:
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        for sentence, embedding in zip(sentences, embeddings, strict=True):
            record = {"sentence": sentence, "embedding": embedding.astype(ml_dtypes.bfloat16)}
            example = serializer.get_tf_example(features.encode_example(record))
            # Otherwise the order of the fields differs from one process to the next.
            writer.write(example.SerializeToString(deterministic=True))
        writer.close()
