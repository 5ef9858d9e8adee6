"""The page of a run, and of several: what it says, and what a browser makes of it."""

import base64
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import equipment
import imageio.v3 as iio
import numpy as np
import pytest

from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import media, page, video
from kvpo_jax.runtime.films import Film, films_in
from kvpo_jax.runtime.records import read_run
from kvpo_jax.runtime.statistics import heldout_summary

PROMPTS = [["a red disk moves left", "a <b>blue</b> cross & more"], ["one", "two"]]
FIELDS = {
    "rollout.branches": 2,
    "train.iterations": 3,
    "train.prompts_per_iteration": 2,
    "objective.beta": 0.25,
    "video.switch_frames": (18,),
}
ROUTED = [[3, 4, 5, 6, 7, 8], [3, 5, 7, 9, 10, 11]]


class Tag:
    """An element of a page: name, attributes, and all text inside."""

    def __init__(self, name: str, attributes: dict[str, str | None]):
        self.name, self.attributes, self.text = name, attributes, ""

    def __getitem__(self, name: str) -> str:
        return self.attributes.get(name) or ""


class Reader(HTMLParser):
    """The elements of a page, in its order."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[Tag] = []
        self._open: list[Tag] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open[-1].name}"

    def handle_starttag(self, name, attributes):
        self.tags.append(Tag(name, dict(attributes)))
        if name not in self.VOID:
            self._open.append(self.tags[-1])

    def handle_startendtag(self, name, attributes):
        self.tags.append(Tag(name, dict(attributes)))

    def handle_endtag(self, name):
        assert self._open.pop().name == name
        if name in ("h5", "p", "dt", "dd"):
            self.handle_data(" ")

    def handle_data(self, data):
        for tag in self._open:
            tag.text += data

    def all(self, name: str, kind: str = "") -> list[Tag]:
        """The elements of this name, and of this class."""
        return [t for t in self.tags if t.name == name and (not kind or kind in t["class"].split())]

    def table(self, caption: str) -> list[list[str]]:
        """The rows of the table of this caption, without the columns' names."""
        start = next(
            i for i, t in enumerate(self.tags) if t.name == "caption" and caption in t.text
        )
        rows: list[list[str]] = []
        for tag in self.tags[start:]:
            if tag.name == "table":
                break
            if tag.name == "tr":
                rows.append([])
            if tag.name in ("th", "td"):
                rows[-1].append(tag.text)
        return rows[1:]


