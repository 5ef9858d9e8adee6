"""The instructions of HPSv3 and VideoAlign, read from where their authors published them.

They are string constants of Python files, which are parsed and neither imported nor run.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Sequence
from pathlib import Path

from kvpo_jax.models.reward_model import HPSV3_TOKENS, VIDEOALIGN_TOKENS

HPSV3_FILE = "hpsv3/dataset/data_collator_qwen.py"
VIDEOALIGN_FILE = "prompt_template.py"


def hpsv3(source: Path | str) -> str:
    """HPSv3's instruction, a format string with {text_prompt}, from its wheel, an unpacked one, or the file in it."""
    instruction, request = constants(source, HPSV3_FILE, ("INSTRUCTION", "prompt_with_special_token"))
    # Only the first is a format string there.
    return checked(source, instruction + request.replace("{", "{{").replace("}", "}}"), HPSV3_TOKENS)


def videoalign(source: Path | str) -> str:
    """VideoAlign's instruction, a format string with {text_prompt}, from its repository or the file in it."""
    (instruction,) = constants(source, VIDEOALIGN_FILE, ("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",))
    return checked(source, instruction, VIDEOALIGN_TOKENS)


def constants(source: Path | str, file: str, names: Sequence[str]) -> list[str]:
    """String constants of a Python file, by the names that it assigns them to.

    Args:
      source: the Python file, or a wheel or folder that has it.
      file: its path there.
      names: of the constants.

    Raises:
      ValueError: there is no such file, it is no Python, or a name is not assigned a string; names the file.
    """
    source = Path(source)
    where = f"{source}, its {file}" if source.is_dir() or zipfile.is_zipfile(source) else str(source)
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                text = archive.read(file).decode()
        else:
            text = (source / file if source.is_dir() else source).read_text()
        module = ast.parse(text)
    except (OSError, KeyError, SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: no Python file can be read ({error})") from error
    found = {
        target.id: node.value.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for name in names:
        if not isinstance(found.get(name), str):
            raise ValueError(f"{where} assigns no string to {name}")
    return [found[name] for name in names]


def checked(source: Path | str, template: str, tokens: Sequence[str]) -> str:
    """The template; ValueError unless it has every reward token once, in their order, and takes a {text_prompt}."""
    places = [template.find(token) for token in tokens]
    if places != sorted(places) or any(template.count(token) != 1 for token in tokens):
        raise ValueError(f"{source}: its instruction does not have {', '.join(tokens)} once each and in this order")
    try:
        empty, filled = (template.format(text_prompt=prompt) for prompt in ("", "a prompt"))
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{source}: its instruction is no format string of {{text_prompt}}: {error!r}") from error
    if empty == filled:
        raise ValueError(f"{source}: its instruction has no place for a prompt, {{text_prompt}}")
    return template
