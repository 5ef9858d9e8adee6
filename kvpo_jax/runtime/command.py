"""What every command has in common: flags, one-line errors, the cache of compiled programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import jax
from absl import app, flags, logging

from kvpo_jax.errors import UsageError
from kvpo_jax.runtime.config import local_path

flags.disclaim_key_flags()  # what define_path defines is a flag of the module that calls it


def run(module: str, define_flags: Callable[[], None], main: Callable[[list[str]], None]) -> None:
    """Runs a command, whichever way it was started: -m, a console script, or a file of tools/.

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

    def quiet_main(arguments: list[str]) -> None:
        # Orbax logs thirty lines for a checkpoint, and a warning for one that is only read.
        logging.set_verbosity(logging.ERROR)
        try:
            main(arguments)
        except KeyboardInterrupt:
            sys.exit("interrupted")

    app.run(quiet_main, flags_parser=parse_flags)


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


class _PathParser(flags.ArgumentParser):
    """Of a flag that is a local path; a leading ~ is the home directory, as in a shell."""

    def parse(self, argument: str) -> str:
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


def fail(error: UsageError | OSError) -> NoReturn:
    """Ends the program with one line that says what is wrong.

    Any other exception is a fault of a program, of this one or of somebody's scorer, and keeps its
    traceback.
    """
    sys.exit(f"error: {in_a_line(error)}")


def in_a_line(error: UsageError | OSError) -> str:
    """What is wrong, and where it happened."""
    notes = getattr(error, "__notes__", ())
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        message = f"{error.filename}: {error.strerror}"
    elif error.args and isinstance(error, UsageError):
        message = str(error.args[0])
    else:
        message = str(error)
    return ": ".join([*notes, message])


def use_compilation_cache() -> None:
    """Keeps compiled programs between processes, under ~/.cache/kvpo_jax.

    JAX's own variables override the folder and the compile time from which a program is kept.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/kvpo_jax/xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
