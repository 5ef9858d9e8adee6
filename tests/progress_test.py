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


# ---------------------------------------------------------------- bars

BAR = """
import time
with progress.bar('encoding the ' + 20 * 'long ' + 'list', 40) as advance:
    for i in range(40):
        time.sleep(0.01)
        advance(description='encoding the ' + 20 * 'long ' + f'list {i}')
"""


def test_a_bar_on_a_terminal_fits_and_counts():
    text = on_terminal(BAR)
    lines = [ESCAPE.sub("", line) for line in re.split(r"[\r\n]+", text)]
    assert max(map(len, lines)) == 80
    assert any("40/40" in line and line.startswith("encoding the long") for line in lines)


def test_a_bar_on_an_ascii_terminal_is_ascii():
    text = on_terminal(BAR, PYTHONIOENCODING="ascii")
    assert text.isascii() and "40/40" in text and "-----" in text


def test_a_short_stage_prints_nothing_into_a_pipe():
    done = subprocess.run(
        [sys.executable, "-c", f"from kvpo_jax.runtime import progress\n{BAR}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == done.stderr == ""


@pytest.mark.parametrize("total, counts", [(3, ["1/3", "2/3", "3/3"]), (None, ["1", "2", "3"])])
def test_a_long_stage_prints_lines_into_a_pipe(total, counts):
    def stage(stream):
        with progress.bar("scoring", total, stream, period=0.0) as advance:
            advance()
            advance(description="scoring b.mp4")
            advance()

    names = ["scoring", "scoring b.mp4", "scoring b.mp4"]
    expected = [f"{name}: {count}" for name, count in zip(names, counts, strict=True)]
    assert printed("utf-8", stage).splitlines() == expected


# ---------------------------------------------------------------- the line of an iteration


def laps(*times, iterations=9):
    clock = iter(times)
    return progress.Progress(iterations, clock=lambda: next(clock))


def test_a_line_has_what_fits_into_80_columns():
    line = laps(0.0, 100.0)
    line.lap()
    assert line.line(0, METRICS) == (
        "1/9  reward +0.500  std 2e-03  gate  75%  KL 1e-04   100.0 s    13:20 left"
    )
    assert line.line(0, {"kl": 0.5}) == "1/9  KL 5e-01   100.0 s    13:20 left"


def test_a_wide_line_has_everything():
    line = laps(0.0, 100.0)
    line.lap()
    assert line.line(0, METRICS, width=200) == (
        "1/9  reward +0.500  std 2e-03  gate  75%  KL 1e-04  anchor +0.250  grad 2e+00  win  75%  "
        "ratio 2e-02  clip   0%   100.0 s    13:20 left"
    )


@pytest.mark.parametrize("iterations", [9, 40, 100, 5000])
@pytest.mark.parametrize("reward", [0.5, -123.456, float("nan")])
def test_lines_fit_80_columns_in_ascii(iterations, reward):
    line = laps(0.0, 9999.0, iterations=iterations)
    line.lap()
    text = line.line(iterations - 2, {**METRICS, "reward": reward})
    assert len(text) <= 80 and text.isascii()
    assert text.split()[0] == f"{iterations - 1}/{iterations}" and text.endswith(" left")


def test_the_time_left_does_not_count_compilation():
    line = laps(0.0, 100.0, 110.0, 120.0)
    line.lap(compiling=90.0)
    assert line.line(0, {}) == "1/9   100.0 s     1:20 left"
    line.lap()
    line.lap(compiling=4.0)
    assert line.line(2, {}) == "3/9    10.0 s     0:48 left"
    assert line.line(1, {}) == line.line(1, {})  # it only formats


def test_the_time_left_forgets_the_first_iteration_of_a_process():
    """It also traces programs and reads them from disk."""
    line = laps(0.0, 100.0, 102.0, 106.0)
    line.lap(compiling=20.0)
    line.lap()
    assert line.line(1, {}) == "2/9     2.0 s     0:14 left"
    line.lap()
    assert line.line(2, {}) == "3/9     4.0 s     0:18 left"


def test_show_prints_the_line_once(capsys):
    laps(0.0, 100.0).show(0, {"kl": 0.5, "seconds_compile": 90.0})
    assert capsys.readouterr().out == "1/9  KL 5e-01   100.0 s     1:20 left\n"


def test_the_legend_explains_every_column():
    lines = progress.legend().splitlines()
    assert len(lines) == len(progress.COLUMNS) and max(map(len, lines)) <= 80
    assert "KL" in progress.legend() and "gate" in progress.legend()


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")]
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


LINE = """
with progress.line() as show:
    for text in ("first " * 30, "東京" * 30, "last"):
        show(text)
"""


def test_a_line_that_changes_stays_in_the_width_of_the_terminal_and_leaves_no_rest():
    shown = on_terminal(LINE).rstrip("\r\n").split("\r")
    assert shown[0] == "" and [cell_len(text) for text in shown[1:]] == [79, 79, 79]
    assert shown[3] == "last" + 75 * " "


def test_of_a_line_that_changes_a_pipe_gets_the_last_state():
    def show(stream):
        with progress.line(stream) as line:
            line("first")
            line("caf\u00e9")
        with progress.line(stream):
            pass

    assert printed("ascii", show) == "caf\\xe9\n"
