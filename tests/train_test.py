"""The training loop on a generator of random weights: exact resume, many devices, gate, ratio, compile-once."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import checkpoint, heldout, objective, rollout, sharding, train
from kvpo_jax import config as config_lib
from kvpo_jax.models.wan import init_variables, wan_config
from kvpo_jax.rewards import registry
from kvpo_jax.types import Scores

PROMPTS, BRANCHES = 4, 4
ROUNDING = 1e-4  # how far two programs may move a ratio in float32
FIELDS = {
    "model.dim": 16, "model.ffn_dim": 32, "model.num_heads": 2, "model.num_layers": 2, "model.freq_dim": 16,
    "lora.rank": 2, "lora.alpha": 2.0, "video.blocks": 8, "video.switch_frames": (12,),
    "rollout.branches": BRANCHES, "rollout.window_blocks": 2,
    "train.iterations": 4, "train.prompts_per_iteration": PROMPTS, "train.checkpoint_every": 1, "train.keep": 10,
    "eval.prompts": 4, "eval.batch": 4, "eval.every": 0, "mesh.data": 1, "mesh.branch": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A generator whose every parameter is random: zero inits would hide what depends on them."""
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    params = init_variables(wan_config(make_config(path)), jax.random.key(0))["params"]
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    noise = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    params = jax.tree.map(lambda x, key: x + 0.1 * jax.random.normal(key, x.shape), params, noise)
    checkpoint.save_weights(path, params, {})
    return path


def make_config(weights: Path, **fields):
    config = config_lib.load("configs/tiny.py")
    arguments = {**FIELDS, "weights": weights, **{k.replace("__", "."): v for k, v in fields.items()}}
    return config_lib.override(config, [f"--config.{name}={value}" for name, value in arguments.items()])


def saved_state(workdir: Path, config, step: int) -> train.TrainState:
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.branch, PROMPTS, BRANCHES)
    like = train.init_state(config, train.make_optimiser(config.train), mesh)
    with checkpoint.manager(workdir / "checkpoints", config.train.keep) as checkpoints:
        found, state, _ = checkpoint.restore_latest(checkpoints, like)
    assert found == step
    return state


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


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
        "reference", "online", "ema", "gain", "gain_ci95", "win_rate", "num_prompts"
    }  # fmt: skip
    assert summary["heldout"]["num_prompts"] == config.eval.prompts
    np.testing.assert_allclose(
        summary["heldout"]["gain"], summary["heldout"]["online"] - summary["heldout"]["reference"], atol=1e-6
    )
    assert {"total", "compile", "rollout", "reward", "update"} <= set(summary["seconds"])
    assert (workdir / "report" / "before_after.png").stat().st_size > 1000
    for components in summary["components"].values():
        assert components.keys() == {"VQ", "MQ", "TA", "motion", "smoothness"}  # the last two are only watched
    assert not any("motion" in name for name in lines(workdir)[-1])
    assert lines(workdir)[0]["ratio_check"] < ROUNDING
    assert [row["iteration"] for row in lines(workdir)] == [0, 1, 2, 3]
    assert list((workdir / "tensorboard").iterdir())


def test_the_policy_moves_and_the_reference_does_not(uninterrupted):
    config, workdir, _ = uninterrupted
    state = saved_state(workdir, config, 4)
    fresh = train.init_state(config, train.make_optimiser(config.train), sharding.make_mesh(1, 1, PROMPTS, BRANCHES))
    assert_equal(state.reference, fresh.lora)
    assert_equal(state.old, state.lora)  # synced after every second rollout
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.lora, fresh.lora)
    assert all(jax.tree.leaves(changed))
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), state.lora, state.ema)))


