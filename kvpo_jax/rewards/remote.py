"""A scorer behind an address, in an environment of its own: the client of a reward server.

docs/rewards.md has the protocol; `server` is a server of it. Clips go out in a zip file, and a list
of numbers for each component comes back. Requests are made in threads of their own, and wait for a
server that does not answer with longer and longer pauses.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvpo_jax.errors import NotFiniteError, Registry, UsageError, listed
from kvpo_jax.rewards.composite import Sentence
from kvpo_jax.runtime import progress, video, web
from kvpo_jax.types import Array

PROTOCOL = 1
TOKEN = "KVPO_REWARD_TOKEN"  # environment variable
REQUEST, PIXELS = "request.json", "pixels.npy"  # in the zip file
CODEC = "h264, yuv420p, crf 10"  # of `video.writing`: not without loss
FPS = 16.0  # of an mp4, if nobody knows
MEGABYTE = 10**6


@dataclasses.dataclass(frozen=True)
class Settings:
    """Section reward.http of a config, where each is explained."""

    timeout: float
    retries: int
    backoff: float
    required: bool
    missing: float
    format: str
    megabytes: int
    requests: int
    ahead: bool
    token_file: str


class About(NamedTuple):
    """What a server says of itself.

    Attributes:
      name: of its scorer.
      components: the names of what it returns.
      version: of what its scores depend on, in its own words.
      groups: whether a request has to be one group, whole and alone.
    """

    name: str
    components: tuple[str, ...]
    version: str
    groups: bool


# ---------------------------------------------------------------- clips in bytes


def _write_npz(file: zipfile.ZipFile, pixels: np.ndarray, fps: float) -> dict[str, Any]:
    """The clips as they are; `numpy.load` reads them."""
    with file.open(PIXELS, "w", force_zip64=True) as entry:
        np.lib.format.write_array(entry, pixels)
    return {"white": 255 if pixels.dtype == np.uint8 else 1}


def _write_mp4(file: zipfile.ZipFile, pixels: np.ndarray, fps: float) -> dict[str, Any]:
    """Each clip as a video, 0.mp4, 1.mp4, ..."""
    _, _, height, width, _ = pixels.shape
    with tempfile.TemporaryDirectory() as folder:
        for number, clip in enumerate(video.as_bytes(pixels)):
            path = Path(folder, f"{number}.mp4")
            with video.writing(path, height, width, fps) as write_frame:
                for frame in clip:
                    write_frame(frame)
            file.write(path, path.name)
    return {"codec": CODEC}


# (zip file, pixels [n, frames, h, w, 3], fps) -> what the request says of them.
FORMATS: Registry[Callable[[zipfile.ZipFile, np.ndarray, float], dict[str, Any]]] = Registry(
    "reward.http.format", {"npz": _write_npz, "mp4": _write_mp4}
)


def pack(pixels: np.ndarray, prompts: Sequence[str], format: str, fps: float | None) -> bytes:
    """The body of a request; `unpack` is the inverse."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_STORED) as file:
        said = FORMATS[format](file, pixels, fps or FPS)
        request = {
            "protocol": PROTOCOL,
            "prompts": list(map(str, prompts)),
            "before": [list(getattr(prompt, "before", ())) for prompt in prompts],
            "groups": [number for number, group in enumerate(_groups(prompts)) for _ in group],
            "fps": fps,
            "format": format,
            **said,
        }
        file.writestr(REQUEST, json.dumps(request))
    return body.getvalue()


def unpack(body: bytes) -> tuple[np.ndarray, list[Sentence]]:
    """The clips and the sentences of a request.

    Raises:
      ValueError, KeyError, TypeError, zipfile.BadZipFile: it is none; UsageError for a video.
    """
    with zipfile.ZipFile(io.BytesIO(body)) as file:
        request = json.loads(file.read(REQUEST))
        if request["protocol"] != PROTOCOL:
            raise ValueError(f"the request is of protocol {request['protocol']}, not {PROTOCOL}")
        if request["format"] == "npz":
            with file.open(PIXELS) as entry:
                pixels = np.lib.format.read_array(entry, allow_pickle=False)
        else:
            pixels = np.stack([_video(file, n) for n in range(len(request["prompts"]))])
    columns = (request[name] for name in ("prompts", "before", "groups"))
    prompts = [Sentence.with_context(*row) for row in zip(*columns, strict=True)]
    if pixels.ndim != 5 or pixels.shape[-1] != 3 or len(pixels) != len(prompts):
        raise ValueError(f"clips of shape {pixels.shape} for {len(prompts)} prompts")
    return pixels, prompts


