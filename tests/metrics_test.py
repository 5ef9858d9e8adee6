"""Metrics that survive a kill and a full disk, and TensorBoard's events."""

import io
import json
import math
import os
import signal
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from equipment import configure
from PIL import Image

from kvpo_jax import programs
from kvpo_jax.runtime import films, metrics, video
from kvpo_jax.runtime.records import read_run
from kvpo_jax.types import Judged, Replayed, Scores


def means_of(groups):
    return metrics.group_metrics(groups, programs.group_means)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def iterations(path):
    return [line["iteration"] for line in lines(path)]


def events(folder):
    """The events of a folder's files, read with the length of each record; checksums are not."""
    from tensorboardX.proto.event_pb2 import Event

    out = []
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            out.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return out


def values(folder, field):
    """tag -> value of all summaries that have this field; later ones take the place of earlier."""
    every = [value for event in events(folder) for value in event.summary.value]
    return {value.tag: getattr(value, field) for value in every if value.HasField(field)}


def points(folder):
    """(step, tag) -> value of all scalars."""
    found = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found[event.step, value.tag] = value.simple_value
    return found


def run(program, *arguments):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_line_per_iteration_with_null_for_what_is_not_finite(tmp_path):
    writer = metrics.MetricWriter(tmp_path / "run", first_iteration=0)
    writer.write_scalars(0, {"reward": np.float32(0.5), "loss": jnp.float32(2), "kl": math.inf})
    path = tmp_path / "run" / "metrics.jsonl"  # before anything is closed or flushed
    assert path.read_text() == '{"iteration": 0, "reward": 0.5, "loss": 2.0, "kl": null}\n'
    writer.close()


def test_a_continued_run_has_every_iteration_once(tmp_path):
    writer = metrics.MetricWriter(tmp_path, first_iteration=0)
    for i in range(5):
        writer.write_scalars(i, {"reward": i})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"iteration": 5, "rew')  # killed while it wrote
    writer = metrics.MetricWriter(tmp_path, first_iteration=3)
    writer.write_scalars(3, {"reward": 30.0})
    writer.close()
    assert iterations(path) == [0, 1, 2, 3]
    assert lines(path)[-1] == {"iteration": 3, "reward": 30.0}
    assert not list(tmp_path.glob("*.tmp"))


