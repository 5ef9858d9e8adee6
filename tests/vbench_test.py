"""What VBench gets and what it returns: names, samples, scripts, and its aggregation by hand."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from equipment import run_command

from kvpo_jax import vbench
from kvpo_jax.data import prompts as prompts_lib
from kvpo_jax.data.prompts import PromptSequence
from kvpo_jax.runtime import video


def export(mode="vbench", prompts=("a cat", "a dog"), **fields):
    originals = [(prompt,) for prompt in prompts]
    fields = {"texts": [PromptSequence(s, 0) for s in originals], "samples": 5, "seed": 0, **fields}
    return vbench.Export(mode, originals, **fields)


def read(tmp_path, prompts, extended=None, flickering=None, mode="vbench"):
    """`read_prompts` of files of these lines."""
    paths = []
    for name, lines in (("p.txt", prompts), ("e.txt", extended), ("f.txt", flickering)):
        paths.append(tmp_path / name if lines is not None else None)
        if lines is not None:
            paths[-1].write_text("".join(f"{line}\n" for line in lines))
    return vbench.read_prompts(mode, *paths)


def run(*arguments):
    return run_command("-m", "kvpo_jax.evaluate", *arguments)


# ---------------------------------------------------------------- names


def test_the_standard_list_makes_4720_videos_and_6220_with_those_that_are_filtered(tmp_path):
    prompts = [f"prompt {i} of a façade" for i in range(944)]
    listed = [*prompts, prompts[3], prompts[7]]  # two stand there twice
    extended = [f"{prompt}, at length" for prompt in prompts] + ["other", "words"]
    originals, texts, filtered = read(tmp_path, listed, extended, prompts[100:175])
    plan = vbench.planned(vbench.Export("vbench", originals, texts, 5, 40))
    assert len(plan) == 4720 == len({video.file for video in plan})
    assert {video.file for video in plan} == {f"{p}-{i}.mp4" for p in prompts for i in range(5)}
    assert all(list(video.text) == [f"{video.prompt}, at length"] for video in plan)
    assert all(video.seed == 40 + video.sample for video in plan)
    assert len({(video.seed, video.index) for video in plan}) == 4720  # no noise twice
    assert len({video.made for video in plan}) == 4720

    plan = vbench.planned(vbench.Export("vbench", originals, texts, 5, 40, filtered))
    assert len(plan) == 6220 == len({video.file for video in plan})
    many = [video.file for video in plan if video.sample >= 5]
    assert set(many) == {f"{p}-{i}.mp4" for p in prompts[100:175] for i in range(5, 25)}
    assert len({(video.seed, video.index) for video in plan}) == 6220


@pytest.mark.parametrize(
    "mode, prompt, message",
    [
        ("vbench", "a/b", "has '/', so it cannot be the name of a video of vbench"),
        ("vbench", "é" * 125, "makes a name of 256 bytes, and a file system takes 255"),
        ("vbench_long", "a_b", "has '_', so it cannot be the name of a video of vbench_long"),
        ("vbench_long", "a-Scene", "has '-Scene'"),
    ],
)
def test_a_prompt_that_is_no_name_is_an_error_and_never_cut(mode, prompt, message):
    with pytest.raises(ValueError, match=message):
        vbench.planned(export(mode, ["a cat", prompt]))
    custom = vbench.planned(export("custom", ["a cat", prompt], samples=1))
    assert [video.file for video in custom] == ["0000-0.mp4", "0001-0.mp4"]
    assert custom[1].prompt == prompt


def test_the_longest_name_is_taken_whole():
    (made,) = vbench.planned(export(prompts=["é" * 124 + "x"], samples=1))
    assert len(made.file.encode()) == 255 and made.file == "é" * 124 + "x-0.mp4"


@pytest.mark.parametrize(
    "files, message",
    [
        ((["a", "b"], ["a, long"]), "e.txt has 1 prompts, .*p.txt 2: line i of the first has to"),
        ((["a", "b"], None, ["c"]), "f.txt: 'c' is not in .*p.txt"),
        ((["[a],[b]"],), "has sequences of several prompts .*--export=custom has"),
    ],
)
def test_files_that_do_not_belong_together_are_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, *files)


def test_sequences_are_custom_videos(tmp_path):
    originals, texts, _ = read(tmp_path, ["[a],[b]", "[c],[d]"], mode="custom")
    (first, second) = vbench.planned(vbench.Export("custom", originals, texts, 1, 0))
    assert (first.prompt, first.text, second.prompt) == ("a b", ("a", "b"), "c d")


def test_what_is_generated_lasts_as_long_as_its_prompts_say(tmp_path):
    lines = ['{"prompts": ["a", "b"], "durations": [9, 3]}', '{"prompts": ["c"]}']
    extended = ['{"prompts": ["a, long", "b, long"]}', '{"prompts": ["c, long"], "durations": [6]}']
    paths = [tmp_path / "p.jsonl", tmp_path / "e.jsonl"]
    for path, content in zip(paths, (lines, extended), strict=True):
        path.write_text("".join(f"{line}\n" for line in content))
    originals, texts, _ = vbench.read_prompts("custom", *paths, None)
    made = vbench.Export("custom", originals, texts, 1, 0)
    vbench.write(made, tmp_path / "out", [], [], [])
    generated = prompts_lib.load(tmp_path / "out" / "generation.jsonl")
    assert [(s.sentences, s.durations) for s in generated] == [
        (("a, long", "b, long"), (9, 3)),
        (("c, long",), (6,)),
    ]
    plan = [json.loads(line) for line in (tmp_path / "out" / "plan.jsonl").read_text().splitlines()]
    assert [row["durations"] for row in plan] == [[9, 3], [6]]


# ---------------------------------------------------------------- the scripts

# Stands for VBench's evaluate.py: takes its flags, finds its videos, writes files of its form.
UPSTREAM = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--mode", choices=["custom_input", "vbench_standard", "vbench_category"])
for name in ("videos_path", "dimension", "output_path", "prompt_file"):
    parser.add_argument(f"--{name}")
given = parser.parse_args()
files = sorted(pathlib.Path(given.videos_path).iterdir())
assert all(file.stat().st_size for file in files)
if given.mode == "custom_input":
    assert set(json.load(open(given.prompt_file))) == {file.name for file in files}
scale = 100 if given.dimension == "imaging_quality" else 1
videos = [
    {"video_path": str(file), "video_results": scale * (0.5 + i / 10)}
    for i, file in enumerate(files)
]
mean = sum(video["video_results"] for video in videos) / len(videos) / scale
out = pathlib.Path(given.output_path)
out.mkdir(exist_ok=True)
(out / f"results_{given.dimension}_eval_results.json").write_text(
    json.dumps({given.dimension: [mean, videos]})
)
(out / f"results_{given.dimension}_full_info.json").write_text("[]")
"""


