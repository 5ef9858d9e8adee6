"""What commands show: on a terminal of 80 columns, in a pipe, and where the encoding is ASCII."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.cells import cell_len

from kvpo_jax.runtime import progress

NAMES = ["", "reward", "VQ", "MQ", "TA", "VQ_best", "videoalign_MQ", "gain", "95 % interval"]
ROWS = [
    ["reference", *6 * ["10.5000"], "", ""],
    ["online", *6 * ["10.7500"], "+0.2500", "[+0.2000, +0.3000]"],
]
METRICS = {
    "reward": 0.5,
    "best_minus_anchor": 0.0042,
    "reward_std_in_group": 0.0019,
    "gate_open": 0.75,
    "kl": 1.2e-4,
    "reward_anchor": 0.25,
    "grad_norm": 1.5,
    "win_rate": 0.75,
    "log_ratio_std": 0.02,
    "clip_fraction": 0.0,
    "other": 1.0,
}
SHUT = {**METRICS, "gate_open": 0.0, "grad_norm": 0.0, "skipped_update": 1.0}
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(autouse=True)
def no_columns(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)


def printed(encoding, function, *arguments):
    """What a function prints to a stream that is no terminal."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    function(*arguments, stream=stream)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def on_terminal(program, columns=80, **environment):
    """The bytes that a program writes to a terminal of so many columns, as text."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", **environment}
    command = [sys.executable, "-c", f"from kvpo_jax.runtime import progress\n{program}"]
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=environment)
    os.close(child)
    out = b""
    try:
        while block := os.read(parent, 65536):
            out += block
    except OSError:  # how Linux says that the other end is closed
        pass
    assert process.wait() == 0, out
    return out.decode()


def in_a_pipe(program):
    """What a program prints on stdout and stderr if neither is a terminal."""
    command = [sys.executable, "-c", f"from kvpo_jax.runtime import progress\n{program}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def screen(written, columns=80):
    """The lines that stand on a terminal in the end."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[1A":
            row -= 1
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
            assert len(lines[row]) <= columns, lines[row]
        else:
            assert part.endswith("m") or part in ("\x1b[?25l", "\x1b[?25h"), repr(part)
    return [line.rstrip() for line in lines]


class Time:
    """A clock that goes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


# ---------------------------------------------------------------- tables


def test_a_narrow_table_has_a_rule_and_numbers_on_the_right():
    rows = [["reference", 0.5, "no"], ["online", "-10.25", "yes"]]
    text = printed("utf-8", progress.table, "Held out", ["policy", "reward", "better"], rows)
    assert [line.rstrip() for line in text.splitlines()] == [
        "Held out",
        "policy     reward  better",
        "-------------------------",
        "reference     0.5  no",
        "online     -10.25  yes",
    ]


def test_a_wide_table_continues_below_and_breaks_no_number():
    lines = printed("utf-8", progress.table, "Held out", NAMES, ROWS).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines].count("online") == 2
    words = re.split(r"\s{2,}", "  ".join(lines))
    assert all(words.count(name) == 1 for name in NAMES if name)
    assert words.count("10.7500") == 6 and words.count("[+0.2000, +0.3000]") == 1


def test_columns_widen_a_pipe(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert len(printed("utf-8", progress.table, "", NAMES, ROWS).splitlines()) == 4


def test_a_pipe_gets_no_colours_even_if_they_are_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = printed("utf-8", progress.table, "[bold]not markup[/bold] :smile:", NAMES, ROWS)
    assert text.startswith("[bold]not markup[/bold] :smile:\n")
    assert "\x1b" not in text


def test_ascii_streams_get_ascii_alone_and_the_columns_stay_aligned():
    rows = [["ein Bär läuft", "1.0"], ["x", "22.0"]]
    text = printed("ascii", progress.table, "Prompts – alle", ["prompt", "reward"], rows)
    lines = text.splitlines()
    assert lines[0] == r"Prompts \u2013 alle"
    assert lines[3].startswith(r"ein B\xe4r l\xe4uft")
    assert len({len(line) for line in lines[1:]}) == 1


def test_wide_characters_and_long_names_fit():
    rows = [["画" * 60, "1.0", "x" * 200]]
    lines = printed("utf-8", progress.table, "", ["prompt", "reward", "text"], rows).splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert "".join(lines).count("画") >= 60 and "".join(lines).count("x") >= 200


def test_a_terminal_has_80_columns_and_bold_names():
    text = on_terminal(f"progress.table('Held out', {NAMES}, {ROWS})")
    assert "\x1b[1m" in text
    lines = ESCAPE.sub("", text).splitlines()
    assert max(map(len, lines)) <= 80 and "Held out" in lines


# ---------------------------------------------------------------- stages


def test_silence_is_broken_after_five_seconds_and_later_after_thirty():
    clock = Time()
    stages = progress.Stages(clock)
    said = {}

    def until(second):
        while clock.now < 100 + second:
            clock.now += 1
            if text := stages.announcement():
                said[round(clock.now - 100)] = text

    until(10)
    training = stages.enter("training", 40)
    until(17)
    replay = stages.enter("replay")
    until(21)
    assert said == {15: "training 0/40, 0:05", 20: "training 0/40, replay, 0:10"}
    stages.heard()  # a line of another kind at 21
    until(50)
    assert list(said)[2:] == [26, 31, 36, 41, 46]
    said.clear()
    until(130)  # the process is no longer young
    assert list(said) == [51, 56, 86, 116]
    stages.leave(replay)
    training.advance()
    said.clear()
    stages.enter("saving")  # which has not been announced yet
    until(140)
    assert said == {131: "training 1/40, saving, 0:01"}
    until(170)
    assert list(said) == [131, 161]


def test_nothing_is_announced_when_nothing_is_under_way():
    clock = Time()
    stages = progress.Stages(clock)
    stage = stages.enter("scoring")
    stages.enter("clips")
    stages.leave(stage)  # and what is inside of it
    clock.now += 1000
    assert stages.announcement() is None
    stages.enter("decoding")
    assert stages.announcement() is None  # it has just begun


@pytest.mark.parametrize(
    ("width", "told"),
    [
        (80, "planning, shared blocks 0/5, compiling shared_block, 0:09"),
        (57, "planning, shared blocks 0/5, compiling shared_block, 0:09"),
        (56, "planning, compiling shared_block, 0:09"),
        (10, "planning, compiling shared_block, 0:09"),
    ],
)
def test_an_announcement_leaves_out_what_is_between(width, told):
    stages = progress.Stages(clock := Time())
    stages.enter("planning")
    stages.enter("shared blocks", 5)
    stages.enter("compiling shared_block")
    clock.now += 9.0
    assert stages.announcement(width) == told


BAR = """
import time
with progress.bar('encoding the ' + 20 * 'long ' + 'list', 40) as advance:
    for i in range(40):
        time.sleep(0.01)
        advance(description='encoding the ' + 20 * 'long ' + f'list {i}')
