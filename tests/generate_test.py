"""Streaming generation: the same video as the rollout's prefix, files that play, prompts that are
typed, and branches of a fork.
"""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from equipment import (
    SMALL,
    SMALLEST,
    bare_run,
    batch_of,
    configure,
    fresh_variables,
    random_variables,
    random_weights,
    run_command,
    save_lora,
)

from kvpo_jax import adapters, diversity, generate, rollout
from kvpo_jax import run as run_lib
from kvpo_jax import state as state_lib
from kvpo_jax.algorithm import keys
from kvpo_jax.data import prompts, toy_world
from kvpo_jax.data.prompts import PromptSequence
from kvpo_jax.errors import UsageError
from kvpo_jax.run import Run
from kvpo_jax.runtime import atomic, checkpoint, sharding, workdir
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.video import enlarge
from kvpo_jax.types import PyTree

BLOCKS = 7
PIVOT = 5  # of branches
SENTENCES = ("a red disk moves left", "a blue cross moves up")


@pytest.fixture(scope="module")
def world() -> tuple[Run, PyTree]:
    """A run with the shipped generator, and the variables of a fresh adapter."""
    fields = {"video.blocks": BLOCKS, "video.switch_frames": (12,)}
    config = configure("configs/tiny.py", {**fields, "eval.prompts": 2, "eval.batch": 1})
    run = run_lib.load(config, sharding.make_mesh(1, 1, 1, 1))
    lora = fresh_variables(config)["lora"]
    return run, run.variables(lora)


def video(world, sentences, switch_frames, blocks, noise) -> list[jax.Array]:
    """The blocks of one video, as the command streams them."""
    run, variables = world
    sentence_at = generate.sentence_schedule(sentences, switch_frames)
    speaker = generate.Speaker(run, variables, sentence_at)
    return [x for x, _ in rollout.stream(run, variables, speaker, noise, blocks)]


def test_streams_what_the_rollout_generates(world):
    run, variables = world
    noise = keys.NoiseKey(jax.random.key(5), jnp.arange(1))
    embeddings = jnp.asarray(run.backbone.embed(SENTENCES))[None]
    batch = batch_of(embeddings, np.ones((1, 2), bool))
    theirs = rollout.generate(run, variables, batch, noise, run.config.video.blocks)
    ours = video(world, SENTENCES, (12,), BLOCKS, noise)
    np.testing.assert_array_equal(jnp.concatenate(ours), jnp.concatenate(theirs))
    # A sentence that is repeated is no switch.
    plain = video(world, SENTENCES[:1], (), BLOCKS, noise)
    repeated = video(world, SENTENCES[:1] * 2, (12,), BLOCKS, noise)
    np.testing.assert_array_equal(jnp.concatenate(plain), jnp.concatenate(repeated))
    assert not np.array_equal(plain[-1], ours[-1])


def test_prompts_may_switch_before_a_window_of_frames_is_there(world):
    noise = keys.NoiseKey(jax.random.key(5), jnp.arange(1))
    ours = video(world, SENTENCES, (3,), 3, noise)
    assert all(np.isfinite(x).all() for x in ours)
    assert not np.array_equal(ours[1], video(world, SENTENCES[:1], (), 3, noise)[1])


def test_typed_lines_take_over_at_the_next_block(capsys):
    begun, heard = threading.Event(), threading.Event()

    def lines():
        yield "a pink disk moves left\n"  # which is no prompt of the toy
        yield f" {SENTENCES[0]} \n"
        begun.wait()
        yield "\n"
        yield f"{SENTENCES[1]}\n"
        yield "again\n"
        yield f"{SENTENCES[0]}\n"
        heard.set()

    sentence_at = generate.typed(lines(), toy_world.check, 0.0)
    assert [sentence_at(0), sentence_at(3)] == [SENTENCES[0]] * 2
    assert "'pink' is not one of red, green, blue, yellow; type another" in capsys.readouterr().err
    begun.set()
    heard.wait()
    # Every prompt has a block, and the last one stays when the lines have ended.
    assert [sentence_at(6), sentence_at(9), sentence_at(12)] == [SENTENCES[1], *[SENTENCES[0]] * 2]
    assert "expected 5 words" in capsys.readouterr().err


def test_typed_lines_are_asked_for_no_faster_than_a_block_plays():
    sentence_at, begin = generate.typed(iter(SENTENCES), toy_world.check, 0.2), time.monotonic()
    assert [sentence_at(0), sentence_at(3), sentence_at(6)] == [*SENTENCES, SENTENCES[1]]
    assert time.monotonic() - begin >= 0.4