def write_run(workdir: Path, videos: bool = True, **fields) -> Path:
    """A run directory with numbers that a reader can follow."""
    config = equipment.configure("configs/tiny.py", FIELDS | fields)
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    (workdir / "versions.json").write_text(json.dumps({"jax": "1.2.3", "device_kind": "cpu"}))
    metrics = [
        {
            "iteration": i,
            "reward": 0.4 + 0.1 * i,
            "reward_anchor": 0.35 + 0.1 * i,
            "reward_VQ": 0.5,
            "reward_std_in_group": 0.01,
            "kl": 0.1 * i if i else None,
            "entropy": 0.6,
            "gate_open": 0.5,
            "grad_norm": 1.0,
            "seconds_rollout": 2.0,
            "seconds_compile": 50.0 if i == 0 else 0.0,
            "seconds_total": 52.0 + 2.0 * i,
        }
        for i in range(3)
    ]
    branches = [
        {
            "iteration": i,
            "prompt": prompt,
            "pivot": 5,
            "fork_frame": 15,
            "window": [5, 7],
            "routed": ROUTED,
            "reward": [0.4321, 0.4567],
            "reward_anchor": 0.45,
            "components": {"VQ": {"branches": [0.1, 0.3], "anchor": 0.25}},
            "advantage": [-1.0, 1.0],
            "energy": [0.03, 0.02],
            "energy_old": [0.03, 0.02],
            "energy_reference": [0.03, 0.02],
            "probability": [0.25, 0.75],
            "ratio": [1.0, 1.0],
            "gate_open": True,
            "weight": 1.0,
        }
        for i in range(3)
        for prompt in PROMPTS
    ]
    heldout = {
        "iteration": 3,
        "prompt": PROMPTS,
        "reward": {"reference": [0.4, 0.5], "online": [0.5, 0.7], "ema": [0.4, 0.6]},
        "components": {
            policy: {"VQ": [0.1, 0.3], "motion": [0.5, 0.5]}
            for policy in ("reference", "online", "ema")
        },
        "optimised": ["VQ"],
        "first_pivot": 5,
        "blocks": {},
    }
    for name, rows in (("metrics", metrics), ("branches", branches), ("heldout", [heldout])):
        (workdir / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if videos:
        for step in (0, 2):
            for name, change in (("anchor", 0), ("branch_0", 20), ("branch_1", 60)):
                write_film(workdir, Film("iteration", step, 0, name), change)
        for step, policy in ((0, "reference"), (3, "online"), (3, "ema")):
            for index in range(2):
                write_film(workdir, Film("heldout", step, index, policy))
    return workdir


def write_film(workdir: Path, film: Film, change: int = 0) -> None:
    """A grey video of a run whose second half is so much brighter."""
    pixels = np.full((16, 8, 8, 3), 100, np.uint8)
    pixels[8:] += change
    video.write(workdir / film.path, pixels, fps=8)


def command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    """The command, in a process of its own."""
    words = [sys.executable, "-m", "kvpo_jax.report", *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "first $x$ <i>&")


@pytest.fixture(scope="module")
def text(run) -> str:
    done = command(run.name, cwd=run.parent)
    output = Path(run.name, "report", "index.html")
    assert (done.stdout, done.stderr, done.returncode) == (f"wrote {output}\n", "", 0)
    return (run.parent / output).read_text()


def test_the_sections_stand_in_their_order(text):
    read = Reader(text)
    assert [tag.text for tag in read.all("h2")] == [
        "Result",
        "Health",
        "Curves",
        "Branches",
        "Reward against energy",
        "Configuration",
        "Versions and commands",
    ]
    assert read.all("h1")[0].text == "first $x$ <i>&"
    assert [tag["href"] for tag in read.all("a")] == [
        f"#{tag['id']}" for tag in read.all("section")
    ]


def test_the_page_needs_no_other_file(text):
    assert "://" not in text  # neither a link nor a namespace
    read = Reader(text)
    for tag in read.tags:
        for name in ("src", "href", "poster", "data", "xlink:href"):
            assert not tag[name] or tag[name].startswith(("data:", "#")), (tag.name, tag[name][:40])
    assert not re.search(r"url\((?!#)|@import", text)
    assert "DejaVu" not in text and "#0102" not in text  # curves have the page's font and colours
    pictures = read.all("img")
    assert pictures and all(tag["alt"] for tag in pictures)
    assert all(tag["aria-label"] for tag in [*read.all("video"), *read.all("svg")])
    named = [tag["id"] for tag in read.tags if tag["id"]]
    assert len(named) == len(set(named))


def test_the_numbers_are_the_records(text):
    read = Reader(text)
    rows = read.table("Held-out prompts")
    assert [[*row[:2], *row[5:]] for row in rows] == [
        ["reference", "0.4500", "0.2000", "0.5000"],
        ["online", "0.6000", "0.2000", "0.5000"],
        ["ema", "0.5000", "0.2000", "0.5000"],
    ]
    # Gains of 0.1 and 0.2: 0.15 -+ 12.7062 x 0.0707 / sqrt(2).
    assert rows[1][2:5] == ["+0.1500", "[-0.4853, +0.7853]", "100%"]
    assert rows[2][4] == "75%"  # a tie and a win
    prompts = read.table("Rewards by prompt")
    assert prompts[0] == [" → ".join(PROMPTS[0]), "0.4000", "0.5000", "0.4000", "+0.1000"]
    assert prompts[1][0] == "one → two"
    seconds = read.table("Seconds of the recorded iterations")
    assert seconds == [
        ["rollout", "6.0", "11%"],
        ["compile", "50.0", "89%"],
        ["in all", "56.0", "100%"],
    ]
    assert read.table("What differs from the preset") == [
        ["objective.beta", "0.05", "0.25"],
        ["rollout.branches", "8", "2"],
        ["train.iterations", "24", "3"],
        ["train.prompts_per_iteration", "4", "2"],
        ["video.switch_frames", "(12, 24)", "(18,)"],
    ]
    assert ["jax", "1.2.3"] in read.table("Versions and devices")
    reward = next(t for t in read.all("svg", "curve") if t["aria-label"].startswith("Reward over"))
    for line in ("branches: from 0.4 to 0.6", "anchor: from 0.35 to 0.55", "EMA: from 0.45 to 0.5"):
        assert line in reward["aria-label"]


def test_the_numbers_to_see_first_are_the_summarys(tmp_path):
    """Of the online policy, and not of the average."""
    run = write_run(tmp_path / "run", videos=False)
    heldout = heldout_summary(*map(np.asarray, ([0.4, 0.5], [0.5, 0.7], [0.4, 0.6])))
    (run / "summary.json").write_text(json.dumps({"heldout": heldout, "seconds": {"total": 61}}))
    page.write([run], tmp_path / "index.html")
    read = Reader((tmp_path / "index.html").read_text())
    reward, gain, wins = (tag.text.strip() for tag in read.all("dd")[:3])
    assert reward == "0.60000.4500 before" and wins == "100%of 2 prompts"
    assert gain.startswith("+0.150095 % [-0.4853, ")


def test_a_run_of_the_world_return_has_a_table_of_tasks(run, tmp_path):
    told = page.told(run.name, run, 0)
    assert page.task_table(told) is None
    workdir = write_run(tmp_path / "return", videos=False)
    config = json.loads((workdir / "config.json").read_text()) | {"backbone": "return"}
    (workdir / "config.json").write_text(json.dumps(config))
    [evaluation] = read_run(workdir).heldout
    evaluation["prompt"] = [
        ["a red bar", other, "a blue dot", "nothing", "it returns"]
        for other in ("a red bar", "a blue dot", "a blue dot")
    ]
    for policy, gain in (("reference", 0.0), ("online", 0.25), ("ema", 0.0)):
        evaluation["reward"][policy] = [0.5, 0.25 + gain, 0.5 + gain]
        evaluation["components"][policy] = {"motion": [1.0] * 3, "SC": [1.0, gain, 0.5]}
    (workdir / "heldout.jsonl").write_text(json.dumps(evaluation) + "\n")
    rows = Reader(page.render([page.told("return", workdir, 0)])).table("By task")
    assert [row[:4] for row in rows] == [
        ["outvoted", "2", "reference", "0.3750"],
        ["outvoted", "2", "online", "0.6250"],
        ["outvoted", "2", "ema", "0.3750"],
        *(["sink wins", "1", policy, "0.5000"] for policy in page.POLICIES),
    ]
    assert rows[1][4] == "+0.2500" and rows[1][7:] == ["0.3750"] and rows[4][5] == "-"


def test_held_out_rewards_stand_at_the_updates_made(run):
    records = read_run(run)
    assert page.heldout("online")(records) == ([0, 3], pytest.approx([0.45, 0.6]))
    assert page.heldout("ema", "VQ")(records) == ([0, 3], pytest.approx([0.2, 0.2]))
    rows = [{"iteration": 0}, {"iteration": 1, "heldout_reference": 0.4, "heldout_ema": 0.5}]
    older = dataclasses.replace(records, heldout=(), metrics=rows)
    assert page.heldout("ema")(older) == ([0, 2], [0.4, 0.5])


def test_a_page_is_the_same_every_time(run):
    stories = [page.told("run", run, 0)]
    assert page.render(stories) == page.render(stories)


def test_branches_are_ordered_by_reward(text):
    read = Reader(text)
    names = [tag.text for tag in read.all("h5")]
    assert names == ["branch 1", "anchor", "branch 0"] * 2  # two pictured iterations
    assert [tag.text for tag in read.all("h4")] == ["Iteration 2", "Iteration 0"]
    best, anchor, worst = (" ".join(tag.text.split()) for tag in read.all("article")[:3])
    assert best == "branch 1 0.4567 +0.0067 VQ 0.3000 advantage +1.00 energy 0.02 probability 0.750"
    assert anchor == "anchor 0.4500 VQ 0.2500"
    assert worst.startswith("branch 0 0.4321 -0.0179 VQ 0.1000")
    # VQ lies 0.05 above the anchor's and 0.15 below it, the most of the group: half of the bar.
    bars = [tag["style"] for tag in read.all("i") if tag["class"] in ("up", "down")][:2]
    assert bars == ["left:50.0%;width:16.7%", "left:0.0%;width:50.0%"]


def test_the_map_shows_what_each_branch_attends_to(run):
    records = read_run(run)
    drawn = page.routed_map(records.config, records.branches[0], ["branch_1", "anchor", "branch_0"])
    assert drawn["frames"] == 36 and drawn["pivot"] == 15 and drawn["switches"] == [18]
    assert drawn["window"] == (15, 9)  # blocks 5 to 7 of 3 frames
    of = {row["name"]: dict(row["cells"]) for row in drawn["rows"]}
    assert list(of) == ["branch 1", "anchor", "branch 0"]
    sink, near = dict.fromkeys(range(3), "sink"), dict.fromkeys(range(12, 15), "near")
    for name, routed in (("branch 0", ROUTED[0]), ("branch 1", ROUTED[1])):
        assert of[name] == sink | near | dict.fromkeys(routed, "routed")
    assert of["anchor"] == sink | dict.fromkeys(range(6, 15), "near")


def test_the_map_is_drawn_where_the_frames_are(text):
    """Frame n begins at 72 + 18 n of the picture's 720 units, for 36 frames."""
    drawn = text[text.index("<svg viewBox") :]
    places = [float(x) for x in re.findall(r'<rect class="routed" x="([\d.]+)"', drawn)[:6]]
    assert [(x - 72.5) / 18 for x in places] == ROUTED[1]
    assert re.search(r'class="pivot" x1="342.0"', drawn)
    assert re.search(r'class="switch" x1="396.0"', drawn)


def test_differences_are_those_of_the_videos(run):
    folder = run / "videos" / "iteration_00002"
    branches = [folder / f"prompt_0_branch_{g}.mp4" for g in range(2)]
    strips, levels, most = media.difference_strips(folder / "prompt_0_anchor.mp4", branches)
    np.testing.assert_allclose(levels, [10, 30], atol=2)  # 20 and 60 in half of the frames
    np.testing.assert_allclose(most, 60, atol=4)
    for strip, grey in zip(strips, (85, 255), strict=True):  # 20 and 60 of the largest, 60
        pixels = iio.imread(io.BytesIO(strip)).astype(int)
        half = pixels.shape[1] // 2
        assert np.all(pixels[:, :half] <= 10) and np.all(abs(pixels[:, half:] - grey) <= 15)


def test_what_has_no_room_is_named(run):
    videos = page.grouped(films_in(run))
    size = sum(path.stat().st_size for group in videos.values() for path in group.values())
    newest = sum(path.stat().st_size for path in videos["iteration", 2].values())

    def shown(room: int) -> tuple[list[int], str, int, str]:
        story = page.told("run", run, room)
        branches, heldout = page.galleries(story, 6), page.before_after(story, 6)
        iterations = [part["iteration"] for part in branches["parts"]]
        return iterations, branches["left_out"], len(heldout["pairs"]), heldout["left_out"]

    assert shown(size) == ([2, 0], "", 2, "")
    assert shown(size - newest // 2) == ([2], "0", 2, "")  # the first iteration has to go
    assert shown(0) == ([2, 0], "0, 2", 0, "0, 1")  # maps and numbers


def test_what_is_left_out_is_on_the_page(run):
    told = Reader(page.render([page.told("run", run, 0)])).all("main")[0].text
    assert "Left out for want of room: held-out prompts 0, 1, in videos/" in told
    assert "Left out for want of room: iterations 0, 2, in videos/" in told


def test_a_page_has_the_newest_evaluation_and_the_first_prompts():
    shown = (
        Film("heldout", 0, 1, "reference"),
        Film("heldout", 40, 1, "online"),
        Film("iteration", 19, 0, "branch_0"),
    )
    other = (Film("heldout", 20, 1, "online"), Film("iteration", 19, 1, "branch_0"))
    found = page.grouped({film: film.path for film in (*shown, *other)})
    assert found == {
        ("heldout", 1): {"reference": shown[0].path, "online": shown[1].path},
        ("iteration", 19): {"branch_0": shown[2].path},
    }


def test_the_largest_page_is_bounded():
    assert len(base64.b64encode(bytes(page.ROOM))) < page.LARGEST - 1_000_000


def test_a_large_video_is_there_as_a_preview(tmp_path):
    path = tmp_path / "large.mp4"
    rng = np.random.default_rng(0)
    with video.writing(path, 480, 640, 8) as write:
        for _ in range(8):
            write(rng.integers(0, 256, (480, 640, 3), np.uint8))
    assert path.stat().st_size > media.LARGEST
    ((content,),) = media.fitting({"a": [path]}, page.ROOM).values()
    assert len(content) < media.LARGEST
    assert iio.imread(content, extension=".mp4").shape == (8, 240, 320, 3)


def test_a_run_of_an_older_version_says_what_it_lacks(tmp_path):
    run = write_run(tmp_path / "old", videos=False)
    for name in ("heldout.jsonl", "branches.jsonl", "config.json", "versions.json"):
        (run / name).unlink()
    page.write([run], tmp_path / "index.html")
    read = Reader((tmp_path / "index.html").read_text())
    missing = "config.json, branches.jsonl, heldout.jsonl, summary.json, videos/"
    assert missing in read.all("header")[0].text
    told = read.all("main")[0].text
    for sentence in (
        "No evaluation is recorded",
        "There are no held-out videos",
        "There is no branches.jsonl",
        "There is no config.json",
        "There is no versions.json",
    ):
        assert sentence in told
    assert len(read.all("svg", "curve")) >= 6


def test_several_runs_stand_side_by_side(run, tmp_path):
    other = write_run(tmp_path / "second", **{"objective.beta": 0.5})
    output = tmp_path / "both.html"
    page.write([run, other], output)
    read = Reader(output.read_text())
    assert read.all("h1")[0].text == "2 runs"
    rows = read.table("Held-out prompts")
    assert [row[:2] for row in rows] == [
        ["first $x$ <i>&", "reference"],
        ["", "online"],
        ["", "ema"],
        ["second", "reference"],
        ["", "online"],
        ["", "ema"],
    ]
    assert read.table("What differs between") == [["objective.beta", "0.25", "0.5"]]
    reward = next(t for t in read.all("svg", "curve") if t["aria-label"].startswith("Reward over"))
    assert "second, branches: from 0.4 to 0.6" in reward["aria-label"]
    names = [tag.text.strip() for tag in read.all("h3")]
    assert names.count("● second") == 3  # health, branches, commands
    # Before, and after each run, for two prompts; then a group of three for each run.
    assert len(read.all("video")) == 2 * 3 + 2 * 3


def test_runs_of_other_prompts_play_by_themselves(run, tmp_path):
    other = write_run(tmp_path / "other")
    heldout = (other / "heldout.jsonl").read_text().replace("red disk", "pink disk")
    (other / "heldout.jsonl").write_text(heldout)
    stories = [page.told(path.name, path, page.ROOM) for path in (run, other)]
    assert page.side_by_side(stories, 6) == []
    assert len(page.side_by_side(stories[:1] * 2, 6)) == 2


def test_runs_of_one_name_are_told_apart(tmp_path):
    a, b = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert page.labelled([a, b]) == ["a/run", "b/run"]
    assert page.labelled([a]) == ["run"]
    with pytest.raises(UsageError, match="twice"):
        page.labelled([a, tmp_path / "a" / ".." / "a" / "run"])


def test_a_group_without_rewards_has_a_gallery(run, tmp_path):
    """As sampling of branches makes it: no reward is known."""
    records = read_run(run)
    record = {k: records.branches[0][k] for k in ("prompt", "pivot", "fork_frame", "window")}
    paths = page.grouped(films_in(run))["iteration", 2]
    contents = {name: path.read_bytes() for name, path in paths.items()}
    part = page.gallery(records.config, record | {"routed": ROUTED}, paths, contents)
    assert [card["name"] for card in part["cards"]] == ["anchor", "branch 0", "branch 1"]
    page.write_branches("diversity", [part], tmp_path / "index.html")
    read = Reader((tmp_path / "index.html").read_text())
    assert len(read.all("video")) == 3 and "None" not in read.all("main")[0].text


def test_a_page_that_cannot_be_written_loses_nothing(run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir, ignore=shutil.ignore_patterns("report"))
    (workdir / "report" / "index.html").mkdir(parents=True)
    (workdir / "videos" / "iteration_00002" / "prompt_0_branch_0.mp4").write_bytes(b"damaged")
    said = page.written(workdir)
    assert said.count("\n") == 0 and "python -m kvpo_jax.report" in said
    assert "prompt_0_branch_0.mp4" in said and "UsageError" in said
    shutil.rmtree(workdir / "videos")
    assert "Is a directory" in page.written(workdir)
    (workdir / "report" / "index.html").rmdir()
    assert page.written(workdir) == f"{workdir / 'report' / 'index.html'} shows it"


def test_health_says_what_is_over(tmp_path):
    sick = write_run(tmp_path / "sick", videos=False)
    rows = [json.loads(line) for line in (sick / "metrics.jsonl").read_text().splitlines()]
    for row, spread in zip(rows, (0.0, 0.01, 0.01), strict=True):
        row |= {"reward_std_in_group": spread, "pixel_std_in_group": 0.1}
    (sick / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    told = page.told("sick", sick, 0)
    assert page.recovered(told) == ["no spread, in iterations 0"]
    assert "Over: no spread, in iterations 0" in Reader(page.render([told])).all("main")[0].text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--outputs=x", "run"], "there is no flag --outputs; did you mean 'output'?"),
        (["run", "--output=run"], "--output=run is a folder; name a file in it"),
        (["run"], "run is not the directory of a run: it has no config.json and no metrics.jsonl"),
    ],
)
def test_bad_arguments_are_a_line(tmp_path, arguments, message):
    (tmp_path / "run").mkdir()
    done = command(*arguments, cwd=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("", f"error: {message}\n", 1)


# ---------------------------------------------------------------- in a browser

# Appended to a copy of the page: what it has loaded, as JSON in the document.
PROBE = """<script>
addEventListener("load", async () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
  const videos = [...document.querySelectorAll("video")];
  // Timers run on virtual time, and decoders on real time: the square roots take some of it.
  for (let i = 0; i < 3000 && videos.some(v => v.readyState < 2 && !v.error); i++) {
    for (let n = 0; n < 2e6; n++) window.root = Math.sqrt(n);
    await new Promise(done => setTimeout(done, 5));
  }
  const state = {
    videos: videos.map(v => v.readyState >= 2 && v.videoWidth),
    images: [...document.images].map(i => i.complete && i.naturalWidth),
    curves: [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect().height > 50),
    wide: document.documentElement.scrollWidth - innerWidth,
    fetched: performance.getEntriesByType("resource").map(e => e.name.slice(0, 5)),
    buttons: document.querySelectorAll("button.play:not([hidden])").length,
    errors: window.wrong,
  };
  const place = document.createElement("pre");
  place.id = "probe";
  place.textContent = JSON.stringify(state);
  document.body.append(place);
});
</script></body>"""
FIRST = """<head><script>window.wrong = [];
addEventListener("error", e => wrong.push(String(e.message || e.target.tagName)), true);
console.error = console.warn = (...x) => wrong.push(x.join(" "));
</script>"""


def probed(browser: str, text: str, folder: Path, width: int) -> tuple[dict, str]:
    """What a browser that has no network says of a page, and what it writes to its console."""
    # A window is 500 pixels wide at least; a frame in it may be narrower.
    copy = folder / "copy.html"
    probe = PROBE.replace("document.body.append", "parent.document.body.append")
    copy.write_text(text.replace("<head>", FIRST, 1).replace("</body>", probe))
    frame = f'<iframe src="copy.html" style="border:0;width:{width}px;height:2000px"></iframe>'
    (folder / "frame.html").write_text(f"<!doctype html><body>{frame}</body>")
    done = subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--allow-file-access-from-files", "--enable-logging=stderr", "--dump-dom"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000"),
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={max(width, 500)},2000",
            (folder / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    return json.loads(found[1]), done.stderr


def test_a_browser_shows_all_of_it(text, browser, tmp_path):
    """All loads without a network, at a phone's width too."""
    for width in (400, 1280):
        folder = tmp_path / str(width)
        folder.mkdir()
        state, console = probed(browser, text, folder, width)
        assert state["videos"] == [128] * 12, state
        assert state["images"] and all(state["images"]), state
        assert state["curves"] and all(state["curves"]), state
        assert state["wide"] <= 0, f"{state['wide']} pixels too wide at {width}"
        assert set(state["fetched"]) <= {"data:"}, state
        assert not state["errors"] and "CONSOLE" not in console, console
        assert state["buttons"] == 3


def test_the_browser_test_sees_what_is_broken(text, browser, tmp_path):
    broken = re.sub(r"(data:video/mp4;base64,)[^\"]{200}", r"\1", text, count=1)
    broken = broken.replace('"use strict";', '"use strict"; nowhere();')
    state, _ = probed(browser, broken, tmp_path, 1280)
    assert not all(state["videos"]) and state["errors"] and not state["buttons"]