"""
NESTED = """
import time
progress.SETTLED = 0.0
with progress.bar('training', 3, steady=False) as advance:
    for i in progress.steps(range(3), 'held-out prompts'):
        with progress.bar('scoring clips', 7):
            time.sleep(0.3)
        print('printed', i)
        progress.say('said ' + str(i))
        progress.table('', ('table', 'of'), [(i, 'rows')])
        advance()
print('the end')
"""


@pytest.mark.parametrize("columns", [40, 80, 160])
def test_a_bar_on_a_terminal_fits_and_counts(columns):
    text = on_terminal(BAR, columns)
    lines = [ESCAPE.sub("", line) for line in re.split(r"[\r\n]+", text)]
    assert max(map(len, lines)) == columns
    assert any(line.startswith("encoding the") and line.endswith(" left") for line in lines)
    assert any("━" in line for line in lines)
    assert not any(screen(text, columns))  # it is gone in the end


def test_a_bar_on_an_ascii_terminal_is_ascii():
    text = on_terminal(BAR, PYTHONIOENCODING="ascii")
    assert text.isascii() and "-----" in text


@pytest.mark.parametrize("columns", [40, 80, 160])
def test_what_is_printed_stands_above_the_bar_and_no_bar_remains(columns):
    text = on_terminal(NESTED, columns)
    expected = [
        line
        for i in range(3)
        for line in (f"printed {i}", f"said {i}", "table  of", "-----------", f"{i}      rows")
    ]
    assert screen(text, columns) == [*expected, "the end", ""]
    assert "scoring clips 0/7" in text or columns == 40
    if columns == 160:
        assert "training 1/3, held-out prompts 1/3, scoring clips 0/7" in text
    assert text.endswith("the end\r\n") and text.rindex("\x1b[?25l") < text.rindex("\x1b[?25h")


def test_a_stage_that_does_not_fit_leaves_out_what_is_between():
    stages = progress.Stages(clock := Time())
    stages.enter("training", 40, steady=False).advance(12)
    stages.enter("held-out prompts", 32).advance(8)
    stages.enter("compiling shared_block")
    assert drawn(stages, 80).split(" ━")[0].rstrip() == "training 12/40"  # the others flicker
    clock.now += 75
    shown = "training 12/40, held-out prompts 8/32, compiling shared_block"
    assert drawn(stages, 100).split(" ━")[0].rstrip() == shown
    assert drawn(stages, 80).split(" ━")[0].rstrip() == "training 12/40, compiling shared_block"
    assert [drawn(stages, n)[-5:] for n in (100, 80)] == [" 1:15"] * 2
    for columns in (20, 40, 160):
        assert len(drawn(stages, columns)) == columns


def drawn(stages, columns):
    """The line at the bottom of a terminal."""
    out = progress.Console(
        width=columns, force_terminal=True, color_system=None, file=io.StringIO()
    )
    out.print(stages.bar(out))
    return out.file.getvalue().rstrip("\n")


def test_the_time_left_of_a_bar_is_that_of_its_steps():
    stages = progress.Stages(clock := Time())
    stage = stages.enter("scoring", 5)
    clock.now += 10
    assert drawn(stages, 80).endswith(" 0:10")
    stage.advance()
    assert drawn(stages, 80).endswith(" 0:40 left")
    clock.now += 10
    stage.advance()
    assert drawn(stages, 80).endswith(" 0:30 left")


def test_a_short_stage_prints_nothing_into_a_pipe():
    assert in_a_pipe(BAR) == ("", "")


def test_a_long_stage_prints_plain_lines_into_a_pipe():
    hurry = "progress.TICK = 0.01; progress.FIRST = progress.LATER = 0.1"
    out, errors = in_a_pipe(f"{hurry}\n{NESTED}")
    assert errors == "" and "\x1b" not in out and "\r" not in out
    lines = out.splitlines()
    assert "training 1/3, held-out prompts 1/3, scoring clips 0/7, 0:00" in lines
    assert lines[-1] == "the end"


def test_a_stage_that_fails_leaves_nothing_behind():
    with pytest.raises(ZeroDivisionError), progress.bar("outer"):
        for _ in progress.steps(range(3), "inner"):
            1 / 0  # noqa: B018
    assert not progress.STAGES.shown and not progress.STAGES._stages


def test_compiling_is_a_stage_with_the_name_of_the_program(monkeypatch):
    monkeypatch.setattr(progress, "STAGES", progress.Stages())
    seen = []

    def note():
        seen.append([stage.text() for stage in progress.STAGES._stages])

    def slow_program(x):
        note()  # while it is traced
        return jax.jit(jnp.sin)(x)

    def broken_program(x):
        note()
        raise ZeroDivisionError

    with progress.bar("scoring"):
        jax.jit(slow_program)(1.0)
        note()
        with pytest.raises(ZeroDivisionError):
            jax.jit(broken_program)(1.0)
        note()
    assert seen == [
        ["scoring", "compiling slow_program"],
        ["scoring"],
        ["scoring", "compiling broken_program"],
        ["scoring"],
    ]


def test_a_process_that_is_muted_prints_on_stderr_alone():
    hurry = "progress.TICK = 0.01; progress.FIRST = progress.LATER = 0.1"
    program = f"import sys\nprogress.mute()\n{hurry}\n{NESTED}\nprint('bad', file=sys.stderr)"
    assert in_a_pipe(program) == ("", "bad\n")
    assert on_terminal(program) == "bad\r\n"


def test_a_warning_is_yellow_on_a_terminal_and_plain_in_a_pipe():
    assert on_terminal("progress.warn('a [b] :smile:')") == "\x1b[33ma [b] :smile:\x1b[0m\r\n"
    assert on_terminal("progress.warn('a')", NO_COLOR="1") == "a\r\n"
    assert in_a_pipe("progress.warn('a [b] ' + 100 * 'x')") == (f"a [b] {100 * 'x'}\n", "")


def test_a_reader_that_goes_away_is_an_error_of_printing():
    program = """
