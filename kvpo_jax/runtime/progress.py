"""What a command shows: tables, the stages under way, and the line of a training iteration.

All of it fits the terminal's width. Where there is no terminal it is plain text, as wide as COLUMNS
or 80, and a stage that takes long is announced by a line now and then.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext, suppress
from typing import NamedTuple, TextIO, TypeVar

from rich.box import Box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

RULE = Box("    \n    \n -- \n" + 5 * "    \n", ascii=True)  # a line under the header
GAP = 2  # spaces between two columns
Rows = Sequence[Sequence[object]]
T = TypeVar("T")


class _Console(Console):
    """One that raises BrokenPipeError, as print does, and does not end the process."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704


def console(stream: TextIO | None = None) -> Console:
    """Makes the console of a stream, by default stdout. What its encoding lacks is escaped.

    While a bar is on stdout, its console is the one that knows how to print above it.
    """
    if stream is None and STAGES.terminal is not None:
        return STAGES.terminal
    stream = stream or sys.stdout
    escape_unencodable(stream)
    return _Console(
        file=stream,
        force_terminal=stream.isatty(),
        width=None if stream.isatty() else int(os.environ.get("COLUMNS") or 80),
        markup=False,
        emoji=False,
        highlight=False,
    )


def escape_unencodable(stream: TextIO) -> None:
    """Lets a stream write escapes for what its encoding lacks, where it can."""
    if reconfigure := getattr(stream, "reconfigure", None):
        reconfigure(errors="backslashreplace")