def test_segments_are_spread_evenly_over_the_blocks():
    assert generate.switches(3, 12, 3) == (12, 24)
    assert generate.switches(4, 49, 3) == (36, 72, 111)
    assert generate.switches(1, 5, 3) == ()
    with pytest.raises(ValueError, match="3 prompts do not fit into 2 blocks"):
        generate.switches(3, 2, 3)


def test_switch_frames_are_those_of_blocks():
    assert generate.given_switches([], 3, 12) == ()
    assert generate.given_switches(["3", "9"], 3, 12) == (3, 9)
    for given in ("9,3", "3,3", "0", "4", "12", "-3"):
        with pytest.raises(
            ValueError, match=f"--switch_frames={given}: expected ascending multiples of config"
        ):
            generate.given_switches(given.split(","), 3, 12)
    with pytest.raises(ValueError, match="--switch_frames=3,a: expected latent frames"):
        generate.given_switches(["3", "a"], 3, 12)


def test_a_sum_of_adapters_generates_as_its_parts_do(tmp_path, world):
    run, _ = world
    fields = {"video.blocks": BLOCKS, "video.switch_frames": (12,)}
    config = configure("configs/tiny.py", {**fields, "lora.alpha": 4.0})
    lora = fresh_variables(config)["lora"]
    lora = jax.tree.map(lambda x: x + 0.05, lora)
    file = save_lora(tmp_path / "lora.safetensors", lora, config)
    noise, made = keys.NoiseKey(jax.random.key(5), jnp.arange(1)), []
    for text in (f"{file}", f"{file}:0.25,{file}:0.75", f"{file}:0.25"):
        found = adapters.parse(text)
        sized = adapters.configured(run.config, found)
        loaded = generate.load_run(sized, None, found, "online", SENTENCES)
        made.append(jnp.concatenate(video(loaded, SENTENCES[:1], (), 2, noise)))
    np.testing.assert_allclose(made[1], made[0], atol=1e-5)
    assert np.abs(made[2] - made[0]).max() > 1e-2


def test_a_video_of_several_devices_is_that_of_one(world):
    """Two share the tokens of its blocks, and its rows in the decoder; a third is left alone."""
    run, _ = world
    config = run.config.copy_and_resolve_references()
    config.mesh.update(context=2, fsdp=2)
    noise = keys.NoiseKey(jax.random.key(5), jnp.arange(1))
    shared = generate.load_run(config, None, [], "online", SENTENCES)
    assert dict(shared[0].mesh.shape) == {"data": 1, "fsdp": 1, "branch": 1, "context": 2}
    ours, alone = (video(x, SENTENCES, (12,), BLOCKS, noise) for x in (shared, world))
    np.testing.assert_allclose(jnp.stack(ours), jnp.stack(alone), atol=1e-5, rtol=0)
    pixels = (
        np.concatenate(list(generate.decoded(x[0], made)), 1)
        for x, made in ((shared, ours), (world, alone))
    )
    np.testing.assert_allclose(*pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("at_once", "fsdp", "context", "shape"),
    [
        (1, 1, 4, (1, 1, 1, 4)),
        (1, 2, 3, (1, 1, 1, 1)),  # 3 divides no 8 devices
        (2, 2, 4, (1, 2, 1, 4)),
        (3, 2, 4, (3, 1, 1, 2)),  # each of three videos has two of eight
        (8, 4, 2, (2, 4, 1, 1)),
    ],
)
def test_the_devices_of_videos(at_once, fsdp, context, shape):
    config = config_lib.load("configs/tiny.py").copy_and_resolve_references()
    config.mesh.update(fsdp=fsdp, context=context)
    assert generate.mesh_of_videos(config, at_once).devices.shape == shape


