"""The command line, as a person meets it when something is wrong: one line that names it, and no
traceback.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from equipment import ROOT, SMALL, configure, random_weights, run_command

from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import workdir as workdir_lib
from kvpo_jax.runtime.statistics import heldout_summary


def run(*arguments, cwd):
    return run_command("-m", "kvpo_jax.main", *arguments, cwd=cwd)


def start(*arguments, cwd, path=ROOT):
    """As `run`, by a Python of its own."""
    return subprocess.run(
        [sys.executable, "-m", "kvpo_jax.main", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(path)},
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--config.train.iteration=3"],
            "no field config.train.iteration; did you mean 'train.iterations'?",
        ),
        (
            ["--config.train.iterations=x", "--workdir=w"],
            "config.train.iterations=x: expected int, as in ",
        ),
        (["--config.objective.gate=zer"], "config.objective.gate='zer' is not one of zero,"),
        (["--config=configs/tiny.py:releas"], "presets paper, release, not 'releas'"),
        (["--config=configs/nowhere.py"], "no configuration file 'configs/nowhere.py'"),
        (["--resume"], "--resume: there is no run under"),
        (["--workdri=w"], "no flag --workdri; did you mean 'workdir'?"),
        (["--resume=later"], "flag --resume=later"),
        (["--config.eval.batch=5"], "config.eval.batch=5 does not divide config.eval.prompts=32"),
        (["--config.reward.scorer=hpsv2"], "there is no reward 'hpsv2'"),
        (["--config.seed=-1"], "config.seed=-1: expected 0 to 4294967295"),
        (["--config.seed=4294967296"], "config.seed=4294967296: expected 0 to 4294967295"),
        (["--workdir=gs://bucket/run"], "flag --workdir=gs://bucket/run: gs://bucket/run is a URL"),
        (["--config.paths.lora=s3://a"], "config.paths.lora: s3://a is a URL"),
        (["--workdir=run[1]"], "run[1]: orbax cannot read checkpoints from a path with [ ]"),
        (["--workdir=/proc/nowhere"], "error: /proc/nowhere: No such file or directory"),
        (["--config.mesh.data=3"], "mesh.data=3 does not divide"),
        (["--config.seed=99999999999999999999"], "expected 0 to 4294967295"),
        (["--config.video.switch_frames=(5,)"], "switch_frames=(5,): expected ascending multiples"),
        (["--config.window.near=10"], "near=10"),
        (["--config.video.blocks=6", "--config.video.switch_frames=(12,)"], "no block can be a p"),
        (["--config.weights=none.safetensors"], "weights=none.safetensors: there is no such file"),
        (["--config.backbone=longliv"], "did you mean 'longlive'?"),
        (["--config.video.height=8"], "video.height=8: a latent frame of the toy has 4"),
        (["--config.model.text_dim=8"], "model.text_dim=8: a text of the toy has 16"),
        (["--config.weights=/usr"], "config.weights=/usr is no file"),
        (["--config.weights=/etc/passwd"], "/etc/passwd is not a"),
        (["--config.paths.lora=/etc/passwd"], "/etc/passwd is not a"),
        (["--config.mesh.data=4", "--config.eval.batch=2"], "shards of prompts"),
    ],
)
def test_a_wrong_command_line_is_one_line(tmp_path, arguments, message):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_another_configuration_does_not_continue_a_run(tmp_path):
    workdir_lib.start_run(config_lib.load("configs/tiny.py"), tmp_path / "runs" / "a")
    (tmp_path / "runs" / "a" / "checkpoints" / "10").mkdir(parents=True)
    done = run("--resume", "--config.seed=3", cwd=tmp_path)
    assert done.returncode == 1
    assert "config.seed: the run was started with 0, not with 3" in done.stderr


def test_a_second_process_in_a_run_directory_is_refused(tmp_path):
    with workdir_lib.locked(tmp_path / "w"):
        with pytest.raises(ValueError, match=f"under way here, process {os.getpid()} on"):
            with workdir_lib.locked(tmp_path / "w"):
                pass
    with workdir_lib.locked(tmp_path / "w"):  # the lock goes with the one that held it
        pass


def test_a_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert config_lib.local_path("~/run") == "/home/someone/run"
    assert config_lib.local_path("a/~b") == "a/~b"
    config = config_lib.override(config_lib.load("configs/tiny.py"), ["--config.paths.lora=~/a"])
    assert config.paths.lora == "/home/someone/a"


def test_what_a_run_stumbles_over_is_one_line_and_may_be_corrected(tmp_path):
    (tmp_path / "broken.safetensors").write_text("no weights")
    done = run("--workdir=broken.safetensors", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: --workdir=broken.safetensors is a file; name a directory\n"
    done = run(
        "--workdir=w", "--config.seed=3", "--config.weights=broken.safetensors", cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: broken.safetensors is not a safetensors file but plain")
    assert done.stderr.count("\n") == 1
    corrected = workdir_lib.resolve("configs/tiny.py", tmp_path / "w", ["--config.seed=4"])
    assert (corrected.seed, corrected.weights) == (4, "")


def test_a_finished_run_says_so_and_shows_its_table(tmp_path):
    """In the time that it takes to start, and with nothing in the directory changed."""
    config = config_lib.load("configs/tiny.py")
    record = tmp_path / "w" / "checkpoints" / f"{config.train.iterations}" / "extra" / "metadata"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"config": config.to_dict()}))
    heldout = heldout_summary(*(np.arange(4) * x for x in (1.0, 2.0, 3.0)))
    components = {policy: {"VQ": 0.25} for policy in ("reference", "online", "ema")}
    summary = {"heldout": heldout, "components": components}
    summary |= {"iterations": config.train.iterations, "eval": config.eval.to_dict()}
    (tmp_path / "w" / "summary.json").write_text(json.dumps(summary))
    done = run("--workdir=w", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "w: finished; iteration 24 of 24 is done"
    assert lines[1].startswith("held-out prompt sequences: 4, with")
    online = next(line for line in lines if line.startswith("online"))
    assert online.split()[:3] == ["online", "3.0000", "+1.5000"] and online.endswith(" 0.2500")
    assert lines[-1] == "to go on, raise --config.train.iterations"
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == [
        "checkpoints",
        "summary.json",
    ]
    longer = run("--workdir=w", "--resume", "--config.train.iterations=25", cwd=tmp_path)
    assert "checkpoints/24 cannot be read" in longer.stderr  # which this one has to do


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "generator.safetensors"
    return random_weights(path, configure("configs/tiny.py", SMALL))


@pytest.mark.parametrize(
    "fault, message",
    [
        ("jnp.broadcast_to(jnp.zeros(3), (2,))", "ValueError: Incompatible types"),
        ("{}['caption']", "KeyError: 'caption'"),
        ("exit(3)", "SystemExit: 3"),
    ],
)
def test_what_a_function_of_ones_own_raises_is_one_line_with_its_place(
    tmp_path, generator, fault, message
):
    (tmp_path / "mine.py").write_text(
        f"import jax.numpy as jnp\n\ndef score(pixels, prompts):\n    return {fault}\n"
    )
    fields = {
        **SMALL,
        "weights": generator,
        "video.blocks": 8,
        "video.switch_frames": (),
        "rollout.window_blocks": 1,
        "reward.scorer": "mine:score",
        "reward.weights.a": 1,
        "eval.prompts": 2,
        "eval.batch": 2,
        "mesh.data": 1,
    }
    done = run(*(f"--config.{name}={value}" for name, value in fields.items()), cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: reward mine:score raised {message}")
    assert done.stderr.endswith(f", at {tmp_path}/mine.py:4\n")


@pytest.mark.parametrize(
    "text, message",
    [
        ("def score(:", "cannot be imported: File"),
        ("score = 3", "reward mine:score is a int: expected hpsv3,"),
        ("1 / 0", "reward mine:score cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_that_cannot_be_imported_is_one_line(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    done = run("--config.reward.scorer=mine:score", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert not (tmp_path / "runs").exists()


def test_help_names_the_flags(tmp_path):
    done = start("--help", cwd=tmp_path)
    assert all(
        flag in done.stdout
        for flag in ("--config:", "--workdir:", "--[no]resume:", "--config.FIELD=VALUE")
    )


@pytest.mark.slow
def test_an_installed_package_has_its_configurations_and_assets(tmp_path):
    for name in ("kvpo_jax", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--quiet",
        "-w",
        tmp_path,
        tmp_path / "source",
    ]
    subprocess.run(build, check=True, stdin=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    configs = {f"kvpo_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assets = {
        f"kvpo_jax/assets/{path.name}"
        for path in (ROOT / "kvpo_jax" / "assets").iterdir()
        if path.is_file()
    }
    assert configs <= names and {name for name in assets if not name.endswith(".py")} <= names
    done = start("--config.train.iteration=3", cwd=tmp_path, path=tmp_path / "site")
    assert "did you mean 'train.iterations'?" in done.stderr
