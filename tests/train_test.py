"""The training loop on a generator of random weights: exact resume, many devices, gate, ratio,
compile-once.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equipment import SMALL, configure, random_weights

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import budget, evaluate, programs, rollout, train
from kvpo_jax import run as run_lib
from kvpo_jax import state as state_lib
from kvpo_jax.algorithm import keys, objective
from kvpo_jax.errors import DivergedError, NotFiniteError, UsageError
from kvpo_jax.rewards import composite, scorers
from kvpo_jax.run import Run
from kvpo_jax.runtime import checkpoint, films, sharding, video
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import workdir as workdir_lib
from kvpo_jax.runtime.pictures import PICTURED
from kvpo_jax.runtime.process import STOPPED
from kvpo_jax.state import TrainState
from kvpo_jax.types import Experience, Judged, Scores

PROMPTS, BRANCHES = 4, 4
ROUNDING = 1e-4  # how far two programs may move a ratio in float32
FIELDS = {
    **SMALL,
    "video.blocks": 8,
    "video.switch_frames": (12,),
    "rollout.branches": BRANCHES,
    "rollout.window_blocks": 2,
    "train.iterations": 4,
    "train.prompts_per_iteration": PROMPTS,
    "train.checkpoint_every": 1,
    "train.keep": 10,
    "eval.prompts": 4,
    "eval.batch": 4,
    "eval.every": 0,
    "mesh.data": 1,
    "mesh.branch": 1,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A generator whose every parameter is random: zero inits would hide what depends on them."""
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    return random_weights(path, make_config(path))


def make_config(weights: Path, **fields):
    config = config_lib.load("configs/tiny.py")
    arguments = {
        **FIELDS,
        "weights": weights,
        **{k.replace("__", "."): v for k, v in fields.items()},
    }
    return config_lib.override(
        config, [f"--config.{name}={value}" for name, value in arguments.items()]
    )


def saved_state(workdir: Path, config, step: int) -> TrainState:
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.branch, PROMPTS, BRANCHES)
    like = state_lib.abstract_state(config, mesh)
    with checkpoint.manager(workdir / "checkpoints", config.train.keep) as checkpoints:
        found, state, _ = checkpoint.restore_latest(checkpoints, like)
    assert found == step
    return state


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def furthest(a, b) -> float:
    """The largest distance of two entries."""
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), a, b)))


