"""The life of a training process: when it stops, what it saves then, how several of them end, where
its seconds go.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from kvpo_jax.errors import SaveError, SharedError, UsageError
from kvpo_jax.runtime import checkpoint, command, progress, sharding

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
    a value that is not finite is seen by all, and so is a SharedError.
    """
    try:
        yield
    except SaveError:
        raise  # another save would fail as this one has
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, FloatingPointError | SharedError):
            try:
                save()
            except Exception as failure:
                error.add_note(f"the last good state could not be saved either ({failure})")
        raise
    finally:
        checkpoint.wait(checkpoints)


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


# ---------------------------------------------------------------- several processes

FAILED = "kvpo_jax/failed"  # a key of JAX's coordination service, and a barrier
GRACE = 10_000  # ms that a process which ends waits for the others to see why


@contextmanager
def ending_together() -> Iterator[None]:
    """Ends every process of a run within seconds of an error that one of them meets.

    The others may wait for it in an operation over all devices, where no exception reaches them,
    and it would wait for them as it leaves: 300 s, the timeout of JAX's shutdown. So the one that
    fails leaves a word in JAX's coordination service, where all look once a second. They end with
    status 1. A save under way is complete by then, for `saved_on_error` waits for it.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    client = ocp.multihost.get_jax_distributed_client()
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(client, done), daemon=True)
    watcher.start()
    try:
        yield
    except SystemExit:  # stopped, which all of them are
        raise
    except BaseException as error:
        if done.is_set():  # another has failed and left, which is what has failed here
            watcher.join()
        done.set()
        if isinstance(error, UsageError | OSError):
            what = command.in_a_line(error)
        else:
            what = f"{type(error).__name__}: {error}"
            traceback.print_exception(error)
        with suppress(jax.errors.JaxRuntimeError):  # another was faster
            client.key_value_set(FAILED, f"process {jax.process_index()} has failed, {what}")
        _end(client, what)
    finally:
        done.set()
        watcher.join()


def _watch(client: Any, done: threading.Event) -> None:
    """Ends this process once another has left a word."""
    while not done.wait(1.0):
        with suppress(jax.errors.JaxRuntimeError):  # there is none yet
            what = client.key_value_try_get(FAILED)
            done.set()
            _end(client, what)


def _end(client: Any, what: str) -> None:
    """Ends this process with status 1, as soon as the others know that they have to end too."""
    progress.show_cursor()
    print(f"error: {what}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    with suppress(jax.errors.JaxRuntimeError):  # one does not come: it was killed
        client.wait_at_barrier(FAILED, GRACE)
    if sharding.is_main():
        time.sleep(1)  # the service ends with it, and JAX ends those who are still there by SIGABRT
    os._exit(1)  # no exit handlers: they would wait for the others


# ---------------------------------------------------------------- seconds


class Clock:
    """Seconds of a run by stage, over all the processes that it took.

    Compilation is counted as a stage of its own, apart from the stage that it happens in.
    """

    def __init__(self):
        self._before: dict[str, float] = {}
        self._stages: dict[str, float] = {}
        self._lap: dict[str, float] = {}
        self._begin, self._compiling = time.monotonic(), 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_) -> None:
        # Not tracing: its events are nested (one per inner jit) and would be counted twice.
        if event.endswith(("backend_compile_duration", "jaxpr_to_mlir_module_duration")):
            self._compiling += duration_secs

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
