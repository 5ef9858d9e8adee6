"""Every method by its name: its configuration, its training, and what makes no sense."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equipment import SMALL, SMALLEST, bare_run, batch_of, configure, random_variables

from kvpo_jax import methods, rollout, train
from kvpo_jax import run as run_lib
from kvpo_jax import state as state_lib
from kvpo_jax.algorithm import explore, keys, losses, replay
from kvpo_jax.errors import UsageError
from kvpo_jax.runtime import checkpoint, sharding
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.process import Clock
from kvpo_jax.types import Experience, ReplayTuples

FILES = ("configs/tiny.py", "configs/longlive.py", "configs/memflow.py")
# A training of a small generator of random weights in the toy's world. Its one pivot is block 5.
FIELDS = {
    **SMALL,
    "model.num_layers": 1,
    "video.blocks": 12,
    "video.switch_frames": (),
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
# Three that differ in what is explored, in the states and in the loss, and all ablations of KVPO,
# of which those that change different fields are trained together.
QUICK = (
    ("flow_grpo",),
    ("nft",),
    ("neighbor_grpo",),
    ("blocks_3", "slots_3", "steps_1", "kl_0"),
    ("blocks_5", "slots_9", "steps_3", "kl_1"),
    ("blocks_7", "steps_4", "kl_3"),
    ("random_window", "kl_10"),
)


def make_config(*together: str, **fields):
    """The toy's configuration of methods, made small; the fields of the methods stay."""
    own = set().union(*(methods.METHODS[method] for method in together))
    small = {name: value for name, value in FIELDS.items() if name not in own}
    config = configure("configs/tiny.py", small)
    for method in together:
        config = methods.apply(config, method).lock()
    config.objective.anchors = 2  # fewer than there are branches
    given = {name.replace("__", "."): value for name, value in fields.items()}
    config = config_lib.override(config, [f"--config.{n}={v}" for n, v in given.items()])
    config_lib.check(config)
    return config


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """A file of base weights for FIELDS."""
    path = tmp_path_factory.mktemp("weights") / "generator.safetensors"
    checkpoint.save_weights(path, random_variables(make_config("kvpo"), 0.2)["params"], {})
    return path


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
        (
            "flow_grpo",
            {"replay.energy": "latent"},
            "a probability by config.replay.energy=velocity",
        ),
        ("nft", {"replay.grad_steps": 5}, "grad_steps=5, but config.sampler.steps and"),
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
        (
            "kvpo",
            {"replay.steps_drawn": 1},
            "steps_drawn=1: the loss of config.objective.kind='gibbs'",
        ),
        (
            "cm_grpo",
            {"replay.steps_drawn": 4},
            "steps_drawn=4 is more than the 3 states of a block",
        ),
        (
            "nft",
            {"replay.step_weight": "flow_grpo"},
            "weighs drawn steps, and config.replay.states",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line(spec, fields, message):
    with pytest.raises(UsageError, match="^config[^\n]*$") as error:
        config_lib.check(configure(f"configs/tiny.py:{spec}", fields))
    assert message in str(error.value)


# ---------------------------------------------------------------- training


def test_all_ablations_are_trained_and_change_what_they_are_of():
    """Alone, and together with others that leave their fields as they are."""
    ablations = {
        name for name in methods.METHODS if name.startswith(("blocks", "slots", "steps", "kl"))
    }
    assert {name for together in QUICK[3:] for name in together} == {*ablations, "random_window"}
    for together in QUICK:
        config = config_lib.flat(make_config(*together))
        for method in together:
            alone = config_lib.flat(make_config(method))
            assert all(config[name] == alone[name] for name in methods.METHODS[method])


@pytest.mark.parametrize(
    "together",
    [
        *QUICK,
        *(pytest.param((m,), marks=pytest.mark.slow) for m in methods.METHODS if (m,) not in QUICK),
    ],
    ids="+".join,
)
def test_every_method_trains_and_resumes_bit_for_bit(together, generator, tmp_path):
    """Its policy moves, from a ratio of exactly 1; a state that was saved and read goes on as the
    one in memory.
    """
    config = make_config(*together, weights=generator)
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
    same = jax.tree.map(lambda a, b: bool((a == b).all()), after.old, after.lora)
    assert all(jax.tree.leaves(same)) == (not config.train.old_decay)
    assert run.programs.compilations()["replay"] == 1  # in all epochs
    of_reference = (jax.tree.leaves(s.reference) for s in (state, first, after))
    assert all(a is b is c for a, b, c in zip(*of_reference, strict=True))  # there is one copy


def test_every_level_of_a_method_is_learnt_on_the_releases_preset():
    """Which has gradients in the first two of four steps."""
    for method, levels in {"nft": 4, "astrolabe": 1, "awm": 4, "neighbor_grpo": 4}.items():
        config = config_lib.load(f"configs/tiny.py:release+{method}")
        config_lib.check(config)
        assert config_lib.learned_steps(config) == levels
        assert config.replay.grad_steps == 4
    more = {"replay.times": (1.0, 0.8, 0.6, 0.4, 0.3, 0.2), "replay.grad_steps": 6}
    config = make_config("nft", **{n.replace(".", "__"): value for n, value in more.items()})
    assert config_lib.learned_steps(config) == 6


def test_branches_that_are_replayed_are_divided_too():
    """Eight are rolled out, and the states of four are compared with all."""
    given = configure("configs/tiny.py:ar_copo", {"mesh.branch": 8, "mesh.data": 1})
    with pytest.raises(UsageError, match="mesh.branch=8 does not divide 4 branches"):
        run_lib.make_mesh(given)
    alone = configure("configs/tiny.py:ar_copo", {"train.prompts_per_iteration": 1})
    assert run_lib.make_mesh(alone).shape["branch"] == 4
    kvpo = configure("configs/tiny.py:kvpo", {"train.prompts_per_iteration": 1})
    assert run_lib.make_mesh(kvpo).shape["branch"] == 8


def test_the_old_policy_follows():
    """DiffusionNFT: it keeps min(0.001 k, 0.5) of itself after k iterations."""
    config = make_config("nft")
    shares = [config_lib.old_decay(config, k) for k in (0, 1, 100, 1000)]
    assert shares == pytest.approx([0, 0.001, 0.1, 0.5])
    assert [config_lib.is_on_policy(config, k) for k in (0, 1)] == [True, False]
    assert not config_lib.always_on_policy(config)
    assert config_lib.always_on_policy(make_config("kvpo"))


# ---------------------------------------------------------------- the mesh

# Each alternative of what is explored, of the states, of their context and of the loss.
MESHED = {
    "flow_grpo": ("transition", "transitions", "own", "ratio"),
    "ar_copo": ("init_noise", "branch", "anchor", "neighbours"),
    "nft": ("init_noise", "ends", "own", "nft"),
    "cm_grpo": ("transition", "transitions", "own", "regression"),  # one drawn step
    "chr_l2": ("routing", "anchor", "anchor", "gibbs"),
    "chr_noise_tve": ("routing+init_noise", "branch", "anchor", "gibbs"),
    "release": ("routing", "branch", "self_rolled", "gibbs"),
    "memflow": ("routing", "branch", "anchor", "gibbs"),  # kvpo with a memory bank
}
PROMPTS, BRANCHES, PIVOT = 2, 4, 5


def meshed_config(method: str, fields: dict):
    """The configuration of one of MESHED."""
    if method == "memflow":
        return configure("configs/tiny.py", {**fields, "window.bank": 2, "window.bank_interval": 1})
    return configure(f"configs/tiny.py:{method}", fields)


def learnt(method: str, fsdp: int, branch: int, chunk: int, recorded: ReplayTuples | None = None):
    """What a rollout on a mesh records, some branches at a time, and then the energies and the
    gradient of a method, on this or on what another rollout has recorded. The policies differ, and
    the advantages are made up.
    """
    small = {**SMALLEST, "model.num_layers": 1, "video.blocks": 7, "video.switch_frames": ()}
    small |= {"rollout.branches": BRANCHES, "train.prompts_per_iteration": PROMPTS}
    small |= {"rollout.branch_chunk": chunk, "replay.blocks": 0}
    if "rollout.window_blocks" not in methods.METHODS.get(method, {}):
        small["rollout.window_blocks"] = 2
    config = meshed_config(method, small)
    mesh = sharding.make_mesh(1, branch, PROMPTS, BRANCHES, fsdp=fsdp)

    def policy(seed: int):
        return sharding.place_weights(random_variables(config, 0.25, seed), mesh)

    variables, rng = policy(0), np.random.default_rng(0)
    run = bare_run(config, mesh, variables["params"])
    old, reference = (policy(seed)["lora"] for seed in (1, 2))
    embeddings = rng.normal(size=(PROMPTS, 1, 3, 4)).astype(np.float32)
    batch = batch_of(
        sharding.place(embeddings, mesh, sharding.PROMPTS), np.zeros((PROMPTS, 1), bool)
    )
    noise = keys.NoiseKey(jax.random.key(7), jnp.arange(PROMPTS))
    drawn = run.programs.draw(jax.random.key(0), jnp.arange(PROMPTS), 3 * PIVOT)
    rolled = rollout.rollout(run, variables, batch, noise, drawn, PIVOT)
    tuples = jax.tree.map(sharding.whole, rolled.replay)
    groups = rng.normal(size=(3, PROMPTS, BRANCHES)).astype(np.float32)
    compares = config_lib.compares_energies(config)
    experience = Experience(
        tuples=recorded or tuples,
        embeddings=embeddings,
        text=rolled.text,
        advantages=groups[0],
        gate_open=np.ones(PROMPTS, bool),
        energies_old=groups[1],
        energies_ref=groups[2],
        energy_unit=np.float32(1.0),
        on_policy=np.asarray(compares),
        old=None if compares else old,
        reference=None if compares or not config.objective.beta else reference,
    )
    gradient, replayed = run.programs.replay(
        variables["lora"], run.params, experience, np.asarray(True)
    )
    assert float(optax.tree.norm(gradient.lora)) > 0
    return tuples, jax.tree.map(sharding.whole, (gradient.lora, replayed.energies))


@pytest.mark.slow
@pytest.mark.parametrize("method", MESHED)
def test_a_mesh_changes_nothing(method):
    """One device and four differ by rounding: also where the four roll the branches out in two
    chunks, and in the norm of the gradient.

    Rewards are left out. An advantage divides what rounding makes of a reward by the spread of the
    group, so that with two trainings only that could be seen.
    """
    one, (gradient, energies) = learnt(method, 1, 1, 0)
    other, (sharded, also) = learnt(method, 2, 2, 2, recorded=one)
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(other), jax.tree.leaves(one), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=0, err_msg=name)
    difference = optax.tree.norm(jax.tree.map(np.subtract, sharded, gradient))
    assert difference < 1e-5 * optax.tree.norm(gradient)
    np.testing.assert_allclose(also, energies, rtol=1e-5)


def test_the_mesh_is_tested_with_every_alternative():
    fields = ("rollout.explore", "replay.states", "replay.context", "objective.kind")
    for method, values in MESHED.items():
        config = config_lib.flat(meshed_config(method, {}))
        assert tuple(config[name] for name in fields) == values
    registries = explore.EXPLORES, replay.STATES, replay.CONTEXTS, losses.KINDS
    for registry, tested in zip(registries, zip(*MESHED.values(), strict=True), strict=True):
        assert registry.keys() - {"none"} == set(tested)


# ---------------------------------------------------------------- a method from outside


def test_a_method_from_outside_the_package(monkeypatch, generator):
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
    config = make_config("rvm", weights=generator)
    run = run_lib.load(config)
    state = state_lib.init_state(config, run.mesh, run.initial_lora())
    _, metrics, groups = train.improve(run, state, 0, Clock())
    assert metrics["update_norm"] > 0 and (2 * 4 * 2,) in seen
    assert groups[0].replayed.energies.shape == (2, 4) and groups[0].replayed.ratio is None