def lines(workdir: Path) -> list[dict]:
    """metrics.jsonl without what a clock says."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(weights, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    config = make_config(weights, train__epochs=2, train__rollouts_per_sync=2)
    return config, workdir, train.train_and_evaluate(config, workdir)


def test_run_leaves_what_other_tools_read(uninterrupted):
    config, workdir, summary = uninterrupted
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert set(summary["heldout"]) == {
        "reference",
        "online",
        "ema",
        "gain",
        "gain_ci95",
        "win_rate",
        "ema_gain",
        "ema_gain_ci95",
        "ema_win_rate",
        "num_prompts",
    }
    assert summary["heldout"]["num_prompts"] == config.eval.prompts
    np.testing.assert_allclose(
        summary["heldout"]["gain"],
        summary["heldout"]["online"] - summary["heldout"]["reference"],
        atol=1e-6,
    )
    assert {"total", "compile", "rollout", "reward", "update"} <= set(summary["seconds"])
    assert (workdir / "report" / "before_after.png").stat().st_size > 1000
    assert f"{summary['heldout']['gain']:+.4f}" in (workdir / "report" / "index.html").read_text()
    for components in summary["components"].values():
        assert components.keys() == {
            "VQ",
            "MQ",
            "TA",
            "motion",
            "smoothness",
            *scorers.COMPONENTS["stream"],
        }  # motion and what follows are only watched
    assert not any("motion" in name for name in lines(workdir)[-1])
    assert [row["iteration"] for row in lines(workdir)] == [0, 1, 2, 3]
    assert list((workdir / "tensorboard").iterdir())


def heldout_lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "heldout.jsonl").read_text().splitlines()]


def test_every_evaluation_leaves_what_every_prompt_got(uninterrupted):
    config, workdir, summary = uninterrupted
    *_, last = heldout_lines(workdir)
    assert last["iteration"] == summary["iterations"] == 4
    prompts = backbone_lib.load(config).prompts
    assert last["prompt"] == [prompts("heldout", i) for i in range(config.eval.prompts)]
    for policy in ("reference", "online", "ema"):
        assert len(last["reward"][policy]) == config.eval.prompts
        mean = np.mean(last["reward"][policy])
        assert mean == pytest.approx(summary["heldout"][policy], abs=1e-6)
        means = {name: np.mean(x) for name, x in last["components"][policy].items()}
        assert means == pytest.approx(summary["components"][policy], abs=1e-6)
        blocks = summary["reward_by_block"][policy]
        assert last["blocks"][policy] == pytest.approx(blocks, abs=1e-6) and len(blocks) == 8
    assert sorted(last["optimised"]) == ["MQ", "TA", "VQ"]
    assert last["first_pivot"] == 5


def test_the_videos_of_a_run_are_whole_and_what_they_say(uninterrupted):
    """Of the first prompt of the pictured iterations, and of the first held-out prompts."""
    config, workdir, _ = uninterrupted
    found = films.films_in(workdir)
    assert len(found) == len(list((workdir / "videos").glob("*/*")))  # and nothing else
    pictured = [i for i in range(4) if config_lib.is_pictured(config, i)]
    evaluated = [line["iteration"] for line in heldout_lines(workdir)]
    names, prompts = films.branch_names(BRANCHES), range(min(PICTURED, config.eval.prompts))
    expected = [films.Film("iteration", i, 0, name) for i in pictured for name in names]
    expected += [films.Film("heldout", 0, i, "reference") for i in prompts]
    expected += [
        films.Film("heldout", done, i, policy)
        for done in evaluated
        for i in prompts
        for policy in ("ema", "online")
    ]
    assert sorted(found) == sorted(expected)
    clips = {film: video.read(path) for film, path in found.items()}
    assert {clip.shape for clip in clips.values()} == {(24, 128, 128, 3)}
    with np.load(workdir / "reference.npz") as file:
        pixels = file["pixels"]
    run = run_lib.load(config)
    shown = backbone_lib.heldout_shown(config, run.backbone)
    for i in prompts:
        clip = clips[films.Film("heldout", 0, i, "reference")]
        error = clip[shown].astype(int) - video.enlarge(pixels[i])
        assert np.abs(error).mean() < 4  # what H.264 and its colours cost


def test_the_policy_moves_and_the_reference_does_not(uninterrupted):
    config, workdir, _ = uninterrupted
    state = saved_state(workdir, config, 4)
    lora = programs.fresh_lora(config, keys.draw_key(config.seed, "lora", 0))
    assert_equal(state.reference, lora)
    assert_equal(state.old, state.lora)  # synced after every second rollout
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.lora, lora)
    assert all(jax.tree.leaves(changed))
    assert any(
        jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), state.lora, state.ema))
    )


def test_stopped_and_resumed_is_uninterrupted(uninterrupted, weights, tmp_path):
    """Stopped after one iteration, between two syncs of the old policy, and resumed: every bit is
    the same.

    So it is without what is only watched, and with rewards that are loaded anew every time.
    """
    config, workdir, _ = uninterrupted
    first = make_config(
        weights,
        train__epochs=2,
        train__rollouts_per_sync=2,
        train__iterations=1,
        eval__scorer="",
        reward__resident=False,
    )
    train.train_and_evaluate(first, tmp_path)
    train.train_and_evaluate(config, tmp_path)
    assert_equal(saved_state(tmp_path, config, 4), saved_state(workdir, config, 4))
    expected = lines(workdir)
    resumed = lines(tmp_path)

    def held(row):
        return {
            k: v for k, v in row.items() if not k.startswith("heldout")
        }  # iteration 0 was a last one once

    assert [held(row) for row in resumed] == [held(row) for row in expected]
    assert resumed[1:] == expected[1:]
    branches, uninterrupted_branches = (
        (folder / "branches.jsonl").read_text() for folder in (tmp_path, workdir)
    )
    assert branches == uninterrupted_branches
    assert branches.count("\n") == 4 * PROMPTS


@pytest.mark.slow
def test_a_run_whose_tokens_are_split_resumes_and_moves(weights, tmp_path):
    """Bit for bit on its own mesh, and to another one: checkpoints know of none."""

    def continued(folder: str, context: int, iterations: int) -> TrainState:
        config = make_config(
            weights,
            mesh__context=context,
            rollout__branches=2,
            rollout__window_blocks=1,
            train__iterations=iterations,
            train__prompts_per_iteration=2,
            eval__prompts=2,
            eval__batch=2,
        )
        train.train_and_evaluate(config, tmp_path / folder)
        return saved_state(tmp_path / folder, config, iterations)

    whole = continued("whole", 2, 2)
    first = continued("parts", 2, 1)
    shutil.copytree(tmp_path / "parts", tmp_path / "moved")
    assert_equal(continued("parts", 2, 2), whole)
    moved = continued("moved", 1, 2)
    assert furthest(first.lora, whole.lora) > 5e-4
    assert furthest(moved.lora, whole.lora) < 1e-6


def test_the_records_are_those_of_the_last_epoch(uninterrupted):
    """As the metrics are: after a step the ratio is not 1, even in the first iteration."""
    _, workdir, _ = uninterrupted
    rows = [json.loads(line) for line in (workdir / "branches.jsonl").read_text().splitlines()]
    for metrics in lines(workdir):
        ratio, probability = (
            np.array([row[name] for row in rows if row["iteration"] == metrics["iteration"]])
            for name in ("ratio", "probability")
        )
        deviation = np.abs(ratio - 1).max(axis=1).mean()
        assert 0 < deviation == pytest.approx(metrics["ratio_deviation"], rel=1e-3)
        entropy = -np.sum(probability * np.log(probability), axis=1).mean()
        assert entropy == pytest.approx(metrics["entropy"], rel=1e-5)


@pytest.fixture(scope="module")
def experience(weights):
    """One rollout, by the initial policy on one device, and everything that an update needs."""
    return make_experience(run_lib.load(make_config(weights)))


def moved(state):
    """The state with a policy away from the reference: a fresh LoRA has B = 0, and then no gradient
    in A.
    """

    def draw(x):
        return x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape)

    lora = jax.tree.map(draw, state.lora)
    return state.replace(lora=lora, old=lora)


class World(NamedTuple):
    """A run before its first iteration, and what it has experienced with rewards from nowhere."""

    run: Run
    state: TrainState
    experience: Experience


def make_experience(run, first=0) -> World:
    """An Experience of the run's prompts at once, from number `first` on."""
    config = run.config
    state = state_lib.init_state(config, run.mesh, run.initial_lora())
    unit = sharding.place(np.float32(4e-3), run.mesh)  # about the spread of these energies
    state = state.replace(energy_unit=unit)
    numbers = np.arange(first, first + config_lib.prompts_at_once(config), dtype=np.int32)
    batch = backbone_lib.prompt_batch(run.backbone, run.mesh, "train", 0, numbers)
    # Keys whose groups have energies with a spread well above rounding: a gradient goes as its
    # inverse.
    routed_frames = run.programs.draw(jax.random.key(1), numbers, 15)
    noise = keys.NoiseKey(jax.random.key(2), numbers)
    variables = run.variables(state.old)
    rolled = rollout.rollout(run, variables, batch, noise, routed_frames, pivot=5)
    rewards = jax.random.normal(jax.random.key(3), (PROMPTS, BRANCHES))[numbers]
    judged = Judged(
        scores=Scores(rewards, jnp.min(rewards, axis=1) - 1, {}),
        advantages=jax.vmap(objective.group_advantage)(rewards),
        gate_open=jnp.ones(len(numbers), bool),
        pixel_std=jnp.zeros(()),
    )
    experience = train.remember(run, state, rolled, batch, judged, on_policy=True)
    return World(run, state, experience)