def test_relative_positions_have_no_end():
    """1035 frames, with a bank and two prompt switches, from a history of six. Until the window of
    nine frames leaves one out, they are those of absolute positions.
    """
    switch_frames = (6, 1026)
    window = {"past": 3, "near": 1, "recache_frames": 3, "bank": 2, "bank_interval": 3}
    fields = {
        **SMALLEST,
        **{f"window.{name}": value for name, value in window.items()},
        **{"model.num_layers": 1, "model.sparse_memory": 1, "sampler.steps": (1.0,)},
        **{"rollout.perturbed_steps": 1, "replay.grad_steps": 1},
    }

    def frames(positions, blocks):
        """The first blocks, float[blocks, F, Y, X, C], and the history behind them."""
        config = configure("configs/tiny.py", fields | {"window.positions": positions})
        config = diversity.switching(config_lib.generating(config), switch_frames)
        run = bare_run(config, sharding.make_mesh(1, 1, 1, 1))
        variables = random_variables(config, 0.4)
        sentences = np.random.default_rng(0).normal(size=(1, 3, 3, 4)).astype(np.float32)
        text = run.programs.encode_text(variables, sentences)
        prompt_at = rollout.script(config, text, np.ones((1, 3), bool))
        noise = keys.NoiseKey(jax.random.key(5), jnp.arange(1))
        made = list(rollout.stream(run, variables, prompt_at, noise, blocks))
        return np.concatenate([x for x, _ in made]), made[-1][1]

    relative, history = frames("relative", 345)
    absolute, _ = frames("absolute", 4)
    np.testing.assert_allclose(relative[:3], absolute[:3], atol=1e-5, rtol=0)
    assert np.abs(relative[3] - absolute[3]).max() > 1e-3
    assert relative.shape[:2] == (345, 3) and np.isfinite(relative).all()
    np.testing.assert_array_equal(history.frame, [[0, 1, 2, 1032, 1033, 1034]])


def found_videos(path, **asked):
    """What the command makes of a prompt file and flags."""
    config = config_lib.load("configs/tiny.py")
    config.window.positions = asked.pop("positions", "absolute")
    unasked = {"prompt": [], "interactive": False, "branches": None}
    given = SimpleNamespace(
        **({"num_frames": 0, "switch_frames": []} | unasked | asked), prompts=str(path)
    )
    return [v[1:] for v in generate.find_videos(given, config)]


def test_a_video_is_as_long_as_its_prompts_say(tmp_path):
    path = tmp_path / "p.jsonl"
    sequences = [PromptSequence(("a", "b", "c"), 1, (15, 3, 9)), PromptSequence(("a", "b"), 2)]
    prompts.write(path, sequences)
    assert found_videos(path) == [((15, 18), 9), ((18,), 12)]  # the second as the config's
    assert found_videos(path, num_frames=60) == [((15, 18), 20), ((30,), 20)]
    prompts.write(path, sequences[:1])
    assert found_videos(path, switch_frames=["3", "12"]) == [((3, 12), 12)]  # flags come first
    for durations, asked, message in (
        ((15, 3, 9), {"num_frames": 18}, r"p\.jsonl:1: durations \[15, 3, 9\]: expected ascending"),
        (
            (14, 4, 9),
            {},
            r"p\.jsonl:1: durations \[14, 4, 9\]: expected ascending multiples of con",
        ),
        ((15, 3, 8), {}, "a prompt sequence of 26 frames is not a multiple of 3"),
        ((900, 900, 9), {}, "a prompt sequence of 1809 frames, but there are positions for 1024"),
    ):
        prompts.write(path, [PromptSequence(("a", "b", "c"), 1, durations)])
        with pytest.raises(UsageError, match=message):
            found_videos(path, **asked)
    assert found_videos(path, positions="relative") == [((900, 1800), 603)]
    prompts.write(path, sequences)
    with pytest.raises(UsageError, match="durations of their prompts differ; name it with --num_f"):
        found_videos(path, branches=2)


def test_names_are_in_the_order_of_the_prompts():
    names = [generate.name_of(index, 1001, "a b") for index in (0, 99, 100, 999, 1000)]
    assert generate.name_of(0, 1, "Ein Café, 東京!") == "000_ein_café_東京.mp4"
    assert names == sorted(names)
    assert generate.name_of(999, 1000, "A b!") == "999_a_b.mp4"


def run(*arguments):
    return run_command("-m", "kvpo_jax.generate", *arguments)