def test_stopped_and_resumed_is_uninterrupted(uninterrupted, weights, tmp_path):
    """Stopped after one iteration, between two syncs of the old policy, and resumed: every bit is the same.

    So it is without what is only watched, and with rewards that are loaded anew every time.
    """
    config, workdir, _ = uninterrupted
    first = make_config(
        weights, train__epochs=2, train__rollouts_per_sync=2, train__iterations=1, eval__scorer="",
        reward__resident=False,
    )  # fmt: skip
    train.train_and_evaluate(first, tmp_path)
    train.train_and_evaluate(config, tmp_path)
    assert_equal(saved_state(tmp_path, config, 4), saved_state(workdir, config, 4))
    expected = lines(workdir)
    resumed = lines(tmp_path)
    held = lambda row: {k: v for k, v in row.items() if not k.startswith("heldout")}  # iteration 0 was a last one once
    assert [held(row) for row in resumed] == [held(row) for row in expected]
    assert resumed[1:] == expected[1:]


@pytest.fixture(scope="module")
def experience(weights):
    """One rollout, by the initial policy on one device, and everything that an update needs."""
    return make_experience(make_config(weights))


def moved(state):
    """The state with a policy away from the reference: a fresh LoRA has B = 0, and then no gradient in A."""
    draw = lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape)
    lora = jax.tree.map(draw, state.lora)
    return state.replace(lora=lora, old=lora)


def make_experience(config, first=0):
    """An Experience of the config's prompts at once, from number `first` on."""
    mesh = rollout.make_mesh(config)
    numbers = jnp.arange(first, first + rollout.prompts_at_once(config))
    backbone = backbone_lib.load(config)
    params = backbone.load(jax.sharding.NamedSharding(mesh, sharding.REPLICATED))
    stages = rollout.build(config, mesh)
    optimiser = train.make_optimiser(config.train)
    state = train.init_state(config, optimiser, mesh)
    batch = heldout.prompt_batch(backbone, mesh, "train", numbers.tolist())
    behaviour = {"params": params, "lora": state.old}
    text = stages.encode_text(behaviour, batch.embeddings)
    selected = stages.draw(jax.random.key(1), numbers, 15)
    noise = rollout.NoiseKey(jax.random.key(2), numbers)
    videos = rollout.rollout(stages, config, mesh, behaviour, text, batch.changed, noise, selected, 5)
    reference = jax.jit(train.make_energies(config, mesh))(
        params, state.reference, batch.embeddings, text, videos.replay
    )
    rewards = jax.random.normal(jax.random.key(3), (PROMPTS, BRANCHES))[numbers]
    experience = train.Experience(
        tuples=videos.replay, embeddings=batch.embeddings, text=text,
        advantages=jax.vmap(objective.group_advantage)(rewards), safe=jnp.ones(len(numbers), bool),
        energies_old=reference, energies_ref=reference, on_policy=jnp.asarray(True),
    )  # fmt: skip
    return config, mesh, params, optimiser, state, experience


def make_update(config, mesh, optimiser):
    """(state, params, experience) -> (state, metrics, energies): an optimiser step on one micro-batch."""
    gradient, apply = train.make_gradient(config, mesh), train.make_apply(config, mesh, optimiser)

    def update(state, params, experience):
        total, energies = gradient(state.lora, params, experience)
        return *apply(state, total), energies

    update.gradient, update.apply = gradient, apply
    return update


def test_ratio_is_one_before_a_step_and_not_after(experience):
    """The gradient's own energies stand against those of a forward pass: on policy they would not be compared."""
    config, mesh, params, optimiser, state, batch = experience
    update = make_update(config, mesh, optimiser)
    _, metrics, _ = update(state, params, batch.replace(on_policy=jnp.asarray(False)))
    assert metrics["ratio_deviation"] < ROUNDING
    after, metrics, old = update(state, params, batch)
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    _, metrics, _ = update(after, params, batch.replace(energies_old=old, on_policy=jnp.asarray(False)))
    assert metrics["ratio_deviation"] > 10 * ROUNDING
    assert update.gradient._cache_size() == update.apply._cache_size() == 1


