"""Prompt files: the released loader's results, errors that name the line, split, stream, tfds."""

import json
import subprocess
import sys

import pytest

from kvpo_jax.data import prompts, prompts_tfds
from kvpo_jax.data.prompts import PromptSequence

FORMATTED = (
    "1,[a fox],[it stops, and [slowly] looks back]\n\n0,\n2,[a hare]\n[no number],[second]\n"
)


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def texts(sequences):
    return [list(sequence.sentences) for sequence in sequences]


def numbered(count):
    return [PromptSequence((f"prompt {i}", f"and then {i}"), i + 1) for i in range(count)]


# ---------------------------------------------------------------- files


@pytest.mark.golden
def test_reads_what_the_released_loader_reads(golden_dir):
    """All of the release's cases, which are lenient.

    The release loses a first field without a number. A number here makes us read as it does.
    """
    data = json.loads((golden_dir / "prompts.json").read_text())
    text = {"p.txt": data["p.txt"].replace("[no index prefix],", "9,"), "p.jsonl": data["p.jsonl"]}
    assert text["p.txt"] != data["p.txt"] and len(data["results"]) == 12
    for case in data["results"]:
        kwargs = dict(case["kwargs"])
        first = kwargs.pop("max_n", None)
        sequences, _ = prompts.parse(text[case["file"]], "." + case["file"].partition(".")[2])
        assert texts(prompts.select(sequences, **kwargs))[:first] == [
            row["prompts"] for row in case["result"]
        ], case


@pytest.mark.golden
def test_names_the_lines_of_which_the_released_loader_loses_text(golden_dir, tmp_path):
    data = json.loads((golden_dir / "prompts.json").read_text())
    for name, lines in (("p.txt", [7, 9, 10]), ("p.jsonl", [3, 4, 6])):
        assert [line for line, _ in prompts.parse(data[name], f".{name[2:]}")[1]] == lines
        path = write(tmp_path, name, data[name])
        with pytest.raises(ValueError) as error:
            prompts.load(path)
        assert [f"{path}:{line}: " in str(error.value) for line in range(1, 12)] == [
            line in lines for line in range(1, 12)
        ]


def test_formatted_text(tmp_path):
    assert prompts.load(write(tmp_path, "a.txt", FORMATTED)) == [
        PromptSequence(("a fox", "it stops, and [slowly] looks back"), 1),
        PromptSequence(("a hare",), 4),
        PromptSequence(("no number", "second"), 5),
    ]


def test_commas_in_a_first_field_without_a_number_belong_to_it(tmp_path):
    path = write(tmp_path, "a.txt", "[a fox, a hare],[7, or 8]\r\n 12 , [ x ] , [], [y]\r\n")
    assert texts(prompts.load(path)) == [["a fox, a hare", "7, or 8"], ["x", "y"]]


def test_text_with_one_prompt_per_line(tmp_path):
    """Brackets and numbers inside a prompt do not make a file formatted."""
    path = write(tmp_path, "a.txt", "\ufeffA fox, [slowly], turns.\n\n  3 hares; 2, then 1\n")
    assert prompts.load(path) == [
        PromptSequence(("A fox, [slowly], turns.",), 1),
        PromptSequence(("3 hares; 2, then 1",), 3),
    ]
    path = write(tmp_path, "b.txt", '{a fox}\n{"caption": "a hare"}\n')
    assert texts(prompts.load(path)) == [["{a fox}"], ['{"caption": "a hare"}']]


def test_jsonl(tmp_path):
    path = write(
        tmp_path, "a.jsonl", '{"prompts": ["é", " b [c ", ""], "id": 7}\n\n{"prompts": ["d"]}'
    )
    assert prompts.load(path) == [PromptSequence(("é", "b [c"), 1), PromptSequence(("d",), 3)]


def test_durations_belong_to_the_prompts_that_are_kept(tmp_path):
    line = '{"prompts": ["a", "", "b", "c"], "durations": [6, 3, 12, 9]}'
    (sequence,) = prompts.load(write(tmp_path, "a.jsonl", line))
    assert sequence == PromptSequence(("a", "b", "c"), 1, (6, 12, 9))
    assert prompts.switch_frames(sequence) == (6, 18)
    (cut,) = prompts.select([sequence], max_segments=2)
    assert cut == PromptSequence(("a", "b"), 1, (6, 12))
    # The videos of a run switch together.
    assert prompts.segments_to(sequence, 4) == PromptSequence(("a", "b", "c", "c"), 1)
    assert prompts.cleaned(sequence).durations == (6, 12, 9)


