"""Scores of video files by the command, and rewards by name."""

import csv
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equipment import configure, fresh_variables, run_command, save_lora

from kvpo_jax import backbone, evaluate, programs
from kvpo_jax import run as run_lib
from kvpo_jax import state as state_lib
from kvpo_jax.data import prompts as prompts_lib
from kvpo_jax.data import toy_world
from kvpo_jax.rewards import composite, motion, scorers, stream, toy, video_files
from kvpo_jax.runtime import checkpoint, video
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import workdir as workdir_lib


def brightness(pixels, prompts):
    return {"brightness": pixels.mean((1, 2, 3, 4))}


def run(*arguments):
    return run_command("-m", "kvpo_jax.evaluate", *arguments)


def test_rewards_by_name_are_those_functions():
    clips = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 5, 8, 8, 3)), jnp.float32)
    sentences = ["a red disk moves left", "a blue cross moves up"]
    ours = scorers.Scorers(f"toy, motion,{__name__}:brightness", {})(clips, sentences)
    theirs = {
        **toy.score(clips, sentences),
        **motion.score(clips, sentences),
        **brightness(clips, sentences),
    }
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    again = "kvpo_jax.rewards.motion:score"
    with pytest.raises(ValueError, match=f"have a component 'motion'; '{again}' is the second"):
        scorers.Scorers(f"motion,{again}", {})(clips, sentences)


def test_weights_are_loaded_once_and_again_after_release(monkeypatch):
    loads = []
    monkeypatch.setitem(
        scorers.SCORERS, "counted", lambda paths: loads.append(paths["counted"]) or brightness
    )
    clips = jnp.ones((1, 3, 2, 2, 3))
    rewards = scorers.Scorers("counted", {"counted": "file"})
    assert not loads
    for expected in (1, 1):
        assert rewards(clips, ["a"]) == {"brightness": 1.0} and len(loads) == expected
    rewards.release()
    assert rewards(clips, ["a"]) == {"brightness": 1.0} and loads == ["file"] * 2
    assert scorers.Scorers("", {})(clips, ["a"]) == {}


@pytest.mark.parametrize("name", ["hpsv2", "nowhere:score", "kvpo_jax.rewards.motion:nothing"])
def test_an_unknown_reward_is_named(name):
    with pytest.raises(ValueError, match=f"there is no reward '{name}'"):
        scorers.Scorers(name, {}).check()


def write_toy_video(path, prompt, seed):
    """A clean clip of 18 frames of the toy world, 16 times enlarged; its pixels as the file should
    have them.
    """
    frames = np.arange(18)
    colour, shape, direction = toy_world.parse(prompt)
    velocity = np.array(list(toy_world.DIRECTIONS.values()))[direction]
    centre = (np.array([2.0, 3.0]) + frames[:, None] * velocity) % toy_world.SIZE
    images = video.enlarge(np.asarray(toy_world.render(jnp.asarray(centre), colour, shape)))
    with video.writing(path, *images.shape[1:3], 8) as write:
        for image in images:
            write(image)
    return images


def test_command_scores_files_as_training_does(tmp_path):
    prompts = ["a red disk moves left", "a blue cross moves up"]
    videos = [write_toy_video(tmp_path / f"{i}.mp4", prompt, i) for i, prompt in enumerate(prompts)]
    (tmp_path / "p.txt").write_text(f"1,[{prompts[0]}]\n2,[{prompts[1]}],[{prompts[1]}]\n")
    done = run(
        f"--videos={tmp_path}",
        f"--prompts={tmp_path / 'p.txt'}",
        "--rewards=motion,stream",
        "--clip_frames=8",
        "--block_pixels=3,6",
    )
    assert (done.returncode, done.stderr) == (0, "")
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["video"] for row in rows] == ["0.mp4", "1.mp4"]

    def score(clip):
        return motion.score(jnp.asarray(clip[None], jnp.float32) / 255, [""])

    # One clip in the middle of the whole; two, in the middle of each half.
    expected = [
        float(score(videos[0][5:13])["motion"][0]),
        float(np.mean([score(videos[1][start : start + 8])["motion"][0] for start in (0, 9)])),
    ]
    np.testing.assert_allclose(
        [float(row["motion"]) for row in rows], expected, rtol=0.05
    )  # h264 is not exact
    assert "mean" in done.stdout and "smoothness" in done.stdout
    whole = stream.score(jnp.asarray(np.stack(videos)), _every_frame(18, (3, 9, 15)))
    for name in ("temporal_flickering", "exposure_kept", "continuity"):
        np.testing.assert_allclose([float(row[name]) for row in rows], whole[name], atol=0.05)


