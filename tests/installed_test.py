"""An installed copy without a checkout: its console scripts convert, train, export and generate."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import safetensors.numpy
import torch

from kvpo_jax.convert.wan_weights import to_official, wan_table

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("kvpo_jax", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
TOY = ROOT / "kvpo_jax" / "assets" / "toy_generator.safetensors"
SMALL = (
    "--config.train.iterations=2",
    "--config.train.prompts_per_iteration=1",
    "--config.rollout.branches=2",
    "--config.eval.prompts=2",
    "--config.eval.batch=2",
)


def run(*command, cwd: Path) -> str:
    """The output of a command that sees neither the checkout nor what the tests import it by."""
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> Path:
    """The folder of the console scripts of a virtual environment, where a wheel is installed.

    The environment borrows the packages that kvpo_jax depends on from this one, so that nothing is
    downloaded. An editable kvpo_jax is not borrowed: Python ignores .pth files in such a folder.
    """
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # a build leaves files beside its sources
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        elif (ROOT / name).is_file():
            shutil.copyfile(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-index", "--quiet")
    run(*pip, "wheel", *offline, "--no-build-isolation", f"-w{folder}", source, cwd=folder)
    shutil.rmtree(source)
    (wheel,) = folder.glob("kvpo_jax-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(*pip, "--python", python, "install", *offline, wheel, cwd=folder)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "borrowed.pth").write_text("\n".join(sorted(borrowed)))
    return python.parent


@pytest.mark.slow
def test_from_a_checkpoint_to_a_video_without_a_checkout(scripts, tmp_path):
    where = "import kvpo_jax, sys; print(kvpo_jax.__file__, *sys.path, sep='\\n')"
    package, *path = run(scripts / "python", "-c", where, cwd=tmp_path).splitlines()
    assert Path(package).is_relative_to(scripts.parent) and str(ROOT) not in path

    # The toy generator as a checkpoint of LongLive has it.
    toy = safetensors.numpy.load_file(TOY)
    state = {}
    for name, (ours, layer) in wan_table(3).items():
        tensor = to_official(ours, toy[ours] if layer is None else toy[ours][layer])
        state[f"model.{name}"] = torch.tensor(np.ascontiguousarray(tensor))
    torch.save({"generator": state}, tmp_path / "toy.pt")
    run(
        *(scripts / "kvpo-convert", "toy.pt", "--num_heads=4", "--text_len=8"),
        "--output=toy.safetensors",
        cwd=tmp_path,
    )
    converted = safetensors.numpy.load_file(tmp_path / "toy.safetensors")
    assert converted.keys() == toy.keys()
    assert all(np.array_equal(converted[name], tensor) for name, tensor in toy.items())

    weights = "--config.weights=toy.safetensors"
    run(scripts / "kvpo-train", "--workdir=run", weights, *SMALL, cwd=tmp_path)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(np.isfinite(json.loads(line)["reward"]) for line in lines)
    assert (tmp_path / "run" / "summary.json").is_file()
    assert (tmp_path / "run" / "report" / "index.html").is_file()

    run(
        *(scripts / "kvpo-export", "--workdir=run", "--format=peft", "--output=lora.pt"),
        cwd=tmp_path,
    )
    lora = torch.load(tmp_path / "lora.pt", weights_only=True)["generator_lora"]
    assert len(lora) == 3 * 20
    assert any(x.abs().max() > 0 for name, x in lora.items() if "lora_B" in name)  # it has learned

    run(
        *(scripts / "kvpo-generate", "--checkpoint=run", "--prompt=a red disk moves left"),
        *("--num_frames=6", "--output=videos"),
        cwd=tmp_path,
    )
    (video,) = (tmp_path / "videos").iterdir()
    assert iio.imread(video).shape[0] == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [*"train evaluate generate report doctor convert export encode prompts plan".split()]
)
def test_every_console_script_has_help(scripts, tmp_path, script):
    done = subprocess.run(
        [scripts / f"kvpo-{script}", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "Try --helpfull" in done.stdout and not done.stderr  # the doctor has no flags
    assert not list(tmp_path.iterdir())