def _video(file: zipfile.ZipFile, number: int) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        return video.read(Path(file.extract(f"{number}.mp4", folder)))


def _groups(prompts: Sequence[str]) -> Iterator[list[int]]:
    """The places of the clips of each group; a plain str is a group of its own."""
    keys = [getattr(prompt, "group", None) for prompt in prompts]
    places = itertools.groupby(
        range(len(keys)), lambda i: (keys[i], i if keys[i] is None else None)
    )
    return (list(group) for _, group in places)


# ---------------------------------------------------------------- the server


class Server:
    """A scorer behind an address.

    Args:
      url: its address.
      settings: how it is asked.
      fps: frames per second of the clips; None if nobody knows.
    """

    def __init__(self, url: str, settings: Settings, fps: float | None = None):
        self.url, self._settings, self._fps = url, settings, fps
        self._turns = threading.Semaphore(settings.requests)
        self._silent = False  # whether it has answered nothing, with all retries
        self._lock = threading.Lock()
        self._missing = 0

    @functools.cached_property
    def about(self) -> About:
        """What the server says of itself; it is waited for as long as for scores.

        Raises:
          UsageError: it does not answer, or not as the protocol says.
        """
        web.check_address(self.url)
        stop = threading.Event()
        try:
            return self._persist(self._describe, self._settings.retries, stop)
        except web.Failed as error:
            raise UsageError(f"reward server {error}; is it running?") from error

    @property
    def missing(self) -> int:
        """How many clips have got `reward.http.missing` so far."""
        return self._missing

    def ask(
        self, pixels: Array | np.ndarray, prompts: Sequence[str]
    ) -> Callable[[], dict[str, np.ndarray]]:
        """Sends clips, and returns what waits for their scores, component -> float32[n].

        Args:
          pixels: [n, frames, h, w, 3], float in [0, 1] or uint8.
          prompts: n sentences.

        Raises:
          UsageError: by what is returned: no answer where one is required, or a wrong one.
        """
        about, stop = self.about, threading.Event()
        futures = [
            _started(self._answer, np.asarray(pixels[part]), prompts[part], stop)
            for part in self._parts(pixels, prompts)
        ]

        def scores() -> dict[str, np.ndarray]:
            try:
                parts = [future.result() for future in progress.steps(futures, f"at {about.name}")]
            finally:
                stop.set()  # the others, if one has failed
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

        return scores

    def _parts(self, pixels: Array | np.ndarray, prompts: Sequence[str]) -> list[slice]:
        """The requests: whole groups, as many as are within reward.http.megabytes, or one."""
        clip = np.prod(pixels.shape[1:], dtype=int) * pixels.dtype.itemsize
        most = 0 if self.about.groups else self._settings.megabytes * MEGABYTE // clip
        ends: list[int] = []
        start = 0
        for group in _groups(prompts):
            if ends and group[-1] + 1 - start <= most:
                ends[-1] = group[-1] + 1
            else:
                start = group[0]
                ends.append(group[-1] + 1)
        return [slice(*ends) for ends in itertools.pairwise((0, *ends))]

    def _answer(
        self, pixels: np.ndarray, prompts: Sequence[str], stop: threading.Event
    ) -> dict[str, np.ndarray]:
        """The scores of a request, or what is used instead."""
        settings = self._settings
        with self._turns:
            if stop.is_set():
                raise UsageError("another request has failed")
            body = pack(pixels, prompts, settings.format, self._fps)
            retries = 0 if self._silent and not settings.required else settings.retries
            try:
                content = self._persist(functools.partial(self._fetch, body), retries, stop)
            except web.Failed as error:
                if settings.required:
                    raise UsageError(
                        f"reward server {error}; start it and give the same command again to go on"
                    ) from error
                return self._instead(len(prompts), str(error))
        self._silent = False
        return read_scores(self.url, content, self.about.components, len(prompts))

    def _instead(self, clips: int, reason: str) -> dict[str, np.ndarray]:
        """reward.http.missing for every component, counted and said."""
        with self._lock:
            self._silent = True
            self._missing += clips
        value = self._settings.missing
        progress.warn(
            f"reward server {reason}: {clips} clips get {value:g}, {self._missing} so far"
        )
        return {name: np.full(clips, value, np.float32) for name in self.about.components}

    def _persist(self, attempt: Callable[[], Any], retries: int, stop: threading.Event) -> Any:
        def told(text: str) -> None:
            progress.say(f"reward server {text}")

        return web.persist(attempt, retries, self._settings.backoff, stop, told)

    def _fetch(self, body: bytes | None = None) -> bytes:
        kind = {} if body is None else {"Content-Type": "application/zip"}
        headers = {**kind, **web.bearer(web.token(self._settings.token_file, TOKEN))}
        try:
            return web.fetch(self.url, body, headers, self._settings.timeout)
        except UsageError as error:
            hint = f" (a token is in ${TOKEN} or reward.http.token_file)" * (
                "HTTP 401" in str(error)
            )
            raise UsageError(f"reward server {error}{hint}") from error

    def _describe(self) -> About:
        return read_about(self.url, self._fetch())


