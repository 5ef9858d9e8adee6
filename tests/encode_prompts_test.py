"""From a prompt file to embeddings by the real command: a tokenizer folder, weight files, and a
kill.
"""

import dataclasses
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kvpo_jax.convert.encode_prompts import encode_prompts
from kvpo_jax.data import embeddings, text
from kvpo_jax.models import umt5
from kvpo_jax.runtime import checkpoint

TOOL = Path(__file__).resolve().parents[1] / "tools" / "encode_prompts.py"
CFG = umt5.UMT5Config(vocab=24, dim=16, heads=2, head_dim=8, ffn_dim=24, layers=2, dtype="float32")
WORDS = ["a", "red", "green", "fox", "cat", "runs", "stops", "and", "looks", "back"]
PAD, EOS, UNKNOWN = 0, 1, 2
MAX_LENGTH = 8


def save_tokenizer(folder, ends=True):
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", EOS)]
        )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(
        folder
    )
    return folder


def save_weights(path, cfg=CFG, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    params = jax.tree.map(
        lambda x: 0.15 * jax.random.normal(next(keys), x.shape, x.dtype), umt5.abstract_params(cfg)
    )
    metadata = {
        "kind": "umt5",
        "config": json.dumps(dataclasses.asdict(cfg)),
        "manifest": json.dumps({"seed": seed}),
    }
    checkpoint.save_weights(path, params, metadata)
    return params


def save_prompts(path, sequences):
    path.write_text("".join(json.dumps({"prompts": sequence}) + "\n" for sequence in sequences))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with tokenizer/, umt5.safetensors and p.jsonl, whose sequences share a sentence; and
    the weights.
    """
    folder = tmp_path_factory.mktemp("inputs")
    save_tokenizer(folder / "tokenizer")
    save_prompts(
        folder / "p.jsonl",
        [["a red fox", "a  red fox stops"], ["a &amp;lt; cat", "a red fox", "zebra " * 9]],
    )
    return folder, save_weights(folder / "umt5.safetensors")


def run(inputs, output, **kwargs):
    folder = inputs[0]
    files = {
        "weights": folder / "umt5.safetensors",
        "tokenizer": folder / "tokenizer",
        "max_length": MAX_LENGTH,
    }
    prompt_files = kwargs.pop("prompt_files", [folder / "p.jsonl"])
    encode_prompts(prompt_files, output, **{**files, **kwargs})


def test_clean():
    assert text.clean("  Schr\u00c3\u00b6dinger&amp;amp;lt;3\n\t cat\u00a0 ") == "Schrödinger<3 cat"
    assert text.clean("tom &amp; jerry") == "tom & jerry"


def test_tokenizer(inputs):
    ids, mask = text.tokenizer(inputs[0] / "tokenizer", 5)(
        ["a  red\nfox ", "", "a cat runs and looks back", "zebra"]
    )
    a, red, fox, cat, runs, and_ = (
        3 + WORDS.index(word) for word in ("a", "red", "fox", "cat", "runs", "and")
    )
    assert ids.tolist() == [
        [a, red, fox, EOS, PAD],
        [EOS, PAD, PAD, PAD, PAD],
        [a, cat, runs, and_, EOS],  # cut, and still ended
        [UNKNOWN, EOS, PAD, PAD, PAD],
    ]
    assert (
        ids.dtype == np.int32 and mask.dtype == bool and mask.sum(axis=1).tolist() == [4, 1, 5, 2]
    )


def test_tokenizer_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere has no tokenizer .*google/umt5-xxl"):
        text.tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not end a sentence"):
        text.tokenizer(save_tokenizer(tmp_path, ends=False))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="broken cannot be read"):
        text.tokenizer(tmp_path / "broken")


def test_embeddings_are_the_encoder_s(inputs, tmp_path, capsys):
    run(inputs, tmp_path, batch=3)
    assert "4 sentences of 2 prompts" in capsys.readouterr().out
    opened = embeddings.open_embeddings(tmp_path)
    sentences = ["a red fox", "a red fox stops", "a < cat", "zebra " * 9]
    assert list(opened) == [text.clean(sentence) for sentence in sentences]
    ids, mask = text.tokenizer(inputs[0] / "tokenizer", MAX_LENGTH)(sentences)
    assert mask.sum(axis=1).tolist() == [4, 5, 4, 8]
    expected = umt5.embed(CFG, inputs[1], jnp.asarray(ids), jnp.asarray(mask))
    out = opened.lookup(sentences).astype(np.float32)
    np.testing.assert_allclose(out, expected, rtol=2**-8, atol=1e-5)  # bfloat16 rounds to 8 bits
    assert not out[~mask].any() and out[mask].any(axis=-1).all()


def run_in_terminal(command):
    """Runs a command on a terminal: what it writes there."""
    terminal, other = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdout=other, stderr=other, env=environment)
    os.close(other)
    shown = b""
    try:
        while part := os.read(terminal, 1 << 16):
            shown += part
    except OSError:  # how Linux says that nobody holds the other end any more
        pass
    os.close(terminal)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


def test_command_killed_and_continued(inputs, tmp_path):
    """640 sentences, ten shards; the process is killed once the first shard is there."""
    sentences = [f"{a} {b} {c} {d}" for a in WORDS for b in WORDS for c in WORDS for d in WORDS][
        :640
    ]
    prompts = tmp_path / "p.jsonl"
    save_prompts(prompts, [sentences[i : i + 4] for i in range(0, 640, 4)])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(inputs, whole, prompt_files=[prompts], batch=1)
    files = {"prompts": prompts, "output": killed, "weights": inputs[0] / "umt5.safetensors"}
    files |= {"tokenizer": inputs[0] / "tokenizer", "batch": 1, "max_length": MAX_LENGTH}
    command = [sys.executable, TOOL, *(f"--{name}={value}" for name, value in files.items())]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(killed.glob("*00000-of-00010")):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "dataset_info.json").exists()
    shown = run_in_terminal(command)
    assert f"wrote {killed}" in shown.replace("\r\n", "")  # it is wrapped
    done = [int(count) for count in re.findall(r"encoding sentences (\d+)/640", shown)]
    assert done == sorted(done) and done[0] >= 64  # the shards that were there

    def contents(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    assert contents(killed) == contents(whole)


def test_wrong_files(inputs, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(inputs, tmp_path / "out", weights=tmp_path / "nowhere")
    checkpoint.save_weights(tmp_path / "wan", inputs[1], {"kind": "wan"})
    with pytest.raises(ValueError, match="wan.*'umt5'.*kvpo-convert"):
        run(inputs, tmp_path / "out", weights=tmp_path / "wan")
    save_weights(tmp_path / "small", dataclasses.replace(CFG, vocab=5))
    with pytest.raises(ValueError, match="do not belong together"):
        run(inputs, tmp_path / "out", weights=tmp_path / "small")
    assert not (tmp_path / "out").exists()


def test_other_weights_do_not_mix(inputs, tmp_path):
    run(inputs, tmp_path / "out")
    save_weights(tmp_path / "other", seed=1)
    for change, name in (
        ({"weights": tmp_path / "other"}, "weights"),
        ({"max_length": 6}, "text_len, tokens"),
    ):
        with pytest.raises(ValueError, match=f"other {name}"):
            run(inputs, tmp_path / "out", **change)
