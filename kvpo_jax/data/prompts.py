"""Prompt files, and an endless shuffled stream over them; docs/data.md has examples."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from kvpo_jax.data import text
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import file_kind
from kvpo_jax.runtime.atomic import replacing

T = TypeVar("T")

SUFFIXES = (".txt", ".jsonl")
_FORMATTED = re.compile(r"(\d+\s*,)?\s*\[")  # how a formatted line begins
_NUMBER = re.compile(r"^\d+\s*(,|$)")  # what may stand before its fields
_PLACEHOLDER = re.compile(r"0+\s*,?")  # how the release's formatter writes an empty prompt
_Read = tuple[list[str], list[int], str | None]  # prompts, their durations, and what is wrong
_SHOWN = 3  # how many malformed lines an error lists


@dataclasses.dataclass(frozen=True)
class PromptSequence:
    """The prompts of one video.

    Attributes:
      sentences: one for each prompt segment, at least one.
      line: its line in the file, counted from 1.
      durations: latent frames of each segment; empty if the sequence does not say.
    """

    sentences: tuple[str, ...]
    line: int
    durations: tuple[int, ...] = ()


# ---------------------------------------------------------------- files


def load(
    path: Path | str, min_segments: int = 1, max_segments: int | None = None
) -> list[PromptSequence]:
    """The sequences of a `.txt` or `.jsonl` file; see `read` and `select`.

    Raises:
      UsageError: lines are malformed (names file and line of each), or the file is not UTF-8 text,
        has another suffix, or has no sequence that is long enough.
    """
    path = Path(path)
    sequences, problems = read(path)
    if problems:
        shown = [f"{path}:{line}: {problem}" for line, problem in problems[:_SHOWN]]
        more = [f"and {len(problems) - _SHOWN:,} lines more"] if len(problems) > _SHOWN else []
        raise UsageError("; ".join([*shown, *more]))
    if not sequences:
        raise UsageError(f"{path} has no prompts")
    selected = select(sequences, min_segments, max_segments)
    if not selected:
        raise UsageError(
            f"{path}: none of its {len(sequences)} prompt sequences has {min_segments} segments or"
            " more"
        )
    return selected


def load_extended(path: Path, extended: Path | None) -> list[tuple[PromptSequence, PromptSequence]]:
    """(what a video is judged by, what it is generated from) of every sequence of a file.

    Args:
      path: file of the former.
      extended: file whose line i extends line i of `path`, and has its durations unless it has
        some itself; None generates from `path` itself.

    Raises:
      UsageError: see `load`; or the files have not as many sequences; it names both.
    """
    originals = load(path)
    texts = originals if extended is None else load(extended)
    if len(texts) != len(originals):
        raise UsageError(
            f"{extended} has {len(texts)} prompts, {path} {len(originals)}: line i of the first has"
            " to extend line i of the second"
        )
    pairs = zip(originals, texts, strict=True)
    return [(original, _lasting_as(text, original)) for original, text in pairs]


def _lasting_as(text: PromptSequence, original: PromptSequence) -> PromptSequence:
    """The text, with the durations of the original if it has none and as many sentences."""
    if text.durations or len(text.sentences) != len(original.sentences):
        return text
    return dataclasses.replace(text, durations=original.durations)


def read(path: Path) -> tuple[list[PromptSequence], list[tuple[int, str]]]:
    """What `parse` finds in a file.

    Raises:
      UsageError: the file is not UTF-8 text, or has another suffix.
    """
    suffix = suffix_of(path)
    file_kind.check(path, "a file of prompts", "text", "json", "utf-16", "empty")
    return parse(read_text(path), suffix)


def read_text(path: Path) -> str:
    """The text of a file; UsageError that names the line if it is not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UsageError(f"{path}:{line}: it has a zero byte, so it is no text; name another file")
    return text