def update(run, state, experience):
    """(state, metrics, energies) after an optimiser step on one micro-batch."""
    total, energies = gradient(run, state.lora, experience)
    return *run.programs.apply(state, total), energies


def gradient(run, lora, experience):
    """Gradient and energies of the policy with this LoRA tree."""
    total, replayed = run.programs.replay(lora, run.params, experience, np.asarray(True))
    return total, replayed.energies


def test_ratio_is_one_before_a_step_and_not_after(experience):
    """Also where the old energies were made without a gradient, and are compared."""
    run, state, batch = experience
    off_policy = batch.replace(energies_old=batch.energies_ref, on_policy=np.asarray(False))
    _, metrics, _ = update(run, state, off_policy)
    assert metrics["ratio_deviation"] == metrics["kl"] == 0
    after, metrics, old = update(run, state, batch)
    assert metrics["kl"] == 0
    off_policy = batch.replace(energies_old=old, on_policy=np.asarray(False))
    _, metrics, _ = update(run, after, off_policy)
    assert metrics["ratio_deviation"] > 10 * ROUNDING
    assert run.programs.replay._cache_size() == run.programs.apply._cache_size() == 1


@pytest.mark.parametrize("chunk", [0, 4])
def test_rounding_is_no_policy_change_in_bfloat16(tmp_path, chunk):
    """With a learning rate of 0 theta stays the old and the reference policy: off policy too, no
    ratio moves, none is clipped, and the KL is 0, to the last bit.

    The shipped generator, on which a second program would differ with chunks and without.
    """
    fields = {
        "model.dtype": "bfloat16",
        "replay.chunk": chunk,
        "rollout.branches": 4,
        "objective.gate": "mechanism_2",
        "train.prompts_per_iteration": 1,
        "train.rollouts_per_sync": 2,
        "train.learning_rate": 0.0,
        "train.iterations": 2,
        "eval.prompts": 2,
        "eval.batch": 2,
        "eval.every": 0,
        "mesh.data": 1,
        "mesh.branch": 1,
    }
    train.train_and_evaluate(configure("configs/tiny.py", fields), tmp_path)
    for row in lines(tmp_path):
        assert row["energy_old_std_in_group"] > 0 and row["grad_norm"] > 0
        for name in ("ratio_deviation", "log_ratio_std", "clip_fraction", "kl"):
            assert row[name] == 0, name


