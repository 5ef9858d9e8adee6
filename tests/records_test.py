"""What a run directory says of its run is read whole, and damage is one line that says where."""

import json
import subprocess
import sys

import pytest

from kvpo_jax.errors import UsageError
from kvpo_jax.runtime.atomic import write_lines
from kvpo_jax.runtime.records import lines_in, read_run

BRANCH = {
    "iteration": 0,
    "prompt": ["a dog"],
    "pivot": 5,
    "fork_frame": 15,
    "window": [5, 7],
    "routed": [[3, 4], [4, 5]],
    "reward": [0.1, 0.2],
    "reward_anchor": 0.1,
    "components": {"MQ": {"branches": [0.1, 0.2], "anchor": 0.1}},
    "advantage": [-1.0, 1.0],
    "energy": [0.1, None],
    "energy_old": [0.1, 0.2],
    "energy_reference": [0.1, 0.2],
    "probability": [0.5, 0.5],
    "ratio": [1.0, 1.0],
    "gate_open": True,
}
NUMBERS = {policy: [0.1, 0.2] for policy in ("reference", "online", "ema")}
HELDOUT = {
    "iteration": 20,
    "prompt": [["a dog"], ["a cat"]],
    "reward": NUMBERS,
    "components": {policy: {"MQ": [0.1, 0.2]} for policy in NUMBERS},
    "optimised": ["MQ"],
    "first_pivot": 5,
    "blocks": {},
}


def test_lines_may_have_any_text_and_are_written_whole(tmp_path):
    """Half of a surrogate pair is what a command line has of bytes that are no UTF-8."""
    rows, path = [{"prompt": "a café \udcff"}, {"prompt": "雪"}], tmp_path / "made" / "plan.jsonl"
    write_lines(rows, path)
    assert lines_in(path, {}) == rows
    assert path.read_text(encoding="utf-8").splitlines()[1] == '{"prompt": "雪"}'
    with pytest.raises(ValueError):
        write_lines([{"distance": float("nan")}], path)
    assert lines_in(path, {}) == rows and len([*path.parent.iterdir()]) == 1


@pytest.fixture
def workdir(tmp_path):
    """A run directory with every record."""
    for name, value in {
        "config.json": {"seed": 0, "video": {"switch_frames": [12, 24]}},
        "metrics.jsonl": {"iteration": 0, "reward": 0.5, "kl": None},
        "branches.jsonl": BRANCH,
        "heldout.jsonl": HELDOUT,
        "summary.json": {"iterations": 1},
        "versions.json": {"jax": "0"},
    }.items():
        (tmp_path / name).write_text(json.dumps(value) + "\n")
    return tmp_path


def test_every_record_is_read(workdir):
    run = read_run(workdir)
    assert run.config.video.switch_frames == (12, 24)
    assert run.metrics == [{"iteration": 0, "reward": 0.5, "kl": None}]
    assert run.branches == [BRANCH] and run.heldout == [HELDOUT]
    assert run.summary == {"iterations": 1} and run.versions == {"jax": "0"}


def test_a_run_of_an_older_version_lacks_some(workdir):
    for path in workdir.iterdir():
        if path.name != "metrics.jsonl":
            path.unlink()
    run = read_run(workdir)
    assert len(run.metrics) == 1 and not run.config
    assert (run.branches, run.heldout, run.summary, run.versions) == ([], [], {}, {})


def test_a_line_that_a_run_is_writing_is_left_out(workdir):
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 1, "rew')
    assert len(read_run(workdir).metrics) == 1


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("config.json", "{", "config.json is damaged: "),
        ("config.json", "[]", "config.json is damaged: it is no object"),
        ("metrics.jsonl", '{"iteration": 0}\nnonsense\n', "metrics.jsonl:2 is damaged: "),
        ("metrics.jsonl", b"\xff\xfe\n", "metrics.jsonl:1 is damaged: "),
        ("metrics.jsonl", '{"reward": 1}\n', "metrics.jsonl:1 is damaged: there is no iteration"),
        ("metrics.jsonl", '{"iteration": 0, "kl": "x"}\n', 'kl is "x", not a number'),
        ("metrics.jsonl", '{"iteration": 0, "kl": 1%s}\n' % ("0" * 400), "0, not a number"),
        ("summary.json", "[" * 100_000, "summary.json is damaged: "),
        ("metrics.jsonl", '{"iteration": true}\n', "iteration is true, not a whole number"),
        ("branches.jsonl", {**BRANCH, "reward": 1}, "branches.jsonl:1 is damaged: reward is no"),
        ("branches.jsonl", {**BRANCH, "ratio": [1]}, "ratio is not of the 2 branches of reward"),
        ("branches.jsonl", {**BRANCH, "prompt": [3]}, "prompt[0] is 3, not text"),
        ("heldout.jsonl", {**HELDOUT, "reward": {}}, "there is no reward.reference"),
        ("heldout.jsonl", {**HELDOUT, "blocks": {"ema": 1}}, "blocks.ema is no list"),
    ],
)
def test_damage_is_named_with_its_place(workdir, name, content, says):
    if isinstance(content, dict):
        content = json.dumps(content) + "\n"
    (workdir / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as error:
        read_run(workdir)
    assert says in str(error.value) and str(workdir) in str(error.value)


def test_what_is_no_run_is_said(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="is not the directory of a run"):
            read_run(path)


def test_records_are_read_without_jax():
    """So that a command that only reads starts at once."""
    program = (
        "import sys; from kvpo_jax.runtime import doctor, records; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