def test_a_server_scores_files(tmp_path, served, monkeypatch):
    url, token = served
    pixels = write_toy_video(tmp_path / "0.mp4", "a red disk moves left", 0)
    (tmp_path / "p.jsonl").write_text('{"prompts": ["a", "b"], "durations": [6, 12]}\n')
    asked = f"--videos={tmp_path}", f"--prompts={tmp_path / 'p.jsonl'}", f"--rewards=stream,{url}"
    monkeypatch.delenv("KVPO_REWARD_TOKEN", raising=False)
    done = run(*asked)
    assert done.returncode == 1 and not done.stdout
    assert "HTTP 401" in done.stderr and done.stderr.count("\n") == 1
    monkeypatch.setenv("KVPO_REWARD_TOKEN", Path(token).read_text().strip())
    done = run(*asked, "--clip_frames=0")
    assert (done.returncode, done.stderr) == (0, "")
    with (tmp_path / "scores_segments.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["prompt"], row["before"], row["clips"]) for row in rows] == [
        ("a", "0.0", "1.0"),
        ("b", "1.0", "1.0"),
    ]
    light = [float(row["light"]) for row in rows]
    expected = [np.mean(part) / 255 for part in (pixels[:6], pixels[6:])]
    np.testing.assert_allclose(light, expected, atol=0.01)  # h264 is not exact
    assert "temporal_flickering" not in rows[0]  # of the whole video
    assert "temporal_flickering" in (tmp_path / "scores.csv").read_text()


def _every_frame(count, starts):
    return composite.footage_of(((0, count),), [composite.Clip(0, 0, count)], starts)


def test_videos_are_scored_in_the_order_of_their_numbers_and_an_error_keeps_what_was_scored(
    tmp_path,
):
    sentences = ["two", "nine", "of ten", "last"]
    for number, name in enumerate(("2", "9", "10", "100")):
        write_toy_video(tmp_path / f"{name}.mp4", "a red disk moves left", number)
    sequences = [
        prompts_lib.PromptSequence((sentence,), line)
        for line, sentence in enumerate(sentences, start=1)
    ]

    def score(pixels, prompts):
        if prompts == ["last"]:
            raise ValueError("too dark")
        return {"length": jnp.array([len(prompts[0])])}

    output, part = tmp_path / "new" / "scores.csv", tmp_path / "new" / "scores.csv.part"
    with pytest.raises(ValueError, match="too dark") as raised:
        video_files.score(score, tmp_path, sequences, (0, 0), output)
    assert raised.value.__notes__ == [str(tmp_path / "100.mp4")]
    rows = ["video,prompt,length", "2.mp4,two,3.0", "9.mp4,nine,4.0", "10.mp4,of ten,6.0"]
    assert part.read_text().splitlines() == rows and not output.exists()

    def lengths(pixels, prompts):
        return {"length": jnp.array([len(prompts[0])])}

    video_files.score(lengths, tmp_path, sequences, (0, 0), output)
    assert output.read_text().splitlines() == [*rows, "100.mp4,last,4.0"]
    assert [path.name for path in output.parent.iterdir()] == ["scores.csv"]


def sequences_of(*first):
    return [prompts_lib.PromptSequence((sentence, "b"), i) for i, sentence in enumerate(first, 1)]


@pytest.mark.parametrize(
    "names, sentences, lines",
    [
        # In the order of the names where no name is a prompt.
        (["0", "1"], ["a cat", "a dog"], [1, 2]),
        # As benchmarks name them, several of a prompt and in another order than the file.
        (["a cat-0", "a cat-1", "zebra-0"], ["zebra", "a cat"], [2, 2, 1]),
        # As kvpo-generate names them, also after their order has changed.
        (["000_a_cat", "001_ein_café"], ["Ein Café!", "A cat."], [2, 1]),
        (["000_a", "001_a"], ["a", "a"], [1, 2]),
        # Names that are cut off.
        (["001_" + 6 * "word_" + "a" * 18], [" ".join(6 * ["word"]) + " " + "a" * 40], [1]),
    ],
)
def test_videos_are_paired_with_prompts_by_their_names(names, sentences, lines):
    files = [Path(f"{name}.mp4") for name in names]
    assert [s.line for s in video_files.pair(files, sequences_of(*sentences))] == lines