def test_no_gradient_where_none_is_wanted(experience):
    run, state, batch = experience
    total, energies = gradient(run, moved(state).lora, batch)
    nothing, replayed = run.programs.replay(moved(state).lora, run.params, batch, np.asarray(False))
    np.testing.assert_array_equal(replayed.energies, energies)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(nothing.lora))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(total.lora))


def test_closed_gate_leaves_lora_and_optimiser_alone(experience):
    run, state, batch = experience
    state, _, _ = update(run, state, batch)  # so that there is momentum
    closed = batch.replace(gate_open=jnp.zeros(PROMPTS, bool))
    after, metrics, _ = update(run, state, closed)
    assert metrics["grad_norm"] == 0
    assert metrics["skipped_update"] == 1
    assert_equal(after, state)


def test_a_gated_prompt_has_no_say(experience):
    """With the gate of prompt 0 closed, its advantages change nothing."""
    run, state, batch = experience
    batch = batch.replace(gate_open=jnp.arange(PROMPTS) > 0)
    other = batch.replace(advantages=batch.advantages * np.array([[-3]] + [[1]] * (PROMPTS - 1)))
    a, b = (update(run, state, x)[0] for x in (batch, other))
    assert_equal(a.lora, b.lora)


def test_the_update_raises_the_probability_of_better_branches(experience):
    run, state, batch = experience
    after, _, _ = update(run, state, batch)
    energies, options = train.energies(run, after.lora, batch), run.config.objective

    def log_pi(energies, reference):
        tau = objective.temperature(reference, options.tau, options.tau_unit, batch.energy_unit)
        return objective.log_policy(energies, tau)

    after, before = (
        jax.vmap(log_pi)(e, batch.energies_ref) for e in (energies, batch.energies_ref)
    )
    assert np.mean(np.asarray(after - before) * batch.advantages) > 0


@pytest.mark.parametrize(
    ("data", "fsdp", "branch", "context"),
    # Each axis with a gradient of its own, and every pair of axes.
    [(1, 1, 1, 2), (1, 2, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (2, 1, 1, 2)],
)
def test_one_device_is_two_or_eight(experience, weights, data, fsdp, branch, context):
    """The same rollout, and from it energies, gradient, norms and LoRA, to 1e-6."""
    run, state, batch = experience
    after, metrics, old = update(run, state, batch)
    gradient_moved, _ = gradient(run, moved(state).lora, batch)
    mesh = {
        "mesh__data": data,
        "mesh__fsdp": fsdp,
        "mesh__branch": branch,
        "mesh__context": context,
    }
    run, state, batch_ = make_experience(run_lib.load(make_config(weights, **mesh)))
    assert run.mesh.size == data * fsdp * branch * context
    np.testing.assert_allclose(batch_.tuples.z, batch.tuples.z, atol=1e-5)

    # From the same experience, so that what is compared is the update.
    def place(ours, like):
        named = isinstance(getattr(like, "sharding", None), jax.sharding.NamedSharding)
        return jax.device_put(np.asarray(ours), like.sharding if named else None)

    placed = jax.tree.map(place, batch, batch_)
    after_, metrics_, old_ = update(run, state, placed)
    np.testing.assert_allclose(old_, old, rtol=1e-6)
    for name in ("grad_norm", "update_norm", "lora_norm"):
        np.testing.assert_allclose(metrics_[name], metrics[name], rtol=1e-5, err_msg=name)
    where = [jax.tree.map(lambda x: x.sharding, x) for x in (state, after_)]
    assert jax.tree.leaves(where[0]) == jax.tree.leaves(where[1])  # each step leaves them there
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after_.lora, after.lora)
    gradient_moved_, _ = gradient(run, moved(state).lora, placed)
    assert_gradients_equal(gradient_moved_.lora, gradient_moved.lora)
    assert run.programs.compilations()["apply"] == 1


