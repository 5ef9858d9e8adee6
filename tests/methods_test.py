"""Every method by its name: its configuration, its training, and what makes no sense."""

import jax
import numpy as np
import pytest
from equipment import configure

from kvpo_jax import methods, train
from kvpo_jax import run as run_lib
from kvpo_jax import state as state_lib
from kvpo_jax.algorithm import losses
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import checkpoint, sharding
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.process import Clock

FILES = ("configs/tiny.py", "configs/longlive.py", "configs/memflow.py")
# A training of the shipped generator that takes seconds once it is compiled.
FIELDS = {
    "video.blocks": 8,
    "video.switch_frames": (12,),
    "rollout.branches": 4,
    "rollout.window_blocks": 2,
    "objective.gate": "none",
    "train.iterations": 3,
    "train.prompts_per_iteration": 2,
    "train.video_every": 0,
    "eval.prompts": 2,
    "mesh.data": 1,
    "mesh.branch": 1,
}
# One for each source of states, each context and each kind of loss; the others differ in numbers.
QUICK = ("flow_grpo", "nft")
TRAINED = (
    *QUICK,
    *("kvpo", "chr_l2", "noise_tve", "noise_l2", "neighbor_grpo", "ar_copo", "dance_grpo"),
    *("cps_grpo", "cm_grpo", "astrolabe", "awm", "rwr", "chr_noise_tve", "random_window"),
)


def make_config(method: str, **fields):
    """The toy's configuration of a method, made small; the fields of the method stay."""
    own = methods.METHODS.get(method, {})
    small = {name: value for name, value in FIELDS.items() if name not in own}
    small |= {name.replace("__", "."): value for name, value in fields.items()}
    config = configure(f"configs/tiny.py:{method}", small)
    config_lib.check(config)
    return config


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_changes_every_configuration_in_its_fields_alone(file, method):
    before, after = (config_lib.flat(config_lib.load(f)) for f in (file, f"{file}:{method}"))
    config_lib.check(config_lib.load(f"{file}:{method}"))
    changed = {name for name in after if after[name] != before[name]}
    assert changed <= set(methods.METHODS[method])
    assert changed or method in ("kvpo", "blocks_3", "blocks_5")


def test_a_method_goes_on_a_preset():
    both = config_lib.load("configs/tiny.py:release+rwr")
    config_lib.check(both)
    assert (both.window.past, both.objective.kind) == (6, "regression")
    release = config_lib.load("configs/tiny.py:release")
    assert config_lib.load("configs/tiny.py:release+kvpo").to_dict() == release.to_dict()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("configs/tiny.py:flow_grpoo", "not 'flow_grpoo'; did you mean 'flow_grpo'"),
        ("configs/tiny.py:release+rrw", "'rrw' is no method"),
        ("configs/tiny.py:nft+rwr", "nft and rwr are two methods"),
        ("configs/tiny.py:relase+rwr", "not 'relase'; did you mean 'release'"),
    ],
)
def test_a_name_that_is_none_is_one_line(spec, message):
    with pytest.raises(UsageError, match="^[^\n]*$") as error:
        config_lib.load(spec)
    assert message in str(error.value)


ONE_STEP = {"sampler.steps": (1.0,), "replay.grad_steps": 1, "rollout.perturbed_steps": 1}


