"""What a run writes for people: metrics that survive a kill, progress, pictures, and the numbers of the last table."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from kvpo_jax import report


def iterations(path):
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()]


def test_a_killed_and_continued_run_has_every_iteration_once(tmp_path):
    writer = report.MetricWriter(tmp_path, first_iteration=0)
    for i in range(5):
        writer.write(i, {"reward": np.float32(i), "kl": math.inf})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    assert json.loads(path.read_text().splitlines()[3]) == {"iteration": 3, "reward": 3.0, "kl": None}
    with path.open("a") as file:
        file.write('{"iteration": 5, "rew')  # killed while it wrote
    writer = report.MetricWriter(tmp_path, first_iteration=3)
    writer.write(3, {"reward": 30.0})
    writer.close()
    assert iterations(path) == [0, 1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1])["reward"] == 30.0


def test_tensorboard_gets_scalars_and_strips(tmp_path):
    writer = report.MetricWriter(tmp_path, first_iteration=0)
    writer.write(0, {"reward": 1.0})
    writer.write_videos(0, "branches", [("anchor", np.zeros((4, 12, 12, 3)))])
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"reward" in content and b"branches" in content and b"PNG" in content


def test_progress_tells_the_rate_and_the_time_left(capsys):
    times = iter([0.0, 100.0, 110.0, 120.0])  # the first iteration compiles, then 10 s each
    progress = report.Progress(9, clock=lambda: next(times))
    metrics = {"reward": 0.5, "reward_anchor": 0.25, "win_rate": 0.75, "other": 1.0, "log_ratio_std": 0.02}
    metrics |= {"seconds_rollout": 60.02, "seconds_update": 39.96, "seconds_evaluation": 0.0}
    first = progress.line(0, metrics)
    assert first == (
        "1/9  reward +0.500  anchor +0.250  win  75%  ratio ±2e-02  100.0 s (rollout 60.0, update 40.0)  "
        "1:40 elapsed, 13:20 left"
    )
    assert progress.line(1, {}) == "2/9  10.0 s  1:50 elapsed, 1:10 left"
    assert progress.line(2, {}) == "3/9  10.0 s  2:00 elapsed, 1:00 left"
    assert capsys.readouterr().out.count("\n") == 3


def test_strips_show_pixels_as_squares():
    rng = np.random.default_rng(0)
    clips = rng.random((2, 3, 12, 12, 3)).astype(np.float32)
    sheet = np.asarray(report._sheet([("anchor", clips[0]), ("branch 0", clips[1])]))
    right = 12  # the margin; tiles of 48 pixels, 4 to a pixel of the clip, end there
    tile = sheet[26 : 26 + 48, -right - 1 - 48 : -right - 1]
    np.testing.assert_array_equal(tile[::4, ::4], np.round(255 * clips[0, 2]).astype(np.uint8))
    np.testing.assert_array_equal(tile[::4], tile[3::4])


def test_before_after_has_two_strips_per_prompt(tmp_path):
    prompts = [["a red disk moves left", "a blue disk moves left"]] * 3
    shape = (3, 48, 12, 12, 3)
    path = tmp_path / "report" / "before_after.png"
    report.before_after(prompts, (24,), np.zeros(shape), np.ones(shape), np.zeros(3), np.asarray([1, -1, 0]), path)
    picture = np.asarray(Image.open(path)).astype(int)
    black_rows = np.sum(np.all(picture == 0, axis=-1), axis=1) == 24 * 48
    assert np.sum(black_rows) == 3 * 48


def test_every_segment_is_shown_however_short(tmp_path):
    path = tmp_path / "p.png"
    clips = np.zeros((1, 48, 12, 12, 3))
    report.before_after([["one", "two", "three"]], (1, 3), clips, clips, np.zeros(1), np.zeros(1), path)
    black = np.all(np.asarray(Image.open(path)) == 0, axis=-1)
    assert np.max(np.sum(black, axis=1)) == (24 + 2) * 48  # frames 1 and 3 are shown besides 24 even ones


def test_long_prompts_are_cut_to_two_lines():
    font = report._font(13)
    assert report._wrap("a red disk moves left", font, 400) == ["a red disk moves left"]
    lines = report._wrap("word " * 100, font, 120)
    assert len(lines) == 2 and lines[1].endswith("...") and all(font.getlength(line) <= 120 for line in lines)


@pytest.mark.parametrize(
    "freedom, quantile",  # from printed tables, three decimals
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042), (31, 2.040), (120, 1.980)],
)
def test_student_t_quantiles(freedom, quantile):
    assert abs(report.t_quantile_975(freedom) - quantile) <= 5e-4


def test_heldout_summary_by_hand():
    reference = np.asarray([0.0, 0.0, 0.0])
    online = np.asarray([1.0, 2.0, 3.0])  # gain 2, standard deviation 1: half-width 4.303 / sqrt(3) = 2.484
    summary = report.heldout_summary(reference, online, online / 2)
    assert {k: summary[k] for k in ("reference", "online", "ema", "gain", "win_rate", "num_prompts")} == {
        "reference": 0.0, "online": 2.0, "ema": 1.0, "gain": 2.0, "win_rate": 1.0, "num_prompts": 3,
    }  # fmt: skip
    np.testing.assert_allclose(summary["gain_ci95"], [2 - 2.484, 2 + 2.484], atol=1e-3)
    json.dumps(summary)
    assert report.heldout_summary(reference, reference, reference)["win_rate"] == 0.5
    with pytest.raises(ValueError, match="two prompts or more"):
        report.heldout_summary(reference[:1], online[:1], online[:1])


def test_finish_leaves_the_results(tmp_path, capsys):
    frames, n = 8, 2
    heldout = lambda x: SimpleNamespace(
        pixels=np.full((n, frames, 12, 12, 3), x),
        reward=np.asarray([x, x + 0.1]),
        components={"VQ": np.asarray([x, x])},
    )
    backbone = SimpleNamespace(prompts=lambda split, i: [f"{split} {i}", "b"], to_pixel=lambda frame: 2 * frame)
    config = SimpleNamespace(video=SimpleNamespace(switch_frames=(2,)))
    seconds = {"total": 3.0, "rollout": 2.0}
    summary = report.finish(tmp_path, config, backbone, heldout(0.25), heldout(0.75), heldout(0.5), seconds)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["heldout"]["gain"] == pytest.approx(0.5) and summary["seconds"] == seconds
    assert summary["components"]["ema"] == {"VQ": 0.5}
    assert Image.open(tmp_path / "report" / "before_after.png").width > 8 * 48
    assert "reference" in capsys.readouterr().out


def test_final_table():
    rewards = lambda x: {"reward": np.asarray([x, x + 1]), "VQ": np.asarray([x, x])}
    table = report.final_table(
        {"reference": rewards(0.0), "online": rewards(1.0), "EMA": rewards(-1.0)},
        {"total": 10.0, "compile": 4.0, "update": 6.0},
    )
    assert table.splitlines() == [
        "held-out prompt sequences: 2, with the same noise for every policy",
        "",
        "            reward       VQ  gain over reference       95 % interval  win rate",
        "reference   0.5000   0.0000",
        "online      1.5000   1.0000              +1.0000  [+1.0000, +1.0000]      100%",
        "EMA        -0.5000  -1.0000              -1.0000  [-1.0000, -1.0000]        0%",
        "",
        "seconds: 10.0 in all (compile 4.0, update 6.0)",
    ]