def write(path: Path, sequences: Sequence[PromptSequence]) -> None:
    """Writes a `.jsonl`, or a formatted `.txt` as the release has it, whole or not at all.

    Raises:
      UsageError: the file would not be read back as these sequences, as a `.txt` with durations or
        with brackets that are not closed; or the name has another suffix.
    """
    lines = [_line(sequence, suffix_of(path)) for sequence in sequences]
    for number, (sequence, line) in enumerate(zip(sequences, lines, strict=True), start=1):
        back, _ = parse(line, suffix_of(path))
        if [(s.sentences, s.durations) for s in back] != [(sequence.sentences, sequence.durations)]:
            raise UsageError(
                f"{path}: sequence {number} ({sequence.sentences[0][:40]!r}) has durations, line"
                " breaks or brackets that such a file cannot hold; write a .jsonl"
            )
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _line(sequence: PromptSequence, suffix: str) -> str:
    """The line of a file that is read back as the sequence."""
    if suffix == ".jsonl":
        durations = {"durations": sequence.durations} if sequence.durations else {}
        return json.dumps({"prompts": sequence.sentences, **durations}, ensure_ascii=False)
    return ",".join([str(len(sequence.sentences)), *(f"[{s}]" for s in sequence.sentences)])


def suffix_of(path: Path) -> str:
    """The suffix of a prompt file; UsageError if it is another one."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: the name of a prompt file ends in {' or '.join(SUFFIXES)}")
    return path.suffix.lower()


def parse(text: str, suffix: str) -> tuple[list[PromptSequence], list[tuple[int, str]]]:
    """The sequences of a prompt file, and (line, problem) of each line that would lose text.

    A `.jsonl` file has an object with the list "prompts" on each line (KVPO, LongLive, MemFlow),
    and may have the latent frames of each prompt in a list "durations" beside it. A
    `.txt` file is *formatted*, `number,[first],[second]` (KVPO), if any line begins with a field,
    numbered or not; otherwise each line is one prompt (LongLive's and MemFlow's single-prompt
    files). The number, and other keys, mean nothing. Brackets inside a field belong
    to its text. Empty fields and empty lines are skipped.

    The released loader returns the same sequences of jsonl and formatted files, without naming a
    problem. There are two exceptions: it loses the first field of a line without a number, which is
    kept here, and it turns a prompt that is not a string into one, which is a problem here.
    """
    lines = [
        (number, line.strip())
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if suffix == ".jsonl":
        read_line = _read_json
    elif any(_FORMATTED.match(line) for _, line in lines):
        read_line = _read_fields
    else:
        read_line = _read_plain
    sequences, problems = [], []
    for number, line in lines:
        fields, durations, problem = read_line(line)
        kept = [m for m, field in enumerate(fields) if field.strip()]
        sentences = tuple(fields[m].strip() for m in kept)
        if sentences:
            lengths = tuple(durations[m] for m in kept) if durations else ()
            sequences.append(PromptSequence(sentences, number, lengths))
        elif problem is None and not _PLACEHOLDER.fullmatch(line):
            problem = "there is no prompt in this line; write one or delete the line"
        if problem is not None:
            problems.append((number, problem))
    return sequences, problems


def _read_json(line: str) -> _Read:
    """The prompts of a `.jsonl` line."""
    try:
        made = json.loads(line)
    except json.JSONDecodeError as error:
        return [], [], f"not JSON: {error.msg} at column {error.colno}"
    prompts = made.get("prompts") if isinstance(made, dict) else None
    if not isinstance(prompts, list):
        return [], [], 'expected {"prompts": ["...", "..."]}'
    wrong = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if wrong:
        return [], [], f"the prompt {json.dumps(wrong[0])} is not a string"
    durations = made.get("durations") or []
    whole = isinstance(durations, list) and all(type(n) is int and n > 0 for n in durations)
    if not whole or (durations and len(durations) != len(prompts)):
        problem = (
            f"durations {json.dumps(durations)}: expected latent frames, one number per prompt"
        )
        return prompts, [], problem
    return prompts, durations, None


def _read_plain(line: str) -> _Read:
    """A line that is one prompt, unless it was written for a `.jsonl`."""
    if line.startswith("{"):
        try:
            if "prompts" in json.loads(line):
                return [], [], 'a line {"prompts": ...} of a .jsonl file; rename the file to .jsonl'
        except json.JSONDecodeError:
            pass
    return [line], [], None


def _read_fields(line: str) -> _Read:
    """The bracketed fields of a formatted line."""
    fields: list[str] = []
    field, outside, depth = "", "", 0
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
        return fields, [], f"a bracket is not closed, and {field!r} would be lost"
    if not outside:
        return fields, [], None
    lost = f"{outside!r} is outside of the brackets and would be lost"
    return fields, [], f"{lost}; a line reads 1,[first],[second]"


def select(
    sequences: Iterable[PromptSequence], min_segments: int = 1, max_segments: int | None = None
) -> list[PromptSequence]:
    """The sequences with at least `min_segments` sentences, cut to `max_segments` (None: all)."""
    if max_segments is not None and not 1 <= min_segments <= max_segments:
        raise UsageError(
            f"min_segments={min_segments} to max_segments={max_segments} is not a range of segments"
        )
    return [
        dataclasses.replace(
            sequence,
            sentences=sequence.sentences[:max_segments],
            durations=sequence.durations[:max_segments],
        )
        for sequence in sequences
        if len(sequence.sentences) >= min_segments
    ]


def slug(sentence: str) -> str:
    """The words of a sentence as a file name has them: "A café!" is "a_café"."""
    return re.sub(r"\W+", "_", unicodedata.normalize("NFKC", sentence).casefold()).strip("_")


# ---------------------------------------------------------------- split


def split(
    sequences: Iterable[PromptSequence], heldout: int, seed: int
) -> tuple[list[PromptSequence], list[PromptSequence]]:
    """(train, held out): `heldout` sequences are chosen by a hash of seed and text.

    The order of the file does not matter. Adding a line never moves an existing one into the
    held-out part; at most the new line is held out itself and the last held-out one returns to
    training. The held-out part is in the order of the hash, so that asking for fewer gives the
    first of them, and has no text twice. The training part is in the order of the file and has no
    held-out text.

    Raises:
      UsageError: nothing would be left to train on.
    """
    sequences = list(sequences)
    distinct = {sequence.sentences: sequence for sequence in reversed(sequences)}
    if not 0 <= heldout < len(distinct):
        raise UsageError(
            f"{heldout} held-out sequences of {len(distinct)} different ones leave nothing to"
            " train on"
        )

    def rank(sentences: tuple[str, ...]) -> bytes:
        return hashlib.sha256(json.dumps([seed, *sentences]).encode()).digest()

    chosen = sorted(distinct, key=rank)[:heldout]
    trained_on = distinct.keys() - set(chosen)
    train = [sequence for sequence in sequences if sequence.sentences in trained_on]
    return train, [distinct[sentences] for sentences in chosen]


# ---------------------------------------------------------------- stream


def at(sequences: Sequence[T], index: int, seed: int) -> T:
    """Element `index` of an endless stream over the sequences.

    Every epoch has each sequence once, in an order that seed and epoch decide. The stream has no
    state: it resumes exactly from the next index.
    """
    epoch, position = divmod(index, len(sequences))
    return sequences[np.random.default_rng((seed, epoch)).permutation(len(sequences))[position]]


def cleaned(sequence: PromptSequence) -> PromptSequence:
    """The sequence as the text encoder reads it (`text.clean`)."""
    sentences = tuple(text.clean(sentence) for sentence in sequence.sentences)
    return dataclasses.replace(sequence, sentences=sentences)


def segments_to(sequence: PromptSequence, segments: int) -> PromptSequence:
    """The sequence with M = `segments` sentences, without durations.

    Later sentences are cut off; missing ones repeat the last, which is no prompt switch.
    """
    sentences = sequence.sentences[:segments]
    sentences += sentences[-1:] * (segments - len(sentences))
    return dataclasses.replace(sequence, sentences=sentences, durations=())


def switch_frames(sequence: PromptSequence) -> tuple[int, ...]:
    """The latent frames at which the sentences after the first begin, by its durations."""
    return tuple(itertools.accumulate(sequence.durations[:-1]))


def on_segments(sequence: PromptSequence, switches: Sequence[int]) -> PromptSequence:
    """The sequence with a sentence for each segment of a video that switches at latent frames.

    With durations it is the sentence that they say is heard when the segment begins; where it is
    that of the segment before, the prompt does not switch. Without, see `segments_to`.
    """
    if not sequence.durations:
        return segments_to(sequence, len(switches) + 1)
    own = switch_frames(sequence)
    heard = [sum(start >= frame for frame in own) for start in (0, *switches)]
    sentences = tuple(sequence.sentences[m] for m in heard)
    return dataclasses.replace(sequence, sentences=sentences, durations=())
