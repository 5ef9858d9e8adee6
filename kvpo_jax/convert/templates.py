"""The instructions of HPSv3 and VideoAlign, read from where their authors published them.

They are string constants of Python files, which are parsed and neither imported nor run.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Sequence
from pathlib import Path

from kvpo_jax.errors import UsageError
from kvpo_jax.models.reward_model import HPSV3_TOKENS, VIDEOALIGN_TOKENS

HPSV3_FILE = "hpsv3/dataset/data_collator_qwen.py"
VIDEOALIGN_FILE = "prompt_template.py"


def hpsv3(source: Path | str) -> str:
    """HPSv3's instruction, a format string with {text_prompt}.

    Args:
      source: its wheel, an unpacked one, or the file in it.
    """
    instruction, request = constants(
        source, HPSV3_FILE, ("INSTRUCTION", "prompt_with_special_token")
    )
    # Only the first is a format string there.
    template = instruction + request.replace("{", "{{").replace("}", "}}")
    check_template(source, template, HPSV3_TOKENS)
    return template


def videoalign(source: Path | str) -> str:
    """VideoAlign's instruction, a format string with {text_prompt}.

    Args:
      source: its repository, or the file in it.
    """
    (instruction,) = constants(source, VIDEOALIGN_FILE, ("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",))
    check_template(source, instruction, VIDEOALIGN_TOKENS)
    return instruction


def constants(source: Path | str, file: str, names: Sequence[str]) -> list[str]:
    """The strings that a Python file assigns to some names.

    Args:
      source: the Python file, or a wheel or folder that has it.
      file: its path there.
      names: the names.

    Raises:
      UsageError: there is no such file, it is not Python, or it assigns no string to a name; the
        message names the file.
    """
    source = Path(source)
    place = (
        f"{source}, its {file}" if source.is_dir() or zipfile.is_zipfile(source) else str(source)
    )
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                text = archive.read(file).decode()
        else:
            text = (source / file if source.is_dir() else source).read_text()
        module = ast.parse(text)
    except (OSError, KeyError, SyntaxError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{place}: no Python file can be read ({error})") from error
    found = {
        target.id: node.value.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    strings = []
    for name in names:
        value = found.get(name)
        if not isinstance(value, str):
            raise UsageError(f"{place} assigns no string to {name}")
        strings.append(value)
    return strings


def check_template(source: Path | str, template: str, tokens: Sequence[str]) -> None:
    """UsageError unless a template has the reward tokens once each and in their order, and has a
    place for {text_prompt}.
    """
    places = [template.find(token) for token in tokens]
    if places != sorted(places) or any(template.count(token) != 1 for token in tokens):
        raise UsageError(
            f"{source}: its instruction does not have {', '.join(tokens)} once each and in this"
            " order"
        )
    try:
        empty, filled = (template.format(text_prompt=prompt) for prompt in ("", "a prompt"))
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{source}: its instruction is not a format string of {{text_prompt}}: {error!r}"
        ) from error
    if empty == filled:
        raise UsageError(f"{source}: its instruction has no place for a prompt, {{text_prompt}}")