def assert_gradients_equal(a, b):
    """To 1e-6, or 5e-6 of an entry above 0.2; every leaf has entries that are far larger."""
    for ours, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.abs(theirs).max() > 1e-3
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=5e-6)


def test_the_gradients_of_micro_batches_add_up(experience, weights):
    run, state, batch = experience
    lora = moved(state).lora
    whole, _ = gradient(run, lora, batch)
    run, total, each = run_lib.load(make_config(weights, train__micro_batch=1)), None, []
    shares = run.programs
    for first in range(PROMPTS):
        own = make_experience(run, first).experience
        share, _ = shares.replay(lora, run.params, own, np.asarray(True))
        each.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(share.lora)]))
        total = share if total is None else shares.accumulate(total, share)
    assert shares.replay._cache_size() == 1
    assert_gradients_equal(total.lora, whole.lora)
    assert total.counted == whole.counted == PROMPTS
    products = np.inner(each, each)
    of_pairs = products[~np.eye(PROMPTS, dtype=bool)].mean()
    np.testing.assert_allclose(
        programs.agreement(total, PROMPTS), of_pairs / np.diag(products).mean(), rtol=1e-4
    )
    for name, value in whole.metrics.items():
        np.testing.assert_allclose(total.metrics[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("epochs", [1, 2])
def test_micro_batches_are_one_batch(weights, tmp_path, epochs):
    """The prompts of an iteration at once or one after the other: the same rewards and LoRA, to
    1e-6.
    """
    states = []
    for micro_batch in (0, 1):
        config = make_config(
            weights, train__micro_batch=micro_batch, train__epochs=epochs, train__iterations=1
        )
        train.train_and_evaluate(config, tmp_path / str(micro_batch))
        states.append(saved_state(tmp_path / str(micro_batch), config, 1))
    rows = [lines(tmp_path / name)[0] for name in "01"]
    assert "gradient_agreement" not in rows[0] and -1 / 3 < rows[1]["gradient_agreement"] < 1
    for name, value in rows[0].items():
        assert rows[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    # In the second step Adam divides by gradients, of which some are little more than rounding.
    atol = 1e-6 if epochs == 1 else 1e-5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=atol), states[0].lora, states[1].lora
    )


def test_an_earlier_micro_batch_is_forgotten(weights, tmp_path, monkeypatch):
    """While rewards are made there is one history, that of the rollout; on held-out prompts and
    before a rollout there is none.
    """
    config = make_config(
        weights, train__micro_batch=1, train__iterations=2, eval__batch=1, eval__prompts=2
    )
    blank = programs.build(config, run_lib.make_mesh(config)).blank
    shape = jax.eval_shape(lambda: blank(1)).k.shape

    def histories():
        return sum(x.shape == shape for x in jax.live_arrays()) // 2  # keys and values

    before, counted = histories(), {"rollout": [], "train": [], "heldout": []}
    explore = train.explore

    def counting_explore(*arguments, **named):
        counted["rollout"].append(histories() - before)
        return explore(*arguments, **named)

    ask_group, segment_rewards = backbone_lib.ask_group, composite.segment_rewards

    def counting_ask_group(*arguments):
        counted["train"].append(histories() - before)
        return ask_group(*arguments)

    def counting_segment_rewards(*arguments):
        if arguments[1].anchor is None:
            counted["heldout"].append(histories() - before)
        return segment_rewards(*arguments)

    monkeypatch.setattr(train, "explore", counting_explore)
    monkeypatch.setattr(backbone_lib, "ask_group", counting_ask_group)
    monkeypatch.setattr(composite, "segment_rewards", counting_segment_rewards)
    train.train_and_evaluate(config, tmp_path)
    # Two iterations, and once more to measure the unit of tau.
    assert counted["rollout"] == [0] * 3 * PROMPTS
    assert counted["train"] == [1] * 2 * PROMPTS
    assert set(counted["heldout"]) == {0}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "objective__advantage": "anchor",
            "replay__blocks": 2,
            "rollout__branch_chunk": 2,
            "mesh__data": 2,
            "mesh__branch": 2,
        },
    ],
)
def test_rewards_are_those_of_making_decoding_and_scoring_everything(weights, fields):
    """Clips of frames 3-8 and 15-20 of 24; forks at 15 and 18. A film changes no number."""
    config = make_config(weights, reward__clip_frames=6, reward__min_behind=0.1, **fields)
    run = run_lib.load(config)
    state = state_lib.init_state(config, run.mesh, run.initial_lora())
    batch = train.prompts_of(run, 0, np.arange(PROMPTS, dtype=np.int32))
    assert run.pivots == (5, 6)
    compiled = set()
    for pivot in run.pivots:
        judged = []
        for filmed in (True, False):
            windows = backbone_lib.windows_read(config, run.backbone.to_pixel, pivot, filmed)
            rolled = train.explore(run, state.old, batch, 0, pivot, windows)
            if filmed:
                films = run.decoder.group_films(rolled.branches, rolled.anchor, pivot)
            judged.append(train.judge(run, rolled, batch, 0, pivot)())
            compiled.add(run.programs.pixel_std._cache_size())
        pictured, plain = judged
        last = 3 * (pivot + 2)  # the perturbed window ends where the last clip does, or later
        assert np.all(rolled.anchor[:, last:] == 0) and np.all(rolled.anchor[:, last - 1] != 0)
        assert_equal(pictured, plain)

        everything = ((0, 24),)
        whole = train.explore(run, state.old, batch, 0, pivot, everything)
        pixels = run.decoder.group(whole.branches, whole.anchor, pivot, everything)
        first = np.concatenate([pixels.anchor[0], pixels.videos[0]])
        np.testing.assert_array_equal(films, np.round(255 * first))
        scores, local = backbone_lib.score_group(
            config, run.backbone, batch.sentences, pixels.replace(fork=0), pivot
        )
        jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6, rtol=0), plain.scores, scores)
        assert np.ptp(scores.branches, axis=1).min() > 1e-4
        advantages = objective.compute_advantages(
            config.objective, config.reward.weights, scores, local
        )
        np.testing.assert_allclose(plain.advantages, advantages, atol=0.05)
    assert len(compiled) == 1  # nothing is compiled for a film