def test_from_prompts_to_a_table(tmp_path):
    prompts = ["a red disk moves left", "a blue cross moves up"]
    folder, upstream = tmp_path / "it's here", tmp_path / "VBench"
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    upstream.mkdir()
    (upstream / "evaluate.py").write_text(UPSTREAM)
    arguments = [f"--prompts={tmp_path / 'p.txt'}", f"--output={folder}", "--samples=1"]
    arguments += ["--num_frames=6", "--export=custom"]
    done = run(*arguments, "--config.model.remat=none")
    assert done.returncode == 0, done.stderr
    assert "2 videos of 2 prompts, 0 are there" in done.stdout
    for script in ("generate.sh", "generate.sh", "run_vbench.sh"):  # the second time links only
        done = subprocess.run(
            ["bash", folder / script],
            capture_output=True,
            text=True,
            env={**os.environ, "VBENCH": str(upstream)},
        )
        assert done.returncode == 0, done.stderr
    plan = [json.loads(line) for line in (folder / "plan.jsonl").read_text().splitlines()]
    assert [row["file"] for row in plan] == ["0000-0.mp4", "0001-0.mp4"]
    assert len(video.read(folder / "videos" / "0001-0.mp4")) == 6
    done = run(f"--import={folder}")
    assert (done.returncode, done.stderr) == (0, "")
    made = json.loads((folder / "vbench.json").read_text())
    assert made["imaging_quality"]["value"] == pytest.approx(0.55)
    assert made["imaging_quality"]["ci95"] == pytest.approx([0.5, 0.6])
    assert (made["imaging_quality"]["prompts"], made["imaging_quality"]["videos"]) == (2, 2)

    done = run(*arguments, "--seed=1")
    assert done.returncode == 1 and "was begun with seed 0, not 1" in done.stderr
    (folder / "videos" / "mine.mp4").write_bytes(b"x")
    done = run(*arguments, "--config.model.remat=none")
    assert done.returncode == 1 and "has mine.mp4, which the plan has not" in done.stderr


