"""The mirror of a run on Weights & Biases: it reads what the run writes for TensorBoard."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ml_collections import ConfigDict

from kvpo_jax.errors import MissingPackageError, UsageError
from kvpo_jax.runtime import progress
from kvpo_jax.runtime.atomic import replacing
from kvpo_jax.runtime.config import flat

PROJECT = "kvpo_jax"  # unless WANDB_PROJECT names another


def check() -> None:
    """MissingPackageError unless the packages of the extra `wandb` are installed."""
    for name in ("wandb", "tensorboard"):
        if importlib.util.find_spec(name) is None:
            raise MissingPackageError(f"--wandb needs {name}: pip install 'kvpo_jax[wandb]'")


@contextmanager
def mirrored(config: ConfigDict, workdir: Path) -> Iterator[None]:
    """Mirrors the TensorBoard events that are written inside, in workdir/tensorboard.

    A continued run goes on with the same run of Weights & Biases, whose id is in workdir/wandb_id.

    Args:
      config: of the run.
      workdir: the run directory; it exists.

    Raises:
      UsageError: Weights & Biases cannot be reached, or does not know who calls.
    """
    import tensorboardX.writer
    import wandb
    from wandb.integration import tensorboard

    events = str(workdir.absolute() / "tensorboard")
    tensorboard.patch(root_logdir=events)
    found = {name: os.environ.get(f"WANDB_{name.upper()}") for name in ("project", "name")}
    try:
        with progress.bar("calling Weights & Biases"):
            run = wandb.init(
                project=found["project"] or PROJECT,
                name=found["name"] or workdir.absolute().name,
                id=run_id(workdir),
                resume="allow",
                dir=workdir,
                config=flat(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
    except wandb.errors.Error as error:
        said = " ".join(str(error).split())
        raise UsageError(
            f"--wandb: {said.rstrip('.')}; WANDB_MODE=offline keeps the run on disk instead"
        ) from error
    where = f"on disk; later: wandb sync {Path(run.dir).parent}" if run.offline else run.url
    progress.say(f"Weights & Biases: {where}")
    # It learns of the folder when a writer of this class is made. The run's own writer is another.
    tensorboardX.writer.EventFileWriter(events).close()
    try:
        yield
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def run_id(workdir: Path) -> str:
    """The id of a run on Weights & Biases, which is made at first and then kept in its directory.

    Raises:
      UsageError: the file that keeps it holds something else.
    """
    path = workdir / "wandb_id"
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_text(secrets.token_hex(4))
    kept = path.read_bytes()
    if not re.fullmatch(rb"\w{1,64}", kept):
        raise UsageError(
            f"{path} does not hold the id of a run; put it back, or delete the file to begin"
            " another run on Weights & Biases"
        )
    return kept.decode()
