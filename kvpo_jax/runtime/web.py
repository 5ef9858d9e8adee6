"""Requests over HTTP, made again where the same one may succeed later, and tokens."""

from __future__ import annotations

import http.client
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from kvpo_jax.errors import UsageError

T = TypeVar("T")

LONGEST_WAIT = 60.0  # seconds between two tries
AGAIN = (408, 409, 425, 429)  # statuses, besides 5xx, after which the same request may succeed
SHOWN = 300  # letters of what a server says with an error
PIECE = 2**16  # bytes that are read at once


class Failed(Exception):
    """A try that may succeed when it is made again, after `wait` seconds if the server says so."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class _Unmoved(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the header with the token would go along, wherever it leads."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def is_address(text: str) -> bool:
    """Whether a text begins as the address of a server."""
    return re.match(r"https?://", text) is not None


def check_address(url: str) -> None:
    """UsageError unless `url` is an address without a password in it."""
    try:
        parts = urllib.parse.urlsplit(url)
        known = parts.hostname and parts.port != 0 and not re.search(r"[\s\x00-\x1f]", url)
    except ValueError as error:
        raise UsageError(f"{url} is no address: {error}") from error
    if not is_address(url) or not known:
        raise UsageError(f"{url} is no address; expected http://HOST:PORT or https://HOST")
    if "@" in parts.netloc:
        where = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        raise UsageError(f"the address {where} has a password, which would be written down")


def fetch(
    url: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 60.0,
) -> bytes:
    """One request, a POST if there is a body: what the server answers.

    Args:
      url: where.
      body: what is sent.
      headers: of the request. They go to `url` alone, for no redirect is followed.
      timeout: seconds that the server may say nothing, and that its whole answer may take.

    Raises:
      Failed: the same request may succeed later.
      UsageError: it will not.
    """
    opener = urllib.request.build_opener(_Unmoved)
    try:
        request = urllib.request.Request(url, body, dict(headers or {}))
        with opener.open(request, timeout=timeout) as answer:
            return _read(answer, url, timeout)
    except urllib.error.HTTPError as error:
        with error:
            said = " ".join(error.read(4 * SHOWN).decode(errors="replace").split())[:SHOWN]
        reason = f"{url}: HTTP {error.code} {error.reason}: {said}"
        if error.code not in AGAIN and error.code < 500:
            raise UsageError(reason) from error
        wait = error.headers.get("Retry-After", "")
        raise Failed(reason, float(wait) if wait.isdecimal() else 0.0) from error
    except (http.client.InvalidURL, ValueError) as error:
        raise UsageError(f"{url} is no address: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"{url}: {getattr(error, 'reason', error) or 'no answer'}") from error


def _read(answer: http.client.HTTPResponse, url: str, timeout: float) -> bytes:
    """A whole answer; TimeoutError if it takes too long."""
    pieces, end = [], time.monotonic() + timeout
    while piece := answer.read1(PIECE):
        pieces.append(piece)
        if time.monotonic() > end:
            raise TimeoutError(f"the answer is not whole after {timeout:g} s")
    content = b"".join(pieces)
    if answer.length:  # read1 does not say that the connection has ended too early
        raise http.client.IncompleteRead(content, answer.length)
    return content


def persist(
    attempt: Callable[[], T],
    retries: int,
    wait: float,
    stop: threading.Event,
    told: Callable[[str], None] = lambda text: None,
) -> T:
    """What `attempt` returns, which is called again after `Failed`.

    Args:
      attempt: a try.
      retries: how many more are made.
      wait: seconds before the first of them; doubled before each further one, up to LONGEST_WAIT.
      stop: set when nothing is wanted any more; a wait then ends.
      told: is given a line before every wait.

    Raises:
      Failed: the last try has failed, too.
    """
    for number in range(retries + 1):
        try:
            return attempt()
        except Failed as error:
            pause = min(max(error.wait, wait * 2**number), LONGEST_WAIT)
            last = number == retries
            if not last:
                told(f"{error}; try {number + 2} of {retries + 1} in {pause:.0f} s")
            if last or stop.wait(pause):
                tries = f"tried {number + 1} time{'s' * (number > 0)}"
                raise Failed(f"{error} ({tries})") from error
    raise AssertionError("there is at least one try")


def token(path: str, variable: str) -> str:
    """The token in a file or, without one, in an environment variable; empty if there is none.

    Raises:
      UsageError: it cannot be a header; the message does not show it.
      OSError: the file cannot be read.
    """
    try:
        text = (Path(path).read_text() if path else os.environ.get(variable, "")).strip()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text with a token") from error
    if path and not text:
        raise UsageError(f"{path} is empty; expected a token")
    if not re.fullmatch(r"[!-~]*", text):
        raise UsageError(f"the token in {path or variable} has other letters than ASCII's")
    return text


def bearer(token: str) -> dict[str, str]:
    """The header that shows a token, none without one."""
    return {"Authorization": f"Bearer {token}"} if token else {}