def scripts(tmp_path, made):
    vbench.write(made, tmp_path / "out", ["--checkpoint=my run"], ["--export=x"], [])
    return {path.name: path.read_text() for path in (tmp_path / "out").glob("*.sh")}


@pytest.mark.parametrize(
    ("flags", "said", "other"),
    [
        (["--workdir={folder}", "--iteration=2"], "--checkpoint={folder} --iteration=2", "--lora"),
        (["--lora=a.safetensors:0.5"], "--lora=a.safetensors:0.5", "--checkpoint"),
    ],
)
def test_the_policy_that_is_exported_is_the_one_that_generates(tmp_path, flags, said, other):
    (tmp_path / "p.txt").write_text("a red disk moves left")
    given = [f"--prompts={tmp_path / 'p.txt'}", f"--output={tmp_path / 'out'}", "--export=custom"]
    done = run(*given, *(flag.format(folder=tmp_path) for flag in flags))
    assert done.returncode == 0, done.stderr
    script = (tmp_path / "out" / "generate.sh").read_text()
    assert said.format(folder=tmp_path) in script and other not in script


def test_every_dimension_has_a_command_of_its_mode(tmp_path):
    short = scripts(tmp_path / "short", export(filtered=["a dog"]))
    lines = short["run_vbench.sh"].splitlines()
    for name in vbench.DIMENSIONS:
        (line,) = [x for x in lines if f"--dimension {name} " in x]
        folder = "static/filtered_videos" if name == "temporal_flickering" else "videos"
        assert line.startswith("python evaluate.py --mode=vbench_standard")
        assert f'--videos_path "$here/{folder}"' in line
    (static,) = [i for i, line in enumerate(lines) if "static_filter.py" in line]
    assert "--dimension temporal_flickering" in lines[static + 1]
    generating = [x for x in short["generate.sh"].splitlines() if "kvpo_jax.generate" in x]
    assert len(generating) == 25
    assert "'--checkpoint=my run'" in generating[0] and "--seed=24" in generating[-1]

    long = scripts(tmp_path / "long", export("vbench_long", samples=2))["run_vbench.sh"]
    assert long.count("eval_long.py --mode=long_vbench_standard") == 16
    assert long.count("--dev_flag --num_of_samples_per_prompt=2") == 16
    (filtered,) = [line for line in long.splitlines() if "--static_filter_flag" in line]
    assert "--dimension temporal_flickering" in filtered

    custom = scripts(tmp_path / "custom", export("custom"))
    assert custom["run_vbench.sh"].count("evaluate.py --mode=custom_input") == 6
    assert custom["run_vbench_long.sh"].count("eval_long.py --mode=long_custom_input") == 6
    for text in (*short.values(), long, *custom.values()):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


# ---------------------------------------------------------------- results


def results(folder, values, clips=False):
    """Result files, one per dimension: dimension -> prompt -> values of its videos."""
    for name, prompts in values.items():
        scale = 100 if name == "imaging_quality" else 1
        videos = []
        for prompt, samples in prompts.items():
            for sample, value in enumerate(samples):
                path = f"/v/{prompt}-{sample}"
                ends = [f"/{prompt}-{sample}_{i:03d}.mp4" for i in range(2)] if clips else [".mp4"]
                for i, end in enumerate(ends):
                    shifted = (value + (0.1, -0.1)[i]) if clips else value
                    videos.append({"video_path": path + end, "video_results": scale * shifted})
        mean = float(np.mean([x for samples in prompts.values() for x in samples]))
        made = [mean, videos, []] if clips else [mean, videos]
        folder.mkdir(exist_ok=True)
        (folder / f"results_{name}_eval_results.json").write_text(json.dumps({name: made}))