def test_a_weight_without_a_component_is_an_error_of_the_first_held_out_batch(
    weights, tmp_path, monkeypatch
):
    calls = []

    def score(pixels, prompts):
        calls.append(len(prompts))
        return {"brightness": pixels.mean((1, 2, 3, 4))}

    monkeypatch.setitem(scorers.SCORERS, "mine", lambda paths: score)
    config = make_config(weights, reward__scorer="mine", reward__weights__dark=1, eval__batch=2)
    with pytest.raises(
        ValueError, match="weights.dark=1: config.reward.scorer has only brightness; "
    ):
        train.train_and_evaluate(config, tmp_path)
    assert calls == [2, 2]  # segments


def test_only_lora_is_trained(experience):
    run, state, _ = experience
    config, optimiser = run.config, state_lib.make_optimiser(run.config.train)
    assert jax.tree.structure(optimiser.init(state.lora)) == jax.tree.structure(state.optimiser)
    assert (
        len(jax.tree.leaves(state.lora)) == 2 * 10
    )  # A and B of the ten Linears of a block, stacked over layers
    assert all(config.lora.rank in leaf.shape[1:] for leaf in jax.tree.leaves(state.lora))


@pytest.mark.parametrize("fault", ["not finite", "raises"])
def test_a_fault_of_a_reward_stops_the_run_and_loses_nothing(weights, tmp_path, monkeypatch, fault):
    """NaN or an exception from the second iteration on: an error that names it, after the first
    iteration has been saved.
    """
    config = make_config(weights, train__checkpoint_every=100, eval__by_block=False)
    segments = len(config.video.switch_frames) + 1
    calls = iter(range(1000))

    def score(pixels, prompts):
        good = next(calls) < 2 * segments  # the evaluation before, and the first iteration
        if not good and fault == "raises":
            raise RuntimeError("MQ has no weights")
        return {
            name: jnp.full(len(prompts), 0.5 if good or name != "MQ" else jnp.nan)
            for name in ("VQ", "MQ", "TA")
        }

    monkeypatch.setitem(scorers.SCORERS, "toy", lambda paths: score)
    with pytest.raises((FloatingPointError, RuntimeError), match="MQ"):
        train.train_and_evaluate(config, tmp_path)
    assert saved_state(tmp_path, config, 1).iteration == 1