def test_what_is_written_is_read_back(tmp_path):
    sequences = [PromptSequence(("é, [x]", "b"), 1), PromptSequence(("c",), 2)]
    for name in ("a.jsonl", "a.txt"):
        prompts.write(tmp_path / name, sequences)
        assert prompts.load(tmp_path / name) == sequences
    assert (tmp_path / "a.txt").read_text() == "2,[é, [x]],[b]\n1,[c]\n"
    timed = PromptSequence(("d", "e ] [ f", "g\nh"), 1, (3, 6, 9))
    prompts.write(tmp_path / "b.jsonl", [timed])
    assert prompts.load(tmp_path / "b.jsonl") == [timed]
    for lost in (timed, PromptSequence(("e ] [ f",), 1), PromptSequence(("g\nh",), 1)):
        with pytest.raises(ValueError, match=r"c\.txt: sequence 1 .* write a \.jsonl"):
            prompts.write(tmp_path / "c.txt", [lost])
    assert not (tmp_path / "c.txt").exists()
    with pytest.raises(ValueError, match="ends in .txt or .jsonl"):
        prompts.write(tmp_path / "c.json", sequences)


def test_segments_are_bounded(tmp_path):
    path = write(tmp_path, "a.txt", "1,[a]\n2,[b],[c]\n3,[d],[e],[f]\n")
    assert texts(prompts.load(path, min_segments=2)) == [["b", "c"], ["d", "e", "f"]]
    assert texts(prompts.load(path, max_segments=2)) == [["a"], ["b", "c"], ["d", "e"]]
    assert texts(prompts.load(path, min_segments=2, max_segments=2)) == [["b", "c"], ["d", "e"]]
    with pytest.raises(ValueError, match="none of its 3 prompt sequences has 4 segments or more"):
        prompts.load(path, min_segments=4)
    with pytest.raises(ValueError, match="b.txt has no prompts$"):
        prompts.load(write(tmp_path, "b.txt", "\n \n"))
    with pytest.raises(ValueError, match="min_segments=3 to max_segments=2"):
        prompts.load(path, min_segments=3, max_segments=2)


@pytest.mark.parametrize(
    "name, text, message",
    [
        (
            "a.txt",
            "1,[a]\n2,[b],[c\n",
            r"a\.txt:2: a bracket is not closed, and '\[c' would be lost",
        ),
        (
            "a.txt",
            "1,[a]\n\n3,[b] and [c]\n",
            r"a\.txt:3: 'and' is outside of the brackets and would be lost",
        ),
        ("a.txt", "1,[a]\nfox,[b]\n", r"a\.txt:2: 'fox' is outside"),
        ("a.txt", "1,[a]]\n", r"a\.txt:1: '\]' is outside"),
        ("a.txt", "1,[a]\na fox\n", r"a\.txt:2: 'a fox' is outside"),
        ("a.txt", "1,[a]\n2,\n", r"a\.txt:2: there is no prompt"),
        ("a.txt", "1,[a]\n2,[],[ ]\n", r"a\.txt:2: there is no prompt"),
        (
            "a.jsonl",
            '{"prompts": ["a"]}\n{"prompts": ["b"\n',
            r"a\.jsonl:2: not JSON: .* at column 17",
        ),
        ("a.jsonl", '{"prompt": ["a"]}\n', r'a\.jsonl:1: expected {"prompts"'),
        (
            "a.jsonl",
            '{"prompts": ["a", "b"], "durations": [3]}\n',
            r"a\.jsonl:1: durations \[3\]: expected latent frames, one number per prompt",
        ),
        ("a.jsonl", '{"prompts": ["a"], "durations": [1.5]}\n', r"1: durations \[1.5\]: exp"),
        ("a.jsonl", '{"prompts": ["a"], "durations": [0]}\n', r"1: durations \[0\]: exp"),
        ("a.jsonl", '{"prompts": ["a"], "durations": "3"}\n', r'1: durations "3": exp'),
        ("a.jsonl", '["a"]\n', r'a\.jsonl:1: expected {"prompts"'),
        ("a.jsonl", '{"prompts": "a"}\n', r'a\.jsonl:1: expected {"prompts"'),
        ("a.jsonl", '{"prompts": ["a", null]}\n', r"a\.jsonl:1: the prompt null is not a string"),
        ("a.jsonl", '{"prompts": []}\n', r"a\.jsonl:1: there is no prompt"),
        (
            "a.txt",
            'a\n{"prompts": ["b"]}\n',
            r"a\.txt:2: a line .* of a \.jsonl file; rename the file to \.jsonl",
        ),
        ("a.txt", "\n", r"a\.txt has no prompts"),
        ("a.csv", "a\n", r"a\.csv: the name of a prompt file ends in \.txt or \.jsonl"),
    ],
)
def test_a_malformed_line_is_an_error_that_names_file_and_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        prompts.load(write(tmp_path, name, text))


