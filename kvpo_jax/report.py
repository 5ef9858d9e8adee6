"""Tells the story of a run in one HTML page, or compares several runs.

    python -m kvpo_jax.report runs/tiny-...                  # runs/tiny-.../report/index.html
    python -m kvpo_jax.report runs/a runs/b --output=ab.html

It reads the files of the run directories and nothing else, also while a run is under way. The page
holds its videos and pictures, so it can be opened from disk, copied and sent; it needs no server
and no network. A run writes it at its end, too. The page of several runs is written to
report/index.html in the current directory.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from kvpo_jax.errors import UsageError, nearest
from kvpo_jax.runtime import command, page, progress


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    given = flags.FLAGS
    runs = arguments[1:]
    for run in runs:
        if run.startswith("--"):
            name = run[2:].partition("=")[0]
            raise UsageError(f"there is no flag --{name}{nearest(name, given)}")
    if not runs:
        raise UsageError("expected one or more run directories; see --help")
    workdirs = [Path(run) for run in runs]
    folder = workdirs[0] if len(workdirs) == 1 else Path()
    output = Path(given.output) if given.output else folder / "report" / "index.html"
    if output.is_dir():
        raise UsageError(f"--output={output} is a folder; name a file in it")
    with progress.bar("writing the page"):
        page.write(workdirs, output)
    print(f"wrote {output}", flush=True)


def define_flags() -> None:
    """The flags of the command."""
    command.define_path("output", None, "the page; default: report/index.html in the run directory")


def cli() -> None:
    """Entry point."""
    command.run("kvpo_jax.report", define_flags, main)


if __name__ == "__main__":
    cli()