def test_an_infinite_update_of_a_finite_gradient_names_the_learning_rate(weights, tmp_path):
    """And not the reward that its videos would have; nothing of it is saved."""
    config = make_config(weights, train__learning_rate=1e30)
    with pytest.raises(NotFiniteError, match="update_norm is inf .* lower config.train.learning_r"):
        train.train_and_evaluate(config, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_every_evaluation_is_a_checkpoint_to_choose_from(weights, tmp_path, capsys):
    fields = {"train__checkpoint_every": 100, "train__keep": 1, "eval__every": 2}
    small = {"eval__prompts": 2, "eval__batch": 2, "eval__by_block": False, "eval__scorer": ""}
    config = make_config(weights, **fields, **small, train__iterations=5, train__keep_best=2)
    workdir_lib.start_run(config, tmp_path)
    train.train_and_evaluate(config, tmp_path)
    evaluated = [row for row in lines(tmp_path) if "heldout_online" in row]
    rewards = {row["iteration"] + 1: row["heldout_online"] for row in evaluated}
    assert list(rewards) == [2, 4, 5]
    kept = sorted({5, *sorted(rewards, key=rewards.__getitem__)[-2:]})
    assert checkpoint.steps(tmp_path / "checkpoints") == kept
    best = max(rewards, key=rewards.__getitem__)
    capsys.readouterr()
    evaluate.evaluate_run(tmp_path, "best", [])
    said = capsys.readouterr().out
    assert f"iteration {best} of {tmp_path}\n" in said
    assert f"{rewards[best]:.4f}" in said


@pytest.mark.parametrize("iterations", [3, 4])
def test_a_diverged_policy_is_not_what_is_left(weights, tmp_path, monkeypatch, iterations):
    """The third update is finite, and so large that its policy makes no finite video.

    That shows in the evaluation after it, or in the rollout of the next iteration, when it has been
    saved already and the state before it deleted.
    """

    def schedule(*_):
        return lambda count: jnp.where(count < 2, 1e-3, 1e15)

    monkeypatch.setattr(optax, "linear_schedule", schedule)
    fields = {"train__iterations": iterations, "train__warmup": 1, "train__keep": 1}
    config = make_config(weights, **fields)
    with pytest.raises(DivergedError, match=r"videos .* not finite: .*config.train.learning_rate="):
        train.train_and_evaluate(config, tmp_path)
    state = saved_state(tmp_path, config, 2)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(state.lora)) < 10


def test_controls_change_the_advantages_only(weights):
    options, key, numbers = make_config(weights).objective, jax.random.key(0), np.arange(PROMPTS)
    advantages = jax.random.uniform(key, (PROMPTS, BRANCHES))

    def controlled(**fields):
        section = options.copy_and_resolve_references()
        section.update(fields)
        return objective.control_advantages(section, advantages, key, numbers, PROMPTS)

    np.testing.assert_array_equal(controlled(), advantages)
    np.testing.assert_array_equal(controlled(negate_advantages=True), -advantages)
    shuffled = controlled(shuffle_advantages=True)
    assert np.any(shuffled != advantages)
    np.testing.assert_array_equal(np.sort(shuffled, axis=1), np.sort(advantages, axis=1))
    # A prompt's permutation is of its number, not of its place in the batch.
    shuffling = options.copy_and_resolve_references()
    shuffling.shuffle_advantages = True
    third = slice(2, 3)
    alone = objective.control_advantages(shuffling, advantages[third], key, numbers[third], PROMPTS)
    np.testing.assert_array_equal(alone, shuffled[third])


def test_a_judge_that_errs_errs_alike_in_all_components():
    weights, p, g = {"VQ": 0.25, "TA": 0.5}, 3, 4000
    ones = jnp.ones((p, g)), jnp.ones(p)
    scores = Scores(*ones, {name: ones for name in ("VQ", "TA", "watched")})
    numbers, key = np.arange(p), jax.random.key(1)
    noisy = objective.noisy_scores(scores, weights, 0.2, key, numbers)
    branches, anchor = noisy.components["VQ"]
    assert abs(float(jnp.std(branches)) - 0.2) < 0.01 and abs(float(branches.mean()) - 1) < 0.01
    assert len(set(map(float, anchor))) == p  # the anchor's are drawn, too
    np.testing.assert_array_equal(noisy.components["TA"][0], branches)
    np.testing.assert_array_equal(noisy.components["watched"][0], ones[0])
    np.testing.assert_allclose(noisy.branches, 1 + 0.75 * (branches - 1), rtol=1e-5)
    np.testing.assert_allclose(noisy.anchor, 1 + 0.75 * (anchor - 1), rtol=1e-5)
    # What is drawn is of a prompt's number, not of its place in the batch.
    third = jax.tree.map(lambda x: x[2:], scores)
    alone = objective.noisy_scores(third, weights, 0.2, key, numbers[2:])
    np.testing.assert_array_equal(alone.branches, noisy.branches[2:])


