"""Prompt embeddings on disk: what was written is found again, by us and by tfds, and a kill changes
nothing.
"""

import os
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds

from kvpo_jax import backbone
from kvpo_jax.data import embeddings, prompts
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import checkpoint
from kvpo_jax.runtime import config as config_lib

DIM, TEXT_LEN, COUNT = 3, 5, 150  # three shards, the last one not full
SENTENCES = [f"a cat & {i} döner" for i in range(COUNT)]
MADE_FROM = {"weights": "abc"}


def valid(i: int) -> np.ndarray:
    """The embedding of sentence i: 1 to TEXT_LEN tokens of i, i + 1/4, i + 1/2, which bfloat16 has
    exactly.
    """
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
    out = opened.lookup(
        [SENTENCES[149], SENTENCES[0], "  a cat &amp; 77\n döner "]
    )  # cleaned before it is sought
    assert out.shape == (3, TEXT_LEN, DIM) and out.dtype == ml_dtypes.bfloat16
    for row, i in zip(out, (149, 0, 77), strict=True):
        tokens = 1 + i % TEXT_LEN
        np.testing.assert_array_equal(row[:tokens], valid(i).astype(ml_dtypes.bfloat16))
        assert not row[tokens:].any()
    assert opened[SENTENCES[0]].shape == (1, DIM)


def test_an_unknown_sentence_is_named_with_the_command(folder):
    opened = embeddings.open_embeddings(folder)
    assert "a dog" not in opened
    with pytest.raises(KeyError, match="'a dog'.*kvpo-encode"):
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
    with pytest.raises(ValueError, match="not finished.*kvpo-encode"):
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


def test_damaged_files_are_named_and_made_again(folder, tmp_path):
    """Cut off, or changed in the middle, which is only seen when it is read."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shards = sorted(copy.glob("*array_record*"))
    content = shards[1].read_bytes()
    for file in (copy / "sentences.json", copy / "features.json", shards[1]):
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(
            ValueError, match=f"{file} is damaged .*; delete it and run .*kvpo-encode"
        ):
            embeddings.open_embeddings(copy)
        file.unlink()
        write(copy)
        assert contents(copy) == contents(folder)
    shards[1].write_bytes(content[:3000] + bytes(100) + content[3100:])
    opened = embeddings.open_embeddings(copy)
    with pytest.raises(ValueError, match=f"{shards[1]} is damaged"):
        opened.lookup(SENTENCES)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="kvpo-encode"):
        embeddings.open_embeddings(tmp_path / "nowhere")


# ---------------------------------------------------------------- a backbone that reads them


@pytest.fixture
def config(folder, tmp_path):
    """LongLive with these embeddings, a prompt file of ten of their sentences, and four of them
    held out.
    """
    checkpoint.save_weights(tmp_path / "vae.safetensors", {}, {"kind": "wan_vae", "config": "{}"})
    (tmp_path / "p.txt").write_text("".join(f"{sentence}\n" for sentence in SENTENCES[:10]))
    fields = {
        "paths.vae": tmp_path / "vae.safetensors",
        "paths.prompts": tmp_path / "p.txt",
        "paths.embeddings": folder,
        "model.text_len": TEXT_LEN,
        "model.text_dim": DIM,
        "train.held_out": 4,
        "eval.prompts": 4,
    }
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    return config_lib.override(config_lib.load("configs/longlive.py"), arguments)


def test_what_is_trained_on_does_not_depend_on_what_is_evaluated(config):
    """Another eval.prompts continues the same stream, and evaluates the first of what was held out
    all along.
    """
    made = backbone.load(config)
    stream = [made.prompts("train", i) for i in range(12)]
    heldout = [made.prompts("heldout", i) for i in range(4)]
    assert len({s[0] for s in stream}) == 6 and not {s[0] for s in stream} & {s[0] for s in heldout}
    config.eval.prompts = 2
    fewer = backbone.load(config)
    assert [fewer.prompts("train", i) for i in range(12)] == stream
    assert [fewer.prompts("heldout", i) for i in range(2)] == heldout[:2]


def test_durations_choose_among_the_frames_at_which_a_run_may_switch(config, tmp_path):
    """Of 49 blocks of 3 frames."""
    first, second = SENTENCES[:2]
    config.video.switch_frames = (39, 75, 111)
    config.paths.prompts = str(tmp_path / "timed.jsonl")

    def read(*durations):
        timed = [prompts.PromptSequence((x, first), 1, (39, 108)) for x in SENTENCES[2:8]]
        timed += [prompts.PromptSequence((second, first), 1, x) for x in durations]
        prompts.write(Path(config.paths.prompts), timed)
        made = backbone.load(config)
        read = [("train", i) for i in range(len(timed) - 4)] + [("heldout", i) for i in range(4)]
        return [sequence for x in read if (sequence := made.prompts(*x))[0] == second]

    assert read((39, 108)) == [[second, first, first, first]]
    assert read((75, 72)) == [[second, second, first, first]]
    assert read(()) == [[second, first, first, first]]
    for durations, message in (
        ((36, 111), r"add --config.video.blocks=49 '--config.video.switch_frames=\(36, 39\)'$"),
        ((39, 105), "train on a file of one length in blocks of 3, or leave the durations out: "),
        ((40, 107), "train on a file of one length in blocks of 3, or leave the durations out: "),
    ):
        given = f"timed.jsonl:7: durations {list(durations)} are of {sum(durations)} latent frames"
        with pytest.raises(UsageError, match=f"{re.escape(given)} .*{message}"):
            read(durations)
    config.video.switch_frames = (36, 39)
    assert read((36, 111)) == [[second, first, first]]


def test_nothing_held_out_is_trained_on(config):
    """Stories that begin alike, that differ in white space, that repeat their only sentence: as
    used, with M = 4, each is on one side.
    """
    a, b, c, *rest = SENTENCES
    lines = [f"[{a}],[{b}],[{c}],[{x}],[{y}]" for x in rest[:3] for y in rest[:4]]
    lines += [f"[{x}]" for x in rest] + [f"[  {x} ],[{x}]" for x in rest]
    Path(config.paths.prompts).write_text("".join(f"{n},{x}\n" for n, x in enumerate(lines)))
    config.video.switch_frames = (39, 75, 111)
    made = backbone.load(config)
    heldout = {tuple(made.prompts("heldout", i)) for i in range(4)}
    trained = {tuple(made.prompts("train", i)) for i in range(4 * len(lines))}
    assert len(heldout) == 4 and not heldout & trained
    assert len(heldout | trained) == 3 + len(rest)


def test_more_held_out_prompts_than_there_are_is_an_error(config):
    config.eval.prompts = 6
    with pytest.raises(
        ValueError, match="config.eval.prompts=6, but only config.train.held_out=4 sequences"
    ):
        backbone.load(config)
    config.train.held_out = 10
    with pytest.raises(
        ValueError, match="p.txt: 10 held-out sequences of 10 .*; lower config.train.held_out"
    ):
        backbone.load(config).prompts("train", 0)


def test_sentences_without_an_embedding_are_found_with_the_first_prompt(config):
    with open(config.paths.prompts, "a") as file:
        file.write("a  cat &amp; 77 döner\na dog\na hare\na  dog\n")
    made = backbone.load(config)  # a video of another prompt needs none of them
    with pytest.raises(
        ValueError, match="no embedding of 'a dog', 'a hare'; .*kvpo-encode .* --config.paths.umt5="
    ):
        made.prompts("heldout", 0)
