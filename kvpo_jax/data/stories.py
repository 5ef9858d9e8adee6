"""A story, as one text, into the segments of a prompt sequence.

The release splits at every period (`process_data/format_scene_dataset.py`), which cuts "Dr. Smith"
and "3.5 metres" in two. Here a period ends a segment only where a sentence ends.
"""

from __future__ import annotations

import re

# Where a sentence may end. A full stop of Chinese or Japanese needs no blank behind it, and neither
# does a period between a word and a capitalised one, as in "runs.The fox".
_MARK = re.compile(
    r"""(?P<mark>[.!?…]+)(?P<close>["'”’)\]]*)(?=\s|$)"""
    r"|[。！？]+[”’」』）]*"
    r"|(?<=[a-z]{2})\.(?=[A-Z][a-z])"
)
_INITIALS = re.compile(r"([A-Za-z]\.)*[A-Z]")  # "J", "U.S"
_NUMBER = re.compile(r"\d{1,2}")  # of a list

# What is abbreviated before more words of the same sentence.
_INSIDE = frozenset(
    "mr mrs ms dr prof st sgt capt col gen lt rev hon mt ft vs e.g i.e cf ca approx dept".split()
)
_BEFORE_NUMBERS = frozenset("no nos fig figs vol pp ch sec op".split())
_ANYWHERE = frozenset("etc a.m p.m jr sr inc ltd co corp ph.d al".split())
# A capitalised one of these begins a sentence, also behind "the U.S."
_STARTERS = frozenset(
    "a after an and as at behind but he her his in it its meanwhile now on she slowly suddenly that"
    " the their then there these they this we when while with".split()
)

CAMERA_WORDS = frozenset(
    "aerial angle bird's-eye camera close-up closeup crane dolly focus handheld hand-held"
    " high-angle lens low-angle medium overhead pan pans pull push shot static steadicam tilt tilts"
    " track tracking wide zoom zooms".split()
)
CAMERA_LENGTH = 8  # words that an instruction to the camera has at most


def segments(story: str) -> tuple[str, ...]:
    """The segments of a story, in order; blanks are collapsed and final periods dropped.

    A last segment of up to CAMERA_LENGTH words with one of CAMERA_WORDS belongs to the segment
    before it, as in the release.
    """
    found = [_trimmed(sentence) for sentence in sentences(story)]
    found = [segment for segment in found if segment]
    if len(found) > 1 and _is_camera(found[-1]):
        found[-2:] = [f"{found[-2]}, {found[-1]}"]
    return tuple(found)


def sentences(text: str) -> list[str]:
    """The sentences of a text, with their final marks; blanks are collapsed."""
    text, start, found = " ".join(text.split()), 0, []
    for match in _MARK.finditer(text):
        sentence, after = text[start : match.end()].strip(), text[match.end() :].lstrip()
        if not _goes_on(text[start : match.start()], match["mark"] or "", match["close"], after):
            found.append(sentence)
            start = match.end()
    return [*found, *filter(None, [text[start:].strip()])]


def _goes_on(before: str, mark: str, close: str | None, after: str) -> bool:
    """Whether a sentence goes on behind a mark.

    Args:
      before: the sentence up to the mark.
      mark: the mark; empty where there is no doubt.
      close: quotes and brackets that are closed behind it.
      after: the text that follows.
    """
    if not after or not mark:
        return False
    if close or mark != ".":  # "Stop!" he shouts; it waits ... and runs
        return after[0].islower() and (bool(close) or mark[-1] in ".…")
    word = _last_word(before)
    if word.lower() in _INSIDE or (_NUMBER.fullmatch(word) and before.strip() == word):
        return True
    if word.lower() in _BEFORE_NUMBERS:
        return after[0].isdigit()
    if word.lower() in _ANYWHERE:
        return not after[0].isupper()
    if _INITIALS.fullmatch(word):
        following = after.split()[0]
        return not (following[0].isupper() and following.lower().strip(",") in _STARTERS)
    return False


def _last_word(text: str) -> str:
    """The word that a text ends with, without what opens it."""
    return (text.split() or [""])[-1].lstrip("\"'“‘([")


def _trimmed(sentence: str) -> str:
    """The sentence without a period at its end, unless the period belongs to its last word."""
    if not sentence.endswith(".") or sentence.endswith(".."):
        return sentence
    word = _last_word(sentence[:-1])
    abbreviated = word.lower() in _INSIDE | _ANYWHERE or (
        "." in word and _INITIALS.fullmatch(word) is not None
    )
    return sentence if abbreviated else sentence[:-1].rstrip()


def _is_camera(segment: str) -> bool:
    """Whether a segment is an instruction to the camera."""
    words = [word.strip(",;:!?\"'").lower() for word in segment.split()]
    return len(words) <= CAMERA_LENGTH and not CAMERA_WORDS.isdisjoint(words)