def test_release_preset_trains(weights, tmp_path):
    """Every field of the release preset, through the same loop."""
    release = config_lib.load("configs/tiny.py:release")
    fields = {
        **FIELDS,
        "weights": weights,
        "train.iterations": 2,
        "replay.blocks": 3,
        "model.num_layers": 2,
    }
    config = config_lib.override(release, [f"--config.{k}={v}" for k, v in fields.items()])
    summary = train.train_and_evaluate(config, tmp_path)
    assert np.isfinite(summary["heldout"]["gain"])
    first, second = lines(tmp_path)
    assert second["ratio_deviation"] > 0  # the old policy is that of two rollouts


# ---------------------------------------------------------------- the command


def start(weights: Path, workdir: Path, **fields) -> subprocess.Popen:
    arguments = {
        **FIELDS,
        "weights": weights,
        **{k.replace("__", "."): v for k, v in fields.items()},
    }
    command = [sys.executable, "-m", "kvpo_jax.main", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in arguments.items()]
    # A job in the background ignores SIGINT, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
        )
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for_lines(workdir: Path, count: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    path = workdir / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def six_iterations(weights, tmp_path_factory):
    """Of the command, uninterrupted."""
    workdir, iterations = tmp_path_factory.mktemp("whole"), {"train__iterations": 6}
    process = start(weights, workdir, **iterations)
    assert process.wait(600) == 0, process.stdout.read()
    return workdir, iterations


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed_is_uninterrupted(weights, six_iterations, tmp_path, sent):
    """The real command, killed in the middle of an iteration, then run again with the same
    arguments.
    """
    whole, iterations = six_iterations
    process = start(weights, tmp_path / "killed", **iterations)
    wait_for_lines(tmp_path / "killed", 2, process)
    process.send_signal(sent)
    code = process.wait(120)
    assert code == (-sent if sent == signal.SIGKILL else STOPPED)
    again = start(weights, tmp_path / "killed", **iterations)
    assert again.wait(600) == 0, again.stdout.read()
    config = make_config(weights, **iterations)
    assert_equal(saved_state(tmp_path / "killed", config, 6), saved_state(whole, config, 6))
    assert lines(tmp_path / "killed") == lines(whole)


def test_a_run_ends_when_its_budget_is_used_and_goes_on_with_a_larger_one(weights, tmp_path):
    """The budget is what two iterations take, to the last pass; then one less than four take."""
    fields = {"train__iterations": 50, "train__checkpoint_every": 30}
    run = run_lib.load(make_config(weights, **fields))
    two, three, four = (budget.of_first(run, iterations).passes for iterations in (2, 3, 4))
    for limit, iterations, passes, further in (two, 2, two, three), (four - 1, 3, three, four):
        config = make_config(weights, **fields, train__budget_passes=limit)
        assert workdir_lib.finished(config, tmp_path) is None
        workdir_lib.start_run(config, tmp_path)
        summary = train.train_and_evaluate(config, tmp_path)
        assert (summary["iterations"], lines(tmp_path)[-1]["iteration"]) == (
            iterations,
            iterations - 1,
        )
        assert summary["passes_forward"] + summary["passes_backward"] == passes
        assert summary["passes_with_another_iteration"] == further
        assert "heldout_online" in lines(tmp_path)[-1]
        assert workdir_lib.finished(config, tmp_path) == summary
    assert [row["passes_forward"] + row["passes_backward"] for row in lines(tmp_path)][1:] == [
        two,
        three,
    ]
    saved_state(tmp_path, config, 3)
    enough = make_config(weights, **fields, train__budget_passes=four)
    unlimited = make_config(weights, **fields)
    assert (
        workdir_lib.finished(enough, tmp_path) is workdir_lib.finished(unlimited, tmp_path) is None
    )
    assert workdir_lib.trained_config(tmp_path).train.iterations == 50


def test_which_iterations_are_pictured(weights):
    config = make_config(weights, train__iterations=7, train__video_every=3)
    assert [i for i in range(7) if config_lib.is_pictured(config, i)] == [0, 2, 5, 6]
    config = make_config(weights, train__iterations=7, train__video_every=0)
    assert not any(config_lib.is_pictured(config, i) for i in range(7))


def test_a_run_without_a_checkpoint_is_an_error_that_names_the_folder(weights, tmp_path):
    config = make_config(weights)
    with pytest.raises(UsageError, match="checkpoints has no checkpoint yet"):
        state_lib.saved_state(tmp_path, config, sharding.make_mesh(1, 1, PROMPTS, BRANCHES))
