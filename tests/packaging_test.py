"""pyproject.toml names every package, and console scripts that are there."""

import importlib
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_installed():
    found = [path.parent.relative_to(ROOT) for path in ROOT.glob("kvpo_jax/**/__init__.py")]
    expected = {".".join(path.parts) for path in found} | {"kvpo_jax.configs"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


@pytest.mark.parametrize("name, target", PROJECT["project"]["scripts"].items())
def test_every_console_script_has_a_function(name, target):
    module, function = target.split(":")
    assert callable(getattr(importlib.import_module(module), function)), name


def test_no_requirement_stands_twice():
    extras = PROJECT["project"]["optional-dependencies"]
    named = [*PROJECT["project"]["dependencies"], *(r for group in extras.values() for r in group)]
    assert len(named) == len(set(named))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["-e .[cuda12,data]"]
