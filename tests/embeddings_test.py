"""Prompt embeddings on disk: what was written is found again, by us and by tfds, and a kill changes nothing."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds

from kvpo_jax.data import embeddings

DIM, TEXT_LEN, COUNT = 3, 5, 150  # three shards, the last one not full
SENTENCES = [f"a cat & {i} döner" for i in range(COUNT)]
MADE_FROM = {"weights": "abc"}


def valid(i: int) -> np.ndarray:
    """The embedding of sentence i: 1 to TEXT_LEN tokens of i, i + 1/4, i + 1/2 (exact in bfloat16)."""
    return np.tile(np.float32([i, i + 0.25, i + 0.5]) / 64, (1 + i % TEXT_LEN, 1))


def encode(part: slice):
    return (valid(i) for i in range(part.start, part.stop))


def write(folder, encode=encode, sentences=SENTENCES, made_from=MADE_FROM):
    embeddings.write(folder, sentences, encode, TEXT_LEN, DIM, made_from)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings") / "new"
    write(folder)
    return folder


def test_lookup(folder):
    opened = embeddings.open_embeddings(folder)
    assert len(opened) == COUNT and list(opened) == SENTENCES
    out = opened.lookup([SENTENCES[149], SENTENCES[0], "  a cat &amp; 77\n döner "])  # cleaned before it is sought
    assert out.shape == (3, TEXT_LEN, DIM) and out.dtype == ml_dtypes.bfloat16
    for row, i in zip(out, (149, 0, 77), strict=True):
        tokens = 1 + i % TEXT_LEN
        np.testing.assert_array_equal(row[:tokens], valid(i).astype(ml_dtypes.bfloat16))
        assert not row[tokens:].any()
    assert opened[SENTENCES[0]].shape == (1, DIM)


def test_an_unknown_sentence_is_named_with_the_command(folder):
    opened = embeddings.open_embeddings(folder)
    assert "a dog" not in opened
    with pytest.raises(KeyError, match="'a dog'.*tools/encode_prompts.py"):
        opened.lookup([SENTENCES[0], "a dog"])


def test_tfds_reads_it(folder):
    source = tfds.builder_from_directory(folder).as_data_source("prompts")
    assert len(source) == COUNT
    record = source[130]
    assert record["sentence"].decode() == SENTENCES[130]
    np.testing.assert_array_equal(record["embedding"], valid(130).astype(ml_dtypes.bfloat16))


def test_killed_and_continued_leaves_the_same_files(folder, tmp_path):
    asked = []

    def dies(part):
        asked.append(part.start)
        for i in range(part.start, part.stop):
            if i == 70:
                raise KeyboardInterrupt
            yield valid(i)

    def continues(part):
        asked.append(part.start)
        return encode(part)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, dies)
    with pytest.raises(ValueError, match="not finished.*tools/encode_prompts.py"):
        embeddings.open_embeddings(tmp_path)
    write(tmp_path, continues)
    assert asked == [0, 64, 64, 128]
    assert contents(tmp_path) == contents(folder)
    write(tmp_path, continues)  # nothing left to do
    assert len(asked) == 4 and contents(tmp_path) == contents(folder)


def test_other_inputs_are_refused(folder):
    before = contents(folder)
    with pytest.raises(ValueError, match="other sentences"):
        write(folder, sentences=SENTENCES[1:])
    with pytest.raises(ValueError, match="other weights"):
        write(folder, made_from={"weights": "abd"})
    assert contents(folder) == before


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="tools/encode_prompts.py"):
        embeddings.open_embeddings(tmp_path / "nowhere")