@pytest.mark.parametrize(
    ("spec", "fields", "message"),
    [
        ("kvpo", {"replay.states": "transitions"}, "rollout.explore='routing' draws none"),
        ("flow_grpo", {"rollout.stochasticity": 0.0}, "stochasticity=0, which draws nothing"),
        ("flow_grpo", {"rollout.explore": "init_noise"}, "draws none; set it to transition"),
        ("flow_grpo", {"replay.states": "ends"}, "'ratio' needs config.replay.states=transitions"),
        ("flow_grpo", ONE_STEP, "nothing to draw"),
        ("nft", {"replay.states": "branch"}, "'nft' needs config.replay.states=ends"),
        ("nft", {"replay.times": (1.0, 0.0)}, "expected levels above 0, up to 1"),
        ("nft", {"replay.context": "self_rolled"}, "own is another context of each branch"),
        ("ar_copo", {"objective.anchors": 9}, "anchors=9 is more than config.rollout.branches=8"),
        ("ar_copo", {"objective.tau_unit": "running_std"}, "tau_unit is group_std or absolute"),
        ("ar_copo", {"replay.states": "ends"}, "needs config.replay.states=branch"),
        ("chr_l2", {"replay.context": "own"}, "are read under config.replay.context=anchor"),
        ("kvpo", {"replay.context": "own"}, "an energy of 0, and nothing is learned"),
        ("noise_tve", {"replay.context": "self_rolled"}, "energy of 0, as have all under"),
        ("noise_tve", {"replay.blocks": 1}, "Replay more blocks"),
        ("noise_tve", {"rollout.noise_scale": 1.5}, "noise_scale=1.5 is more than 1"),
    ],
)
def test_what_makes_no_sense_is_one_line(spec, fields, message):
    with pytest.raises(UsageError, match="^config[^\n]*$") as error:
        config_lib.check(configure(f"configs/tiny.py:{spec}", fields))
    assert message in str(error.value)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(
    "method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in TRAINED]
)
def test_every_method_trains_and_resumes_bit_for_bit(method, tmp_path):
    """Its policy moves, from a ratio of exactly 1; a state that was saved and read goes on as the
    one in memory.
    """
    config = make_config(method)
    run = run_lib.load(config)
    clock, state = Clock(), state_lib.init_state(config, run.mesh, run.initial_lora())
    first, metrics, groups = train.improve(run, state, 0, clock)
    if config.train.epochs == 1:
        assert metrics["ratio_deviation"] == 0
    assert metrics["update_norm"] > 0 and np.isfinite(metrics["loss"])
    assert float(groups[0].judged.scores.branches.std(axis=1).min()) > 0
    with checkpoint.manager(tmp_path, 1) as checkpoints:
        checkpoint.save(checkpoints, 1, first, {})
        like = state_lib.abstract_state(config, run.mesh)
        _, restored, _ = checkpoint.restore_latest(checkpoints, like)
    after, continued = (train.improve(run, s, 1, clock)[0] for s in (first, restored))
    jax.tree.map(np.testing.assert_array_equal, after, continued)
    follows = method in ("nft", "astrolabe")
    same = jax.tree.map(lambda a, b: bool((a == b).all()), after.old, after.lora)
    assert all(jax.tree.leaves(same)) == (not follows)


def test_the_old_policy_follows():
    """DiffusionNFT: it keeps min(0.001 k, 0.5) of itself after k iterations."""
    config = make_config("nft")
    shares = [config_lib.old_decay(config, k) for k in (0, 1, 100, 1000)]
    assert shares == pytest.approx([0, 0.001, 0.1, 0.5])
    assert [config_lib.is_on_policy(config, k) for k in (0, 1)] == [True, False]
    assert not config_lib.always_on_policy(config)
    assert config_lib.always_on_policy(make_config("kvpo"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flow_grpo", "ar_copo", "astrolabe"])
def test_a_mesh_changes_nothing(method):
    """Own noise, contexts of branches, and comparisons across branches, on one device and four;
    and with the branches rolled out in two chunks.
    """

    def improved(**fields):
        config = make_config(method, **fields)
        run = run_lib.load(config)
        state = state_lib.init_state(config, run.mesh, run.initial_lora())
        state, metrics, groups = train.improve(run, state, 0, Clock())
        return metrics, sharding.whole(groups[0].judged.scores.branches)

    one, rewards = improved()
    four, other = improved(mesh__data=2, mesh__branch=2)
    np.testing.assert_allclose(other, rewards, rtol=1e-4)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(four[name], one[name], rtol=1e-2, atol=1e-7)
    _, other = improved(rollout__branch_chunk=2)
    np.testing.assert_allclose(other, rewards, rtol=1e-4)


# ---------------------------------------------------------------- a method from outside


def test_a_method_from_outside_the_package(monkeypatch):
    """The worked example of docs/architecture.md: RVM, signed regression of end points."""
    seen = []

    def signed(options, distance, at):
        seen.append(at.states.sigma.shape)
        loss = at.states.advantage * distance(at.theta, at.states.u)
        return loss, dict.fromkeys(losses.SEEN, 0 * loss)

    monkeypatch.setitem(losses.KINDS, "signed", losses.Kind(signed))
    monkeypatch.setitem(
        methods.METHODS, "rvm", {**methods.ENDS, "objective.kind": "signed", "replay.times": (0.5,)}
    )
    config = make_config("rvm")
    run = run_lib.load(config)
    state = state_lib.init_state(config, run.mesh, run.initial_lora())
    _, metrics, groups = train.improve(run, state, 0, Clock())
    assert metrics["update_norm"] > 0 and (2 * 4 * 2,) in seen
    assert groups[0].replayed.energies.shape == (2, 4) and groups[0].replayed.ratio is None