@pytest.mark.parametrize(
    "names, sentences, message",
    [
        (["0", "1"], ["a cat"], "has 2 videos, but there are 1 prompt sequences"),
        (["a cat", "a cow"], ["a cat", "a dog"], "'a cow.mp4' is named by none of the 2 prompt"),
        (["a cat"], ["a cat", *"defg"], "has no video of 'd', 'e', 'f' and 1 more"),
        (["0_a", "1_a", "2_a"], ["a", "a"], "fits the prompts of the lines '1', '2'; there are"),
    ],
)
def test_videos_that_belong_to_no_prompts_are_an_error(names, sentences, message):
    files = [Path(f"{name}.mp4") for name in names]
    with pytest.raises(ValueError, match=message):
        video_files.pair(files, sequences_of(*sentences))


def test_prompts_switch_where_their_durations_say():
    timed = prompts_lib.PromptSequence(("a", "b", "c"), 1, (6, 3, 6))
    # 15 latent frames of the Wan VAE are 57 frames: its first is one frame, the others are four.
    assert video_files.switch_pixels(timed, 57) == [21, 33]
    assert video_files.switch_pixels(timed, 15) == [6, 9]  # of the toy, frame by frame
    assert video_files.switch_pixels(timed, 30) == [12, 18]
    assert video_files.switch_pixels(sequences_of("a")[0], 57) == [28]


def test_an_enlarged_video_is_reduced_to_what_it_was():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), np.uint8)
    np.testing.assert_array_equal(video.reduced(video.enlarge(pixels), 8, 12), pixels)
    assert video.reduced(pixels, 8, 12) is pixels
    with pytest.raises(ValueError, match="pictures have 12x8 pixels, expected 8x8, or these enlar"):
        video.reduced(pixels, 8, 8)


def test_the_clips_of_a_video_are_those_of_its_durations(tmp_path, capsys):
    write_toy_video(tmp_path / "a.mp4", "a red disk moves left", 0)
    count = len(video.read(tmp_path / "a.mp4"))
    timed = prompts_lib.PromptSequence(("a", "one frame", "b"), 1, (3, 1, count - 4))

    def length(pixels, prompts):
        return {"length": jnp.full(len(prompts), pixels.shape[1] * (prompts[0] == "a"))}

    rows = video_files.score(length, tmp_path, [timed], (0, 0), tmp_path / "scores.csv")
    assert rows["a.mp4"] == {"length": 3 / 2}  # on average of the segments
    with (tmp_path / "scores_segments.csv").open() as file:
        segments = [tuple(row.values()) for row in csv.DictReader(file)]
    assert segments == [
        ("a.mp4", "0", "a", "3.0"),
        ("a.mp4", "1", "one frame", ""),
        ("a.mp4", "2", "b", "0.0"),
    ]
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["by", "segment", "0", "1", "2"] in table and ["length", "3.0000", "0.0000"] in table


