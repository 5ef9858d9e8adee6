"""Tables, bars, and the line of a training iteration.

They fit the terminal's width; where there is no terminal, COLUMNS or 80, and they have no colours.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich import progress as live
from rich.box import Box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

RULE = Box("    \n    \n -- \n" + 5 * "    \n", ascii=True)  # a line under the header
GAP = 2  # spaces between two columns
Rows = Sequence[Sequence[object]]


def console(stream: TextIO | None = None) -> Console:
    """Makes the console of a stream, by default stdout. What its encoding lacks is escaped."""
    stream = stream or sys.stdout
    escape_unencodable(stream)
    return Console(
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


@contextmanager
def line(stream: TextIO | None = None) -> Iterator[Callable[[str], None]]:
    """Shows the newest state of a stage, cut to the width of the terminal; a pipe gets the last.

    Args:
      stream: where to show it, by default stdout.

    Yields:
      show(text), which replaces the text before.
    """
    out, shown = console(stream), ""

    def show(text: str) -> None:
        nonlocal shown
        shown = set_cell_size(_encodable(text, out), out.width - 1)
        if out.is_terminal:
            print(f"\r{shown}", end="", file=out.file, flush=True)

    try:
        yield show
    finally:
        if shown:
            print("" if out.is_terminal else shown.rstrip(), file=out.file, flush=True)


@contextmanager
def bar(
    description: str, total: int | None, stream: TextIO | None = None, *, period: float = 30.0
) -> Iterator[Callable[..., None]]:
    """Shows how far a long stage has come: a bar on a terminal, else a line now and then.

    Args:
      description: what is done.
      total: how many steps it has; None if that is not known.
      stream: where to show it, by default stderr.
      period: seconds between two lines where there is no terminal. A shorter stage prints none.

    Yields:
      advance(steps=1, description=None), to call after every step.
    """
    out = console(stream or sys.stderr)
    if not out.is_terminal:
        yield _lines(description, total, out, period)
        return
    column = Column(ratio=1, no_wrap=True, overflow="crop")
    with live.Progress(
        live.TextColumn("{task.description}", markup=False, table_column=column),
        live.BarColumn(bar_width=20),
        live.MofNCompleteColumn(),
        live.TimeRemainingColumn(),
        console=out,
        expand=True,
    ) as shown:
        task = shown.add_task(_encodable(description, out), total=total)

        def advance(steps: int = 1, description: str | None = None) -> None:
            text = None if description is None else _encodable(description, out)
            shown.update(task, advance=steps, description=text)

        yield advance


def _lines(name: str, total: int | None, out: Console, period: float) -> Callable[..., None]:
    """Makes the `advance` of a bar that prints a line, at most one per `period` seconds."""
    done, due = 0, time.monotonic() + period

    def advance(steps: int = 1, description: str | None = None) -> None:
        nonlocal name, done, due
        name, done = description or name, done + steps
        if time.monotonic() >= due:
            due = time.monotonic() + period
            text = f"{name}: {done}/{total}" if total else f"{name}: {done}"
            out.print(_encodable(text, out), soft_wrap=True)

    return advance


# Metric -> its text in a line, and its meaning. The first ones are shown where there is room.
COLUMNS = {
    "reward": ("reward {:+.3f}", "mean reward of the branches"),
    "reward_std_in_group": ("std {:.0e}", "standard deviation of the rewards in a group"),
    "gate_open": ("gate {:4.0%}", "share of prompts with a branch above the anchor"),
    "kl": ("KL {:.0e}", "divergence from the reference policy"),
    "reward_anchor": ("anchor {:+.3f}", "reward of the anchor"),
    "grad_norm": ("grad {:.0e}", "norm of the gradient"),
    "win_rate": ("win {:4.0%}", "share of branches with a higher reward than their anchor"),
    "log_ratio_std": ("ratio {:.0e}", "standard deviation of the log ratio to the old policy"),
    "clip_fraction": ("clip {:4.0%}", "share of the ratios that are clipped"),
}


def legend() -> str:
    """Explains the words of a progress line, a line each."""
    return "\n".join(f"  {text.split()[0]:6s}  {meaning}" for text, meaning in COLUMNS.values())


class Progress:
    """The line of every training iteration, with the seconds it took and the time that is left.

    Args:
      iterations: how many there are in all.
      clock: seconds, monotonic.
    """

    def __init__(self, iterations: int, clock: Callable[[], float] = time.monotonic):
        self._iterations, self._clock, self._begin, self._took = iterations, clock, clock(), 0.0
        self._recent: deque[float] = deque(maxlen=20)  # seconds, without those of compilation
        self._laps = 0

    def show(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Ends the iteration, numbered from 0, and prints its line."""
        self.lap(metrics.get("seconds_compile", 0.0))
        print(self.line(iteration, metrics, console().width), flush=True)

    def lap(self, compiling: float = 0.0) -> None:
        """Ends an iteration, of which `compiling` seconds will not come again."""
        now = self._clock()
        self._took, self._begin = now - self._begin, now
        self._laps += 1
        if self._laps == 2:
            self._recent.clear()  # the first one has traced the programs, and read them from disk
        self._recent.append(max(0.0, self._took - compiling))

    def line(self, iteration: int, metrics: Mapping[str, float], width: int = 80) -> str:
        """Formats the iteration that the last lap has ended: as many metrics as `width` allows."""
        left = sum(self._recent) / len(self._recent) * (self._iterations - iteration - 1)
        line = f"{iteration + 1:{len(str(self._iterations))}d}/{self._iterations}"
        end = f"  {self._took:6.1f} s  {duration(left):>7s} left"
        for part in (text.format(metrics[m]) for m, (text, _) in COLUMNS.items() if m in metrics):
            if len(line) + GAP + len(part) + len(end) > width:
                break
            line += f"  {part}"
        return line + end


def duration(seconds: float) -> str:
    """Formats seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