def test_of_many_malformed_lines_three_are_named_and_the_others_counted(tmp_path):
    path = write(tmp_path, "a.txt", "1,[a]\n" + "stray\n" * 10_000)
    with pytest.raises(ValueError) as error:
        prompts.load(path)
    message = str(error.value)
    assert [f"{path}:{line}: " in message for line in (2, 3, 4, 5)] == [True, True, True, False]
    assert message.endswith("; and 9,997 lines more") and len(message) < 1000


@pytest.mark.parametrize(
    "content, message",
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:78967f\nsize 145875068\n",
            r"a.txt is not a file of prompts but a Git LFS pointer .* `git lfs pull`",
        ),
        (b"<!DOCTYPE html>\n<html></html>\n", r"a.txt is not a file of prompts but a web page"),
        (b"PK\x03\x04rest", r"a.txt is not a file of prompts but a zip archive"),
        (b"A cat runs.\nA d\0g.\n", r"a.txt:2: it has a zero byte, so it is no text"),
        ("A cat".encode("utf-16"), r"a.txt:1: not UTF-8 text; save the file as UTF-8"),
    ],
)
def test_what_is_no_file_of_prompts_is_named_by_its_kind(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prompts.load(tmp_path / "a.txt")


def test_text_in_another_encoding_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a fox\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"a\.txt:2: not UTF-8"):
        prompts.load(path)


# ---------------------------------------------------------------- split


def test_split_has_everything_once():
    sequences = numbered(40)
    train, heldout = prompts.split(sequences, 8, seed=0)
    assert len(train) == 32 and len(heldout) == 8
    assert sorted(train + heldout, key=lambda s: s.line) == sequences
    assert train == sorted(train, key=lambda s: s.line)
    assert prompts.split(sequences, 0, seed=0) == (sequences, [])


def test_split_is_of_the_text_and_the_seed():
    sequences = numbered(40)
    train, heldout = prompts.split(sequences, 8, seed=0)
    moved = [PromptSequence(s.sentences, 100 - s.line) for s in reversed(sequences)]
    assert texts(prompts.split(moved, 8, seed=0)[1]) == texts(heldout)
    assert prompts.split(sequences, 3, seed=0)[1] == heldout[:3]
    assert set(prompts.split(sequences, 8, seed=1)[1]) != set(heldout)
    # Pins the hash: a run that is resumed by a later version must not train on what it held out.
    assert [s.line for s in heldout] == [26, 6, 8, 34, 23, 37, 13, 38]


def test_an_added_line_moves_no_other_into_the_held_out_part():
    before = prompts.split(numbered(40), 8, seed=0)[1]
    entered = 0
    for i in range(40, 80):
        after = prompts.split([*numbered(40), numbered(80)[i]], 8, seed=0)[1]
        new = [s for s in after if s not in before]
        entered += len(new)
        assert new in ([], [numbered(80)[i]])
        assert [s for s in after if s in before] == before[: 8 - len(new)]
    assert 0 < entered < 40


