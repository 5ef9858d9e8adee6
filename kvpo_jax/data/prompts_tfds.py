"""A prompt file as a tfds dataset in array_record form, written and read without TensorFlow."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import abc
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from kvpo_jax.data import prompts


@dataclasses.dataclass(eq=False)
class PromptFile(tfds.core.BuilderConfig):
    """Which file, and what of it: see `prompts.load` and `prompts.split`."""

    path: str = ""
    min_segments: int = 1
    max_segments: int | None = None
    heldout: int = 0
    seed: int = 0


class PromptSequences(tfds.core.GeneratorBasedBuilder):
    """The splits "train" and, if any sequence is held out, "heldout", in the order of `prompts.split`."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, and the search for checksums needs a package that tfds 4.9 forgot (its issue 11212).
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "sentences": tfds.features.Sequence(tfds.features.Text()),
            "line": tfds.features.Scalar(np.int64),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, abc.Iterator]:
        asked = self.builder_config
        sequences = prompts.load(asked.path, asked.min_segments, asked.max_segments)
        parts = zip(("train", "heldout"), prompts.split(sequences, asked.heldout, asked.seed), strict=True)
        return {name: self._generate_examples(part) for name, part in parts if part}

    def _generate_examples(self, sequences: abc.Iterable[prompts.Sequence]) -> abc.Iterator[tuple[int, dict[str, Any]]]:
        for position, sequence in enumerate(sequences):  # unshuffled, tfds writes in the order of these keys
            yield position, dataclasses.asdict(sequence)


def build(
    path: Path | str,
    data_dir: Path | str,
    min_segments: int = 1,
    max_segments: int | None = None,
    heldout: int = 0,
    seed: int = 0,
) -> PromptSequences:
    """The prepared builder of a prompt file; `build(...).as_data_source("train")` has random access to its rows.

    The dataset's name has a checksum of the file, its suffix and the options: what exists under `data_dir` is used
    again, and a changed file is another dataset.

    Raises:
      ValueError: as `prompts.load` and `prompts.split`.
    """
    path = Path(path)
    options = {"min_segments": min_segments, "max_segments": max_segments, "heldout": heldout, "seed": seed}
    # The suffix decides how the file is read.
    checksum = hashlib.sha256(path.read_bytes() + repr((path.suffix.lower(), options)).encode()).hexdigest()[:16]
    config = PromptFile(name=f"{path.stem}-{checksum}", path=str(path), **options)
    builder = PromptSequences(data_dir=data_dir, config=config, file_format="array_record")
    builder.download_and_prepare()
    return builder


def to_sequence(row: abc.Mapping[str, Any]) -> prompts.Sequence:
    """A row of the data source as what `prompts.load` returns."""
    return prompts.Sequence(tuple(sentence.decode() for sentence in row["sentences"]), int(row["line"]))
