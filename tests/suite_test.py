"""Evaluation suites on a small random generator of the toy world: the same files however the work
was interrupted, ordered or shared.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from equipment import SMALL, configure, fresh_variables, save_lora, serving

from kvpo_jax import run as run_lib
from kvpo_jax import state as state_lib
from kvpo_jax import suite
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import checkpoint, records, video, workdir
from kvpo_jax.runtime.sharding import Share

ALONE = Share(0, 1)
SEQUENCES = [
    {"prompts": ["a red disk moves left", "a blue cross moves up"], "durations": [6, 3]},
    {"prompts": ["a blue cross moves up", "a red disk moves left"], "durations": [3, 9]},
    {"prompts": ["a green square moves down"], "durations": [6]},
    {"prompts": ["a red disk moves left", "a blue cross moves up"], "durations": [3, 6]},
]


def brightness(pixels, prompts):
    """Of a clip; and how long its sentence is."""
    means = np.asarray(pixels).mean((1, 2, 3, 4))
    return {"brightness": means, "letters": [len(prompt) for prompt in prompts]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with weights, prompts, a run of one checkpoint and a LoRA file; and its fields."""
    folder = tmp_path_factory.mktemp("suite")
    fields = {
        **SMALL,
        "reward.scorer": f"{__name__}:brightness",
        "reward.weights.brightness": 1.0,
        "eval.scorer": "",
        "weights": folder / "weights.safetensors",
        "mesh.data": 1,
        "window.recache_frames": 3,  # one program for all switches
    }
    config = configure("configs/tiny.py", fields)
    variables = fresh_variables(config)
    checkpoint.save_weights(folder / "weights.safetensors", variables["params"], {})
    lora = jax.tree.map(lambda x: x + 0.3, variables["lora"])
    save_lora(folder / "lora.safetensors", lora, config)
    state = state_lib.init_state(config, run_lib.make_mesh(config), variables["lora"])
    with checkpoint.manager(folder / "run" / "checkpoints", 1) as checkpoints:
        extra = {"config": config.to_dict()}
        checkpoint.save(checkpoints, 3, state.replace(lora=lora), extra)
    workdir.start_run(config, folder / "run")
    (folder / "p.jsonl").write_text("".join(json.dumps(s) + "\n" for s in SEQUENCES))
    return folder, fields


def evaluated(world, output, share=ALONE, fields=(), **asked):
    """Runs a suite in this process; its folder."""
    folder, own = world
    unasked = {
        **{"suite": "long", "config": None, "checkpoint": None, "policy": None, "lora": ""},
        **{"iteration": "newest", "prompts": folder / "p.jsonl", "extended": None, "samples": 2},
        **{"seed": 0, "num_frames": 0, "against": None, "segment_clips": False},
    }
    given = SimpleNamespace(**(unasked | asked), output=folder / output)
    if given.checkpoint is None or not Path(given.checkpoint).is_dir():
        fields = {**own, **dict(fields)}
    arguments = [f"--config.{name}={value}" for name, value in dict(fields).items()]
    suite.evaluate(given, arguments, share)
    return folder / output


@pytest.fixture(scope="module")
def whole(world):
    """An evaluation that nothing has interrupted."""
    return evaluated(world, "whole", segment_clips=True)


@pytest.fixture(scope="module")
def unlike(world):
    """The same with another seed, and fewer samples."""
    return evaluated(world, "unlike", samples=1, seed=1)