def test_both_ways_to_the_old_energies_agree(experience):
    """The energies that the update finds at theta = old are those of a forward pass with the old policy."""
    config, mesh, params, optimiser, state, batch = experience
    _, _, old = make_update(config, mesh, optimiser)(state, params, batch)
    np.testing.assert_allclose(old, batch.energies_ref, rtol=2e-6)


def test_closed_gate_leaves_lora_and_optimiser_alone(experience):
    config, mesh, params, optimiser, state, batch = experience
    update = make_update(config, mesh, optimiser)
    state, _, _ = update(state, params, batch)  # so that there is momentum
    after, metrics, _ = update(state, params, batch.replace(safe=jnp.zeros(PROMPTS, bool)))
    assert metrics["grad_norm"] == 0
    assert metrics["skipped_update"] == 1
    assert_equal(after, state)


def test_a_gated_prompt_has_no_say(experience):
    """With the gate of prompt 0 closed, its advantages change nothing."""
    config, mesh, params, optimiser, state, batch = experience
    update = make_update(config, mesh, optimiser)
    safe = jnp.arange(PROMPTS) > 0
    a, _, _ = update(state, params, batch.replace(safe=safe))
    b, _, _ = update(state, params, batch.replace(safe=safe, advantages=batch.advantages.at[0].multiply(-3)))
    assert_equal(a.lora, b.lora)


def test_the_update_raises_the_probability_of_better_branches(experience):
    config, mesh, params, optimiser, state, batch = experience
    after, _, _ = make_update(config, mesh, optimiser)(state, params, batch)
    energies = jax.jit(train.make_energies(config, mesh))(
        params, after.lora, batch.embeddings, batch.text, batch.tuples
    )
    tau = jax.vmap(lambda e: objective.temperature(e, config.objective.tau, config.objective.tau_unit))(
        batch.energies_ref
    )
    log_pi = lambda e: jax.vmap(objective.log_policy)(e, tau)
    gain = np.asarray(log_pi(energies) - log_pi(batch.energies_ref))
    assert np.mean(gain * batch.advantages) > 0


@pytest.mark.parametrize(("data", "branch"), [(1, 2), (2, 2), (2, 4), (4, 2)])
def test_one_device_is_two_four_or_eight(experience, weights, data, branch):
    """The same rollout, and from it energies, gradient and LoRA, to 1e-6."""
    config, mesh, params, optimiser, state, batch = experience
    update = make_update(config, mesh, optimiser)
    after, _, old = update(state, params, batch)
    of_moved, _ = update.gradient(moved(state).lora, params, batch)
    config = make_config(weights, mesh__data=data, mesh__branch=branch)
    _, mesh, params, optimiser, state, batch_ = make_experience(config)
    assert mesh.size == data * branch
    np.testing.assert_allclose(batch_.tuples.z, batch.tuples.z, atol=1e-5)
    # From the same experience, so that what is compared is the update.
    on_mesh = lambda like: like.sharding if isinstance(like.sharding, jax.sharding.NamedSharding) else None
    placed = jax.tree.map(lambda ours, like: jax.device_put(np.asarray(ours), on_mesh(like)), batch, batch_)
    update = make_update(config, mesh, optimiser)
    after_, _, old_ = update(state, params, placed)
    ratio_deviation = partial(objective.ratio_deviation, tau=config.objective.tau, unit=config.objective.tau_unit)
    assert jax.vmap(ratio_deviation)(np.asarray(old_), np.asarray(old)).max() < ROUNDING
    np.testing.assert_allclose(old_, old, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after_.lora, after.lora)
    of_moved_, _ = update.gradient(moved(state).lora, params, placed)
    assert_gradients_equal(of_moved_.lora, of_moved.lora)


def assert_gradients_equal(a, b):
    """To 1e-6, or 5e-6 of an entry above 0.2; every leaf has entries that are far larger."""
    for ours, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.abs(theirs).max() > 1e-3
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=5e-6)


