"""Prepares prompt files: kvpo-prompts COMMAND FILE ... [--flags]

    kvpo-prompts format stories.txt --output=prompts.jsonl --segments=4
    kvpo-prompts refine stories.txt --output=prompts.jsonl --endpoint=http://localhost:8000/v1 \\
        --model=Qwen3 --segments=4
    kvpo-prompts continue singles.txt --output=prompts.jsonl --command="ollama run qwen3" --more=3
    kvpo-prompts lint prompts.jsonl --tokenizer=Wan2.1-T2V-1.3B/google/umt5-xxl --segments=4
    kvpo-prompts convert timed.txt --format=timed --output=prompts.jsonl
    kvpo-prompts vbench all_dimension.txt --extended=all_dimension_extended.txt --output=plan.jsonl
    kvpo-prompts stats prompts.jsonl

In a checkout, `python tools/prompts.py` is the same as `kvpo-prompts`. docs/data.md explains each
command, and `kvpo-prompts COMMAND --help` lists its flags.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

import kvpo_jax
from kvpo_jax.data import foreign, lint, prompts, rewriting, stories, text, vbench
from kvpo_jax.data.prompts import PromptSequence
from kvpo_jax.errors import UsageError, nearest
from kvpo_jax.runtime import command, progress
from kvpo_jax.runtime.atomic import write_json, write_lines

ASSETS = Path(kvpo_jax.__file__).parent / "assets"
SHOWN = 3  # stories that an error names


def _output() -> None:
    command.define_path("output", None, "the .jsonl or formatted .txt to write", required=True)


def _one_file(paths: Sequence[str]) -> Path:
    """The only file that a command takes."""
    if len(paths) != 1:
        raise UsageError(f"name one file, as in kvpo-prompts lint prompts.jsonl; got {len(paths)}")
    return Path(paths[0])


def _written(output: Path, sequences: Sequence[PromptSequence]) -> None:
    prompts.write(output, sequences)
    segments = sum(len(s.sentences) for s in sequences)
    print(f"wrote {output}: {len(sequences)} sequences of {segments} segments", flush=True)


# ---------------------------------------------------------------- format


def _format_flags() -> None:
    _output()
    flags.DEFINE_integer("segments", 4, "that a story must have; more are kept", lower_bound=1)
    command.define_path("rejected", None, "write shorter stories here instead of ending")


def format_stories(paths: Sequence[str]) -> None:
    """Splits the stories of a file; a sequence of several sentences stays as it is."""
    given, path = flags.FLAGS, _one_file(paths)
    sequences, short = [], []
    for story in prompts.load(path):
        single = len(story.sentences) == 1 and not story.durations
        made = stories.segments(story.sentences[0]) if single else story.sentences
        if len(made) < given.segments:
            short.append((story, len(made)))
        else:
            sequences.append(PromptSequence(made, story.line, story.durations))
    if short and not given.rejected:
        named = [f"{path}:{s.line}: {n} segments" for s, n in short[:SHOWN]]
        more = [f"and {len(short) - SHOWN} stories more"] if len(short) > SHOWN else []
        raise UsageError(
            f"{'; '.join([*named, *more])}; expected {given.segments}: lower --segments, rewrite"
            " them (kvpo-prompts refine), or set them aside with --rejected=FILE"
        )
    if not sequences:
        raise UsageError(f"{path}: no story has {given.segments} segments")
    if short:
        _written(Path(given.rejected), [s for s, _ in short])
    _written(Path(given.output), sequences)


# ---------------------------------------------------------------- refine, continue


def _rewriting_flags(rules: str) -> None:
    _output()
    flags.DEFINE_string(
        "endpoint",
        None,
        "of an OpenAI-compatible server, as http://localhost:8000/v1; echo: replies are the texts",
    )
    flags.DEFINE_string(
        "command", None, "instead: a program that reads a text and prints its reply"
    )
    flags.DEFINE_string("model", None, "its name at the endpoint")
    command.define_path(
        "rules", str(ASSETS / rules), "the system message, a text file to edit; empty: none"
    )
    flags.DEFINE_float("temperature", 0.7, "of the sampling", lower_bound=0.0)
    flags.DEFINE_float("top_p", 0.8, "of the sampling", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_integer("max_tokens", 2048, "of a reply; 0: do not say", lower_bound=0)
    flags.DEFINE_string("extra", "{}", "JSON object of further fields of a request")
    flags.DEFINE_string("key_variable", "OPENAI_API_KEY", "environment variable with the API key")
    flags.DEFINE_integer("workers", 4, "sequences at a time", lower_bound=1)
    flags.DEFINE_integer("tries", 5, "of a request", lower_bound=1)
    flags.DEFINE_float("wait", 1.0, "seconds to the second try, then doubled", lower_bound=0.0)
    flags.DEFINE_float("timeout", 120.0, "seconds that a reply may take", lower_bound=0.1)
    command.define_path("shards", None, "folder of the replies; default: OUTPUT.shards")


def _refine_flags() -> None:
    _rewriting_flags("refine_rules.txt")
    flags.DEFINE_integer("segments", None, "that a story must get; default: any", lower_bound=1)


def _continue_flags() -> None:
    _rewriting_flags("continue_rules.txt")
    flags.DEFINE_integer("more", 3, "prompts to write behind each sequence", lower_bound=1)


# What the request of an endpoint has, and a command does not get.
_OF_ENDPOINT = ("temperature", "top_p", "max_tokens", "extra", "key_variable")


def _rewriter() -> rewriting.Endpoint:
    """The endpoint or the command that the flags describe."""
    given = flags.FLAGS
    if bool(given.endpoint) == bool(given.command):
        raise UsageError("give one of --endpoint, http://localhost:8000/v1 or echo, and --command")
    rules = prompts.read_text(Path(given.rules)).strip() if given.rules else ""
    if given.rules and not rules:
        raise UsageError(f"--rules={given.rules} is empty")
    return _command(rules) if given.command else _endpoint(rules)


def _command(rules: str) -> rewriting.Endpoint:
    given = flags.FLAGS
    if strange := [name for name in _OF_ENDPOINT if given[name].present]:
        raise UsageError(f"--{strange[0]} is for --endpoint; a command has options of its own")
    try:
        words = shlex.split(given.command)
    except ValueError as error:
        raise UsageError(f"--command={given.command}: {error}") from error
    if not words or not shutil.which(words[0]):
        raise UsageError(f"--command={given.command}: there is no such program")
    return rewriting.Endpoint(
        "",
        given.model or given.command,
        {},
        rules,
        words,
        timeout=given.timeout,
        tries=given.tries,
        wait=given.wait,
    )


def _endpoint(rules: str) -> rewriting.Endpoint:
    given = flags.FLAGS
    echo = given.endpoint == rewriting.ECHO
    if not echo and not given.endpoint.startswith(("http://", "https://")):
        raise UsageError(f"--endpoint={given.endpoint}: expected http://..., https://... or echo")
    if not echo and not given.model:
        raise UsageError("--endpoint needs --model, the name of a model there")
    try:
        extra = json.loads(given.extra)
    except ValueError as error:
        raise UsageError(f"--extra={given.extra} is not JSON: {error}") from error
    if not isinstance(extra, dict) or {"model", "messages", "stream"} & extra.keys():
        raise UsageError(f"--extra={given.extra}: expected an object of sampling fields")
    sampling = {"temperature": given.temperature, "top_p": given.top_p}
    if given.max_tokens:
        sampling["max_tokens"] = given.max_tokens
    return rewriting.Endpoint(
        given.endpoint,
        given.model or rewriting.ECHO,
        sampling | extra,
        rules,
        key=os.environ.get(given.key_variable, ""),
        timeout=given.timeout,
        tries=1 if echo else given.tries,
        wait=given.wait,
    )


def _rewrite(
    paths: Sequence[str], change: Callable[[PromptSequence, rewriting.Ask], PromptSequence]
) -> None:
    """Rewrites a file, and writes what made the new one beside it."""
    given, path = flags.FLAGS, _one_file(paths)
    output, endpoint = Path(given.output), _rewriter()
    prompts.suffix_of(output)  # an error now, not when every reply has come
    shards = Path(given.shards or f"{output}.shards")
    sequences = prompts.load(path)
    made = rewriting.rewrite(sequences, change, endpoint, shards, given.workers)
    _written(output, made)
    origin = {
        "prompts": str(path),
        "prompts_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        **endpoint.origin,
        "rules": endpoint.rules,
        "shards": str(shards),
    }
    write_json(origin, Path(f"{output}.origin.json"))


def refine(paths: Sequence[str]) -> None:
    """Rewrites every sequence as a whole."""
    _rewrite(paths, lambda s, ask: rewriting.refined(s, ask, flags.FLAGS.segments))


def continue_sequences(paths: Sequence[str]) -> None:
    """Writes the next moments of every sequence."""
    _rewrite(paths, lambda s, ask: rewriting.continued(s, ask, flags.FLAGS.more))


# ---------------------------------------------------------------- lint, stats


def _tokenizer_flag() -> None:
    command.define_path("tokenizer", None, "folder of the UMT5 tokenizer, to count tokens")


def _tokens() -> lint.Tokens | None:
    """sentences -> tokens of each, with the one that ends it; None without --tokenizer."""
    folder = flags.FLAGS.tokenizer
    return text.token_counter(folder) if folder else None


def _lint_flags() -> None:
    _tokenizer_flag()
    flags.DEFINE_integer("segments", 0, "that every sequence must have; 0: any", lower_bound=0)
    flags.DEFINE_integer("max_tokens", lint.WHOLE_TEXT, "read of a sentence", lower_bound=1)
    command.define_path("heldout", None, "prompt file of which no sentence may occur", multi=True)
    flags.DEFINE_list("skip", [], f"rules to leave out: {', '.join(lint.RULES)}")
    flags.DEFINE_bool("strict", False, "end with status 1 if anything is found")


def lint_file(paths: Sequence[str]) -> None:
    """Prints what is doubtful in a prompt file, a line each, and how often."""
    given, path = flags.FLAGS, _one_file(paths)
    if unknown := [name for name in given.skip if name not in lint.RULES]:
        raise UsageError(f"--skip={unknown[0]}: no such rule{nearest(unknown[0], lint.RULES)}")
    held = [s for file in given.heldout or [] for s in prompts.load(file)]
    options = lint.Options(given.segments, _tokens(), given.max_tokens, lint.plain_sentences(held))
    sequences, problems = prompts.read(path)
    findings = lint.check(sequences, problems, options, given.skip)
    for line, rule, what in findings:
        print(f"{path}:{line}: {rule}: {what}")
    counts = Counter(finding.rule for finding in findings)
    found = ", ".join(f"{count} {rule}" for rule, count in counts.most_common())
    without = "" if given.tokenizer else "; tokens are not counted without --tokenizer"
    print(f"{path}: {len(sequences)} sequences: {found or 'nothing found'}{without}", flush=True)
    if given.strict and findings:
        raise UsageError(f"{path}: {len(findings)} findings")


def stats(paths: Sequence[str]) -> None:
    """Prints the figures of a prompt file."""
    path = _one_file(paths)
    figures = lint.figures(prompts.load(path), _tokens())
    progress.table(str(path), ["", ""], [list(row) for row in figures.items()])


# ---------------------------------------------------------------- convert, vbench


def _convert_flags() -> None:
    _output()
    flags.DEFINE_enum(
        "format", None, list(FORMATS), "what the input is (docs/data.md)", required=True
    )
    flags.DEFINE_float("fps", 4.0, "latent frames per second, 4 of Wan", lower_bound=0.01)
    flags.DEFINE_integer("block_frames", 3, "latent frames of a block", lower_bound=1)
    flags.DEFINE_bool("durations", True, "keep how long each prompt lasts")


def _timed(paths: Sequence[str]) -> list[PromptSequence]:
    clock = foreign.Clock(flags.FLAGS.fps, flags.FLAGS.block_frames)
    return foreign.timed(_one_file(paths), clock)


FORMATS: dict[str, Callable[[Sequence[str]], list[PromptSequence]]] = {
    "pairs": lambda paths: foreign.pairs(list(map(Path, paths))),
    "captions": lambda paths: foreign.captions(_one_file(paths), flags.FLAGS.block_frames),
    "timed": _timed,
    "sequences": lambda paths: prompts.load(_one_file(paths)),
}


def convert(paths: Sequence[str]) -> None:
    """Writes prompts of another project as sequences."""
    sequences = FORMATS[flags.FLAGS.format](paths)
    if not flags.FLAGS.durations:
        sequences = [dataclasses.replace(sequence, durations=()) for sequence in sequences]
    _written(Path(flags.FLAGS.output), sequences)


def _vbench_flags() -> None:
    command.define_path("output", None, "the .jsonl to write", required=True)
    command.define_path("extended", None, "list of longer prompts to generate from, line by line")
    command.define_path("info", None, "VBench_full_info.json, for 25 samples of flickering")
    flags.DEFINE_integer("samples", vbench.SAMPLES, "videos of each prompt", lower_bound=1)
    flags.DEFINE_bool("custom", False, "number the videos, and write OUTPUT.prompts.json")


def plan_vbench(paths: Sequence[str]) -> None:
    """Writes what VBench wants generated."""
    given, output = flags.FLAGS, Path(flags.FLAGS.output)
    if output.suffix != ".jsonl":
        raise UsageError(f"--output={output} does not end in .jsonl")
    extended, info = (Path(x) if x else None for x in (given.extended, given.info))
    made = vbench.plan(_one_file(paths), extended, info, given.samples, given.custom)
    names = vbench.names(made)
    write_lines(made, output)
    print(f"wrote {output}: {len(made)} different prompts, {len(names)} videos", flush=True)
    if given.custom:
        write_json(names, Path(f"{output}.prompts.json"))


# ---------------------------------------------------------------- the command


class Command(NamedTuple):
    """A subcommand: what defines its flags, and what takes the other arguments."""

    define_flags: Callable[[], None]
    main: Callable[[Sequence[str]], None]


COMMANDS = {
    "format": Command(_format_flags, format_stories),
    "refine": Command(_refine_flags, refine),
    "continue": Command(_continue_flags, continue_sequences),
    "lint": Command(_lint_flags, lint_file),
    "convert": Command(_convert_flags, convert),
    "vbench": Command(_vbench_flags, plan_vbench),
    "stats": Command(_tokenizer_flag, stats),
}


def main(arguments: list[str]) -> None:
    """The command: see the module."""
    name, *rest = arguments[1:] or [""]
    if name not in COMMANDS:
        what = f"there is no command {name!r}" if name else "name a command"
        raise UsageError(f"{what}: {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    if wrong := [x for x in rest if x.startswith("--")]:
        flag = wrong[0][2:].partition("=")[0]
        raise UsageError(f"{name} has no flag --{flag}{nearest(flag, flags.FLAGS)}")
    COMMANDS[name].main(rest)


def define_flags() -> None:
    """The flags of the command that is the first argument."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        COMMANDS[name].define_flags()


def cli() -> None:
    """Entry point."""
    command.run("kvpo_jax.convert.prepare_prompts", define_flags, main)


if __name__ == "__main__":
    cli()