def test_aggregates_are_those_of_vbench_by_hand():
    values = {name: d.low + 0.5 * (d.high - d.low) for name, d in vbench.DIMENSIONS.items()}
    got = vbench.aggregates(values)
    assert got["Quality"] == pytest.approx(0.5) and got["Semantic"] == pytest.approx(0.5)
    # Dynamic degree weighs a half of 6.5; a subject consistency of 1 adds 0.5 of 6.5.
    values |= {"dynamic_degree": 1.0, "subject_consistency": 1.0}
    got = vbench.aggregates(values)
    assert got["Quality"] == pytest.approx(0.5 + (0.5 * 0.5 + 0.5) / 6.5)
    # A scene of 0.8222 is 1, one of nine.
    values["scene"] = 0.8222
    got = vbench.aggregates(values)
    assert got["Semantic"] == pytest.approx(0.5 + 0.5 / 9)
    assert got["Total"] == pytest.approx((4 * got["Quality"] + got["Semantic"]) / 5)
    assert got["Consistency"] == pytest.approx((1 + (0.2615 + 1) / 2) / 2)


def test_aggregates_of_published_kind_of_numbers():
    """(0.95 - 0.1462) / 0.8538 = 0.94144 and so on: the sum over seven dimensions by hand."""
    values = {
        "subject_consistency": 0.95,  # 0.941438
        "background_consistency": 0.96,  # 0.945836
        "temporal_flickering": 0.99,  # 0.973024
        "motion_smoothness": 0.98,  # 0.939966
        "dynamic_degree": 0.7,  # 0.7, a half
        "aesthetic_quality": 0.65,
        "imaging_quality": 0.7,
    }
    total = 0.941438 + 0.945836 + 0.973024 + 0.939966 + 0.35 + 0.65 + 0.7
    assert vbench.aggregates(values)["Quality"] == pytest.approx(total / 6.5, abs=1e-5)
    del values["temporal_flickering"]  # custom videos have six
    got = vbench.aggregates(values)
    assert got["Quality"] == pytest.approx((total - 0.973024) / 5.5, abs=1e-5)
    assert "Semantic" not in got and "Total" not in got


def test_semantic_dimensions_are_normalised_as_published():
    """The half of what VBench's NORMALIZE_DIC has as lowest and highest; most are 0 and 1."""
    halves = {
        "scene": 0.8222 / 2,
        "appearance_style": (0.0009 + 0.2855) / 2,
        "temporal_style": 0.364 / 2,
        "overall_consistency": 0.364 / 2,
    }
    plain = "object_class multiple_objects human_action color spatial_relationship".split()
    values = {**halves, **dict.fromkeys(plain, 0.5)}
    values |= {name: d.high for name, d in vbench.DIMENSIONS.items() if d.quality}
    got = vbench.aggregates(values)
    assert got["Semantic"] == pytest.approx(0.5, abs=1e-9)
    values["temporal_style"] = 0.364
    assert vbench.aggregates(values)["Semantic"] == pytest.approx(0.5 + 0.5 / 9)


