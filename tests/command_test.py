"""How every command ends when the system fails it: one line that names the file, or no word."""

import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import checkpoint, command

# The main function of a command, as Python text.
PROGRAM = """
import os
from pathlib import Path
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import atomic, command

def main(arguments):
    {body}

command.run("__main__", lambda: None, main)
"""


# A file may have no byte, as on a full disk.
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"


def run(body, *arguments, cwd, shell="", **options):
    """Runs a command whose main function is `body`, after the settings of `shell`."""
    program = [sys.executable, "-c", PROGRAM.format(body=body), *arguments]
    command = ["sh", "-c", f'{shell}\nexec "$@"', "sh", *program]
    return subprocess.run(command, cwd=cwd, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    "body, message",
    [
        ("open('nothere.txt')", "nothere.txt: No such file or directory"),
        ("open('.')", ".: Is a directory"),
        ("open(b'caf\\xc3\\xa9')", "caf\\xe9: No such file or directory"),
        ("os.replace('a', 'b')", "a to b: No such file or directory"),
        ("atomic.write_json({'a': 1}, Path('config.json'))", "config.json: File too large"),
        ("atomic.write_json({'a': 1}, Path('/proc/a/b'))", "/proc/a: No such file or directory"),
        ("raise OSError('no camera')", "no camera"),
        ("raise UsageError('prompt caf\\u00e9\\n is  \\n\\nlong')", "prompt caf\\xe9; is; long"),
    ],
)
def test_an_error_is_one_line_that_names_the_file(tmp_path, body, message):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = run(f"{FULL}; {body}", cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {message}\n")
    assert not list(tmp_path.iterdir())  # nothing half-written is left


def test_an_output_that_takes_nothing_is_named(tmp_path):
    with open("/dev/full", "w") as full:
        done = run("print('a')", cwd=tmp_path, stdout=full)
    assert done.returncode == 1
    assert done.stderr == "error: standard output: No space left on device\n"


SAVES = """
    import resource, time
    import jax.numpy as jnp
    from kvpo_jax.runtime import checkpoint
    state = {str(i): jnp.arange(5000.0) / (i + 1) for i in range(20)}
    with checkpoint.manager("run/checkpoints", keep=3) as checkpoints:
        checkpoint.save(checkpoints, 1, state, {})
        checkpoint.wait(checkpoints)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        checkpoint.save(checkpoints, 2, state, {})
        for _ in range(600):
            time.sleep(0.1)
            checkpoint.look_after(checkpoints)
"""


def test_a_save_that_fails_is_one_line_and_the_checkpoint_before_stays(tmp_path):
    done = run(SAVES, cwd=tmp_path, stdout=subprocess.PIPE)
    where = f"{tmp_path}/run"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: checkpoint 2 cannot be saved in {where}/checkpoints: File too large; the last good"
        f" one is 1; mend that, and continue with --workdir={where}\n"
    )
    with checkpoint.reader(tmp_path / "run" / "checkpoints") as checkpoints:
        like = {str(i): jnp.zeros(5000) for i in range(20)}
        step, state, _ = checkpoint.restore_latest(checkpoints, like)
    assert step == 1 and float(state["1"][4999]) == 2499.5


@pytest.mark.parametrize(
    "arguments, body", [([], "[print('a') for _ in range(10**6)]"), (["--help"], "0")]
)
def test_a_reader_that_goes_away_ends_a_command_without_a_word(tmp_path, arguments, body):
    reader, writer = os.pipe()
    os.close(reader)
    done = run(body, *arguments, cwd=tmp_path, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + 13, "")  # as SIGPIPE ends a program


def test_help_is_no_error(tmp_path):
    done = run("0", "--help", cwd=tmp_path, stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "") and "USAGE:" in done.stdout


def test_what_an_encoding_lacks_is_escaped(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    body = "print('caf\\u00e9 \\udce9')"
    done = run(body, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    assert (done.stdout, done.stderr) == ("caf\\xe9 \\udce9\n", "")


def test_streams_may_be_closed(tmp_path):
    assert run("print('a')", cwd=tmp_path, shell="exec >&- 2>&-").returncode == 0


def test_a_fault_of_ours_keeps_its_traceback(tmp_path):
    done = run("1 / 0", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_what_cannot_be_written_is_found_before_the_work(tmp_path):
    made = command.writable("json", str(tmp_path / "new" / "a.json"))
    assert made == tmp_path / "new" / "a.json" and made.parent.is_dir() and not made.exists()
    with pytest.raises(UsageError, match="--json=.*new cannot be written; name a file in a folder"):
        command.writable("json", str(made.parent))
    made.touch()
    with pytest.raises(OSError, match="a.json"):
        command.writable("json", str(made / "b.json"))
