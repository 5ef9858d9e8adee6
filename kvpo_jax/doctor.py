"""Says what is wrong with runs, since when, and what to do; or that all is well.

    python -m kvpo_jax.doctor runs/tiny-... [RUN ...]

It reads the records of a run, also of one that is under way or of an older version. It compiles
nothing, and imports no scorer that a configuration names. docs/doctor.md explains its rules. The
exit status is 0 whatever it finds, and 1 if a run cannot be read.
"""

from __future__ import annotations

from absl import flags

from kvpo_jax.errors import UsageError, nearest
from kvpo_jax.runtime import command
from kvpo_jax.runtime.doctor import examine, over, spans_shown
from kvpo_jax.runtime.records import Records, read_run


def report(run: Records) -> list[str]:
    """The lines that say how a run is: a first one, and one per trouble, there or over."""
    if not run.metrics:
        return ["no iteration is recorded yet"]
    records = run.config, run.metrics, run.branches, run.heldout
    found = [
        f"  {name}, since iteration {since}: {text}" for name, text, since in examine(*records)
    ]
    found += [f"  over: {name}, in {spans_shown(spans)}" for name, spans in over(*records).items()]
    last = run.metrics[-1]["iteration"]
    return [f"iterations 0 to {last}{'' if found else ': all is well'}", *found]


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    runs, faults = arguments[1:], []
    for argument in runs:
        if argument.startswith("-"):
            name = argument.lstrip("-").partition("=")[0]
            raise UsageError(f"there is no flag --{name}{nearest(name, flags.FLAGS)}")
    if not runs:
        raise UsageError("name a run: python -m kvpo_jax.doctor RUN [RUN ...]")
    for name in runs:
        try:
            first, *others = report(read_run(name))
        except (UsageError, OSError) as error:  # the others are still looked at
            faults.append(command.in_a_line(error))
        else:
            print("\n".join([f"{name}: {first}", *others]), flush=True)
    if faults:
        raise UsageError("; ".join(faults))


def define_flags() -> None:
    """It has no flags of its own."""


def cli() -> None:
    """Entry point."""
    command.run("kvpo_jax.doctor", define_flags, main)


if __name__ == "__main__":
    cli()