def test_a_missing_dimension_does_not_count_as_0(tmp_path):
    every = {name: {"a cat": [0.5], "a dog": [0.7]} for name in vbench.DIMENSIONS}
    del every["scene"], every["color"]
    results(tmp_path / "r", every)
    done = run(f"--import={tmp_path / 'r'}")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "has no results of color, scene. They do not count as 0" in done.stderr
    assert not (tmp_path / "r" / "vbench.json").exists()
    (tmp_path / "r" / "manifest.json").write_text('{"mode": "custom"}')
    assert run(f"--import={tmp_path / 'r'}").returncode == 0


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"color": [0.5, [{"video_path"', "not JSON"),
        ("[]", "expected an object, got a list"),
        ('{"colour": [0.5, []]}', "'colour' is no dimension of VBench"),
        ('{"color": 0.5}', "color should be"),
        ('{"color": [0.5, []]}', "color should be"),
        ('{"color": [NaN, [{"video_path": "a-0.mp4", "video_results": 1}]]}', "color is nan"),
        ('{"color": [0.5, [{"video_path": "a-0.mp4"}]]}', "color of a-0.mp4 is None"),
        ('{"color": [0.5, [{"video_results": 1}]]}', "a result without a video_path"),
    ],
)
def test_a_file_that_is_not_of_vbenchs_form_is_named(tmp_path, text, message):
    (tmp_path / "results_1_eval_results.json").write_text(text)
    with pytest.raises(ValueError, match=f"results_1_eval_results.json.*{message}"):
        vbench.read_results(tmp_path, ["color"])


def test_two_results_of_a_dimension_must_be_the_same(tmp_path):
    results(tmp_path / "a", {"color": {"x": [0.5], "y": [0.5]}})
    results(tmp_path / "b", {"color": {"x": [0.5], "y": [0.5]}})
    assert vbench.read_results(tmp_path, ["color"])["color"].value == 0.5
    results(tmp_path / "b", {"color": {"x": [0.5], "y": [0.6]}})
    with pytest.raises(ValueError, match="color is in .*a.* and, with other values, in .*b"):
        vbench.read_results(tmp_path, ["color"])


def test_clips_of_a_long_video_are_one_video(tmp_path):
    results(tmp_path, {"imaging_quality": {"a cat": [0.4, 0.6], "a dog": [0.8]}}, clips=True)
    got = vbench.read_results(tmp_path, ["imaging_quality"])["imaging_quality"]
    assert {k: pytest.approx(v) for k, v in got.videos.items()} == {
        "a cat": (0.4, 0.6),
        "a dog": (0.8,),
    }


@pytest.mark.parametrize(
    "path, expected",
    [
        ("/v/a cat-3.mp4", ("a cat", "3")),
        ("v/split_clip/a cat-0/a cat-0_006.mp4", ("a cat", "0")),
        ("v/split_clip/a cat-0/a cat-0_full.mp4", ("a cat", "0")),
        ("v/split_clip/a cat-0/a cat-0_006.mp4/a cat-0.mp4", ("a cat", "0")),
        ("v/0007-2-Scene-001_004.mp4", ("0007", "2")),
        ("a 3-D cat.mp4", ("a 3-D cat", "")),
    ],
)
def test_the_prompt_and_sample_of_a_path(path, expected):
    assert vbench._video_of(path) == expected


def test_the_interval_is_over_prompts_and_not_over_videos():
    def of(videos):
        value = float(np.mean([x for samples in videos.values() for x in samples]))
        return vbench.Result(value, videos, Path("x"))

    # Two prompts, drawn anew: the mean is 0, 0.5 or 1 with a quarter, a half and a quarter,
    # however many videos agree.
    alike = {"a": (0.0,) * 50, "b": (1.0,) * 50}
    got = vbench.resampled({"scene": of(alike)})["scene"]
    assert sorted(set(got)) == [0.0, 0.5, 1.0]
    assert np.mean(got == 0.5) == pytest.approx(0.5, abs=0.05)

    # What one dimension loses with a prompt the other one gains: their sum does not vary.
    many = {f"p{i}": (i / 100,) for i in range(40)}
    against = {prompt: (1 - x[0],) for prompt, x in many.items()}
    draws = vbench.resampled({"aesthetic_quality": of(many), "imaging_quality": of(against)})
    assert np.std(draws["aesthetic_quality"]) > 0.01
    np.testing.assert_allclose(draws["aesthetic_quality"] + draws["imaging_quality"], 1.0)
    # The standard error of a mean of 40.
    spread = np.std([x[0] for x in many.values()]) / np.sqrt(40)
    assert np.std(draws["aesthetic_quality"]) == pytest.approx(spread, rel=0.1)
    # VBench's own mean is the middle, although it may count frames.
    moved = of(many)._replace(value=0.9)
    assert np.mean(vbench.resampled({"scene": moved})["scene"]) == pytest.approx(0.9, abs=0.01)


def test_one_prompt_has_no_interval():
    one = vbench.Result(0.5, {"a": (0.4, 0.6)}, Path("x"))
    made = vbench.summary({name: one for name in vbench.CUSTOM})
    assert made["dynamic_degree"]["ci95"] is None
    assert made["Quality"]["ci95"] is None and made["dynamic_degree"]["videos"] == 2
