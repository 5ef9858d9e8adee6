"""The mirror on Weights & Biases: offline, continued, and without its package."""

import json
import os
import subprocess
import sys

import pytest

from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import mirror

MIRRORED = """
import sys
from pathlib import Path
import numpy as np
from kvpo_jax.runtime import config, metrics, mirror
workdir, first = Path(sys.argv[1]), int(sys.argv[2])
with mirror.mirrored(config.load("configs/tiny.py"), workdir):
    writer = metrics.MetricWriter(workdir, first)
    for i in range(first, first + 2):
        writer.write_scalars(i, {"reward": i})
        videos = np.zeros((2, 3, 8, 8, 3), np.uint8)
        writer.write_gallery(i, ["anchor", "branch 0"], videos)
    writer.close()
"""


def run(program, *arguments, cwd=None):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    env = {**os.environ, "WANDB_MODE": "offline"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=env, cwd=cwd)


def test_a_continued_run_is_one_run_of_the_mirror(tmp_path):
    """It has curves, videos and the configuration, and is kept on disk where there is no network.

    Two processes, as a continued run has them.
    """
    for first in (0, 2):
        done = run(MIRRORED, tmp_path, first)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Weights & Biases: on disk; later: wandb sync " in done.stdout
    kept = (tmp_path / "wandb_id").read_text()
    found = sorted((tmp_path / "wandb").glob(f"offline-run-*-{kept}"))
    assert found == sorted((tmp_path / "wandb").glob("offline-run-*")) and len(found) == 2
    for folder in found:
        (record,) = folder.glob("*.wandb")
        content = record.read_bytes()
        for said in (b"reward/branches", b"branches/videos", b"train.prompts_per_iteration"):
            assert said in content
        assert len(list((folder / "files" / "media").rglob("*.gif"))) == 2
    steps = [json.loads(x)["iteration"] for x in (tmp_path / "metrics.jsonl").open()]
    assert steps == [0, 1, 2, 3]


def test_an_id_that_is_none_is_an_error_that_names_its_file(tmp_path):
    assert mirror.run_id(tmp_path) == mirror.run_id(tmp_path)
    (tmp_path / "wandb_id").write_text("")
    with pytest.raises(UsageError, match="wandb_id does not hold the id of a run; put it back"):
        mirror.run_id(tmp_path)


# The command, in an environment that lacks a package.
LACKING = """
import sys
sys.modules[sys.argv.pop(1)] = None
from kvpo_jax import main
main.cli()
"""


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_one_line_that_says_what_to_install(tmp_path, package):
    done = run(LACKING, package, "--wandb", "--workdir=w", cwd=tmp_path)
    said = f"error: --wandb needs {package}: pip install 'kvpo_jax[wandb]'\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert not list(tmp_path.iterdir())


def test_nothing_of_it_is_imported_unless_it_is_asked_for(tmp_path):
    program = """
import sys
from pathlib import Path
from kvpo_jax import main, train
from kvpo_jax.runtime import metrics
metrics.MetricWriter(Path(sys.argv[1]), 0).close()
print(sorted({"wandb", "tensorboard"} & sys.modules.keys()))
"""
    assert run(program, tmp_path).stdout == "[]\n"
