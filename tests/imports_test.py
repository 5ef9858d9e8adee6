"""The three rules of docs/architecture.md: what a module may import, compile and compute."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvpo_jax

PACKAGE = Path(kvpo_jax.__file__).resolve().parent

MATHS = ("algorithm", "models")
GROUND = ("types", "errors", *MATHS)  # what maths may import
COMPILING = ("programs", "decoder", "rewards")  # where programs are made
LOOPS = ("train", "rollout", "evaluate", "suite", "generate")


def modules() -> dict[str, Path]:
    """dotted name below kvpo_jax -> file; a package's __init__ has the name of the package."""
    out = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "configs":  # in an installed package: loaded by path, imported by nobody
            out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports anywhere in it."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; write it out"
            # `from kvpo_jax.data import toy_world` imports the module, `from kvpo_jax.types import
            # Array` a name.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n.removeprefix("kvpo_jax.") in known else node.module for n in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        out |= {name.removeprefix("kvpo_jax.") for name in names if name.startswith("kvpo_jax.")}
    return out


def room(name: str) -> str:
    """The first part of a dotted name: a module or a package directly below kvpo_jax."""
    return name.partition(".")[0]


def compiled(tree: ast.AST) -> Iterator[str]:
    """What of a module compiles a program: uses of jit, shard_map, pmap and donated arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("jit", "shard_map", "pmap"):
            yield node.attr
        if isinstance(node, ast.keyword) and node.arg in ("donate_argnums", "donate_argnames"):
            yield node.arg
        if isinstance(node, ast.ImportFrom):
            yield from (a.name for a in node.names if a.name in ("jit", "shard_map", "pmap"))


MODULES = modules()
IMPORTS = {name: imported(path, MODULES) for name, path in MODULES.items()}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in MATHS])
def test_maths_imports_maths_only(name):
    """Rule 1: no mesh, no file, no run."""
    above = [other for other in IMPORTS[name] if room(other) not in GROUND]
    assert not above, f"kvpo_jax.{name} is maths and imports {above}"


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) not in COMPILING])
def test_programs_are_made_in_few_places(name):
    """Rule 2: jit, shard_map and donation stand in programs, decoder and the rewards."""
    found = sorted(set(compiled(TREES[name])))
    assert not found, f"kvpo_jax.{name} has {found}: move what it compiles to programs.py"


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_python(name):
    """Rule 3: no arithmetic of arrays in a loop of the host."""
    names = {
        alias.name
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert "jax.numpy" not in names
    attributes = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.Attribute)]
    used = {f"{n.value.id}.{n.attr}" for n in attributes if isinstance(n.value, ast.Name)}
    assert not used & {"jax.numpy", "jax.lax", "jax.vmap", "jax.grad"}


def test_the_package_does_without_its_converters():
    outside = {name for name in MODULES if room(name) != "convert"}
    users = [name for name in outside if any(room(other) == "convert" for other in IMPORTS[name])]
    assert not users


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


def test_the_rules_see_what_breaks_them():
    source = "import jax\nf = jax.jit(g, donate_argnums=0)\nfrom jax import shard_map\n"
    assert sorted(compiled(ast.parse(source))) == ["donate_argnums", "jit", "shard_map"]
    assert room("algorithm.flow") == "algorithm" and room("train") == "train"
    assert {"algorithm", "models", "runtime", "convert"} <= {room(name) for name in MODULES}


def test_nothing_imports_torch_or_tensorflow():
    names = ["kvpo_jax", *(f"kvpo_jax.{name}" for name in MODULES if name)]
    program = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    found = {{"torch", "tensorflow"}} & sys.modules.keys()
    assert not found, f"{{name}} imports {{found}}"
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
