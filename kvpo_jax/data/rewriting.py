"""Rewrites prompts with a language model, resumably.

The model is behind an OpenAI-compatible endpoint, or a command of this machine.

Every accepted reply is appended to a shard at once, under a hash of what was asked: model,
sampling, rules and text. A command that was killed asks only for what is missing when it is given
again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from kvpo_jax.data import stories
from kvpo_jax.data.prompts import PromptSequence
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import progress, web
from kvpo_jax.runtime.atomic import naming

ECHO = "echo"  # instead of an endpoint: every reply is the text itself
_THOUGHT = re.compile(r"^.*</think>", re.DOTALL)  # what a model says to itself comes first


class Unacceptable(web.Failed):
    """A reply that is not as it must be; the model is asked again."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Who rewrites, and how.

    Attributes:
      url: up to and with /v1; or ECHO; or empty.
      model: its name there.
      sampling: further fields of the request, such as temperature.
      rules: the system message.
      command: without a url, what is run instead, and gets rules and text as its input.
      key: the API key; empty for none.
      timeout: seconds that a reply may take.
      tries: how often a request is made before the command gives up.
      wait: seconds before the second try; doubled before every further one.
    """

    url: str
    model: str
    sampling: Mapping[str, Any]
    rules: str
    command: Sequence[str] = ()
    key: str = dataclasses.field(default="", repr=False)
    timeout: float = 120.0
    tries: int = 5
    wait: float = 1.0

    @property
    def origin(self) -> dict[str, Any]:
        """What made a reply, as it is recorded; no key and no password is in it."""
        parts = urllib.parse.urlsplit(self.url)
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        return {
            **({"command": list(self.command)} if self.command else {"endpoint": url}),
            "model": self.model,
            "sampling": dict(self.sampling),
            "rules_sha256": hashlib.sha256(self.rules.encode()).hexdigest(),
        }

    def hash_of(self, text: str) -> str:
        """The key of a request in the shards; the address of the server is not part of it."""
        asked = [self.model, dict(self.sampling), self.rules, text]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- one request


class Reply(NamedTuple):
    """What came back: the text, and the name of the model that the server says it is of."""

    text: str
    served: str


def request(endpoint: Endpoint, text: str) -> Reply:
    """One try; see `web.fetch` and `run`. A reply that is none is `web.Failed`, too."""
    if endpoint.url == ECHO:
        return Reply(text, ECHO)
    if endpoint.command:
        return Reply(_spoken(endpoint.command[0], run(endpoint, text)), endpoint.model)
    body = {
        "model": endpoint.model,
        "messages": [
            *([{"role": "system", "content": endpoint.rules}] if endpoint.rules else []),
            {"role": "user", "content": text},
        ],
        **endpoint.sampling,
    }
    headers = {"Content-Type": "application/json", **web.bearer(endpoint.key)}
    url = f"{endpoint.url.rstrip('/')}/chat/completions"
    return _read_answer(url, web.fetch(url, json.dumps(body).encode(), headers, endpoint.timeout))


def run(endpoint: Endpoint, text: str) -> str:
    """What the command of an endpoint prints; it and what it has started end in time.

    Raises:
      Failed: it takes too long, or ends with a status other than 0, or prints no text.
      UsageError: it cannot be started.
    """
    name, given = endpoint.command[0], "\n\n".join(filter(None, (endpoint.rules, text)))
    try:
        process = subprocess.Popen(
            endpoint.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise UsageError(f"the command {name} cannot be started: {error.strerror}") from error
    with process:
        try:
            printed, errors = process.communicate(given.encode(), endpoint.timeout)
        except subprocess.TimeoutExpired as error:
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)
            raise web.Failed(f"{name}: no reply after {endpoint.timeout:g} s") from error
    if process.returncode:
        said = " ".join(errors.decode(errors="replace").split())[-web.SHOWN :]
        raise web.Failed(f"{name}: exit status {process.returncode}: {said}")
    try:
        return printed.decode()
    except UnicodeDecodeError as error:
        raise web.Failed(f"{name}: what it prints is no UTF-8 text") from error


def _spoken(source: str, text: Any) -> str:
    """A reply without what the model says to itself; Failed if nothing is left of it."""
    if not isinstance(text, str) or not (text := _THOUGHT.sub("", text).strip()):
        raise web.Failed(f"{source}: the reply is empty")
    return text


def _read_answer(url: str, content: bytes) -> Reply:
    """The reply in an answer of an endpoint."""
    try:
        answer = json.loads(content)
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        cut = choice.get("finish_reason") == "length"
        served = str(answer.get("model", ""))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise web.Failed(f"{url}: the answer is no chat completion ({error!r})") from error
    if cut:
        raise web.Failed(f"{url}: the reply is cut off; raise --max_tokens")
    return Reply(_spoken(url, text), served)


# ---------------------------------------------------------------- shards


class Ledger:
    """The accepted replies of all runs of a command, in append-only files of a folder.

    Each process writes a file of its own, so that none is written by two. A line that a kill cut
    short is passed over.

    Args:
      folder: where the shards are; made with the first reply.
    """

    def __init__(self, folder: Path):
        self._folder, self._lock = folder, threading.Lock()
        self._path = folder / f"{time.time_ns()}-{os.getpid()}.jsonl"
        self._replies: dict[str, Mapping[str, Any]] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for record in _whole_lines(path):
                self._replies[record["key"]] = record

    def find(self, key: str) -> Mapping[str, Any] | None:
        """The record of a request, if it was accepted."""
        return self._replies.get(key)

    def add(self, record: Mapping[str, Any]) -> None:
        """Keeps a record, on the disk when this returns."""
        with self._lock, naming(self._path):
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._replies[record["key"]] = record


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a shard."""
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
            if isinstance(record["key"], str) and isinstance(record["reply"], str):
                yield record
        except (ValueError, KeyError, TypeError):  # a kill cut it
            continue