def _started(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """What `function` returns, called in a thread that does not keep the process from ending."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


# ---------------------------------------------------------------- what it answers


def _read(url: str, content: bytes) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UsageError(f"reward server {url}: the answer is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise UsageError(f"reward server {url}: the answer is a {type(value).__name__}, no object")
    return value


def read_about(url: str, content: bytes) -> About:
    """What a server says of itself; UsageError unless it is as the protocol says."""
    said = _read(url, content)

    def of_type(field: str, kind: type, default: Any = None) -> Any:
        value = said.get(field, default)
        if not isinstance(value, kind):
            raise UsageError(
                f"reward server {url}: its {field!r} is {json.dumps(value)}, expected a"
                f" {kind.__name__}"
            )
        return value

    if said.get("protocol") != PROTOCOL:
        raise UsageError(
            f"reward server {url} speaks protocol {json.dumps(said.get('protocol'))}, expected"
            f" {PROTOCOL}; is it a reward server?"
        )
    names = of_type("components", list)
    if not names or len(set(map(str, names))) < len(names):
        raise UsageError(f"reward server {url}: its 'components' are {json.dumps(names)}")
    if strange := [name for name in names if not isinstance(name, str) or not name.isidentifier()]:
        raise UsageError(f"reward server {url}: the component {strange[0]!r} is no name")
    groups = of_type("groups", bool, False)
    return About(of_type("name", str), tuple(names), of_type("version", str), groups)


def read_scores(
    url: str, content: bytes, components: Sequence[str], clips: int
) -> dict[str, np.ndarray]:
    """component -> float32[clips].

    Raises:
      NotFiniteError: a score is not finite.
      UsageError: a component is missing, unknown, of another length, or not of numbers.
    """
    said = _read(url, content)
    for what, names in (
        ("has no component", [name for name in components if name not in said]),
        ("has the unknown component", [name for name in said if name not in components]),
    ):
        if names:
            raise UsageError(
                f"reward server {url}: the answer {what} {listed(names)}; it said that it has"
                f" {listed(components, len(components))}"
            )
    return {name: _numbers(f"reward server {url}: {name!r}", said[name], clips) for name in said}


def _numbers(what: str, values: Any, clips: int) -> np.ndarray:
    expected = f"expected a list of {clips} numbers, one for each clip"
    if not isinstance(values, list):
        raise UsageError(f"{what} is a {type(values).__name__}, {expected}")
    if len(values) != clips:
        raise UsageError(f"{what} has {len(values)} values, {expected}")
    if strange := [x for x in values if isinstance(x, bool) or not isinstance(x, int | float)]:
        raise UsageError(f"{what} has {json.dumps(strange[0])[:40]} in it, {expected}")
    with np.errstate(over="ignore"):  # what is too large is infinite here
        scores = np.asarray([_float(x) for x in values], np.float64).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise NotFiniteError(f"{what} is {scores[bad[0]]} for clip {bad[0]} of {clips}")
    return scores


def _float(x: float) -> float:
    try:
        return float(x)
    except OverflowError:
        return float("inf")
