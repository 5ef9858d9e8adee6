"""The life of a training process: when it stops, what it saves then, where its seconds go."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from kvpo_jax.runtime import sharding

STOPPED = 75  # exit status of a run that was stopped and can be continued: "try again" in sysexits
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def until_stopped(
    first: int, end: int, stop: threading.Event, profile: Path | None
) -> Iterator[int]:
    """first ... end - 1, until a stop signal has reached a process.

    A trace of the third iteration, or else of the last, goes to the folder `profile`: the first
    iteration of a process compiles, the second may still read what was compiled from disk.
    """
    traced = min(first + 2, end - 1)
    for number in range(first, end):
        if sharding.any_process(stop.is_set()):
            return
        if profile is not None and number == traced and sharding.is_main():
            with jax.profiler.trace(profile):
                yield number
        else:
            yield number


@contextmanager
def saved_on_error(checkpoints: ocp.CheckpointManager, save: Callable[[], None]) -> Iterator[None]:
    """Saves the last good state before an error leaves the loop.

    Every way out waits for the save under way, which would be lost otherwise. An error that one of
    several processes has alone saves nothing, because all of them have to take part in a save;
    a value that is not finite is seen by all.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, FloatingPointError):
            try:
                save()
            except Exception as failure:
                error.add_note(f"the last good state could not be saved either ({failure})")
        raise
    finally:
        checkpoints.wait_until_finished()


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM, SIGINT (Ctrl-C) and SIGHUP set, so that the loop can save and leave.

    A second SIGINT is a KeyboardInterrupt; further ones of the others change nothing. A signal that
    the process was started to ignore, by nohup or as a job in the background, stays ignored.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _: object) -> None:
        if stop.is_set():
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        stop.set()
        if number == signal.SIGINT:  # os.write: a print may be under way, and is not reentrant
            os.write(2, b"\nsaving after this iteration; Ctrl-C again ends at once\n")

    heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            # None is the handler of jax.distributed, which is not Python's.
            signal.signal(number, handler or signal.SIG_DFL)


class Clock:
    """Seconds of a run by stage, over all the processes that it took.

    Compilation is counted as a stage of its own, apart from the stage that it happens in.
    """

    def __init__(self):
        self._before, self._stages, self._begin = {}, {}, time.monotonic()
        self._compiling, self._lap = 0.0, {}
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, seconds: float, **_) -> None:
        # Not tracing: its events are nested (one per inner jit) and would be counted twice.
        if event.endswith(("backend_compile_duration", "jaxpr_to_mlir_module_duration")):
            self._compiling += seconds

    def add(self, seconds: Mapping[str, float]) -> None:
        """Counts the seconds of an earlier process."""
        self._before = dict(seconds)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Counts what runs inside to a stage."""
        begin, compiling = time.monotonic(), self._compiling
        yield
        spent = time.monotonic() - begin - (self._compiling - compiling)
        self._stages[stage] = self._stages.get(stage, 0.0) + spent

    def lap(self) -> dict[str, float]:
        """Seconds of every stage since the last lap."""
        now = {**self._stages, "compile": self._compiling}
        lap = {name: value - self._lap.get(name, 0.0) for name, value in now.items()}
        self._lap = now
        return lap

    @property
    def seconds(self) -> dict[str, float]:
        """Total, compile, and every stage."""
        total = time.monotonic() - self._begin
        now = {"total": total, "compile": self._compiling, **self._stages}
        return {name: value + self._before.get(name, 0.0) for name, value in now.items()}