# ---------------------------------------------------------------- asking


Read = Callable[[str], Any]  # a reply -> what is made of it; Unacceptable if that cannot be
Ask = Callable[[str, Read], Any]


def asking(endpoint: Endpoint, ledger: Ledger, stop: threading.Event) -> Ask:
    """(text, read) -> read(reply): from the ledger, or asked for until `read` takes the reply.

    Args:
      endpoint: who is asked.
      ledger: where accepted replies are.
      stop: set when nothing more is wanted; a wait for the next try then ends.

    Raises:
      UsageError: the endpoint gives no reply that `read` takes; it says what was wrong last.
    """

    def ask(text: str, read: Read) -> Any:
        key = endpoint.hash_of(text)
        known = ledger.find(key)
        if known is not None:
            try:
                return read(known["reply"])
            except Unacceptable:  # accepted when something else was asked for
                pass

        def attempt() -> tuple[Reply, Any]:
            reply = request(endpoint, text)
            return reply, read(reply.text)

        try:
            reply, made = web.persist(attempt, endpoint.tries - 1, endpoint.wait, stop)
        except web.Failed as error:
            raise UsageError(str(error)) from error
        record = {"key": key, "text": text, "reply": reply.text, "served": reply.served}
        ledger.add({**record, **endpoint.origin})
        return made

    return ask


def one_paragraph(reply: str) -> str:
    """A reply as one sentence of a prompt sequence."""
    return " ".join(reply.split())


def segments_of(reply: str, wanted: int | None) -> tuple[str, ...]:
    """The segments of a story; `Unacceptable` unless there are as many as wanted."""
    found = stories.segments(reply)
    if not found or (wanted is not None and len(found) != wanted):
        raise Unacceptable(
            f"the reply {one_paragraph(reply)[:60]!r} has {len(found)} segments, not {wanted or 1}"
        )
    return found


def refined(sequence: PromptSequence, ask: Ask, wanted: int | None) -> PromptSequence:
    """The sequence, rewritten as a whole.

    Its sentences go to the model as one story, and its reply is split like a story
    (`stories.segments`). A sequence of several sentences, or with durations, keeps both; a single
    text becomes `wanted` segments, or any number.
    """
    sized = len(sequence.sentences) > 1 or sequence.durations
    count = len(sequence.sentences) if sized else wanted
    story = " ".join(s if s[-1] in ".!?。！？…" else f"{s}." for s in sequence.sentences)
    made = ask(story, lambda reply: segments_of(reply, count))
    return dataclasses.replace(sequence, sentences=made)


def continued(sequence: PromptSequence, ask: Ask, more: int) -> PromptSequence:
    """The sequence with `more` sentences behind its last, each of which continues all before it.

    Raises:
      UsageError: it has durations, which the new ones would not.
    """
    if sequence.durations:
        raise UsageError(f"line {sequence.line} has durations; take them out to continue it")
    made = list(sequence.sentences)
    for _ in range(more):
        made.append(ask("\n".join(made), one_paragraph))
    return PromptSequence(tuple(made), sequence.line)


def rewrite(
    sequences: Sequence[PromptSequence],
    change: Callable[[PromptSequence, Ask], PromptSequence],
    endpoint: Endpoint,
    shards: Path,
    workers: int,
) -> list[PromptSequence]:
    """Every sequence, changed, in the order that they are given in.

    Args:
      sequences: what is rewritten.
      change: makes one of them, of replies that it asks for.
      endpoint: who is asked.
      shards: the folder of the replies.
      workers: how many sequences are made at a time.

    Raises:
      UsageError: one could not be made. What has been made stays in the shards.
    """
    ledger, stop = Ledger(shards), threading.Event()
    ask = asking(endpoint, ledger, stop)
    made: dict[int, PromptSequence] = {}
    with ThreadPoolExecutor(workers) as pool, progress.bar("rewriting", len(sequences)) as advance:
        futures = {pool.submit(change, s, ask): i for i, s in enumerate(sequences)}
        try:
            for future in as_completed(futures):
                made[futures[future]] = future.result()
                advance()
        except UsageError as error:
            raise UsageError(
                f"{error}; {len(made)} of {len(sequences)} sequences are made, and their replies"
                f" are in {shards}: give the same command again to go on"
            ) from error
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    return [made[i] for i in range(len(sequences))]
