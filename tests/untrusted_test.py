"""Files of strangers run no code: tokenizers, embeddings, checkpoints and run directories."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvpo_jax
from kvpo_jax import backbone, run
from kvpo_jax.data import embeddings, text
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import config as config_lib

PACKAGE = Path(kvpo_jax.__file__).parent
# What runs code on purpose: the config that --config names, and the scorers that a config names.
ON_PURPOSE = {
    "kvpo_jax/runtime/config.py": ["runpy.run_path"],
    "kvpo_jax/rewards/scorers.py": ["importlib.import_module"],
}
# Function -> the keywords that it must be called with.
REQUIRED = {
    "torch.load": {"weights_only": True},
    "from_pretrained": {"trust_remote_code": False, "local_files_only": True},
}
FORBIDDEN = ("eval", "exec", "__import__", "pickle.load", "pickle.loads", "yaml.load", "os.system")


def unsafe(tree: ast.AST) -> Iterator[str]:
    """The calls in a module that could run what a file says."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        for function, keywords in REQUIRED.items():
            if (name == function or name.endswith(f".{function}")) and not (
                keywords.items() <= given.items()
            ):
                yield f"{name} without {keywords}"
        if name in FORBIDDEN or given.get("allow_pickle") is True:
            yield name
        if name.endswith(("import_module", "run_path", "exec_module")):
            yield name


def sources() -> dict[str, Path]:
    root = PACKAGE.parent
    paths = [*PACKAGE.rglob("*.py"), *(root / "tools").glob("*.py")]
    return {str(path.relative_to(root)): path for path in paths}


@pytest.mark.parametrize("name", sources())
def test_no_call_could_run_what_a_file_says(name):
    found = list(unsafe(ast.parse(sources()[name].read_text())))
    assert found == ON_PURPOSE.get(name, [])


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "AutoTokenizer.from_pretrained(folder, local_files_only=True)",
        "AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=True)",
        "pickle.loads(data)",
        "np.load(path, allow_pickle=True)",
        "importlib.import_module(name)",
    ],
)
def test_the_rule_sees_what_breaks_it(line):
    assert list(unsafe(ast.parse(line)))


# ---------------------------------------------------------------- with files that try


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    """A module that can be imported and must not be."""
    name = f"stranger_{os.urandom(4).hex()}"
    scorer = "def score(pixels, prompts): return {'q': pixels.mean((1, 2, 3, 4))}"
    (tmp_path / f"{name}.py").write_text(f"class Tok: pass\n{scorer}\n")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_the_code_of_a_tokenizer_is_not_run(tmp_path):
    """Not even where somebody answers "y" to transformers' question."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "code.py").write_text("open('ran', 'w')\nclass Tok: pass\n")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text("{}")
    auto = {"auto_map": {"AutoTokenizer": ["code.Tok", "code.Tok"]}, "tokenizer_class": "Tok"}
    (folder / "tokenizer_config.json").write_text(json.dumps(auto))
    program = (
        "from kvpo_jax.data.text import TOKENIZER_FILES, UsageError, load_tokenizer\n"
        "try: load_tokenizer('tokenizer', TOKENIZER_FILES, 'the folder google/umt5-xxl')\n"
        "except UsageError as error: print('refused', error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="y\n" * 9,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent), "HF_MODULES_CACHE": str(tmp_path)},
    )
    assert "refused the tokenizer in tokenizer cannot be read" in done.stdout, done.stderr
    assert "name the folder google/umt5-xxl" in done.stdout
    assert "trust_remote_code" not in done.stdout and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
@pytest.mark.parametrize("inner", [False, True])
def test_the_class_that_a_folder_of_embeddings_names_is_not_imported(tmp_path, module, key, inner):
    folder = tmp_path / "embeddings"
    embeddings.write(folder, ["a"], lambda part: [np.ones((1, 2))], 3, 2, {})
    features = json.loads((folder / "features.json").read_text())
    place = features["featuresDict"]["features"]["sentence"] if inner else features
    place.pop("pythonClassName")
    place[key] = f"{module}.Tok"
    (folder / "features.json").write_text(json.dumps(features))
    with pytest.raises(UsageError, match=rf"features.json names {module}\.Tok, which is not of"):
        embeddings.open_embeddings(folder)
    assert module not in sys.modules


def test_a_command_that_does_not_score_imports_no_scorer(module):
    config = config_lib.override(
        config_lib.load("configs/tiny.py"),
        [
            f"--config.reward.scorer={module}:score",
            f"--config.eval.scorer={module}:score",
            "--config.reward.weights.q=1.0",
        ],
    )
    backbone.load(config)
    run.load(config, sentences=())
    assert module not in sys.modules
    run.load(config)
    assert module in sys.modules


def test_a_scorer_that_is_not_there_is_an_error_before_weights_are_loaded():
    config = config_lib.load("configs/tiny.py")
    config = config_lib.override(config, ["--config.eval.scorer=nowhere:score"])
    config.weights = "missing.safetensors"
    with pytest.raises(UsageError, match="there is no reward 'nowhere:score'"):
        run.load(config)


def test_the_tokenizer_s_own_error_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read .*: name a folder of it") as error:
        text.load_tokenizer(tmp_path, text.TOKENIZER_FILES, "a folder of it")
    assert "\n" not in str(error.value)
