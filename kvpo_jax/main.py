"""Runs KVPO; without arguments, the toy of configs/tiny.py in a fresh directory under runs/.

python -m kvpo_jax.main [--config=FILE[:PRESET]] [--workdir=DIR] [--resume] [--config.FIELD=VALUE ...]
"""

import os
import sys

import jax
from absl import app, flags

from kvpo_jax import config as config_lib

_CONFIG = flags.DEFINE_string(
    "config", None, "FILE[:PRESET]; a new run's default is configs/tiny.py. --config.FIELD=VALUE changes a field"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "run directory; a run that is in it already is continued")
_RESUME = flags.DEFINE_bool("resume", False, "continue the run in --workdir, or else the newest under runs/")


def main(arguments: list[str]) -> None:
    try:
        workdir = config_lib.run_directory(_CONFIG.value, _WORKDIR.value, _RESUME.value)
        config = config_lib.resolve(_CONFIG.value, workdir, arguments[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not jax.config.jax_compilation_cache_dir:  # the environment's JAX_COMPILATION_CACHE_DIR
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/kvpo_jax/xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    config_lib.start_run(config, workdir)
    print(f"run directory: {workdir}", flush=True)

    from kvpo_jax import train  # its imports take seconds that a mistyped flag should not

    train.train_and_evaluate(config, workdir)


def parse_flags(argv: list[str]) -> list[str]:
    """Leaves every --config.FIELD=VALUE in place: the fields are known once the configuration is loaded."""
    flags.FLAGS.set_gnu_getopt()
    try:
        return flags.FLAGS(argv, known_only=True)
    except flags.Error as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
