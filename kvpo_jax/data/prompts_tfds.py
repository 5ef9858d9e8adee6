"""A prompt file as a tfds dataset in array_record form, written and read without TensorFlow."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from kvpo_jax.data import prompts


@dataclasses.dataclass(eq=False)
class PromptFile(tfds.core.BuilderConfig):
    """A prompt file with the options of `prompts.load` and `prompts.split`."""

    path: str = ""
    min_segments: int = 1
    max_segments: int | None = None
    heldout: int = 0
    seed: int = 0


class PromptSequences(tfds.core.GeneratorBasedBuilder):
    """The split "train" and, if sequences are held out, "heldout"; see `prompts.split`."""

    VERSION = tfds.core.Version("1.1.0")  # 1.1.0 has durations
    # There is nothing to download. The search for checksums would need a package that tfds 4.9 does
    # not install (tfds issue 11212).
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "sentences": tfds.features.Sequence(tfds.features.Text()),
            "line": tfds.features.Scalar(np.int64),
            "durations": tfds.features.Sequence(np.int64),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        file = self.builder_config
        sequences = prompts.load(file.path, file.min_segments, file.max_segments)
        train, heldout = prompts.split(sequences, file.heldout, file.seed)
        parts = {"train": train, "heldout": heldout}
        return {name: self._generate_examples(part) for name, part in parts.items() if part}

    def _generate_examples(
        self, sequences: Iterable[prompts.PromptSequence]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        # tfds writes in the order of these keys, since it does not shuffle.
        for position, sequence in enumerate(sequences):
            yield position, dataclasses.asdict(sequence)


def build(
    path: Path | str,
    data_dir: Path | str,
    min_segments: int = 1,
    max_segments: int | None = None,
    heldout: int = 0,
    seed: int = 0,
) -> PromptSequences:
    """Makes the dataset of a prompt file; `as_data_source("train")` of it has random access.

    The dataset's name has a checksum of the file, its suffix and the options: a dataset that exists
    under `data_dir` is used again, and a changed file makes another dataset.

    Raises:
      UsageError: see `prompts.load` and `prompts.split`.
    """
    path = Path(path)
    options: dict[str, Any] = {
        "min_segments": min_segments,
        "max_segments": max_segments,
        "heldout": heldout,
        "seed": seed,
    }
    # The suffix decides how the file is read.
    content = path.read_bytes() + repr((path.suffix.lower(), options)).encode()
    checksum = hashlib.sha256(content).hexdigest()[:16]
    config = PromptFile(name=f"{path.stem}-{checksum}", path=str(path), **options)
    builder = PromptSequences(data_dir=data_dir, config=config, file_format="array_record")
    builder.download_and_prepare()
    return builder


def to_sequence(example: Mapping[str, Any]) -> prompts.PromptSequence:
    """The sequence that an example of the data source holds."""
    sentences = tuple(sentence.decode() for sentence in example["sentences"])
    durations = tuple(map(int, example["durations"]))
    return prompts.PromptSequence(sentences, int(example["line"]), durations)