def test_the_gradients_of_micro_batches_add_up(experience, weights):
    config, mesh, params, optimiser, state, batch = experience
    lora = moved(state).lora
    whole, _ = train.make_gradient(config, mesh)(lora, params, batch)
    config = make_config(weights, train__micro_batch=1)
    gradient, total = train.make_gradient(config, mesh), None
    for first in range(PROMPTS):
        share, _ = gradient(lora, params, make_experience(config, first)[-1])
        total = share if total is None else train.accumulate(total, share)
    assert gradient._cache_size() == 1
    assert_gradients_equal(total.lora, whole.lora)
    assert total.safe == whole.safe == PROMPTS
    for name, value in whole.metrics.items():
        np.testing.assert_allclose(total.metrics[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("epochs", [1, 2])
def test_micro_batches_are_one_batch(weights, tmp_path, epochs):
    """The prompts of an iteration at once or one after the other: the same rewards and LoRA, to 1e-6."""
    states = []
    for micro_batch in (0, 1):
        config = make_config(weights, train__micro_batch=micro_batch, train__epochs=epochs, train__iterations=1)
        train.train_and_evaluate(config, tmp_path / str(micro_batch))
        states.append(saved_state(tmp_path / str(micro_batch), config, 1))
    rows = [lines(tmp_path / name)[0] for name in "01"]
    assert max(row.pop("ratio_check") for row in rows) < 1e-5  # nothing but rounding, of other prompts
    for name, value in rows[0].items():
        assert rows[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), states[0].lora, states[1].lora)


def test_an_earlier_micro_batch_is_forgotten(weights, tmp_path, monkeypatch):
    """While rewards are made there is one history, that of the rollout; on held-out prompts there is none."""
    config = make_config(weights, train__micro_batch=1, train__iterations=2, eval__batch=1, eval__prompts=2)
    shape = jax.eval_shape(lambda: rollout.build(config, rollout.make_mesh(config)).blank(1)).k.shape
    histories = lambda: sum(x.shape == shape for x in jax.live_arrays()) // 2  # keys and values
    before, counted = histories(), {"train": [], "heldout": []}
    of_training, of_clips = train.score, heldout.composite.segment_rewards

    def score(*arguments):
        counted["train"].append(histories() - before)
        return of_training(*arguments)

    def segment_rewards(*arguments):
        if arguments[1].shape[1] == 1:
            counted["heldout"].append(histories() - before)
        return of_clips(*arguments)

    monkeypatch.setattr(train, "score", score)
    monkeypatch.setattr(heldout.composite, "segment_rewards", segment_rewards)
    train.train_and_evaluate(config, tmp_path)
    assert counted["train"] == [1] * 2 * PROMPTS
    assert set(counted["heldout"]) == {0}


def test_a_weight_without_a_component_is_an_error_of_the_first_held_out_batch(weights, tmp_path, monkeypatch):
    calls = []

    def score(pixels, prompts):
        calls.append(len(prompts))
        return {"brightness": pixels.mean((1, 2, 3, 4))}

    monkeypatch.setitem(registry.SCORERS, "mine", lambda paths: score)
    config = make_config(weights, reward__scorer="mine", reward__weights__dark=1, eval__batch=2)
    with pytest.raises(ValueError, match="weights.dark=1: config.reward.scorer has only brightness; "):
        train.train_and_evaluate(config, tmp_path)
    assert calls == [2, 2]  # segments


def test_only_lora_is_trained(experience):
    config, _, _, optimiser, state, _ = experience
    assert jax.tree.structure(optimiser.init(state.lora)) == jax.tree.structure(state.optimiser)
    assert len(jax.tree.leaves(state.lora)) == 2 * 10  # A and B of the ten Linears of a block, stacked over layers
    assert all(config.lora.rank in leaf.shape[1:] for leaf in jax.tree.leaves(state.lora))


def test_a_reward_that_is_not_finite_stops_the_run_and_loses_nothing(weights, tmp_path, monkeypatch):
    """NaN from the second iteration on: an error that names the component, after the first one has been saved."""
    config = make_config(weights, train__checkpoint_every=100)
    segments = len(config.video.switch_frames) + 1
    calls = iter(range(1000))

    def score(pixels, prompts):
        good = next(calls) < 2 * segments  # the evaluation before, and the first iteration
        return {name: jnp.full(len(prompts), 0.5 if good or name != "MQ" else jnp.nan) for name in ("VQ", "MQ", "TA")}

    monkeypatch.setitem(registry.SCORERS, "toy", lambda paths: score)
    with pytest.raises(FloatingPointError, match="MQ"):
        train.train_and_evaluate(config, tmp_path)
    assert saved_state(tmp_path, config, 1).iteration == 1


def test_controls_change_the_advantages_only(weights):
    config = make_config(weights)
    key = jax.random.key(0)
    branches = jax.random.uniform(key, (PROMPTS, BRANCHES))
    scores = Scores(branches, branches[:, 0], {"VQ": (branches, branches[:, 0])})
    plain = train.experience_advantages(config, scores, None, key)
    config.objective.negate_advantages = True
    np.testing.assert_array_equal(train.experience_advantages(config, scores, None, key), -plain)
    config.objective.update(negate_advantages=False, shuffle_advantages=True)
    shuffled = train.experience_advantages(config, scores, None, key)
    assert np.any(shuffled != plain)
    np.testing.assert_array_equal(np.sort(shuffled, axis=1), np.sort(plain, axis=1))


def test_release_preset_trains(weights, tmp_path):
    """Every field of the release preset, through the same loop."""
    release = config_lib.load("configs/tiny.py:release")
    fields = {**FIELDS, "weights": weights, "train.iterations": 2, "replay.blocks": 3, "model.num_layers": 2}
    config = config_lib.override(release, [f"--config.{k}={v}" for k, v in fields.items()])
    summary = train.train_and_evaluate(config, tmp_path)
    assert np.isfinite(summary["heldout"]["gain"])
    first, second = lines(tmp_path)
    assert first["ratio_check"] < ROUNDING
    assert second["ratio_deviation"] > 0  # the old policy is that of two rollouts


# ---------------------------------------------------------------- the command


def start(weights: Path, workdir: Path, **fields) -> subprocess.Popen:
    arguments = {**FIELDS, "weights": weights, **{k.replace("__", "."): v for k, v in fields.items()}}
    command = [sys.executable, "-m", "kvpo_jax.main", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in arguments.items()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)


def wait_for_lines(workdir: Path, count: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    path = workdir / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_is_uninterrupted(weights, tmp_path, sent):
    """The real command, killed in the middle of an iteration, then run again with the same arguments."""
    iterations = {"train__iterations": 6}
    whole = start(weights, tmp_path / "whole", **iterations)
    assert whole.wait(600) == 0, whole.stdout.read()
    process = start(weights, tmp_path / "killed", **iterations)
    wait_for_lines(tmp_path / "killed", 2, process)
    process.send_signal(sent)
    code = process.wait(120)
    assert code == (0 if sent == signal.SIGTERM else -sent)
    again = start(weights, tmp_path / "killed", **iterations)
    assert again.wait(600) == 0, again.stdout.read()
    config = make_config(weights, **iterations)
    assert_equal(saved_state(tmp_path / "killed", config, 6), saved_state(tmp_path / "whole", config, 6))
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_which_iterations_are_pictured(weights):
    config = make_config(weights, train__iterations=7, train__video_every=3)
    assert [i for i in range(7) if train.pictured(config, i)] == [0, 2, 5, 6]
    config = make_config(weights, train__iterations=7, train__video_every=0)
    assert not any(train.pictured(config, i) for i in range(7))


def test_a_run_without_a_checkpoint_is_an_error_that_names_the_folder(weights, tmp_path):
    config = make_config(weights)
    like = train.init_state(config, train.make_optimiser(config.train), sharding.make_mesh(1, 1, PROMPTS, BRANCHES))
    with pytest.raises(ValueError, match="checkpoints has no checkpoint yet"):
        train.newest_state(tmp_path, like)