def test_a_cut_line_goes_even_if_its_iteration_is_not_repeated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0}\n{"iteration": 1, "rew')
    metrics.JsonlWriter(path, first_step=2).close()
    assert iterations(path) == [0]


@pytest.mark.parametrize(
    "damage", [b"nonsense", b"\xff\xfe\x00", b"[]", b"{}", b'{"iteration": "2"}', b"null", b""]
)
def test_damaged_lines_are_put_aside_and_named_and_the_run_goes_on(tmp_path, capsys, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 0}\n' + damage + b'\n{"iteration": 2}\n')
    writer = metrics.MetricWriter(tmp_path, first_iteration=3)
    writer.write_scalars(3, {})
    writer.close()
    assert iterations(path) == [0, 2, 3]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damage + b"\n"
    said = [f"{path}: damaged lines, put into metrics.jsonl.damaged: 2"]
    assert capsys.readouterr().out.splitlines() == [*said, f"{path}: missing iterations: 1"]


def test_gaps_and_repetitions_are_said(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    text = "".join(f'{{"iteration": {i}}}\n' for i in (0, 1, 1, 4, 11, 20))
    path.write_text(text)
    metrics.JsonlWriter(path, first_step=12).close()
    assert iterations(path) == [0, 1, 1, 4, 11]
    missing = "missing iterations: 2, 3, 5, 6, 7 and 3 more"
    twice = "iterations that are there more than once: 1"
    assert capsys.readouterr().out == f"{path}: {missing}\n{path}: {twice}\n"
    (tmp_path / "metrics.jsonl").unlink()
    metrics.JsonlWriter(path, first_step=2).close()
    assert capsys.readouterr().out == f"{path}: missing iterations: 0, 1\n"
    for first_step in (0, 2):  # nothing to say of a new run, or of one that is whole
        path.write_text('{"iteration": 0}\n{"iteration": 1}\n{"iteration": 2, "rew')
        metrics.JsonlWriter(path, first_step).close()
        assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- records of branches

PROMPTS, BRANCHES = 3, 2
# A number per (prompt, branch) or per prompt, different for each name: 0.1 is prompt 0, branch 0.
TWO = np.array([[0.1, 0.2], [1.1, 1.2], [2.1, 2.2]], np.float32)
ONE = np.array([0.5, 1.5, 2.5], np.float32)
# The metrics of the update that are printed.
UPDATE = ("kl", "grad_norm", "entropy", "clip_fraction")
ROUTED = np.array([[[3, 5], [4, 8]], [[3, 4], [5, 6]], [[6, 7], [7, 9]]], np.int32)


@pytest.fixture
def config():
    fields = {
        "rollout.branches": BRANCHES,
        "rollout.window_blocks": 2,
        "train.prompts_per_iteration": PROMPTS,
    }
    return configure("configs/tiny.py", fields)


@pytest.fixture
def recorder_of(config, tmp_path):
    """first iteration -> Recorder of runs in one directory."""
    return lambda first: metrics.Recorder(config, tmp_path, first, fps=8)


def pixels():
    """4 frames of an anchor and 2 branches, of 8 pixels; each frame of one colour."""
    colours = np.random.default_rng(0).integers(0, 256, (1 + BRANCHES, 4, 1, 1, 3), np.uint8)
    return colours.repeat(8, axis=2).repeat(8, axis=3)


def groups():
    """An iteration made by hand, of two micro-batches: prompts 0 and 1, and prompt 2."""

    def group(*prompts):
        def of(x):
            return jnp.asarray(x[list(prompts)])

        judged = Judged(
            scores=Scores(of(10 + TWO), of(20 + ONE), {"MQ": (of(30 + TWO), of(40 + ONE))}),
            advantages=of(50 + TWO),
            gate_open=of(np.array([True, False, True])),
            pixel_std=jnp.float32(0.1),
        )
        replayed = Replayed(
            energies=of(60 + TWO),
            floor=None,
            probability=of(TWO),
            ratio=of(90 + TWO),
            weight=of(ONE),
        )
        sentences = tuple((f"a dog, {i}", "a café") for i in prompts)
        return metrics.Group(judged, of(ROUTED), of(70 + TWO), of(80 + TWO), replayed, sentences)

    return [group(0, 1), group(2)]


def record(recorder, iteration, shown=None):
    first, second = groups()
    made = [first.replace(films=shown), second]
    of_update = dict.fromkeys(UPDATE, 0.5)
    found = {"pivot": 6, **of_update, **means_of(made)}
    recorder.record(iteration, found, made)


def evaluation(**online):
    """Of 8 held-out prompts, with 0.5 in every component but what the online policy has."""
    components = {policy: {name: [0.5] * 8 for name in online} for policy in ("reference", "ema")}
    components["online"] = {name: [value] * 8 for name, value in online.items()}
    return {
        "reward": {policy: of["VQ"] for policy, of in components.items()},
        "components": components,
        "optimised": ["VQ"],
        "first_pivot": 2,
        "blocks": {},
    }


def record_heldout(recorder, done, **online):
    recorder.record_heldout(done, evaluation(**online), np.zeros((2, 2, 3), np.uint8))


def test_the_best_branch_is_compared_with_its_own_anchor():
    """The best branches are 10.2, 11.2 and 12.2, the anchors 20.5, 21.5 and 22.5."""
    first, second = groups()
    assert means_of([first])["best_minus_anchor"] == pytest.approx(-10.3)
    anchor = jnp.array([12.0])
    scores = second.judged.scores.replace(anchor=anchor)
    second = second.replace(judged=second.judged.replace(scores=scores))
    found = means_of([first, second])["best_minus_anchor"]
    assert found == pytest.approx((-10.3 + 0.2) / 2)


def test_an_iteration_leaves_a_record_per_prompt(recorder_of, tmp_path):
    recorder = recorder_of(0)
    record(recorder, 0)
    found = (tmp_path / "branches.jsonl").read_text()  # before anything is closed or flushed
    recorder.close()
    # Float32 is written with the digits that give it back: 50.1, not 50.099998474121094.
    expected = {
        "iteration": 0,
        "prompt": ["a dog, 1", "a café"],
        "pivot": 6,
        "fork_frame": 18,
        "window": [6, 7],
        "routed": [[3, 4], [5, 6]],
        "reward": [11.1, 11.2],
        "reward_anchor": 21.5,
        "components": {"MQ": {"branches": [31.1, 31.2], "anchor": 41.5}},
        "advantage": [51.1, 51.2],
        "energy": [61.1, 61.2],
        "energy_old": [71.1, 71.2],
        "energy_reference": [81.1, 81.2],
        "probability": [1.1, 1.2],
        "ratio": [91.1, 91.2],
        "gate_open": False,
        "weight": 1.5,
    }
    rows = [json.loads(line) for line in found.splitlines()]
    assert rows[1] == expected and list(rows[1]) == list(expected)
    assert [row["prompt"][0] for row in rows] == ["a dog, 0", "a dog, 1", "a dog, 2"]
    assert [row["routed"] for row in rows] == ROUTED.tolist()
    assert [row["gate_open"] for row in rows] == [True, False, True]


def test_the_doctor_of_the_loop_names_the_prompt_that_owns_the_gradient(recorder_of, capsys):
    recorder = recorder_of(0)
    found = {"pivot": 6, **dict.fromkeys(UPDATE, 0.5), **means_of(groups())}
    recorder.record(0, {**found, "prompt_weight_max": 0.9}, groups())
    recorder.close()
    assert "doctor: one of 3 prompts, 'a dog, 2' and 1 more, has 90%" in capsys.readouterr().out


def test_the_doctor_of_the_loop_sees_what_is_watched_on_held_out_prompts(recorder_of, capsys):
    recorder = recorder_of(0)
    for iteration, motion in enumerate((0.5, 0.4, 0.4)):
        record_heldout(recorder, iteration + 1, VQ=0.6, motion=motion)
        record(recorder, iteration)
    recorder.close()
    said = capsys.readouterr().out
    assert said.count("doctor: the reward rises while what nobody optimises falls") == 1
    assert "motion (-0.1000 on held-out prompts)" in said


def test_no_record_has_a_number_that_is_not_finite(config):
    first, second = groups()
    second = second.replace(energies_ref=jnp.array([[jnp.nan, -jnp.inf]]))
    records = metrics.branch_records(config, 6, [first, second])
    assert records[2]["energy_reference"] == [None, None]
    json.dumps(records, allow_nan=False)


def test_what_the_loss_does_not_know_of_a_branch_is_null(config, tmp_path):
    """A loss by state has no policy over the branches, and may replay the first of them alone. The
    pages and comparisons read such records.
    """
    made = [
        group.replace(
            replayed=group.replayed.replace(
                energies=group.replayed.energies[:, :1], probability=None, ratio=None
            )
        )
        for group in groups()
    ]
    rows = metrics.branch_records(config, 6, made)
    assert [row["energy"] for row in rows] == [[60.1, None], [61.1, None], [62.1, None]]
    assert all(row["probability"] == row["ratio"] == [None, None] for row in rows)
    (tmp_path / "config.json").write_text("{}")
    lines = (json.dumps({"iteration": 0, **row}) for row in rows)
    (tmp_path / "branches.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert [line["energy"] for line in read_run(tmp_path).branches] == [
        row["energy"] for row in rows
    ]


def test_a_continued_run_has_every_record_once(recorder_of, tmp_path, capsys):
    """What was written after the checkpoint is dropped, and a line that a kill has cut short."""
    recorder = recorder_of(0)
    for i in range(4):
        record(recorder, i)
    recorder.close()
    path = tmp_path / "branches.jsonl"
    with path.open("a") as file:
        file.write('{"iteration": 4, "pro')
    capsys.readouterr()
    recorder = recorder_of(2)
    assert iterations(path) == [0] * PROMPTS + [1] * PROMPTS
    record(recorder, 2)
    recorder.close()
    assert iterations(path) == [i for i in range(3) for _ in range(PROMPTS)]
    assert iterations(tmp_path / "metrics.jsonl") == [0, 1, 2]
    assert str(path) not in capsys.readouterr().out  # nothing is missing, nothing is there twice


def test_records_that_are_missing_or_there_twice_are_said(tmp_path, capsys):
    path = tmp_path / "branches.jsonl"
    path.write_text("".join(f'{{"iteration": {i}}}\n' for i in (0, 0, 1, 3, 3, 3)))
    metrics.JsonlWriter(path, first_step=4, lines_per_step=2).close()
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: missing iterations: 2",
        f"{path}: incomplete iterations: 1",
        f"{path}: iterations that are there more than once: 3",
    ]


# ---------------------------------------------------------------- kills, TensorBoard, full disks

KILLED = """
import os, signal, sys
from kvpo_jax.runtime import metrics
writer = metrics.MetricWriter(sys.argv[1], first_iteration=0)
for i in range(100):
    writer.write_scalars(i, {"reward": i})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_loses_no_line_that_was_written(tmp_path):
    assert run(KILLED, tmp_path).returncode == -signal.SIGKILL
    assert iterations(tmp_path / "metrics.jsonl") == list(range(100))


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    writer = metrics.MetricWriter(tmp_path, first_iteration=0)
    writer.write_scalars(0, {"reward": 0.25, "kl": math.nan})
    writer.write_images(0, {"branches": np.zeros((12, 34, 3), np.uint8)})
    writer.write_images(1, {"several": np.zeros((2, 12, 34, 3), np.float32)})
    writer.flush()
    found = points(tmp_path / "tensorboard")
    assert found[0, "reward/branches"] == 0.25 and math.isnan(found[0, "policy/kl"])
    pictures = values(tmp_path / "tensorboard", "image")
    assert (pictures["branches"].height, pictures["branches"].width) == (12, 34)
    assert pictures["branches"].encoded_image_string.startswith(b"\x89PNG")
    assert set(pictures) == {"branches", "several"}
    writer.close()


def test_tensorboard_is_told_which_steps_are_written_again(tmp_path):
    for first in (0, 3):
        writer = metrics.MetricWriter(tmp_path, first_iteration=first)
        for i in range(first, 5):
            writer.write_scalars(i, {"reward": i + first})
        writer.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    starts = [event for event in events(tmp_path / "tensorboard") if event.HasField("session_log")]
    assert [event.step for event in starts] == [3]
    assert points(tmp_path / "tensorboard")[4, "reward/branches"] == 7


def test_every_metric_has_a_tag_of_its_own():
    expected = {
        "reward": "reward/branches",
        "reward_anchor": "reward/anchor",
        "reward_MQ": "reward/MQ",
        "win_rate": "reward/win_rate",
        "gate_open": "reward/gate_open",
        "gate": "policy/gate",
        "kl": "policy/kl",
        "heldout_online": "heldout/online",
        "heldout_gain_from_pivots": "heldout/gain_from_pivots",
        "seconds_rollout": "time/rollout",
    }
    assert {name: metrics.tag_of(name) for name in expected} == expected


def test_tensorboard_shows_what_became_of_the_branches(recorder_of, config, tmp_path):
    """Histograms of rewards and energies, the configuration, and videos with their rewards."""
    recorder = recorder_of(0)
    record(recorder, 0, pixels())
    recorder.record_heldout(1, {"reward": {"online": [0.5]}}, np.zeros((12, 34, 3), np.uint8))
    recorder.close()
    folder = tmp_path / "tensorboard"
    spread = values(folder, "histo")
    assert set(spread) == {"reward/histogram", "policy/energy_histogram"}
    for name, of in (("reward/histogram", 10 + TWO), ("policy/energy_histogram", 60 + TWO)):
        assert spread[name].num == of.size and sum(spread[name].bucket) == of.size
        assert (spread[name].min, spread[name].max) == pytest.approx((of.min(), of.max()))
    (text,) = values(folder, "tensor").values()
    assert "| rollout.branches | `2` |" in text.string_val[0].decode()
    images = values(folder, "image")
    assert set(images) == {"branches/frames", "branches/videos", "heldout/before_after"}
    # TensorBoard shows one kind of thing under a tag.
    assert not {tag for _, tag in points(folder)} & {*spread, *images}
    with Image.open(io.BytesIO(images["branches/videos"].encoded_image_string)) as gif:
        assert gif.format == "GIF" and gif.n_frames == 4
        assert gif.size == (images["branches/videos"].width, images["branches/videos"].height)


def test_the_caption_of_a_video_has_its_reward():
    assert metrics.captions(groups()[0].judged.scores) == [
        ("anchor", "anchor  20.5000"),
        ("branch_0", "branch 0  10.1000"),
        ("branch_1", "branch 1  10.2000"),
    ]


def test_tensorboard_compares_runs_by_their_configuration(recorder_of, tmp_path):
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    recorder_of(0).close()
    found = {}
    for event in events(tmp_path / "tensorboard"):
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "hparams":
                content = value.metadata.plugin_data.content
                found[value.tag] = HParamsPluginData.FromString(content)
    fields = found["_hparams_/session_start_info"].session_start_info.hparams
    assert fields["rollout.branches"].number_value == 2
    assert fields["eval.by_block"].bool_value is True
    assert fields["video.switch_frames"].string_value == "(12, 24)"
    infos = found["_hparams_/experiment"].experiment.metric_infos
    assert [info.name.tag for info in infos] == ["reward/branches", "heldout/online"]


# ---------------------------------------------------------------- videos and evaluations


def test_a_pictured_iteration_leaves_the_videos_of_its_first_prompt(recorder_of, tmp_path):
    recorder, shown = recorder_of(0), pixels()
    for i in range(3):
        record(recorder, i, shown if i != 1 else None)
    recorder.close()
    names = ["anchor", "branch_0", "branch_1"]
    expected = {films.Film("iteration", i, 0, name) for i in (0, 2) for name in names}
    found = films.films_in(tmp_path)
    assert set(found) == expected
    for film, path in found.items():
        error = video.read(path).astype(int) - video.enlarge(shown[names.index(film.name)])
        assert np.abs(error).mean() < 4


def test_a_continued_run_has_every_evaluation_and_video_once(config, tmp_path, capsys):
    """Evaluated after 2 and 4 iterations; killed in the fifth, and continued with the third."""
    config.train.iterations = 6

    def session(first, last):
        recorder = metrics.Recorder(config, tmp_path, first, fps=8)
        for i in range(first, last):
            record(recorder, i, pixels() if i in (0, 3) else None)
            if i % 2:
                evaluate(recorder, i + 1, float(first))
        recorder.close()

    def evaluate(recorder, done, reward):
        recorder.film_heldout(done, "online", 0, pixels()[0])
        record_heldout(recorder, done, VQ=reward)

    def steps():
        return sorted({(film.kind, film.step) for film in films.films_in(tmp_path)})

    session(0, 5)
    with (tmp_path / "heldout.jsonl").open("a") as file:
        file.write('{"iteration": 6, "rew')
    assert steps() == [("heldout", 2), ("heldout", 4), ("iteration", 0), ("iteration", 3)]
    capsys.readouterr()
    recorder = metrics.Recorder(config, tmp_path, 2, fps=8)
    assert steps() == [("heldout", 2), ("iteration", 0)]
    recorder.close()
    session(2, 6)
    path = tmp_path / "heldout.jsonl"
    assert [row["iteration"] for row in lines(path)] == [2, 4, 6]
    assert [row["reward"]["online"][0] for row in lines(path)] == [0.0, 2.0, 2.0]
    assert str(path) not in capsys.readouterr().out
    # A run that is over evaluates what it has led to again.
    recorder = metrics.Recorder(config, tmp_path, 6, fps=8)
    assert iterations(path) == [2, 4] and ("heldout", 6) not in steps()
    evaluate(recorder, 6, 6.0)
    recorder.close()
    assert iterations(path) == [2, 4, 6] and steps()[2] == ("heldout", 6)


def test_a_run_without_pictures_has_no_videos(config, tmp_path):
    config.train.video_every = 0
    recorder = metrics.Recorder(config, tmp_path, 0, fps=8)
    recorder.film_heldout(0, "reference", 0, pixels()[0])
    recorder.close()
    assert not (tmp_path / "videos").exists()


FULL = """
import resource, sys
import numpy as np
from kvpo_jax.runtime import metrics
writer = metrics.MetricWriter(sys.argv[1], first_iteration=0)
writer.write_scalars(0, {"reward": 0.0})
writer.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))  # the disk is full
try:
    if sys.argv[2] == "close":
        writer.write_images(0, {"noise": np.random.default_rng(0).random((256, 256, 3))})
        writer.close()
    for i in range(1, 20):
        writer.write_images(i, {"noise": np.random.default_rng(i).random((256, 256, 3))})
        writer.write_scalars(i, {"reward": i})
    writer.flush()