def start(*arguments, stdin="", **environment):
    """As `run`, by a Python of its own."""
    return subprocess.run(
        [sys.executable, "-m", "kvpo_jax.generate", *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        env=os.environ | environment,
        timeout=300,
    )


def test_command_writes_videos_that_play(tmp_path, world):
    sequences = [PromptSequence(SENTENCES, 1, (9, 6)), PromptSequence(SENTENCES[1:], 2, (6,))]
    prompts.write(tmp_path / "prompts.jsonl", sequences)
    done = run(f"--prompts={tmp_path / 'prompts.jsonl'}", f"--output={tmp_path}", "--seed=5")
    assert done.returncode == 0, done.stderr
    written = iio.imread(tmp_path / "000_a_red_disk_moves_left.mp4")
    assert written.shape == (15, 128, 128, 3)
    assert iio.imread(tmp_path / "001_a_blue_cross_moves_up.mp4").shape == (6, 128, 128, 3)
    noise = keys.NoiseKey(keys.draw_key(5, "heldout", 0), jnp.arange(1))
    latents = jnp.concatenate(video(world, SENTENCES, (9,), 5, noise), axis=1)
    pixels = enlarge(np.asarray(world[0].backbone.decode({}, latents, None, None)[0][0]))
    assert np.abs(written.astype(int) - pixels).mean() < 4  # of 255; h264 rounds
    assert "000_a_red_disk_moves_left.mp4: 15 frames, " in done.stdout
    assert done.stdout.count(" frames/s\n") == 2


def test_command_reads_prompts_from_the_terminal(tmp_path):
    arguments = ("--interactive", "--num_frames=6", f"--output={tmp_path}")
    (tmp_path / "000_interactive.mp4").write_text("an older one")
    done = start(*arguments, stdin="".join(f"{line}\n" for line in (*SENTENCES, "last")))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"to be replaced in {tmp_path}: '000_interactive.mp4'\n" in done.stdout
    assert "one per block" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if "block 2/2" in line)
    assert "'a blue cross" in line and len(line) < 80
    assert iio.imread(tmp_path / "000_interactive.mp4").shape[0] == 6


def test_a_video_that_cannot_be_written_whole_is_an_error_and_does_not_take_its_name(tmp_path):
    for body, message in (
        (None, "ffmpeg at /nowhere: No such file or directory; pip install imageio-ffmpeg brings"),
        ("cat > /dev/null; echo 'No room' >&2; exit 3", "left.mp4 cannot be written: No room"),
        ("exit 3", "left.mp4 cannot be written: ffmpeg ended with status 3"),
    ):
        program = Path("/nowhere")
        if body is not None:
            program = tmp_path / "ffmpeg"
            program.write_text(f'#!/bin/sh\n[ "$1" = -version ] && exit\n{body}\n')
            program.chmod(0o755)
        arguments = (f"--prompt={SENTENCES[0]}", "--num_frames=3", f"--output={tmp_path}")
        done = start(*arguments, IMAGEIO_FFMPEG_EXE=str(program))
        assert done.returncode == 1 and message in done.stderr and "wrote" not in done.stdout
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert not list(tmp_path.glob("*.mp4"))


# ---------------------------------------------------------------- branches


def branched(branches: int, explored: str | None = None) -> tuple[Run, PyTree]:
    """A run of `BLOCKS + 1` blocks that switches prompts in the middle of them."""
    frames = 3 * (BLOCKS + 1)
    config = diversity.config_of(config_lib.load("configs/tiny.py"), branches, frames, explored)
    run = run_lib.load(diversity.switching(config, (12,)), sharding.make_mesh(1, 1, 1, 1))
    return run, run.variables(fresh_variables(config)["lora"])


@pytest.fixture(scope="module")
def fork():
    """Three branches, and what came of them with the seed 5."""
    run, variables = branched(3)
    return run, variables, diversity.sample(run, variables, SENTENCES, 5, 0, PIVOT)


def test_branches_part_from_the_video_that_is_made_without_them(fork):
    run, variables, rolled = fork
    noise = keys.NoiseKey(keys.draw_key(5, "heldout", 0), jnp.arange(1))
    alone = jnp.concatenate(video((run, variables), SENTENCES, (12,), BLOCKS + 1, noise), axis=1)
    frame = 3 * PIVOT
    # Other batch sizes round otherwise, from the fork on.
    np.testing.assert_array_equal(rolled.anchor[:, :frame], alone[:, :frame])
    np.testing.assert_allclose(rolled.anchor, alone, atol=1e-4)
    made = [np.asarray(x[0]) for _, x in diversity.videos(rolled)]
    assert len(made) == 4
    for i, x in enumerate(made):
        np.testing.assert_array_equal(x[:frame], made[0][:frame])
        assert all(np.abs(x - y).max() > 1e-3 for y in made[:i])