def test_a_file_that_is_no_whole_video_is_named_and_others_are_passed_over(tmp_path):
    write_toy_video(tmp_path / "a.mp4", "a red disk moves left", 0)
    whole = (tmp_path / "a.mp4").read_bytes()
    for other in ("._a.mp4", ".DS_Store", "notes.txt"):
        (tmp_path / other).write_text("of a system")
    (tmp_path / "folder.mp4").mkdir()
    sequences = sequences_of("a red disk moves left")

    def length(pixels, prompts):
        return {"length": jnp.full(len(prompts), pixels.shape[1])}

    rows = video_files.score(length, tmp_path, sequences, (0, 0), tmp_path / "scores.csv")
    assert list(rows) == ["a.mp4", "mean"]
    for content, message in (
        (b"", r"a.mp4 is not a video but an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer .* `git lfs pull`"),
        (whole[: len(whole) * 2 // 3], r"a.mp4 is not a whole video: .*; make or copy it again$"),
    ):
        (tmp_path / "a.mp4").write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            video_files.score(length, tmp_path, sequences, (0, 0), tmp_path / "scores.csv")
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_run_is_evaluated_on_another_machine(tmp_path, capsys):
    fields = {
        "video.blocks": 2,
        "video.switch_frames": (),
        "eval.prompts": 2,
        "eval.batch": 2,
        "eval.scorer": "",
    }
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    config = config_lib.override(config_lib.load("configs/tiny.py"), arguments)
    lora = fresh_variables(config)["lora"]
    reference = state_lib.init_state(config, run_lib.make_mesh(config), lora)
    lora = jax.tree.map(lambda x: x + 0.02, lora)
    state = reference.replace(lora=lora)
    state = state.replace(iteration=jnp.asarray(3, jnp.int32))
    with checkpoint.manager(tmp_path / "checkpoints", 1) as checkpoints:
        checkpoint.save(checkpoints, 3, state, {"config": config.to_dict()})
    saved = config.copy_and_resolve_references()
    saved.mesh.update(data=4, branch=8)  # 32 devices
    saved.paths.lora = "/elsewhere/lora.safetensors"
    saved.model.num_layers = 4  # edited by hand: not what was trained
    workdir_lib.start_run(saved, tmp_path)
    here = ["--config.mesh.data=1", "--config.mesh.branch=1", "--config.paths.lora="]
    file = save_lora(tmp_path / "lora.safetensors", lora, config)
    evaluate.evaluate_run(tmp_path, "newest", here, f"{file}:0.25,{file}:0.75")
    out = capsys.readouterr().out
    rows = {words[0]: words[1:] for words in map(str.split, out.splitlines()) if len(words) > 1}
    assert rows["lora"] == rows["online"] and rows["online"][0] != rows["reference"][0]
    assert f"iteration 3 of {tmp_path}" in out
    assert "config.json was changed, model.num_layers=4 is not 3; the configuration of" in out
    with pytest.raises(
        ValueError, match="paths.lora=/elsewhere/lora.safetensors: there is no such file"
    ):
        evaluate.evaluate_run(tmp_path, 3, here[:2])
    with pytest.raises(ValueError, match="--iteration=2: .*checkpoints has the iterations 3; none"):
        evaluate.evaluate_run(tmp_path, 2, here)


def test_the_reward_of_a_block_is_that_of_its_frames_with_its_own_sentence():
    fields = {"eval.prompts": 4, "eval.batch": 2, "mesh.data": 1, "mesh.branch": 1}
    run = run_lib.load(configure("configs/tiny.py", fields))
    lora = run.initial_lora()
    made = evaluate.evaluate(run, lora)
    assert made.blocks.shape == (4, 12) and made.pixels.size == 0
    assert made.components.keys() >= set(scorers.COMPONENTS["stream"])
    batch = backbone.prompt_batch(run.backbone, run.mesh, "heldout", 0, np.arange(2))
    windows = backbone.windows_read(run.config, run.backbone.to_pixel)
    latents = evaluate._latents(run, lora, batch)
    pixels = run.decoder.videos(latents, windows)
    videos = np.asarray(pixels.videos[:, 0])
    lag = np.asarray(latents[:2, 0]).reshape(2, 36, -1)
    cosines = np.sum(lag[:, 0] * lag[:, 35], -1) / np.prod(
        np.linalg.norm(lag[:, (0, 35)], axis=-1), axis=-1
    )
    np.testing.assert_allclose(made.similarity[:2, -1], cosines, rtol=1e-5)
    change = np.abs(np.diff(videos[:, :36].astype(np.float64), axis=1)).mean((2, 3, 4))
    at = np.arange(1, 36) % 3 == 0  # blocks of three frames meet
    seams = np.minimum(change[:, ~at].mean(1) / change[:, at].mean(1), 1)
    np.testing.assert_allclose(made.components["continuity"][:2], seams, rtol=1e-4)
    for prompt, sentences in enumerate(batch.sentences):
        for block, segment in ((0, 0), (3, 0), (4, 1), (11, 2)):
            here = composite.frames_of(pixels.windows, 3 * block, 3 * block + 3)
            clip = videos[prompt, here][None]
            scores = toy.score(jnp.asarray(clip), [sentences[segment]])
            expected = sum(float(scores[name][0]) for name in ("VQ", "MQ", "TA")) / 3
            assert made.blocks[prompt, block] == pytest.approx(expected, rel=1e-5)
    own = {"reward.scorer": f"{__name__}:brightness", "reward.weights.brightness": 1}
    for silent in ({"eval.by_block": False}, own):
        config = configure("configs/tiny.py", {**fields, **silent})
        other = dataclasses.replace(run, config=config, backbone=backbone.load(config))
        assert evaluate.evaluate(other, lora).blocks.shape == (4, 0)


def test_gains_before_and_from_the_first_pivot_by_hand():
    def heldout(blocks):
        return evaluate.Heldout(np.zeros(0), np.zeros(2), {}, np.array(blocks))

    before, after = heldout([[0.0, 1, 2], [0, 1, 4]]), heldout([[1.0, 1, 4], [0, 2, 8]])
    assert evaluate.gains_by_block(before, after, 1) == {
        "heldout_gain_before_pivots": 0.5,
        "heldout_gain_from_pivots": 1.75,
    }
    nothing = heldout(np.zeros((2, 0)))
    assert evaluate.gains_by_block(nothing, nothing, 1) == {}


def test_the_evaluation_of_the_reference_is_kept_with_what_it_is_made_of(tmp_path):
    """Bit for bit, and made again if anything that it depends on is another."""
    file = tmp_path / "vae"  # one that the toy does not read
    file.write_text("a")
    rng, made = np.random.default_rng(0), []

    def make():
        pixels = rng.normal(size=(2, 36, 8, 8, 3)).astype(np.float32)
        components = {"VQ": rng.normal(size=4).astype(np.float32), "a/b": rng.normal(size=4)}
        looks = {name: rng.normal(size=4) for name in programs.APPEARANCE}
        rewards, blocks = rng.normal(size=4), rng.normal(size=(4, 2))
        made.append(evaluate.Heldout(pixels, rewards, components, blocks, looks))
        return made[-1]

    def kept(**fields):
        named = {name.replace("__", "."): value for name, value in fields.items()}
        run = run_lib.load(configure("configs/tiny.py", {"paths.vae": file, **named}))
        return evaluate.kept_reference(run, tmp_path / "run", make)

    (tmp_path / "run").mkdir()
    first = kept()
    again = kept(train__iterations=99, train__keep=1)
    assert len(made) == 1
    assert again.reward.tobytes() == first.reward.tobytes()
    assert again.blocks.tobytes() == first.blocks.tobytes()
    assert again.similarity.tobytes() == first.similarity.tobytes()
    assert again.components.keys() == first.components.keys()
    for name, value in first.components.items():
        assert again.components[name].tobytes() == value.tobytes()
    for name, value in first.appearance.items():
        assert again.appearance[name].tobytes() == value.tobytes()
    assert again.pixels.shape == first.pixels.shape
    assert again.pixels.tobytes() == first.pixels.tobytes()

    content = bytearray((tmp_path / "run" / "reference.npz").read_bytes())
    content[len(content) // 2] ^= 1  # inside the pixels
    for number, change in enumerate(
        (
            lambda: kept(seed=1),
            lambda: kept(eval__prompts=16),
            lambda: kept(mesh__data=1),
            lambda: (tmp_path / "run" / "reference.npz").write_bytes(content) and kept(),
            lambda: file.write_text("b") and kept(),
        ),
        start=2,
    ):
        change()
        assert len(made) == number


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--videos={dir}"], "--videos needs --prompts"),
        ([], "give one of --workdir, --suite, --videos, --export and --import"),
        (["--videos={dir}", "--import={dir}"], "give one of --workdir, --suite, --videos"),
        (["--workdir={dir}", "--samples=3"], "--samples is for --suite or --export"),
        (["--export=vbench", "--output={dir}/x"], "--export needs --prompts"),
        (
            ["--export=vbench", "--prompts={dir}/p.txt", "--output={dir}/p.txt"],
            "p.txt is a file; name a folder",
        ),
        (["--import={dir}/none"], "none is no folder"),
        (["--videos={dir}", "--prompts={dir}/p.txt"], "has no videos"),
        (
            ["--videos={dir}", "--prompts={dir}/p.txt", "--rewards=hpsv3"],
            "--rewards=hpsv3 needs --hpsv3=FILE, made by",
        ),
        (
            ["--videos={dir}", "--prompts={dir}/p.txt", "--rewards=beauty"],
            "there is no reward 'beauty'",
        ),
        (
            ["--videos={dir}", "--prompts={dir}/p.txt", "--rewards=toy"],
            "--rewards=toy scores its own world's 8x8 pixels",
        ),
        (["--workdir={dir}", "--rewards=motion"], "--rewards is for --videos"),
        (["--workdir={dir}", "--block_pixels=9"], "--block_pixels is for --videos"),
        (
            ["--videos={dir}", "--prompts={dir}/p.txt", "--block_pixels=9,x"],
            "--block_pixels=9,x: expected the pixel frames of the first block and of the others",
        ),
        (["--workdir={dir}", "--clip_frames=36"], "--clip_frames is for --videos"),
        (["--videos={dir}", "--iteration=2"], "--iteration names a checkpoint of --workdir"),
        (["--workdir={dir}", "--config=configs/tiny.py"], "the configuration is the run's own"),
        (["--workdir={dir}/none"], "none is not the directory of a run"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, message):
    (tmp_path / "p.txt").write_text("1,[a]\n")
    workdir_lib.start_run(config_lib.load("configs/tiny.py"), tmp_path)
    done = run(*(argument.format(dir=tmp_path) for argument in arguments))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and message in done.stderr