except OSError as error:
    print("raised", error.strerror)
"""


@pytest.mark.parametrize("call", ["write", "close"])
def test_an_error_of_the_thread_is_raised_and_nothing_hangs(tmp_path, call):
    done = run(FULL, tmp_path, call)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"raised {os.strerror(27)}\n"
    assert "Traceback" not in done.stderr
    assert iterations(tmp_path / "metrics.jsonl")[0] == 0


def test_a_writer_is_closed_after_an_error(tmp_path):
    writer = metrics.MetricWriter(tmp_path, first_iteration=0)
    writer.write_images(0, {"no picture": np.zeros((2, 2, 2, 2, 2))})
    with pytest.raises(AssertionError, match="size of input tensor"):  # tensorboardX's
        writer.close()
    with pytest.raises(ValueError, match="closed file"):
        writer.write_scalars(0, {"reward": 1.0})


def test_the_writers_have_the_methods_of_clu(tmp_path):
    """Their parameters too, by clu's own file: its package would import TensorFlow."""
    import importlib.util
    import inspect

    path = importlib.util.find_spec("clu").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location(
        "clu_interface", f"{path}/metric_writers/interface.py"
    )
    clu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(clu)
    for ours in (metrics.JsonlWriter, metrics.TensorboardXWriter):
        names = ("write_scalars", "write_images", "flush", "close")
        media = ("write_videos", "write_histograms", "write_texts", "write_hparams")
        for name in (*names, *(() if ours is metrics.JsonlWriter else media)):
            mine, theirs = getattr(ours, name), getattr(clu.MetricWriter, name)
            taken = [list(inspect.signature(f).parameters) for f in (mine, theirs)]
            assert taken[0] == taken[1]