def test_every_branch_remembers_other_frames_and_a_seed_says_which(fork):
    run, variables, rolled = fork
    routed = {tuple(map(int, row)) for row in rolled.routed_frames[0]}
    assert len(routed) == 3
    assert all(3 <= frame < 12 for row in routed for frame in row)  # neither sink nor near
    again = diversity.sample(run, variables, SENTENCES, 5, 0, PIVOT)
    for a, b in zip(jax.tree.leaves(rolled), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    others = [diversity.sample(run, variables, SENTENCES, *x, PIVOT) for x in ((6, 0), (5, 1))]
    for other in others:
        assert not np.array_equal(other.routed_frames, rolled.routed_frames)
        assert not np.array_equal(other.anchor, rolled.anchor)


def test_branches_with_noise_of_their_own_part_from_the_same_anchor(fork):
    run, variables = branched(3, "noise")
    rolled = diversity.sample(run, variables, SENTENCES, 5, 0, PIVOT)
    frame, anchor = 3 * PIVOT, fork[2].anchor
    np.testing.assert_array_equal(rolled.anchor[:, :frame], anchor[:, :frame])
    np.testing.assert_allclose(rolled.anchor, anchor, atol=1e-4)
    # Where the solver begins: independent of one another and of the anchor, of variance 1.
    begun = np.asarray(rolled.replay.z[0, :, :, 0]).reshape(3, -1)
    shared = np.asarray(fork[2].replay.z[0, :1, :, 0]).reshape(1, -1)
    correlation = np.corrcoef(np.concatenate([shared, begun]))
    assert np.abs(correlation - np.eye(4)).max() < 0.1
    np.testing.assert_allclose(begun.std(axis=1), 1, atol=0.05)
    for branch in rolled.branches[0]:
        np.testing.assert_array_equal(branch[:frame], anchor[0, :frame])
        assert np.abs(branch - anchor[0]).max() > 0.01
    # No past is needed, and a prompt may switch where they differ.
    config = diversity.switching(run.config, (6,))
    assert [diversity.check_pivot(config, pivot) for pivot in (None, 0, 1, 5)] == [0, 0, 1, 5]
    with pytest.raises(UsageError, match="--pivot=6: the 3 perturbed blocks must lie in blocks 0"):
        diversity.check_pivot(config, 6)
    rolled = diversity.sample(run, variables, SENTENCES, 5, 0, 0)
    assert np.isfinite(rolled.branches).all()


def test_command_writes_branches_and_how_far_apart_they_are(tmp_path, fork):
    _, _, rolled = fork
    arguments = [f"--prompt={sentence}" for sentence in SENTENCES]
    done = run(*arguments, "--branches=3", "--num_frames=24", "--seed=5", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, (tmp_path / "branches.jsonl").read_text().splitlines())
    assert (row["prompt"], row["pivot"]) == (list(SENTENCES), PIVOT)  # the first that can be it
    assert (row["fork_frame"], row["window"], row["explore"]) == (15, [5, 7], "routing")
    assert row["routed"] == rolled.routed_frames[0].tolist()
    assert len(row["reward"]) == 3 and row["components"]["MQ"].keys() == {"branches", "anchor"}
    for name in ("anchor", "branch_0", "branch_1", "branch_2"):
        assert row["videos"][name] == f"000_a_red_disk_moves_left_{name}.mp4"
        assert iio.imread(tmp_path / row["videos"][name]).shape == (24, 128, 128, 3)
    latents = np.concatenate([rolled.anchor[0][None], rolled.branches[0]])[:, 15:]
    by_hand = np.sqrt(((latents[:, None] - latents[None]) ** 2).mean((2, 3, 4, 5)))
    found = row["distance"]
    np.testing.assert_allclose(found["latents"]["matrix"], by_hand, atol=1e-5)
    np.testing.assert_allclose(found["latents"]["to_anchor"], by_hand[0, 1:].mean(), atol=1e-5)
    pairs = [by_hand[1, 2], by_hand[1, 3], by_hand[2, 3]]
    np.testing.assert_allclose(found["latents"]["mean"], np.mean(pairs), atol=1e-5)
    assert f"{found['pixels']['matrix'][0][1]:.4f}" in done.stdout
    assert 0 < found["pixels"]["mean"] < 0.1
    page = (tmp_path / "branches.html").read_text()
    assert page.count("data:video/mp4") == 4 and SENTENCES[1] in page
    assert page.count('<rect class="routed"') == 18  # frames of the map, six a branch


def test_one_branch_has_no_pairs(capsys):
    run, variables = branched(1)
    rolled = diversity.sample(run, variables, SENTENCES, 0, 0, PIVOT)
    pixels = [np.zeros((3, 2, 2, 3)), np.full((3, 2, 2, 3), 0.5)]
    sampled = diversity.Sampled(SENTENCES, rolled, pixels, None)
    row = diversity.record(run.config, sampled, PIVOT, {}, 0)
    assert row["distance"]["pixels"] == {
        "matrix": [[0.0, 0.5], [0.5, 0.0]],
        "mean": None,
        "to_anchor": 0.5,
    }
    assert "reward" not in row
    diversity.print_tables(row)
    assert "\nto the anchor 0.5000\n" in capsys.readouterr().out


def test_a_module_of_ones_own_is_not_imported_to_generate():
    run, _ = branched(1)
    config = run.config.copy_and_resolve_references().unlock()
    for names in ("motion,my_module:score", "hpsv3", ""):
        config.reward.scorer = names
        assert diversity.scored(dataclasses.replace(run, config=config), (), None, PIVOT) is None


def test_chunks_of_branches_divide_them():
    config = configure("configs/tiny.py", {"rollout.branch_chunk": 4})
    chunks = [diversity.config_of(config, n, 36).rollout.branch_chunk for n in (8, 6, 3, 1)]
    assert chunks == [4, 2, 1, 1]
    assert diversity.config_of(config_lib.load("configs/tiny.py"), 5, 36).rollout.branch_chunk == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"pivot": 4}, "--pivot=4: 6 of 6 past frames can be drawn in too few ways; possible are"),
        ({"pivot": 3}, "--pivot=3: it has 9 past frames, and a context holds 12; possible are 5, "),
        ({"pivot": 7}, "=7: a prompt switches inside the perturbed blocks; possible are 5, 8 to 9"),
        ({"pivot": 10}, "--pivot=10: the 3 perturbed blocks must lie in blocks 0 to 11; possible"),
        ({"pivot": -1}, "--pivot=-1: the 3 perturbed blocks must lie in blocks 0 to 11; possible"),
        ({"pivot": 5, "branches": 84}, "=5: 6 of 9 past frames can be drawn in too few ways; poss"),
        ({"frames": 21}, "--branches=3: no block of 7 can be the pivot, with config.rollout"),
    ],
)
def test_blocks_that_cannot_be_the_pivot_are_told_why(arguments, message):
    asked = {"pivot": None, "branches": 3, "frames": 36} | arguments
    config = diversity.config_of(
        config_lib.load("configs/tiny.py"), asked["branches"], asked["frames"]
    )
    config = diversity.switching(config, (24,) if asked["frames"] == 36 else ())
    with pytest.raises(UsageError) as error:
        diversity.check_pivot(config, asked["pivot"])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt=a red disk moves left", "--branches=0"], "flag --branches=0: "),
        (["--prompt=a red disk moves left", "--pivot=5"], "--pivot is of --branches; give"),
        (["--prompt=a red disk moves left", "--explore=noise"], "--explore is of --branches; give"),
        (
            ["--prompt=a red disk moves left", "--branches=2", "--explore=chance"],
            "flag --explore=chance: value should be one of <routing|noise>",
        ),
        (["--interactive", "--branches=2"], "--branches: they share their prompts, so --interac"),
        (["--prompt=a red disk moves left", "--branches=2", "--pivot=99"], "--pivot=99: the 3 "),
        (
            ["--prompt=a red disk moves left", "--num_frames=7"],
            "--num_frames=7 is not a multiple of 3",
        ),
        (
            ["--prompt=a red disk moves left", "--num_frames=1026"],
            "there are positions for 1024 frames",
        ),
        (
            [
                "--prompt=a",
                "--prompt=b",
                "--config.video.switch_frames=()",
                "--config.window.recache_frames=0",
            ],
            "config.window.recache_frames=0, but prompts switch",
        ),
        (["--num_frames=6"], "give one of --prompt"),
        (["--prompt=a", "--lora=nowhere:1,b:x"], "--lora=nowhere:1,b:x: 'x' is no number and b:x"),
        (
            ["--interactive", "--num_frames=3"],
            "--interactive: the input ended before a prompt was typed",
        ),
        (
            ["--prompt=a", "--prompt=b", "--switch_frames=5"],
            "--switch_frames=5: expected ascending multiples",
        ),
        (
            ["--prompt=a", "--prompt=b", "--switch_frames=3,6"],
            "--switch_frames=3,6: 2 prompts switch 1 times",
        ),
        (["--prompt=a pink disk moves left", "--num_frames=3"], "'pink' is not one of red"),
        (
            ["--prompt=a red disk moves left", "--checkpoint=nowhere"],
            "nowhere: there is no such run directory",
        ),
        (
            ["--prompt=a", "--config=configs/longlive.py"],
            "the longlive backbone needs --config.weights",
        ),
        (
            ["--prompt=a red disk moves left", "--ema"],
            "--ema needs --checkpoint to be a run directory",
        ),
        (
            ["--prompt=a red disk moves left", "--iteration=best"],
            "--iteration needs --checkpoint to be a run directory",
        ),
        (
            ["--prompt=a red disk moves left", "--iteration=last"],
            "expected the number of an iteration, newest, or best by its held-out reward",
        ),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, message):
    done = run(*arguments, f"--output={tmp_path}")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert not list(tmp_path.glob("*.mp4"))