def table(title: str, columns: Sequence[str], rows: Rows, stream: TextIO | None = None) -> None:
    """Prints a table. One that is too wide continues below, with its first column again.

    Args:
      title: the line above it; none if empty.
      columns: the names of the columns.
      rows: a cell per column each. Columns of numbers are aligned on the right.
      stream: where to print, by default stdout.
    """
    out = console(stream)
    names = [_encodable(name, out) for name in columns]
    cells = [[_encodable(cell, out) for cell in row] for row in rows]
    widths = [max(map(cell_len, texts)) for texts in zip(names, *cells, strict=True)]
    if len(widths) > 1:
        widths[0] = min(widths[0], out.width // 2)
    if title:
        out.print(_encodable(title, out))
    for part in _parts(widths, out.width):
        shown = Table(box=RULE, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        for i in part:
            numbers = i > 0 and all(row[i][:1] in "0123456789+-.[" for row in cells)
            width = min(widths[i], out.width - (GAP + widths[0] if i else 0))
            shown.add_column(
                Text(names[i]), justify="right" if numbers else "left", width=width, overflow="fold"
            )
        for row in cells:
            shown.add_row(*(Text(row[i]) for i in part))
        out.print(shown)


def _parts(widths: Sequence[int], width: int) -> list[list[int]]:
    """Divides columns into tables that fit `width`, each of which begins with the first column."""
    parts = [[0]]
    for i in range(1, len(widths)):
        longer = [*parts[-1], i]
        if len(longer) > 2 and sum(widths[j] + GAP for j in longer) > width + GAP:
            parts.append([0])
        parts[-1].append(i)
    return parts


def _encodable(value: object, out: Console) -> str:
    """Makes text of a value, with escapes for what the console's encoding lacks."""
    return str(value).encode(out.encoding, "backslashreplace").decode(out.encoding)


def say(text: str, style: str = "") -> None:
    """Prints a line. A terminal gets it wrapped between words."""
    out = console()
    STAGES.heard()
    out.print(Text(_encodable(text, out), style=style), soft_wrap=not out.is_terminal)


def warn(text: str) -> None:
    """Prints a line that a user should not overlook: in yellow on a terminal."""
    say(text, "yellow")


# ---------------------------------------------------------------- stages

YOUNG = 60.0  # seconds of a process in which it is never silent for longer than FIRST
FIRST = 5.0  # seconds of silence after which a stage is announced for the first time
LATER = 30.0  # and again
TICK = 1.0  # seconds between two looks at it
SETTLED = 0.5  # seconds from which on an inner stage is worth showing


class Stage:
    """Something that takes long.

    Args:
      name: what it is called.
      total: how many steps it has; None if that is not known.
      steady: whether its steps take equally long, so that the time left can be told.
      clock: seconds, monotonic.

    Attributes:
      shown: its name at the moment.
      done: its steps so far.
      begin: when it began.
      moved: when it made its last step, or began.
    """

    def __init__(self, name: str, total: int | None, steady: bool, clock: Callable[[], float]):
        self.name, self.total, self.steady, self._clock = name, total, steady, clock
        self.shown, self.done = name, 0
        self.begin = self.moved = clock()

    def advance(self, steps: int = 1, description: str | None = None) -> None:
        """Counts steps; `description` is the new name."""
        self.done += steps
        self.moved = self._clock()
        self.shown = description or self.shown

    def text(self) -> str:
        """The name, and how far the stage has come."""
        count = "" if self.total is None else f"/{self.total}"
        return f"{self.shown} {self.done}{count}" if count or self.done else self.shown


class Stages:
    """The stages under way, the outermost first, and when a pipe has to be told of them.

    Args:
      clock: seconds, monotonic.

    Attributes:
      shown: whether there is a `bar`, inside of which every stage is shown.
      terminal: the console of a bar at the bottom of a terminal, if there is one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._begin, self._heard = clock, clock(), clock()
        self._stages: list[Stage] = []
        self.shown = False
        self.terminal: Console | None = None
        self._announced: set[tuple[str, ...]] = set()

    def enter(self, name: str, total: int | None = None, steady: bool = True) -> Stage:
        """Begins a stage inside of those under way."""
        stage = Stage(name, total, steady, self._clock)
        if not self._stages:
            self.heard()
        self._stages.append(stage)
        return stage

    def leave(self, stage: Stage) -> None:
        """Ends a stage, and those inside of it."""
        if stage in self._stages:
            del self._stages[self._stages.index(stage) :]

    def heard(self) -> None:
        """Notes that the user has been told something."""
        self._heard = self._clock()

    def announcement(self, width: int = 80) -> str | None:
        """The line that a pipe gets now; None if it has not been silent for long enough.

        Stages in the middle are left out where it would be wider than `width`.
        """
        stages, now = [*self._stages], self._clock()
        known = tuple(stage.name for stage in stages)
        young = now - self._begin < YOUNG or known not in self._announced
        if not stages or now - self._heard < (FIRST if young else LATER):
            return None
        self._heard = now
        self._announced.add(known)
        seconds = duration(now - stages[0].moved)
        texts = _outer_and_inner([stage.text() for stage in stages], width - len(seconds) - 2)
        return ", ".join([*texts, seconds])

    def bar(self, out: Console) -> Table:
        """The line at the bottom of a terminal: what is done, a bar, and a time.

        The bar is that of the outermost stage that has steps. The time is what is left of it or, if
        that is not known, since when the outermost stage has made no step. Stages that have just
        begun are not shown: they would flicker.
        """
        now = self._clock()
        inner = [stage for stage in self._stages[1:] if now - stage.begin >= SETTLED]
        stages = [*self._stages[:1], *inner]
        line = Table.grid(padding=(0, 1, 0, 0), expand=True)
        if not stages:
            return line
        barred = next((stage for stage in stages if stage.total), None)
        seconds = duration(now - stages[0].moved)
        if barred is stages[-1] and barred.total and barred.done and barred.steady:
            each = (barred.moved - barred.begin) / barred.done
            seconds = f"{duration(each * (barred.total - barred.done))} left"
        cells: list[Text | ProgressBar] = []
        room = out.width - 1 - len(seconds)
        if barred is not None:
            width = min(20, out.width // 4)
            cells.append(
                ProgressBar(
                    barred.total,
                    barred.done,
                    width=width,
                    style="bright_black",
                    complete_style="default",
                    finished_style="default",
                )
            )
            room -= width + 1
        texts = _outer_and_inner([_encodable(stage.text(), out) for stage in stages], room)
        text = set_cell_size(", ".join(texts), max(room, 0))
        line.add_row(Text(text, no_wrap=True), *cells, Text(seconds, no_wrap=True))
        return line


def _outer_and_inner(texts: list[str], room: int) -> list[str]:
    """The texts of stages, outermost first, without as many in the middle as have no room."""
    while len(texts) > 2 and cell_len(", ".join(texts)) > room:
        texts = [texts[0], *texts[2:]]
    return texts


STAGES = Stages()  # of this process
COMPILES = "/jax/core/compile/"  # how the names of JAX's events begin
_compiling: list[Stage] = []  # the same one for every level of nesting


@contextmanager
def bar(
    name: str, total: int | None = None, *, steady: bool = True, live: bool = True
) -> Iterator[Callable[..., None]]:
    """Shows a stage while it runs: a bar at the bottom of a terminal, else a line now and then.

    A stage that begins inside of another one is shown beside it. No bar remains at the end. It is
    on stdout, as what a command says of its work, so that stderr has errors alone.

    Args:
      name: what is done.
      total: how many steps it has; None if that is not known.
      steady: see `Stage`.
      live: whether a terminal gets a bar. It would be in the way of what is typed.

    Yields:
      advance(steps=1, description=None), to call after every step.
    """
    stage = STAGES.enter(name, total, steady)
    try:
        with nullcontext() if STAGES.shown else _shown(live):
            yield stage.advance
    finally:
        STAGES.leave(stage)


def steps(items: Iterable[T], name: str, total: int | None = None, size: int = 1) -> Iterator[T]:
    """Goes through items, the steps of a stage that is shown if it is inside of a `bar`.

    Args:
      items: of any kind.
      name: what is done.
      total: how many items there are; None if they know.
      size: steps of an item.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    stage = STAGES.enter(name, None if total is None else size * total)
    try:
        for item in items:
            yield item
            stage.advance(size)
    finally:
        STAGES.leave(stage)


@contextmanager
def _shown(live: bool) -> Iterator[None]:
    """Shows the stages under way, at the bottom of a terminal if `live`."""
    out = console()
    at_bottom = live and out.is_terminal and not out.is_dumb_terminal
    STAGES.shown = True
    if "jax" in sys.modules:
        _show_compilation()
    try:
        with _drawn(out) if at_bottom else _told(out):
            yield
    finally:
        STAGES.shown = False


@contextmanager
def _drawn(out: Console) -> Iterator[None]:
    """Draws the stages under way, four times a second. What is printed appears above them."""
    with Live(
        get_renderable=lambda: STAGES.bar(out),
        console=out,
        transient=True,
        redirect_stderr=sys.stderr.isatty(),  # a file gets what is meant for it
    ):
        STAGES.terminal = out
        try:
            yield
        finally:
            STAGES.terminal = None


@contextmanager
def _told(out: Console) -> Iterator[None]:
    """Prints what is under way when nothing else has been printed for long."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(TICK):
            if (text := STAGES.announcement(out.width)) is not None:
                with suppress(OSError):  # what cannot be written, the command itself meets too
                    out.print(_encodable(text, out), soft_wrap=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def show_cursor() -> None:
    """Brings back what a bar hides, in a process that ends without leaving it."""
    if STAGES.terminal is not None:
        STAGES.terminal.show_cursor(True)


def mute() -> None:
    """Prints nothing on stdout from now on: of several processes, the main one speaks."""
    sys.stdout = open(os.devnull, "w")


@functools.cache
def _show_compilation() -> None:
    """From now on the compilation of a program is a stage, with the name of the program."""
    import jax  # which not every command needs

    jax.monitoring.register_scalar_listener(_compilation_begins)
    jax.monitoring.register_event_duration_secs_listener(_compilation_ends)


def _compilation_begins(event: str, value: float, **details: object) -> None:
    # Tracing, lowering, or compiling; tracing is nested, and each of them ends, also if it fails.
    if event.startswith(COMPILES):
        program = str(details.get("fun_name")).removeprefix("jit(").removesuffix(")")
        _compiling.append(_compiling[0] if _compiling else STAGES.enter(f"compiling {program}"))


def _compilation_ends(event: str, duration_secs: float, **details: object) -> None:
    if event.startswith(COMPILES) and _compiling:
        stage = _compiling.pop()
        if not _compiling:
            STAGES.leave(stage)


# ---------------------------------------------------------------- the line of an iteration


class Column(NamedTuple):
    """A word in the line of an iteration.

    Attributes:
      text: how its number is shown.
      width: characters that are kept for it, so that the lines of a run are aligned.
      meaning: of the word.
    """

    text: str
    width: int
    meaning: str


# Metric -> its column. The first ones are shown where there is room.
COLUMNS = {
    "reward": Column("reward={:+.3f}", 13, "mean reward of the branches"),
    "best_minus_anchor": Column("best={:+.0e}", 10, "reward of the best branch minus the anchor's"),
    "reward_std_in_group": Column("std={:.0e}", 8, "standard deviation of the rewards in a group"),
    "gate_open": Column("gate={:.0%}", 9, "share of prompts with a branch above the anchor"),
    "kl": Column("KL={:.0e}", 7, "divergence from the reference policy"),
    "grad_norm": Column("grad={:.0e}", 9, "norm of the gradient"),
    "seconds": Column("took={:.1f}s", 10, "seconds of the iteration"),
    "win_rate": Column("win={:.0%}", 8, "share of branches with a higher reward than the anchor"),
    "reward_anchor": Column("anchor={:+.3f}", 13, "mean reward of the anchors"),
    "log_ratio_std": Column(
        "ratio={:.0e}", 10, "standard deviation of the log ratio to the old policy"
    ),
    "clip_fraction": Column("clip={:.0%}", 9, "share of the ratios that are clipped"),
}
SHUT = "gate shut"  # for every prompt


def legend() -> str:
    """Explains the words of a progress line, a line each."""
    words = {column.text.partition("=")[0]: column.meaning for column in COLUMNS.values()}
    words |= {
        SHUT: "no branch of any prompt beats its anchor",
        "no update": "the gate leaves nothing to learn: the policy stays as it is",
        "eta": "time that is left, from the second iteration on",
    }
    return "\n".join(f"  {word:9s}  {meaning}" for word, meaning in words.items())


class Progress:
    """The line of every training iteration, with the seconds it took and the time that is left.

    Args:
      iterations: how many there are in all.
      clock: seconds, monotonic.
    """

    def __init__(self, iterations: int, clock: Callable[[], float] = time.monotonic):
        self._iterations, self._clock, self._begin, self._took = iterations, clock, clock(), 0.0
        # Seconds without those of compilation. The first iteration also traces the programs, or
        # reads them from disk, which nothing counts: it says nothing of the others.
        self._recent: deque[float] = deque(maxlen=20)
        self._laps = 0

    def show(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Ends the iteration, numbered from 0, and prints its line."""
        self.lap(metrics.get("seconds_compile", 0.0))
        line = self.line(iteration, metrics, console().width)
        if SHUT in line:
            warn(line)
        else:
            say(line)

    def lap(self, compiling: float = 0.0) -> None:
        """Ends an iteration, of which `compiling` seconds will not come again."""
        now = self._clock()
        self._took, self._begin = now - self._begin, now
        self._laps += 1
        if self._laps > 1:
            self._recent.append(max(0.0, self._took - compiling))

    def line(self, iteration: int, metrics: Mapping[str, float], width: int = 80) -> str:
        """Formats the iteration that the last lap has ended: as many metrics as `width` allows."""
        end = ""
        if self._recent:
            left = sum(self._recent) / len(self._recent) * (self._iterations - iteration - 1)
            end = f" eta={rough(left)}"
        line = f"{iteration + 1:{len(str(self._iterations))}d}/{self._iterations}"
        metrics = {**metrics, "seconds": self._took}
        for name, column in COLUMNS.items():
            if name not in metrics:
                continue
            part = _short(column.text.format(metrics[name]))
            if name == "gate_open" and not metrics[name]:
                part = f"{SHUT}: no update" if metrics.get("skipped_update") else SHUT
            if name == "grad_norm" and metrics.get("skipped_update"):
                continue  # it is 0
            if len(line) + 1 + len(part) + len(end) > width:
                break
            line += f" {part:{min(column.width, width - len(line) - 1 - len(end))}s}"
        return (line + end).rstrip()


def _short(text: str) -> str:
    """Shortens exponents: 2e-03 to 2e-3, and 2e+00 to 2e0."""
    return re.sub(r"e\+?(-?)0?(?=\d)", r"e\1", text)


def rough(seconds: float) -> str:
    """Formats seconds as m:ss or, from an hour on, as hours: 0:59, 13.3h."""
    return f"{seconds / 3600:.1f}h" if round(seconds) >= 3600 else duration(seconds)


def duration(seconds: float) -> str:
    """Formats seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
