"""What is doubtful in a prompt file, line by line, and its figures."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kvpo_jax.data import prompts, stories, text
from kvpo_jax.data.prompts import PromptSequence

Tokens = Callable[[Sequence[str]], list[int]]

NEAR = 0.8  # Jaccard similarity of word triples from which on two sequences are near-duplicates
LATIN = 0.5  # share of the letters of a line that are Latin, below which it is another script
WHOLE_TEXT = 512  # tokens that the generators read of a sentence

_CUTS = re.compile(
    r"\b((?:(?:hard|smash|jump|match|scene|quick)[ -])?cuts? (?:to|back|away|from)"
    r"|(?:hard|smash|jump|match|scene)[ -]cuts?|fades? (?:to|in|out)|dissolves? (?:to|into)"
    r"|(?:the )?(?:scene|shot|camera|view) (?:changes|switches|transitions|shifts|jumps) to"
    r"|next (?:scene|shot)|new scene|montage|split screen)\b",
    re.IGNORECASE,
)
_SMALL = frozenset(
    "a an and are as at be by for from has have he her his in into is it its of on or out over"
    " she that the their then there they this to up was while who with".split()
)


class Finding(NamedTuple):
    """What is doubtful: the line of the file, the name of the rule, and what it is."""

    line: int
    rule: str
    text: str


@dataclasses.dataclass(frozen=True)
class Options:
    """What the rules go by.

    Attributes:
      segments: how many every sequence must have; 0 for any number.
      tokens: sentences -> number of tokens; None if there is no tokenizer.
      most_tokens: that a sentence may have.
      heldout: sentences that nothing may be trained on, as `_plain` has them.
    """

    segments: int = 0
    tokens: Tokens | None = None
    most_tokens: int = WHOLE_TEXT
    heldout: frozenset[str] = frozenset()


Rule = Callable[[Sequence[PromptSequence], Options], Iterator[tuple[int, str]]]


def _plain(sentence: str) -> str:
    """A sentence without case, punctuation and odd blanks."""
    return prompts.slug(text.clean(sentence))


def plain_sentences(sequences: Sequence[PromptSequence]) -> frozenset[str]:
    """What `Options.heldout` has of these sequences."""
    return frozenset(_plain(sentence) for s in sequences for sentence in s.sentences)


def _content(sentence: str) -> set[str]:
    """The words of a sentence that carry its meaning."""
    return set(_plain(sentence).split("_")) - _SMALL


def _short(sentence: str) -> str:
    return repr(sentence if len(sentence) <= 50 else f"{sentence[:47]}...")


# ---------------------------------------------------------------- rules


def too_long(sequences: Sequence[PromptSequence], options: Options) -> Iterator[tuple[int, str]]:
    """Sentences with more tokens than the generator reads; the rest is cut off."""
    if options.tokens is None:
        return
    pairs = [(s.line, sentence) for s in sequences for sentence in s.sentences]
    for (line, sentence), count in zip(pairs, options.tokens([x for _, x in pairs]), strict=True):
        if count > options.most_tokens:
            yield line, f"{count} tokens, {options.most_tokens} are read: {_short(sentence)}"


def another_count(
    sequences: Sequence[PromptSequence], options: Options
) -> Iterator[tuple[int, str]]:
    """Sequences of another number of segments: a run cuts them, or repeats their last one."""
    for s in sequences:
        if options.segments and len(s.sentences) != options.segments:
            yield s.line, f"{len(s.sentences)} segments, expected {options.segments}"


def period_inside(
    sequences: Sequence[PromptSequence], options: Options
) -> Iterator[tuple[int, str]]:
    """Segments of several sentences, which the release's formatter would split."""
    for s in sequences:
        for sentence in s.sentences:
            if len(stories.sentences(sentence)) > 1:
                yield s.line, f"a segment has several sentences: {_short(sentence)}"


def duplicate(sequences: Sequence[PromptSequence], options: Options) -> Iterator[tuple[int, str]]:
    """Sequences that occur before, but for case, punctuation and blanks."""
    first: dict[tuple[str, ...], int] = {}
    for s in sequences:
        key = tuple(map(_plain, s.sentences))
        if key in first:
            yield s.line, f"as line {first[key]}"
        first.setdefault(key, s.line)


def near_duplicate(
    sequences: Sequence[PromptSequence], options: Options
) -> Iterator[tuple[int, str]]:
    """Sequences that share most of their word triples with one before.

    Exact: two sets of a similarity of at least NEAR share one of their first (1 - NEAR) n + 1
    elements, where both are in an order with rare ones first; only those are looked up.
    """
    texts = ["_".join(map(_plain, s.sentences)) for s in sequences]
    triples = [_triples(words) for words in texts]
    common = Counter(triple for found in triples for triple in found)
    holders: dict[str, list[int]] = defaultdict(list)
    for i, found in enumerate(triples):
        rare = sorted(found, key=lambda triple: (common[triple], triple))
        rare = rare[: int((1 - NEAR) * len(rare) + 1e-9) + 1]
        for j in sorted({j for triple in rare for j in holders[triple]}):
            similarity = len(found & triples[j]) / len(found | triples[j])
            if similarity >= NEAR and texts[i] != texts[j]:
                yield sequences[i].line, f"{similarity:.0%} as line {sequences[j].line}"
                break
        for triple in rare:
            holders[triple].append(i)