def test_a_run_generates_with_the_configuration_of_its_checkpoint(tmp_path):
    """A hand has changed config.json after the run."""
    trained = config_lib.load("configs/tiny.py")
    edited = trained.copy_and_resolve_references()
    edited.video.block_frames = 5
    atomic.write_json(edited.to_dict(), tmp_path / "config.json")
    extra = tmp_path / "checkpoints" / "3" / "extra"
    extra.mkdir(parents=True)
    atomic.write_json({"config": trained.to_dict()}, extra / "metadata")
    given = SimpleNamespace(
        checkpoint=str(tmp_path), config=None, iteration="newest", output="videos"
    )
    assert generate.find_config(given, [], {"ema": False}) == trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run whose second online policy is its first average: an adapter that changes videos."""
    folder = tmp_path_factory.mktemp("run")
    weights = random_weights(folder / "weights.safetensors", configure("configs/tiny.py", SMALL))
    config = configure("configs/tiny.py", {**SMALL, "weights": weights})
    plain = fresh_variables(config)["lora"]
    moved = jax.tree.map(lambda x: x + 0.3, plain)
    state = state_lib.init_state(config, run_lib.make_mesh(config), plain)
    with checkpoint.manager(folder / "checkpoints", 2) as checkpoints:
        for iteration, (lora, ema) in enumerate([(plain, moved), (moved, plain)], start=1):
            saved = state.replace(lora=lora, ema=ema)
            checkpoint.save(checkpoints, iteration, saved, {"config": config.to_dict()})
    workdir.start_run(config, folder)
    return folder


def test_commands_take_the_checkpoint_and_the_policy_that_they_are_told(trained, tmp_path):
    def made(*flags: str) -> bytes:
        done = run(
            f"--checkpoint={trained}", f"--output={tmp_path}", "--prompt=a red disk moves left",
            "--num_frames=3", *flags,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return (tmp_path / "000_a_red_disk_moves_left.mp4").read_bytes()

    assert made() == made("--iteration=1", "--ema") != made("--iteration=1")

    def exported(*flags: str) -> dict[str, np.ndarray]:
        output = tmp_path / "lora.safetensors"
        arguments = (f"--workdir={trained}", f"--output={output}", "--format=diffusers", *flags)
        done = run_command("-m", "kvpo_jax.convert.export_lora", *arguments)
        assert done.returncode == 0, done.stderr
        return safetensors.numpy.load_file(output)

    newest, first, average = (
        exported(), exported("--iteration=1"), exported("--iteration=1", "--policy=ema")
    )  # fmt: skip
    for name, x in newest.items():
        np.testing.assert_array_equal(x, average[name])
        assert not np.array_equal(x, first[name])


def test_what_is_no_folder_and_no_run_is_named(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"_class_name": "WanModel"}'
    )  # of another program's folder
    for argument, message in (
        (f"--output={tmp_path / 'config.json'}", "config.json is a file; name a folder"),
        (
            f"--checkpoint={tmp_path}",
            "config.json has other fields than configs/tiny.py, missing: ",
        ),
    ):
        done = run("--prompt=a red disk moves left", "--num_frames=3", argument)
        assert done.returncode == 1
        assert (
            done.stderr.startswith("error: ")
            and message in done.stderr
            and done.stderr.count("\n") == 1
        )