def test_a_text_that_is_there_twice_is_on_one_side():
    sequences = [
        PromptSequence(s.sentences, s.line + shift) for shift in (0, 40) for s in numbered(40)
    ]
    train, heldout = prompts.split(sequences, 8, seed=0)
    assert len(train) == 64 and heldout == prompts.split(numbered(40), 8, seed=0)[1]
    assert not {s.sentences for s in train} & {s.sentences for s in heldout}
    with pytest.raises(ValueError, match="40 held-out sequences of 40 different ones"):
        prompts.split(sequences, 40, seed=0)


# ---------------------------------------------------------------- stream


def test_every_epoch_of_the_stream_has_each_sequence_once_in_its_own_order():
    sequences = numbered(10)
    stream = [prompts.at(sequences, index, seed=3) for index in range(40)]
    epochs = [stream[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch, key=lambda s: s.line) == sequences for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [prompts.at(sequences, index, seed=4) for index in range(10)] != epochs[0]


def test_the_stream_resumes_at_any_index():
    """Nothing but the index decides: not what was read before, not what is read beside it."""
    sequences = numbered(7)
    stream = [prompts.at(sequences, index, seed=0) for index in range(30)]
    assert [prompts.at(sequences, index, seed=0) for index in range(17, 30)] == stream[17:]
    assert [prompts.at(sequences, index, seed=0) for index in reversed(range(30))] == stream[::-1]


def test_segments_to_cuts_or_repeats_the_last_sentence():
    sequence = PromptSequence(("a", "b"), 5)
    assert prompts.segments_to(sequence, 1) == PromptSequence(("a",), 5)
    assert prompts.segments_to(sequence, 2) == sequence
    assert prompts.segments_to(sequence, 4) == PromptSequence(("a", "b", "b", "b"), 5)


# ---------------------------------------------------------------- tfds


def test_tfds_dataset_has_the_split_of_the_file(tmp_path):
    lines = [json.dumps({"prompts": [f"café {i}"] * (1 + i % 3)}) for i in range(12)]
    path = write(tmp_path, "p.jsonl", "\n".join(lines))
    builder = prompts_tfds.build(path, tmp_path / "data", min_segments=2, heldout=3, seed=1)
    train, heldout = prompts.split(prompts.load(path, min_segments=2), 3, seed=1)
    source = builder.as_data_source("train")
    assert [prompts_tfds.to_sequence(source[i]) for i in range(len(source))] == train
    assert [prompts_tfds.to_sequence(row) for row in builder.as_data_source("heldout")] == heldout
    assert prompts_tfds.to_sequence(prompts.at(source, 20, seed=0)) == prompts.at(train, 20, seed=0)

    again = prompts_tfds.build(path, tmp_path / "data", min_segments=2, heldout=3, seed=1)
    assert again.data_path == builder.data_path
    path.write_text("\n".join([*lines, '{"prompts": ["new", "line"]}']))
    changed = prompts_tfds.build(path, tmp_path / "data", min_segments=2)
    assert changed.data_path != builder.data_path and set(changed.info.splits) == {"train"}
    assert len(changed.as_data_source("train")) == 9


def test_a_renamed_file_is_another_tfds_dataset(tmp_path):
    """The name decides how its lines are read."""
    path = write(tmp_path, "p.txt", "a fox\n")
    prompts_tfds.build(path, tmp_path / "data")
    with pytest.raises(ValueError, match=r"p\.jsonl:1: not JSON"):
        prompts_tfds.build(path.rename(tmp_path / "p.jsonl"), tmp_path / "data")


def test_a_malformed_file_leaves_no_tfds_dataset(tmp_path):
    path = write(tmp_path, "p.txt", "1,[a]\n2,[b\n")
    with pytest.raises(ValueError, match=r"p\.txt:2: a bracket is not closed"):
        prompts_tfds.build(path, tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.array_record*")) and not list(
        (tmp_path / "data").rglob("*info.json")
    )


def test_tfds_dataset_needs_no_tensorflow(tmp_path):
    path = write(tmp_path, "p.txt", FORMATTED)
    program = f"""
import sys
from kvpo_jax.data import prompts_tfds
source = prompts_tfds.build({str(path)!r}, {str(tmp_path / "data")!r}).as_data_source("train")
print([prompts_tfds.to_sequence(row).line for row in source])
assert not {{"tensorflow", "torch"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[1, 4, 5]"
