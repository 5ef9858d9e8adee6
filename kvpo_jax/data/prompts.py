"""Prompt files, and an endless shuffled stream over them whose position is one number; docs/data.md has examples."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import abc
from pathlib import Path

import numpy as np

SUFFIXES = (".txt", ".jsonl")
_FORMATTED = re.compile(r"(\d+\s*,)?\s*\[")  # how a formatted line begins
_NUMBER = re.compile(r"^\d+\s*(,|$)")  # what may stand before its fields
_PLACEHOLDER = re.compile(r"0+\s*,?")  # how the release's formatter writes an empty prompt
_SHOWN = 10  # malformed lines that an error lists


@dataclasses.dataclass(frozen=True)
class Sequence:
    """The prompts of one video.

    Attributes:
      sentences: one for each prompt segment, at least one.
      line: where its file has it, counted from 1.
    """

    sentences: tuple[str, ...]
    line: int


# ---------------------------------------------------------------- files


def load(path: Path | str, min_segments: int = 1, max_segments: int | None = None) -> list[Sequence]:
    """The sequences of a `.txt` or `.jsonl` file; see `parse` and `select`.

    Raises:
      ValueError: for malformed lines, with file and line of each; for a file that is not UTF-8 text, has another
        suffix, or has no sequence to offer.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: the name of a prompt file ends in {' or '.join(SUFFIXES)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from error
    sequences, problems = parse(text, suffix)
    if problems:
        listed = [f"{path}:{line}: {what}" for line, what in problems[:_SHOWN]]
        more = [f"and {len(problems) - _SHOWN} lines more"] if len(problems) > _SHOWN else []
        raise ValueError("\n".join([*listed, *more]))
    selected = select(sequences, min_segments, max_segments)
    if not selected:
        raise ValueError(f"{path}: none of its {len(sequences)} prompt sequences has {min_segments} segments or more")
    return selected


def parse(text: str, suffix: str) -> tuple[list[Sequence], list[tuple[int, str]]]:
    """What can be read of a prompt file, and (line, what is wrong there) for each line where text would be lost.

    `.jsonl` has an object with the list "prompts" on each line (KVPO, LongLive, MemFlow). A `.txt` is *formatted*,
    `number,[first],[second]` (KVPO), if any line begins with a field, numbered or not; otherwise each line is one
    prompt (LongLive's and MemFlow's single-prompt files). The number, and keys other than "prompts", mean nothing;
    brackets inside a field belong to its text; empty fields and empty lines are passed over.

    The release returns the same sequences of jsonl and formatted files, in silence, but for two things: of a line
    without a number it loses the first field, and here it is kept; a prompt that is not a string becomes one there.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if suffix == ".jsonl":
        read = _read_json
    else:
        read = _read_fields if any(_FORMATTED.match(line) for _, line in lines) else _read_plain
    sequences, problems = [], []
    for number, line in lines:
        fields, problem = read(line)
        sentences = tuple(field.strip() for field in fields if field.strip())
        if sentences:
            sequences.append(Sequence(sentences, number))
        elif problem is None and not _PLACEHOLDER.fullmatch(line):
            problem = "there is no prompt in this line; write one or delete the line"
        if problem is not None:
            problems.append((number, problem))
    return sequences, problems


def _read_json(line: str) -> tuple[list[str], str | None]:
    """The prompts of a `.jsonl` line, and what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return [], f"not JSON: {error.msg} at column {error.colno}"
    prompts = row.get("prompts") if isinstance(row, dict) else None
    if not isinstance(prompts, list):
        return [], 'expected {"prompts": ["...", "..."]}'
    wrong = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if wrong:
        return [], f"the prompt {json.dumps(wrong[0])} is not a string"
    return prompts, None


def _read_plain(line: str) -> tuple[list[str], str | None]:
    """A line that is one prompt, unless it was written for a `.jsonl`."""
    if line.startswith("{"):
        try:
            if "prompts" in json.loads(line):
                return [], 'a line {"prompts": ...} of a .jsonl file; rename the file to .jsonl'
        except json.JSONDecodeError:
            pass
    return [line], None


def _read_fields(line: str) -> tuple[list[str], str | None]:
    """The bracketed fields of a formatted line, and what is wrong with it."""
    fields, field, outside, depth = [], "", "", 0
    for character in _NUMBER.sub("", line, count=1):
        depth += character == "["
        if depth == 0:
            outside += character
            continue
        field += character
        depth -= character == "]"
        if depth == 0:
            fields.append(field[1:-1])
            field = ""
    outside = outside.strip(", \t")
    if depth:
        return fields, f"a bracket is not closed, and {field!r} would be lost"
    if outside:
        return fields, f"{outside!r} is outside of the brackets and would be lost; a line reads 1,[first],[second]"
    return fields, None


def select(sequences: abc.Iterable[Sequence], min_segments: int = 1, max_segments: int | None = None) -> list[Sequence]:
    """The sequences with at least `min_segments` sentences, each cut to its first `max_segments` (None: all)."""
    if max_segments is not None and not 1 <= min_segments <= max_segments:
        raise ValueError(f"min_segments={min_segments} to max_segments={max_segments} is not a range of segments")
    return [
        dataclasses.replace(sequence, sentences=sequence.sentences[:max_segments])
        for sequence in sequences
        if len(sequence.sentences) >= min_segments
    ]


# ---------------------------------------------------------------- split


def split(sequences: abc.Iterable[Sequence], heldout: int, seed: int) -> tuple[list[Sequence], list[Sequence]]:
    """(train, held out): `heldout` sequences for evaluation, chosen by a hash of seed and text, and the rest.

    The order of the file does not matter. A line that is added to it never moves another one into the held-out part; at
    most it takes the place of the last one there. That part is in the order of the hash, so that asking for fewer gives
    the first of them, and has no text twice. What is trained on is in the order of the file and has no held-out text.

    Raises:
      ValueError: if nothing would be left to train on.
    """
    sequences = list(sequences)
    distinct = {sequence.sentences: sequence for sequence in reversed(sequences)}
    if not 0 <= heldout < len(distinct):
        raise ValueError(f"{heldout} held-out sequences of {len(distinct)} different ones leave nothing to train on")
    rank = lambda sentences: hashlib.sha256(json.dumps([seed, *sentences]).encode()).digest()
    chosen = sorted(distinct, key=rank)[:heldout]
    kept = distinct.keys() - set(chosen)
    return [sequence for sequence in sequences if sequence.sentences in kept], [distinct[text] for text in chosen]


# ---------------------------------------------------------------- stream


def at(sequences: abc.Sequence[Sequence], index: int, seed: int) -> Sequence:
    """Element `index` of an endless stream: every epoch has each sequence once, in an order of (seed, epoch).

    The stream has no state: who saves the next index resumes it exactly.
    """
    epoch, position = divmod(index, len(sequences))
    return sequences[np.random.default_rng((seed, epoch)).permutation(len(sequences))[position]]


def segments_to(sequence: Sequence, segments: int) -> Sequence:
    """The sequence with M = `segments` sentences: later ones are cut off, or the last one is repeated (no switch)."""
    sentences = sequence.sentences[:segments]
    return dataclasses.replace(sequence, sentences=sentences + sentences[-1:] * (segments - len(sentences)))
