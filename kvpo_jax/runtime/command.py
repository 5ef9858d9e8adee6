"""What every command has in common: flags, one-line errors, the cache of compiled programs."""

from __future__ import annotations

import logging as python_logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from absl import app, flags, logging

from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import progress

flags.disclaim_key_flags()  # what define_path defines is a flag of the module that calls it


def run(module: str, define_flags: Callable[[], None], main: Callable[[list[str]], None]) -> None:
    """Runs a command, whichever way it was started: -m, a console script, or a file of tools/.

    A UsageError or a system error is one line, see `fail`. A reader of the output that goes away
    ends the command quietly, with the status of a program that SIGPIPE ends.

    Args:
      module: `__name__` of the command's module; its docstring is the usage text.
      define_flags: defines its flags; several commands have flags of the same name, so they are
        defined by the one that runs.
      main: takes the program's name and what is left of the command line.
    """
    define_flags()
    if module in sys.modules:  # else it runs as __main__, by -m
        sys.modules["__main__"].__doc__ = sys.modules[module].__doc__
        for flag in flags.FLAGS.get_flags_for_module(module):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    # Python has none where the shell has closed them.
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        progress.escape_unencodable(stream)
    quieten_libraries()

    def quiet_main(arguments: list[str]) -> None:
        # Orbax logs thirty lines for a checkpoint, a warning for one that is only read, and a
        # hundred lines for a disk that is full; each of its errors is raised, too.
        logging.set_verbosity(logging.FATAL)
        main(arguments)

    try:
        try:
            app.run(quiet_main, flags_parser=parse_flags)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except BrokenPipeError:
        _discard(sys.stdout)
        sys.exit(128 + signal.SIGPIPE)
    except (UsageError, OSError) as error:
        fail(error)


def quieten_libraries() -> None:
    """Keeps from the user what libraries say about themselves."""
    # TensorFlow, where it is installed: tensorflow_datasets and tensorboardX import it.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # JAX names every backend that a machine does not have, imageio every video that is rotated.
    python_logging.getLogger("jax._src.xla_bridge").setLevel(python_logging.WARNING)
    python_logging.getLogger("imageio").setLevel(python_logging.ERROR)
    show = sys.unraisablehook

    def show_unless_closed(unraisable: sys.UnraisableHookArgs) -> None:
        # When one array of a checkpoint cannot be written, tensorstore says this for every other.
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_unless_closed


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command's own flags.

    It leaves every --config.FIELD=VALUE in place: the fields are known once the configuration is
    loaded.
    """
    flags.FLAGS.set_gnu_getopt()
    try:
        return flags.FLAGS(argv, known_only=True)
    except flags.Error as error:
        sys.exit(f"error: {'; '.join(str(error).splitlines())}")
    except SystemExit:  # absl ends --help with status 1
        sys.exit()


class _PathParser(flags.ArgumentParser):
    """Reads a flag that is a local path; a leading ~ is the home directory, as in a shell."""

    def parse(self, argument: str) -> str:
        from kvpo_jax.runtime.config import local_path  # imports JAX, which not every command needs

        return local_path(argument)

    def flag_type(self) -> str:
        return "path"


def define_path(
    name: str, default: str | None, help: str, required: bool = False, multi: bool = False
) -> None:
    """Defines a flag that is a local path, a str; with `multi` a list of them, one per use."""
    serializer: flags.ArgumentSerializer = flags.ArgumentSerializer()
    if multi:
        flags.DEFINE_multi(_PathParser(), serializer, name, default, help, required=required)
    else:
        flags.DEFINE(_PathParser(), name, default, help, serializer=serializer, required=required)


def writable(name: str, path: str) -> Path:
    """The path of the file that the flag `name` names, whose folder is made.

    For a command that would otherwise find out at the end of its work.

    Raises:
      UsageError: it is a folder, or cannot be written.
      OSError: its folder cannot be made.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UsageError(f"--{name}={path} cannot be written; name a file in a folder of yours")
    return file


class _WhichParser(flags.ArgumentParser):
    """Reads a flag that names a checkpoint of a run."""

    syntactic_help = "the number of an iteration, newest, or best by its held-out reward"

    def __init__(self, names: Sequence[str]):
        self._names = names

    def parse(self, argument: int | str) -> int | str:
        text = str(argument)
        if text in self._names:
            return text
        if not text.isdecimal():
            raise ValueError(f"expected {self.syntactic_help}")
        return int(text)

    def flag_type(self) -> str:
        return "checkpoint"


def define_iteration() -> None:
    """Defines --iteration, which of a run's checkpoints is read: a `checkpoint.Which`."""
    from kvpo_jax.runtime.checkpoint import BEST, NEWEST  # as in _PathParser

    parser, help = _WhichParser((NEWEST, BEST)), "which checkpoint of the run"
    flags.DEFINE(parser, "iteration", NEWEST, help, serializer=flags.ArgumentSerializer())


def fail(error: UsageError | OSError) -> NoReturn:
    """Ends the program with one line that says what is wrong.

    Any other exception is a fault of a program and keeps its traceback.
    """
    print("error:", in_a_line(error), file=sys.stderr)
    _discard(sys.stderr)  # threads of libraries may still report the same
    sys.exit(1)


def in_a_line(error: UsageError | OSError) -> str:
    """What is wrong, and where it happened."""
    text = ": ".join([*getattr(error, "__notes__", ()), _message(error)])
    return "; ".join(filter(None, map(str.strip, text.splitlines())))


def _message(error: UsageError | OSError) -> str:
    """What is wrong: the text of a UsageError; the files and the reason of a system error."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error.args[0] if error.args and isinstance(error, UsageError) else error)
    names = [name for name in (error.filename, error.filename2) if name is not None]
    if not names and not _writes(sys.stdout):
        names = ["standard output"]
    files = " to ".join(os.fsdecode(x) if isinstance(x, bytes) else str(x) for x in names)
    return f"{files}: {error.strerror}" if files else error.strerror


def _writes(stream: TextIO) -> bool:
    """Whether a stream takes an empty line; what it does not take is dropped."""
    try:
        print(file=stream, flush=True)
    except OSError:
        _discard(stream)
        return False
    return True


def _discard(stream: TextIO) -> None:
    """Sends what is written to a stream from now on nowhere, also as the interpreter ends."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # a stream that a notebook or a test has put there
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def use_compilation_cache() -> None:
    """Keeps compiled programs between processes, under ~/.cache/kvpo_jax.

    All of them: most of a toy's programs are small, and take seconds together. JAX's own variables
    override the folder and the compile time from which a program is kept.
    """
    import jax

    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/kvpo_jax/xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
