"""What a file is by its first bytes: the wrong files that arrive under a right name."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from kvpo_jax.errors import UsageError

_READ = 4096  # bytes that are looked at
_HEADER = 10**8  # bytes that the header of a safetensors file may have
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # characters that no text has
_PAGES = ("<!doctype html", "<html", "<head", "<body", "<?xml")
_DOWNLOAD = "download or copy it again"
# How a file begins -> its kind, and what it is called.
_BEGINNINGS = {
    b"version https://git-lfs.github.com/": ("lfs", "a Git LFS pointer"),
    b"/annex/objects/": ("annex", "a git-annex pointer"),
    b"PK\x03\x04": ("zip", "a zip archive"),
    b"\x80\x02": ("pickle", "a pickle"),
    b"\x80\x03": ("pickle", "a pickle"),
    b"\x80\x04": ("pickle", "a pickle"),
    b"\x80\x05": ("pickle", "a pickle"),
    b"\x1f\x8b": ("compressed", "a gzip archive"),
    b"BZh": ("compressed", "a bzip2 archive"),
    b"\xfd7zXZ": ("compressed", "an xz archive"),
    b"\x28\xb5\x2f\xfd": ("compressed", "a zstd archive"),
    b"7z\xbc\xaf": ("compressed", "a 7z archive"),
    b"Rar!": ("compressed", "a rar archive"),
    b"%PDF": ("pdf", "a PDF"),
    b"\x89PNG": ("image", "a PNG picture"),
    b"\xff\xd8\xff": ("image", "a JPEG picture"),
    b"GIF8": ("gif", "a GIF"),
    b"\x1a\x45\xdf\xa3": ("video", "a WebM or Matroska video"),
    b"GGUF": ("gguf", "a GGUF file"),
    b"\x89HDF": ("hdf5", "an HDF5 file"),
    b"\x93NUMPY": ("npy", "a NumPy array"),
}
_WHAT_TO_DO = {
    "lfs": "`git lfs pull` in its repository gets the file itself",
    "annex": "`git annex get` in its repository gets the file itself",
    "web page": "the download gave a page instead of the file; download it again, logged in if it"
    " needs that",
    "compressed": "unpack it",
    "zip": "unpack it",
    "gguf": "its numbers are quantised; bring the weights as they were released",
}


def kind_of(path: Path | str) -> tuple[str, str] | None:
    """(kind, what it is called) of a file, such as ("lfs", "a Git LFS pointer").

    The kinds are those of the table and "empty", "zeros", "safetensors", "video", "image",
    "compressed", "utf-16", "web page", "json" and "text". None is a file that resembles none.
    """
    with Path(path).open("rb") as file:
        start = file.read(_READ)
    # First of all: the length of its header may look like any of the beginnings.
    if start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") < _HEADER:
        return "safetensors", "a safetensors file"
    for beginning, kind in _BEGINNINGS.items():
        if start.startswith(beginning):
            return kind
    if not start:
        return "empty", "an empty file"
    if not start.strip(b"\0"):
        return "zeros", "a file that begins with zeros"
    if start[4:8] == b"ftyp" or (start[:4] == b"RIFF" and start[8:11] == b"AVI"):
        return "video", "a video"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "image", "a WebP picture"
    if start[257:262] == b"ustar":
        return "compressed", "a tar archive"
    return _text_of(start)


def _text_of(start: bytes) -> tuple[str, str] | None:
    """The kind of a text that begins with these bytes; None if they are no text."""
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16", "UTF-16 text"
    try:
        # A file that is longer may have a character that is cut here.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start, len(start) < _READ)
    except UnicodeDecodeError:
        return None
    if _CONTROL.search(text):
        return None
    text = text.lstrip()
    if text[:14].lower().startswith(_PAGES):
        return "web page", "a web page"
    if text.startswith(("{", "[")):
        return "json", "JSON"
    return "text", "plain text"


def describe(path: Path | str) -> str | None:
    """What a file is, and what to do if it should be another.

    For example "a Git LFS pointer (134 bytes); `git lfs pull` in its repository gets the file
    itself". None is a file that resembles nothing that is known.
    """
    found = kind_of(path)
    if found is None:
        return None
    kind, name = found
    return f"{name} ({Path(path).stat().st_size:,} bytes); {_WHAT_TO_DO.get(kind, _DOWNLOAD)}"


def check(path: Path | str, expected: str, *kinds: str) -> None:
    """Refuses a file that is recognised as something else than it should be.

    Args:
      path: the file.
      expected: what it should be, for the message: "a video".
      kinds: what it may be (see `kind_of`). A file that resembles nothing passes.

    Raises:
      UsageError: it says what the file is and what to do.
      OSError: the file cannot be read.
    """
    found = kind_of(path)
    if found is not None and found[0] not in kinds:
        raise UsageError(f"{path} is not {expected} but {describe(path)}")