def _triples(words: str) -> set[str]:
    """The word triples of a slug; of a shorter one, itself."""
    parts = words.split("_")
    return {"_".join(parts[i : i + 3]) for i in range(max(1, len(parts) - 2))}


def nothing_in_common(
    sequences: Sequence[PromptSequence], options: Options
) -> Iterator[tuple[int, str]]:
    """Segments without a word of the segment before; MemFlow names subject and place every time."""
    for s in sequences:
        for m in range(1, len(s.sentences)):
            if not _content(s.sentences[m]) & _content(s.sentences[m - 1]):
                yield s.line, f"segment {m + 1} has no word of segment {m}: name the subject again"


def hard_cut(sequences: Sequence[PromptSequence], options: Options) -> Iterator[tuple[int, str]]:
    """Words that ask for a cut, which a video of one take cannot have."""
    for s in sequences:
        for m, sentence in enumerate(s.sentences, start=1):
            if found := _CUTS.search(sentence):
                yield s.line, f"segment {m} asks for a cut: {found[0]!r}"


def another_script(
    sequences: Sequence[PromptSequence], options: Options
) -> Iterator[tuple[int, str]]:
    """Lines whose letters are mostly not Latin: the generators were trained on English here."""
    for s in sequences:
        letters = [c for c in "".join(s.sentences) if c.isalpha()]
        latin = sum(unicodedata.name(c, "").startswith("LATIN") for c in letters)
        if letters and latin < LATIN * len(letters):
            yield s.line, f"{latin} of {len(letters)} letters are Latin: {_short(s.sentences[0])}"


def held_out(sequences: Sequence[PromptSequence], options: Options) -> Iterator[tuple[int, str]]:
    """Sentences of a file of --heldout, on which nothing may be trained."""
    for s in sequences:
        for m, sentence in enumerate(s.sentences, start=1):
            if _plain(sentence) in options.heldout:
                yield s.line, f"segment {m} is held out: {_short(sentence)}"


MALFORMED = "malformed"  # a line that the loader refuses; there is no way to skip it
RULES: dict[str, Rule] = {
    "tokens": too_long,
    "segments": another_count,
    "sentences": period_inside,
    "duplicate": duplicate,
    "near-duplicate": near_duplicate,
    "common": nothing_in_common,
    "cut": hard_cut,
    "script": another_script,
    "heldout": held_out,
}


def check(
    sequences: Sequence[PromptSequence],
    problems: Sequence[tuple[int, str]],
    options: Options,
    skipped: Sequence[str] = (),
) -> list[Finding]:
    """What the rules find, in the order of lines.

    Args:
      sequences: of the file.
      problems: (line, text) of malformed lines, see `prompts.parse`.
      options: what the rules go by.
      skipped: names of RULES that are not applied.
    """
    findings = [Finding(line, MALFORMED, text) for line, text in problems]
    for name, rule in RULES.items():
        if name not in skipped:
            findings += [Finding(line, name, text) for line, text in rule(sequences, options)]
    return sorted(findings, key=lambda finding: finding.line)


# ---------------------------------------------------------------- figures


def figures(sequences: Sequence[PromptSequence], tokens: Tokens | None) -> Mapping[str, str]:
    """What a prompt file is like, by name."""
    sentences = [sentence for s in sequences for sentence in s.sentences]
    words = [word for sentence in sentences for word in _plain(sentence).split("_") if word]
    counts = Counter(len(s.sentences) for s in sequences)
    lengths = [len(sentence.split()) for sentence in sentences]
    out = {
        "sequences": f"{len(sequences):,}",
        "different ones": f"{len({tuple(map(_plain, s.sentences)) for s in sequences}):,}",
        "segments": ", ".join(f"{n:,} of {count}" for count, n in sorted(counts.items())),
        "sentences": f"{len(sentences):,}, {len(set(map(_plain, sentences))):,} different",
        "words per sentence": _spread(lengths),
        "vocabulary": f"{len(set(words)):,} different words of {len(words):,}",
    }
    if tokens is not None:
        out["tokens per sentence"] = _spread(tokens(sentences))
    if timed := [s for s in sequences if s.durations]:
        out["frames per sequence"] = _spread([sum(s.durations) for s in timed])
        out["with durations"] = f"{len(timed):,}"
    return out


def _spread(values: Sequence[int]) -> str:
    low, middle, high = np.percentile(values, (5, 50, 95))
    return (
        f"{np.mean(values):.1f} on average, 5 % to 95 %: {low:.0f} to {high:.0f}, median"
        f" {middle:.0f}, at most {max(values)}"
    )
