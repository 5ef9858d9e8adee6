"""The command for prompt files: format, lint, convert, vbench, stats, and its errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from encode_prompts_test import save_tokenizer

from kvpo_jax.data import foreign, lint, prompts, text, vbench
from kvpo_jax.data.prompts import PromptSequence
from kvpo_jax.errors import UsageError

TOOL = Path(__file__).resolve().parents[1] / "tools" / "prompts.py"


def run(*arguments, status=0):
    """What the command prints; with status 1 its error."""
    done = subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    if status:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr if status else done.stdout


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def sequences_of(*rows):
    return [PromptSequence(tuple(row), line) for line, row in enumerate(rows, start=1)]


# ---------------------------------------------------------------- format


def test_stories_become_sequences_that_load(tmp_path):
    stories = write(
        tmp_path / "s.txt", "Dr. A runs. It stops.\n\nOne. Two. Three. Pan left.\nOne.\n"
    )
    out = tmp_path / "p.jsonl"
    error = run("format", stories, f"--output={out}", "--segments=2", status=1)
    assert f"{stories}:4: 1 segments; expected 2: lower --segments" in error and not out.exists()
    rejected = tmp_path / "short.txt"
    run("format", stories, f"--output={out}", "--segments=2", f"--rejected={rejected}")
    made = [s.sentences for s in prompts.load(out)]
    assert made == [("Dr. A runs", "It stops"), ("One", "Two", "Three, Pan left")]
    assert [s.sentences for s in prompts.load(rejected)] == [("One.",)]  # as it was
    again = tmp_path / "p.txt"  # in the format of the release
    run("format", out, f"--output={again}", "--segments=2")
    assert again.read_text() == "2,[Dr. A runs],[It stops]\n3,[One],[Two],[Three, Pan left]\n"


def test_wrong_words_on_the_command_line_are_one_line(tmp_path):
    path = write(tmp_path / "s.txt", "A fox.\n")
    out = f"--output={tmp_path / 'o.jsonl'}"
    for arguments, message in (
        (["lnt", path], "there is no command 'lnt': .*did you mean 'lint'"),
        (["lint", path, "--skip=cust"], "--skip=cust: no such rule; did you mean 'cut'"),
        (["stats", path, "--tokeniser=x"], "stats has no flag --tokeniser; did you mean 'tokeni"),
        (["refine", path, out, "--endpoint=http://h"], "--endpoint needs --model"),
        (["refine", path, "--output=o.json", "--endpoint=echo"], "o.json: the name of a prompt f"),
        (["refine", path, out, "--endpoint=echo", "--extra=[]"], r"--extra=\[\]: expected an obj"),
    ):
        assert re.search(message, run(*arguments, status=1))


# ---------------------------------------------------------------- lint, stats


def found(rule, *rows, **options):
    """(line, text) of what a rule finds."""
    findings = lint.check(sequences_of(*rows), [], lint.Options(**options))
    return [(finding.line, finding.text) for finding in findings if finding.rule == rule]


def test_tokens_are_counted_as_the_encoder_does(tmp_path):
    tokens = text.token_counter(save_tokenizer(tmp_path))
    assert tokens(["a fox runs", "a  red\nfox"]) == [4, 4]  # with the one that ends it
    rows = [("a fox",), ("a red fox runs and stops",)]
    assert found("tokens", *rows, tokens=tokens, most_tokens=6) == [
        (2, "7 tokens, 6 are read: 'a red fox runs and stops'")
    ]
    ids, mask = text.tokenizer(tmp_path, 16)([rows[1][0]])
    assert mask.sum() == 7


def test_each_rule_finds_what_it_is_for_and_nothing_else():
    assert found("segments", ("a", "b"), ("a",), segments=2) == [(2, "1 segments, expected 2")]
    assert found("segments", ("a", "b"), ("a",)) == []
    assert [
        line for line, _ in found("sentences", ("Dr. A runs", "It is 3.5 m"), ("A. b. c",))
    ] == [2]
    assert found("duplicate", ("A fox!", "b"), ("c",), ("a  fox", "b.")) == [(3, "as line 1")]
    cuts = [
        ("It cuts wood", "a cut apple"),
        ("Then CUT TO a bar",),
        ("the scene changes to a bar",),
    ]
    assert [line for line, _ in found("cut", *cuts)] == [2, 3]
    assert [line for line, _ in found("script", ("une forêt",), ("красная лиса",), ("7",))] == [2]
    assert found("common", ("the red fox runs", "the fox stops", "a bar in the night")) == [
        (1, "segment 3 has no word of segment 2: name the subject again")
    ]
    held = lint.plain_sentences(sequences_of(("b",), ("A fox!",)))
    assert [line for line, _ in found("heldout", ("c",), ("d", "a fox"), heldout=held)] == [2]


def test_near_duplicates_are_those_that_a_comparison_of_all_pairs_finds():
    words = "the old red fox runs over a hill of snow and looks back at its own long track".split()
    rows = []
    for i in range(60):  # variants with some words replaced
        replaced = {(7 * i + k) % len(words): f"w{i % 5}" for k in range(i % 4)}
        rows.append((" ".join(replaced.get(j, word) for j, word in enumerate(words)),))
    twelve = "one two three four five six seven eight nine ten eleven twelve"
    rows += [(twelve,), (twelve.removesuffix(" eleven twelve"),)]  # 8 of 10 triples: 0.8 exactly
    sets = [{tuple(r[0].split()[i : i + 3]) for i in range(len(r[0].split()) - 2)} for r in rows]

    def near(i, j):
        return len(sets[i] & sets[j]) >= 0.8 * len(sets[i] | sets[j]) and rows[i] != rows[j]

    expected = [i + 1 for i in range(62) if any(near(i, j) for j in range(i))]
    assert [line for line, _ in found("near-duplicate", *rows)] == expected
    assert 5 < len(expected) < 60 and expected[-1] == 62


def test_the_command_names_lines_and_counts(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"prompts": ["a fox runs", "a fox"]}\n{"prompts": 1}\n')
    held = write(tmp_path / "h.txt", "A fox.\n")
    lines = run("lint", path, f"--heldout={held}", "--segments=3", "--skip=common").splitlines()
    assert lines == [
        f"{path}:1: segments: 2 segments, expected 3",
        f"{path}:1: heldout: segment 2 is held out: 'a fox'",
        f'{path}:2: malformed: expected {{"prompts": ["...", "..."]}}',
        f"{path}: 1 sequences: 1 segments, 1 heldout, 1 malformed; tokens are not counted without"
        " --tokenizer",
    ]
    assert "3 findings" in run(
        "lint", path, f"--heldout={held}", "--segments=3", "--strict", status=1
    )
    assert "1 sequences: nothing found" in run("lint", held)


def test_figures(tmp_path):
    rows = [PromptSequence(("a fox runs", "a fox"), 1, (6, 9)), PromptSequence(("A fox",), 2)]
    figures = lint.figures(rows, text.token_counter(save_tokenizer(tmp_path)))
    assert figures["segments"] == "1 of 1, 1 of 2"
    assert figures["sentences"] == "3, 2 different"
    assert figures["vocabulary"] == "3 different words of 7"
    assert figures["words per sentence"].startswith("2.3 on average")
    assert figures["tokens per sentence"].endswith("at most 4")
    assert figures["frames per sequence"].startswith("15.0 on average")


# ---------------------------------------------------------------- convert


def test_pairs_of_files_are_sequences_of_two(tmp_path):
    first = write(tmp_path / "a.txt", "a fox\na hare\n")
    second = write(tmp_path / "b.txt", "it runs\nit sits\n")
    out = tmp_path / "p.jsonl"
    run("convert", first, second, "--format=pairs", f"--output={out}")
    assert [s.sentences for s in prompts.load(out)] == [("a fox", "it runs"), ("a hare", "it sits")]
    write(second, "it runs\n\nit sits\n")
    with pytest.raises(
        UsageError, match=r"b\.txt: only one of it and .*a\.txt has a prompt in line 2"
    ):
        foreign.pairs([first, second])
    with pytest.raises(UsageError, match="two files or more"):
        foreign.pairs([first])


def test_timed_prompts_have_whole_blocks(tmp_path):
    path = write(
        tmp_path / "t.txt",
        "A fox, [slow] runs.[10s#] | It stops[2.6 s] | It sleeps[10s]; run | stop | sleep\n"
        "a hare[5] sits[5s]\n",
    )
    first, second = foreign.timed(path, foreign.Clock())
    # 40, 50.4 and 90.4 latent frames, rounded to blocks of 3
    assert first == PromptSequence(
        ("A fox, [slow] runs.", "It stops", "It sleeps"), 1, (39, 12, 39)
    )
    assert second == PromptSequence(("a hare", "sits"), 2, (21, 18))
    assert sum(foreign.Clock().durations([1.0] * 60, "")) == 240  # no error adds up
    out = tmp_path / "p.jsonl"
    run("convert", path, "--format=timed", f"--output={out}", "--nodurations")
    assert prompts.load(out)[1] == PromptSequence(("a hare", "sits"), 2)
    for content, message in (
        ("a fox[10s] | it stops\n", r"t\.txt:1: '\| it stops' has no duration"),
        ("a fox\n", r"t\.txt:1: 'a fox' has no duration"),
        ("[10s]\n", r"t\.txt:1: "),
        (
            "a[10s]\n\nb[9s] | c[0.2s]\n",
            r"t\.txt:3: segment 2 lasts 0\.2 s, and a block of 3 .* 0.75",
        ),
        ("\n", "has no prompts"),
    ):
        with pytest.raises(UsageError, match=message):
            foreign.timed(write(path, content), foreign.Clock())


def test_folders_of_captions(tmp_path):
    for name, captions in (("b", ["x", "y"]), ("a", [f"shot {i}" for i in range(11)])):
        folder = tmp_path / "caption" / name
        folder.mkdir(parents=True)
        for i, caption in enumerate(captions):
            write(folder / f"{i}.json", json.dumps({"caption": caption}))
    durations = write(tmp_path / "caption" / "b" / "shot_durations.txt", "4,2\n")
    expected = [
        PromptSequence(tuple(f"shot {i}" for i in range(11)), 1),  # 10 is behind 9
        PromptSequence(("x", "y"), 2, (12, 6)),
    ]
    assert foreign.captions(tmp_path, 3) == foreign.captions(tmp_path / "caption", 3) == expected
    assert foreign.captions(tmp_path / "caption" / "b", 3)[0].sentences == ("x", "y")
    write(durations, "4 2 2")
    with pytest.raises(UsageError, match="shot_durations.txt: expected 2 numbers .*'4 2 2'"):
        foreign.captions(tmp_path, 3)
    durations.unlink()
    write(tmp_path / "caption" / "b" / "0.json", "{}")
    with pytest.raises(UsageError, match="0.json: expected .*KeyError"):
        foreign.captions(tmp_path, 3)
    (tmp_path / "caption" / "b" / "0.json").unlink()
    with pytest.raises(UsageError, match="without a gap"):
        foreign.captions(tmp_path, 3)


# ---------------------------------------------------------------- vbench


def test_a_plan_has_every_name_that_vbench_looks_for(tmp_path):
    """A list of its sizes: 946 lines, 944 different, of which 75 are of temporal flickering."""
    lines = [f"a prompt number {i}, still" for i in range(944)]
    path = write(tmp_path / "all.txt", "\n".join([*lines, *lines[:2]]) + "\n")
    longer = write(tmp_path / "long.txt", "".join(f"{x} and more\n" for x in [*lines, *lines[:2]]))
    assert len(vbench.names(vbench.plan(path, None, None, 5, False))) == 4720
    info = [
        {"prompt_en": x, "dimension": ["temporal_flickering"] if i < 75 else ["color"]}
        for i, x in enumerate(lines)
    ]
    write(tmp_path / "info.json", json.dumps(info))
    out = tmp_path / "plan.jsonl"
    said = run(
        *("vbench", path, f"--extended={longer}", f"--info={tmp_path / 'info.json'}"),
        f"--output={out}",
    )
    assert "944 different prompts, 6220 videos" in said
    record = json.loads(out.read_text().splitlines()[80])
    assert record["prompts"] == ["a prompt number 80, still and more"]
    assert record["videos"] == [f"a prompt number 80, still-{i}.mp4" for i in range(5)]
    assert prompts.load(out)[0].sentences == ("a prompt number 0, still and more",)


def test_a_name_that_no_file_can_have_is_an_error_and_a_number_is_none(tmp_path):
    path = write(tmp_path / "list.txt", f"a fox\n{'é' * 130}\n")
    with pytest.raises(UsageError, match=r"list\.txt:2: no file can be called .*--custom"):
        vbench.plan(path, None, None, 5, False)
    out = tmp_path / "plan.jsonl"
    run("vbench", path, "--custom", "--samples=2", f"--output={out}")
    names = json.loads((tmp_path / "plan.jsonl.prompts.json").read_text())
    assert list(names) == ["0000-0.mp4", "0000-1.mp4", "0001-0.mp4", "0001-1.mp4"]
    assert names["0001-1.mp4"] == "é" * 130
    with pytest.raises(UsageError, match="has 1 prompts and .* 2; line i of one must extend"):
        vbench.plan(path, write(tmp_path / "e.txt", "x\n"), None, 5, True)
