"""Imports go one way, in the ranks of the design, and never need torch or TensorFlow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kvpo_jax

PACKAGE = Path(kvpo_jax.__file__).resolve().parent

# A module may import those of lower ranks, and those of its own rank if that closes no circle. A package stands for
# whatever of it is not listed by itself.
RANKS = [
    {"types", "config"},
    {"flow", "routing", "kv_cache", "memory_bank", "objective", "doctor", "data", "models.layers"},
    {"models"},
    {"rollout", "replay", "rewards", "backbone", "decoder", "checkpoint", "report", "sharding"},
    {"train", "generate", "evaluate", "heldout"},
    {"main"},
]


def modules() -> dict[str, Path]:
    """dotted name below kvpo_jax -> file; a package's __init__ has the name of the package."""
    out = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "configs":  # in an installed package: loaded by path, imported by nobody
            out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


def rank(name: str) -> int | None:
    while name:
        for i, names in enumerate(RANKS):
            if name in names:
                return i
        name = name.rpartition(".")[0]
    return None


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports anywhere in it."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; write it out"
            # `from kvpo_jax.data import toy_world` imports the module, `from kvpo_jax.types import Array` a name.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n.removeprefix("kvpo_jax.") in known else node.module for n in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        out |= {name.removeprefix("kvpo_jax.") for name in names if name.startswith("kvpo_jax.")}
    return out


MODULES = modules()
IMPORTS = {name: imported(path, MODULES) for name, path in MODULES.items()}


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_only_lower_ranks_or_its_own(name):
    assert rank(name) is not None, f"kvpo_jax.{name} has no rank: give it one in RANKS"
    higher = [other for other in IMPORTS[name] if rank(other) is None or rank(other) > rank(name)]
    assert not higher, f"kvpo_jax.{name} imports {higher}, of a higher rank"


def test_no_circles():
    done = set()

    def visit(name, trail):
        assert name not in trail, f"circular imports: {' -> '.join([*trail, name])}"
        if name not in done:
            for other in IMPORTS.get(name, ()):
                visit(other, [*trail, name])
            done.add(name)

    for name in MODULES:
        visit(name, [])


def test_nothing_imports_torch_or_tensorflow():
    names = ["kvpo_jax", *(f"kvpo_jax.{name}" for name in MODULES if name)]
    program = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    found = {{"torch", "tensorflow"}} & sys.modules.keys()
    assert not found, f"{{name}} imports {{found}}"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