import os
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
try:
    progress.say('x')
except BrokenPipeError:
    os._exit(0)
os._exit(3)
"""
    in_a_pipe(program)


# ---------------------------------------------------------------- the line of an iteration


def laps(*times, iterations=9):
    clock = iter(times)
    return progress.Progress(iterations, clock=lambda: next(clock))


def second(iterations=9):
    """At the end of the second iteration, which took ten seconds."""
    line = laps(0.0, 100.0, 110.0, iterations=iterations)
    line.lap()
    line.lap()
    return line


def test_a_line_has_what_moves_in_80_columns():
    line = second()
    assert line.line(1, METRICS) == (
        "2/9 reward=+0.500 best=+4e-3 std=2e-3 gate=75%  KL=1e-4 grad=2e0  eta=1:10"
    )
    assert line.line(1, {"kl": 0.5}) == "2/9 KL=5e-1 took=10.0s eta=1:10"


def test_a_wide_line_has_everything():
    assert second().line(1, METRICS, width=160) == (
        "2/9 reward=+0.500 best=+4e-3 std=2e-3 gate=75%  KL=1e-4 grad=2e0  took=10.0s win=75%  "
        "anchor=+0.250 ratio=2e-2 clip=0%   eta=1:10"
    )


def test_a_narrow_line_has_the_first_words():
    assert second().line(1, METRICS, width=40) == "2/9 reward=+0.500 best=+4e-3 eta=1:10"


def test_a_gate_that_is_shut_is_said_in_words():
    shut = "2/9 reward=+0.500 best=+4e-3 std=2e-3 gate shut: no update KL=1e-4 took=10.0s eta=1:10"
    assert second().line(1, SHUT, width=len(shut)) == shut
    assert "gate shut: no update KL=1e-4 eta" in second().line(1, SHUT)
    # With a gate that scales the loss instead of dropping it there is an update.
    learned = {**SHUT, "skipped_update": 0.0, "grad_norm": 0.5}
    assert "gate shut KL=1e-4 grad=5e-1" in second().line(1, learned)


@pytest.mark.parametrize("iterations", [9, 40, 125, 999])
@pytest.mark.parametrize("each", [1.0, 3000.0])
def test_the_gradient_and_the_time_left_fit_80_columns(iterations, each):
    line = laps(0.0, 100.0, 100.0 + each, iterations=iterations)
    line.lap()
    line.lap()
    text = line.line(1, {**METRICS, "gate_open": 1.0, "grad_norm": 0.002})
    assert len(text) <= 80 and " grad=2e-3 eta=" in text


@pytest.mark.parametrize("iterations", [9, 100, 5000])
@pytest.mark.parametrize("reward", [0.5, -123.456, float("nan")])
@pytest.mark.parametrize("width", [40, 80, 160])
def test_lines_fit_in_ascii(iterations, reward, width):
    text = second(iterations).line(iterations - 2, {**METRICS, "reward": reward}, width)
    assert len(text) <= width and text.isascii()
    assert text.split()[0] == f"{iterations - 1}/{iterations}" and text.endswith(" eta=0:10")


def test_the_words_of_all_lines_are_aligned():
    line = second(iterations=40)
    small = {**METRICS, "reward": -0.25, "gate_open": 0.0, "grad_norm": 0.002}
    texts = [line.line(1, METRICS), line.line(20, small)]
    for word in ("reward", "best", "std", "gate", "KL", "grad", "eta"):
        assert texts[0].index(word) == texts[1].index(word)


def test_the_time_left_is_told_from_the_second_iteration_on():
    """The first one of a process also traces programs and reads them from disk."""
    line = laps(0.0, 100.0, 102.0, 106.0)
    line.lap(compiling=20.0)
    assert line.line(0, {}) == "1/9 took=100.0s"
    line.lap()
    assert line.line(1, {}) == "2/9 took=2.0s  eta=0:14"
    line.lap()
    assert line.line(2, {}) == "3/9 took=4.0s  eta=0:18"
    assert line.line(2, {}) == line.line(2, {})  # it only formats


def test_the_time_left_does_not_count_compilation():
    line = laps(0.0, 100.0, 110.0)
    line.lap()
    line.lap(compiling=4.0)
    assert line.line(1, {}) == "2/9 took=10.0s eta=0:42"


def test_show_prints_the_line_once_and_breaks_the_silence(capsys, monkeypatch):
    stages = progress.Stages(clock := Time())
    monkeypatch.setattr(progress, "STAGES", stages)
    stages.enter("training")
    clock.now += 4.0
    laps(0.0, 100.0).show(0, {"kl": 0.5, "seconds_compile": 90.0})
    assert capsys.readouterr().out == "1/9 KL=5e-1 took=100.0s\n"
    clock.now += 4.0
    assert stages.announcement() is None
    clock.now += 1.0
    assert stages.announcement() == "training, 0:09"


def test_only_a_shut_gate_has_a_colour():
    program = "line = progress.Progress(9); line.show(0, {})"
    assert "\x1b" not in on_terminal(program.format(METRICS))
    assert on_terminal(program.format(SHUT)).startswith("\x1b[33m1/9 reward=+0.500 ")


def test_the_legend_explains_every_word():
    lines = progress.legend().splitlines()
    assert max(map(len, lines)) <= 80
    words = [line[2:11].rstrip() for line in lines]
    shown = second().line(1, METRICS, width=200).split()[1:]
    assert {word.partition("=")[0] for word in shown} <= set(words)
    assert "gate shut" in words and "no update" in words


def test_the_readme_has_the_same_words_and_names():
    readme = (Path(progress.__file__).parents[2] / "README.md").read_text()
    for name, column in progress.COLUMNS.items():
        word = column.text.partition("=")[0]
        assert f"| `{word}` | " in readme
        assert f"| `{name}` | " in readme or name == "seconds"


@pytest.mark.parametrize("seconds, text", [(59.6, "1:00"), (3599, "59:59"), (3600, "1.0h")])
def test_rough_times(seconds, text):
    assert progress.rough(seconds) == text


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")]
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