def contents(folder):
    """Name -> bytes of every file that a suite leaves, but its locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".lock" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def same(folder, other, *names):
    """Asserts that two folders have the same files, or the same of these names."""
    ours, theirs = contents(folder), contents(other)
    assert ours.keys() == theirs.keys() or names
    for name in names or ours:
        assert ours[name] == theirs[name], name


def test_a_suite_is_that_of_the_lengths_and_sentences_of_its_prompts(whole):
    plan = [json.loads(line) for line in (whole / "plan.jsonl").read_text().splitlines()]
    assert [row["file"] for row in plan] == [f"{p:04d}-{s}.mp4" for s in (0, 1) for p in range(4)]
    assert [row["switch_frames"] for row in plan[:4]] == [[6], [3], [], [3]]
    assert plan[5]["seed"] == [0, 1, 1]
    for row, frames in zip(plan, (9, 12, 6, 9) * 2, strict=True):
        assert len(video.read(whole / "videos" / row["file"])) == frames == row["frames"]
    rows = suite.scored(whole)
    assert len(rows) == 8
    for (prompt, _), row in rows.items():
        pixels = video.read(whole / "videos" / row["file"])[:, 8::16, 8::16] / 255
        sequence = SEQUENCES[prompt]
        parts = np.split(pixels, np.cumsum(sequence["durations"])[:-1])
        np.testing.assert_allclose(
            row["segments"]["brightness"], [part.mean() for part in parts], rtol=1e-5
        )
        assert row["segments"]["letters"] == [len(s) for s in sequence["prompts"]]
        mean = np.mean([part.mean() for part in parts])
        np.testing.assert_allclose(row["scores"]["brightness"], mean, rtol=1e-5)
        assert row["scores"]["reward"] == row["scores"]["brightness"]
    # Neither prompts nor samples share their noise.
    assert len({(whole / "videos" / row["file"]).read_bytes() for row in plan}) == 8


def test_every_segment_is_a_video_with_its_own_sentence(whole):
    prompts = json.loads((whole / "segments" / "prompts.json").read_text())
    assert prompts["0001_seg1-0.mp4"] == "a red disk moves left" and len(prompts) == 14
    clips = whole / "segments" / "videos"
    assert {path.name for path in clips.iterdir()} == prompts.keys()
    lengths = [len(video.read(clips / f"0001_seg{m}-1.mp4")) for m in (0, 1)]
    assert lengths == [3, 9]
    plan = [json.loads(x) for x in (whole / "segments" / "plan.jsonl").read_text().splitlines()]
    assert plan[3]["pixels"] == [3, 12] and plan[3]["video"] == "0001-0.mp4"


def test_what_was_killed_is_continued_bit_for_bit(world, whole):
    folder, fields = world
    output = folder / "killed"
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    command = ["-m", "kvpo_jax.evaluate", "--suite=long", "--samples=2", "--segment_clips"]
    command += [f"--prompts={folder / 'p.jsonl'}", f"--output={output}", *arguments]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        begin = time.monotonic()
        while len(list(output.glob("videos/*.mp4"))) < 3 and process.poll() is None:
            assert time.monotonic() - begin < 200
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
    assert 3 <= len(list(output.glob("videos/*.mp4"))) < 8 and not suite.scored(output)
    for part in output.glob("videos/*.part"):
        part.write_bytes(b"half a frame")
    # A kill while scores are written: two lines and a half, and a video.
    lines = (whole / "scores.jsonl").read_bytes().splitlines(keepends=True)
    (output / "scores.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:40])
    assert len(suite.scored(output)) == 2
    evaluated(world, "killed", segment_clips=True)
    same(output, whole)


def test_neither_devices_nor_processes_nor_samples_change_a_video(world, whole, unlike):
    evaluated(world, "shared", Share(1, 2), {"mesh.data": 2})
    assert not (world[0] / "shared" / "results.json").exists()
    with pytest.raises(UsageError, match="shared was begun with seed 0, not 1"):
        evaluated(world, "shared", Share(0, 2), seed=1)
    shared = evaluated(world, "shared", Share(0, 2), {"mesh.fsdp": 2})
    assert (shared / "scores_1.jsonl").read_text().count("\n") == 4
    names = [name for name in contents(whole) if name.startswith("videos")]
    same(shared, whole, *names, "results.json", "results.md", "plan.jsonl", "manifest.json")
    fewer = evaluated(world, "fewer", samples=1)
    same(fewer, whole, *(name for name in names if name.endswith("-0.mp4")))
    for name in names:
        if name.endswith("-0.mp4"):
            assert (unlike / name).read_bytes() != (fewer / name).read_bytes()


def test_a_server_scores_every_segment_and_its_version_is_noted(world, whole, served):
    url, token = served
    fields = {
        "reward.scorer": url,
        "reward.weights.brightness": 0,
        "reward.weights.light": 1,
        "reward.http.token_file": token,
        "reward.http.required": False,  # a suite ends all the same, to be continued
        "reward.http.retries": 0,
    }
    output = world[0] / "served"
    for name in ("served", "busy"):
        shutil.copytree(whole / "videos", world[0] / name / "videos")
    for wrong, message in (
        ({"reward.weights.lite": 1}, "weights.lite=1: config.reward.scorer has only light, over_"),
        ({"reward.scorer": "http://127.0.0.1:1"}, "reward server http://127.0.0.1:1: .*running?"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluated(world, "served", fields=fields | wrong)
        assert [path.name for path in output.iterdir()] == ["videos"]

    def busy(number, body):
        about = {"protocol": 1, "name": "busy", "components": ["light"], "version": "1"}
        return (503, {}, b"busy") if body else (200, {}, json.dumps(about).encode())

    with serving(busy) as (other, _), pytest.raises(UsageError, match="give the same command ag"):
        evaluated(world, "busy", fields=fields | {"reward.scorer": other})
    assert not suite.scored(world[0] / "busy")
    evaluated(world, "served", fields=fields)
    ours, theirs = suite.scored(output), suite.scored(whole)
    assert ours.keys() == theirs.keys() and len(ours) == 8
    for key, row in ours.items():
        count = len(SEQUENCES[key[0]]["prompts"])
        light = theirs[key]["segments"]["brightness"]
        np.testing.assert_allclose(row["segments"]["light"], light, rtol=1e-5)
        assert row["segments"]["before"] == list(range(count))
        assert row["segments"]["clips"] == [1] * count  # each is a group of its own
    scoring = records.object_in(output / "manifest.json")["scoring"]
    assert scoring["reward.scorer"] == "http://"  # wherever it is
    assert scoring["server 1"].startswith("own_reward:judge kvpo_jax")


def test_every_policy_is_evaluated_and_paired_with_another(world, whole, capsys):
    folder, _ = world
    run, lora = str(folder / "run"), folder / "lora.safetensors"
    online = evaluated(world, "online", checkpoint=run, against=str(whole))
    same(evaluated(world, "reference", checkpoint=run, policy="reference"), whole, "scores.jsonl")
    merged = evaluated(world, "merged", lora=f"{lora}:0.25,{lora}:0.75")
    made, again, before = (
        [video.read(x / "videos" / f"{p:04d}-1.mp4") for p in range(4)]
        for x in (online, merged, whole)
    )
    for x, y, z in zip(made, again, before, strict=True):
        assert np.abs(x - y.astype(float)).mean() < 0.2 < 5 < np.abs(x - z.astype(float)).mean()
    ours, base = (
        {key: row["scores"]["brightness"] for key, row in suite.scored(x).items()}
        for x in (online, whole)
    )
    results = json.loads((online / "results.json").read_text())
    differences = [
        np.mean([ours[prompt, s] - base[prompt, s] for s in (0, 1)]) for prompt in range(4)
    ]
    compared = results["against"]["brightness"]
    np.testing.assert_allclose(compared["difference"], np.mean(differences), rtol=1e-6)
    assert compared["ci95"][0] <= compared["difference"] <= compared["ci95"][1]
    assert results["policy"]["iteration"] == 3
    out = capsys.readouterr().out
    assert "suite long, online: 8 videos of 4 prompts" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "| brightness |" in (online / "results.md").read_text()


def test_intervals_and_pairs_by_hand():
    def rows(*values):
        return [
            {"prompt": p, "sample": s, "scores": {"a": x}, "segments": {"a": [x, x + 1][: 1 + p]}}
            for p, of_prompt in enumerate(values)
            for s, x in enumerate(of_prompt)
        ]

    # Prompt means are 1 and 3: resampled means are 1, 2, 2 and 3.
    made = suite.results_of(rows((0.0, 2.0), (3.0, 3.0)), rows((1.0, 3.0), (1.0, 1.0)))
    assert made["scores"]["a"] == {"mean": 2.0, "ci95": [1.0, 3.0], "prompts": 2}
    # Differences are -1 and 2.
    assert made["against"]["a"] == {"difference": 0.5, "ci95": [-1.0, 2.0], "win_rate": 0.5}
    assert made["segments"]["a"][1] == {"mean": 4.0, "ci95": None, "prompts": 1}
    # Of three prompts the evaluation is better than the other on the last alone.
    apart = [rows((x,), (x,)) + [{**rows((x,))[0], "prompt": 2}] for x in (0.0, 1.0)]
    now, before = apart
    now[2] = {**now[2], "scores": {"a": 2.0}}
    assert suite.results_of(now, before)["against"]["a"]["win_rate"] == pytest.approx(1 / 3)
    assert suite.results_of(rows((0.0, 2.0)))["scores"]["a"]["ci95"] is None
    short = {"prompt": 0, "sample": 0, "scores": {"a": 1.0}, "segments": {"a": [1.0, None, 2.0]}}
    _, second, third = suite.results_of([short])["segments"]["a"]
    assert second == {"mean": None, "ci95": None, "prompts": 0} and third["mean"] == 2.0


@pytest.mark.parametrize(
    "asked, fields, message",
    [
        ({"seed": 1}, {}, "whole was begun with seed 0, not 1; choose another --output"),
        ({"samples": 1}, {}, "was begun with samples 2, not 1"),
        ({}, {"sampler.shift": 2.0}, "was begun with sampler.shift 1.0, not 2.0"),
        ({}, {"window.sink": 2}, "was begun with window.sink 3, not 2"),
        ({}, {"reward.clip_frames": 2}, "was begun with scoring.clip_frames 0, not 2"),
        ({}, {"reward.weights.brightness": 2.0}, "with scoring.weights.brightness 1.0, not 2.0"),
        ({"num_frames": 12}, {}, r"was begun with video.frames \(6, 9, 12\), not \(12,\)"),
        ({"checkpoint": "run"}, {}, "was begun with policy.name 'base', not 'online'"),
        ({"lora": "lora.safetensors"}, {}, "was begun with policy.name 'base', not 'lora'"),
        ({"extended": "p.jsonl"}, {}, "was begun with prompts.extended None, not '"),
        ({"prompts": None}, {}, "--suite needs --prompts"),
        ({"suite": "short"}, {}, "p.jsonl:1 has 2 prompts, and a video of --suite=short has one"),
        ({"policy": "ema"}, {}, "--policy needs --checkpoint to be a run directory"),
        ({"against": "whole"}, {}, "--against=.*whole is --output itself"),
        ({"against": "."}, {}, "has no manifest.json: it is no evaluation"),
        ({}, {"reward.scorer": "beauty"}, "there is no reward 'beauty'"),
    ],
)
def test_an_evaluation_is_continued_with_the_same_only(world, whole, asked, fields, message):
    before = contents(whole)
    for name in asked.keys() & {"checkpoint", "lora", "extended", "against"}:
        asked = {**asked, name: str(world[0] / asked[name])}
    with pytest.raises(UsageError, match=message) as error:
        evaluated(world, "whole", fields=fields, **asked)
    assert "\n" not in str(error.value)
    assert contents(whole) == before


def test_other_weights_and_another_checkpoint_are_another_evaluation(world, whole, tmp_path):
    """Of the same names and sizes: what they are made of is in the manifest."""
    base = tmp_path / "weights.safetensors"
    config = configure("configs/tiny.py", SMALL)
    params = jax.tree.map(lambda x: x + 0.1, fresh_variables(config)["params"])
    checkpoint.save_weights(base, params, {})
    before = contents(whole)
    with pytest.raises(UsageError, match="was begun with files.config.weights"):
        evaluated(world, "whole", fields={"weights": base})
    assert contents(whole) == before
    online, reference = (
        suite.Policy(name, world[0] / "run", 3, ()).record() for name in ("online", "reference")
    )
    assert online["sum"] and online["sum"] != reference["sum"]


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("suite", "short", "was made with suite 'short', not 'long'"),
        ("prompts", {"prompts": "x"}, "was made with prompts.prompts 'x', not"),
        ("samples", 1, "was made with samples 1, not 2"),
        ("video", {"fps": 99}, "was made with video.fps 99, not"),
        ("scoring", {"clip_frames": 7}, "was made with scoring.clip_frames 7, not 0"),
    ],
)
def test_only_evaluations_of_the_same_are_compared(world, whole, name, other, message):
    changed = world[0] / f"other_{name}"
    changed.mkdir()
    manifest = records.object_in(whole / "manifest.json")
    manifest[name] = {**manifest[name], **other} if isinstance(other, dict) else other
    (changed / "manifest.json").write_text(json.dumps(manifest))
    (changed / "scores.jsonl").write_text((whole / "scores.jsonl").read_text())
    with pytest.raises(UsageError, match=message):
        evaluated(world, "compared", against=str(changed))


def test_only_what_is_alike_and_finished_is_compared(world, whole, unlike):
    with pytest.raises(UsageError, match="against=.*unlike was made with seed 1, not 0: only"):
        evaluated(world, "compared", against=str(unlike))
    part = world[0] / "part"
    shutil.copytree(whole, part)
    lines = (whole / "scores.jsonl").read_text().splitlines(keepends=True)
    (part / "scores.jsonl").write_text("".join(lines[:5]))
    with pytest.raises(UsageError, match="part has scores of 5 of 8 videos; finish it first"):
        evaluated(world, "compared", against=str(part))
    (part / "scores.jsonl").write_text("".join(["{}\n", *lines]))
    with pytest.raises(UsageError, match="part/scores.jsonl:1 is damaged: there is no prompt"):
        evaluated(world, "compared", against=str(part))


def test_a_video_is_as_long_as_the_suite_says():
    toy = SimpleNamespace(fps=8, to_pixel=lambda frame: frame)
    wan = SimpleNamespace(fps=16, to_pixel=lambda frame: 1 + 4 * (frame - 1) if frame else 0)
    assert [suite.frames_in(5, x, 3) for x in (toy, wan)] == [39, 21]
    assert [suite.frames_in(60, x, 3) for x in (toy, wan)] == [480, 240]


def test_scores_of_other_versions_are_said(world, whole, capsys):
    other = world[0] / "versions"
    shutil.copytree(whole, other)
    manifest = records.object_in(other / "manifest.json")
    manifest["versions"]["jax"] = "0.1"
    (other / "manifest.json").write_text(json.dumps(manifest))
    evaluated(world, "versions", segment_clips=True)
    assert "versions was begun with jax '0.1', not " in capsys.readouterr().out
