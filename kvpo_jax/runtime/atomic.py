"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names `path` in a system error that names no file, as the error of a write does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, beside `path`; it takes the place of `path` once it is whole.

    The folder is made. After an error nothing is left behind, and a system error names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with naming(path):
            yield temporary
            os.replace(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def keeping_part(path: Path) -> Iterator[Path]:
    """A path to write to, `path`.part; it takes the place of `path` once it is whole.

    The folder is made. After an error the part stays, for what is in it is of use.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with naming(part):
        yield part
        os.replace(part, path)


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that appends a JSON object to a file of lines, on the disk when it returns.

    A last line that a kill has cut short is dropped first. The folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)

        def append(record: Mapping[str, Any]) -> None:
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

        yield append


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Writes a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def write_lines(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Writes a file of JSON lines in UTF-8, whole or not at all; numbers have to be finite."""
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    with replacing(path) as temporary:
        # Half of a surrogate pair, which no UTF-8 has, becomes its escape in JSON.
        temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
