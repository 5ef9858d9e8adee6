"""The check of a device, at the tiny sizes that it has without a GPU."""

import json

import check_device
import pytest
from equipment import ROOT, run_command


def run(*arguments):
    return run_command(ROOT / "tools" / "check_device.py", *arguments)


def check_timed(part):
    assert part["seconds"] > 0 and part["flops"] > 0
    assert part["flops_per_s"] == pytest.approx(part["flops"] / part["seconds"])
    assert part["peak_bytes"] > part["planned_bytes"] > 0


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch):
    """Without golden arrays their tests fail. No part was timed, so no stage has seconds."""
    monkeypatch.setenv("KVPO_GOLDEN_DIR", str(tmp_path))
    done = run("--parts=golden,devices", f"--json={tmp_path / 'out.json'}")
    assert done.stderr.splitlines()[-1] == "error: 1 of 2 parts failed: golden"
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    out = json.loads((tmp_path / "out.json").read_text())
    part = {part.pop("name"): part for part in out["parts"]}
    assert out["size"] == "tiny" and part["devices"]["platform"] == "cpu"
    assert "test_longlive_block[cap18]" in part["golden"]["error"]
    whole = out["iteration"]
    assert [stage["seconds"] for stage in whole["stages"]] == [None] * len(whole["stages"])
    assert whole["seconds"] is None and whole["counted_seconds"] > 0


@pytest.mark.slow
def test_every_part(tmp_path):
    done = run(f"--json={tmp_path / 'out.json'}")
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    part = {part.pop("name"): part for part in out["parts"]}
    assert tuple(part) == check_device.PARTS
    for name in check_device.TIMED:
        check_timed(part[name])
    assert "passed" in part["golden"]["outcome"]
    assert part["attention"]["gradient_difference"] <= check_device.TOLERANCE
    whole = out["iteration"]
    for stage in whole["stages"]:
        speed = part[check_device.SPEED[stage["name"]]]["flops_per_s"]
        assert stage["seconds"] == pytest.approx(1e15 * stage["pflop"] / speed)
        assert stage["counted_seconds"] > 0
    assert whole["seconds"] == pytest.approx(sum(stage["seconds"] for stage in whole["stages"]))
    # What has been timed has seconds, and a sum needs all.
    known = {"block of nine": part["block of nine"]}
    some, speed = check_device.iteration("tiny", known), known["block of nine"]["flops_per_s"]
    for stage in some["stages"]:
        is_known = check_device.SPEED[stage["name"]] in known
        assert stage["seconds"] == (
            pytest.approx(1e15 * stage["pflop"] / speed) if is_known else None
        )
    assert some["seconds"] is None


def test_the_parts_have_the_sizes_of_a_run():
    """The full sizes are those of the shipped config: a block attends to 15 frames."""
    sizes = check_device.SIZES["full"]
    config = sizes.preset.resolve()
    assert (config.model.dim, config.model.num_layers, config.model.dtype) == (1536, 30, "bfloat16")
    assert config.rollout.branches == 8 and config.replay.chunk == len(config.sampler.steps)
    past = config.window.sink + config.window.past
    assert past == 12 and sizes.preset.pivot * config.video.block_frames > past


def test_no_time_is_a_line_for_every_part():
    done = check_device.in_process("attention", "tiny", deadline=0.0)
    assert done == {"error": "there was no time left"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--parts=atention"], "--parts has 'atention'; the parts are devices, attention,"),
        (["--part=golden"], "--part has 'golden'; the parts are devices, attention,"),
        (["--minutes=nan"], "--minutes=nan has to be above 0 and up to 600"),
        (["--minutes=inf"], "--minutes=inf has to be above 0 and up to 600"),
        (["longlive"], "unknown argument 'longlive'"),
    ],
)
def test_mistakes(arguments, message):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
