"""The wiring of the training loop: which policy, key, prompts and pivot reach which program.

One run of three iterations is watched. It starts from an adapter, so that no policy is zero; two
rollouts share an old policy; its prompts come one at a time. The tests work out every expectation
for themselves, from the run's seed and checkpoints.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from equipment import SMALL, configure, undocumented

from kvpo_jax import backbone as backbone_lib
from kvpo_jax import programs as programs_lib
from kvpo_jax import run as run_lib
from kvpo_jax import state as state_lib
from kvpo_jax import train
from kvpo_jax.algorithm import keys
from kvpo_jax.evaluate import Heldout
from kvpo_jax.models.wan import init_variables
from kvpo_jax.runtime import checkpoint
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime.config import wan_config
from kvpo_jax.types import Experience, PyTree

SEED, ITERATIONS, PROMPTS, HELD_OUT = 3, 3, 2, 2
LEARNING_RATE, WARMUP, EMA_DECAY = 0.02, 2, 0.75
NOISE = 5.0  # in rewards of 0 to 1
FIELDS = {
    "seed": SEED,
    **SMALL,
    "video.blocks": 8,
    "video.switch_frames": (12,),
    "rollout.branches": 3,
    "rollout.window_blocks": 1,
    "objective.gate": "mechanism_2",  # never closes, so that the policy moves whatever the rewards
    "reward.noise": NOISE,
    "train.iterations": ITERATIONS,
    "train.prompts_per_iteration": PROMPTS,
    "train.micro_batch": 1,
    "train.rollouts_per_sync": 2,
    "train.learning_rate": LEARNING_RATE,
    "train.warmup": WARMUP,
    "train.ema_decay": EMA_DECAY,
    "train.checkpoint_every": 1,
    "train.keep": 10,
    "eval.prompts": HELD_OUT,
    "eval.batch": 1,
    "eval.every": 0,
    "mesh.data": 1,
    "mesh.branch": 1,
}

# A checkpoint relies on the number of a stream: with another one, a resumed run draws other noise.
STREAMS = {"lora": 0, "pivot": 1, "routing": 2, "noise": 3, "shuffle": 4, "heldout": 5}
STREAMS |= {"suite": 6, "reward": 7}
# Routing draws 6 frames of those between the 3 of the sink and the 3 newest. The first block of 3
# frames that leaves it a choice has number 5. Behind number 6 lie 6 of the 24 scored frames, which
# is just enough.
PIVOTS = [5, 6]


def key_of(seed: int, name: str, step: int) -> jax.Array:
    """The key of a stream at an iteration, by the number of the stream."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS[name]), step)


def numbers(x: jax.Array) -> tuple[int, ...]:
    """The content of an integer array or of a key."""
    data = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return tuple(np.asarray(data).ravel().tolist())


def fingerprint(tree: PyTree) -> str:
    """A hash of the bytes of all leaves."""
    leaves = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))
    return hashlib.sha256(leaves).hexdigest()


PHASES = ("before", "first iteration", "later iterations", "after an iteration")

# ---------------------------------------------------------------- the watched run


@dataclasses.dataclass
class Batch:
    """What the programs were given for one batch of prompts, by content.

    Attributes:
      prompts: (split, index) of each prompt.
      policies: fingerprints of the LoRA trees that made text and video.
      noise: (key, numbers of the prompts) of the noise.
      routing: (key, numbers of the prompts, fork frame) of the CHR draws.
      trained: fingerprint of the LoRA tree at which the gradient was taken.
      experience: what the gradient read; None for held-out prompts.
      calls: how often each program was called; the replay is "gradient" or "energies".
    """

    prompts: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    policies: set[str] = dataclasses.field(default_factory=set)
    noise: set[tuple] = dataclasses.field(default_factory=set)
    routing: set[tuple] = dataclasses.field(default_factory=set)
    trained: str = ""
    experience: Experience | None = None
    calls: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def split(self) -> str:
        return self.prompts[0][0]


def watch(patch: pytest.MonkeyPatch) -> tuple[list[Batch], list[Heldout]]:
    """Lists that fill with the batches and the held-out results of the runs that follow.

    All that this file knows of how the loop gets at its programs is in here.
    """
    batches, results = [], []

    def prompts(read, split, index):
        if not batches or batches[-1].policies:  # the programs have begun with the batch before
            batches.append(Batch())
        batches[-1].prompts.append((split, index))
        return read(split, index)

    def program(name, compiled, *arguments):
        batches[-1].calls[name] += 1
        for argument in arguments:
            if isinstance(argument, keys.NoiseKey):
                batches[-1].noise.add((numbers(argument.key), numbers(argument.prompts)))
            elif isinstance(argument, dict):
                batches[-1].policies.add(fingerprint(argument["lora"]))
        return compiled(*arguments)

    def draw(compiled, key, prompts, fork_frame):
        batches[-1].routing.add((numbers(key), numbers(prompts), int(fork_frame)))
        return compiled(key, prompts, fork_frame)

    def replay(compiled, lora, params, experience, wanted):
        batches[-1].calls["gradient" if wanted else "energies"] += 1
        if wanted:
            batches[-1].trained, batches[-1].experience = fingerprint(lora), experience
        return compiled(lora, params, experience, wanted)

    def load(original, config):
        backbone = original(config)
        return dataclasses.replace(backbone, prompts=partial(prompts, backbone.prompts))

    def build(original, config, mesh):
        batches.clear()  # a prompt that is read before there are programs checks the files only
        programs = original(config, mesh)
        names = ("encode_text", "shared_block", "shared_recache", "branch_block", "branch_recache")
        watched = {name: partial(program, name, getattr(programs, name)) for name in names}
        watched["draw"] = partial(draw, programs.draw)
        watched["replay"] = partial(replay, programs.replay)
        return dataclasses.replace(programs, **watched)

    def evaluate(original, *arguments):
        results.append(original(*arguments))
        return results[-1]

    patch.setattr(backbone_lib, "load", partial(load, backbone_lib.load))
    patch.setattr(programs_lib, "build", partial(build, programs_lib.build))
    patch.setattr(train, "evaluate", partial(evaluate, train.evaluate))
    return batches, results


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run and what was seen of it.

    Attributes:
      config: of the run.
      workdir: of the run.
      batches: of training and held-out prompts, in their order.
      results: of the held-out evaluations, in their order.
      summary: what summary.json holds.
      metrics: the lines of metrics.jsonl.
      branches: the lines of branches.jsonl.
      initial: the LoRA tree that the run started from.
      saved: the train state after 1, 2, ... iterations, by name.
      compiled: the names of the programs that were compiled, by `PHASES`.
    """

    config: config_lib.ConfigDict
    workdir: Path
    batches: list[Batch]
    results: list[Heldout]
    summary: dict
    metrics: list[dict]
    branches: list[dict]
    initial: PyTree
    saved: list[dict]
    compiled: dict[str, list[str]]

    @property
    def training(self) -> list[list[Batch]]:
        """The batches of every iteration."""
        batches = [batch for batch in self.batches if batch.experience is not None]
        return [batches[i : i + PROMPTS] for i in range(0, len(batches), PROMPTS)]

    @property
    def evaluations(self) -> list[list[Batch]]:
        """The batches of every held-out evaluation."""
        batches = [batch for batch in self.batches if batch.policies and batch.split == "heldout"]
        return [batches[i : i + HELD_OUT] for i in range(0, len(batches), HELD_OUT)]

    @property
    def calibration(self) -> list[Batch]:
        """The batches of the first iteration that are rolled out to measure the unit of tau."""
        batches = [batch for batch in self.batches if batch.policies and batch.split == "train"]
        return [batch for batch in batches if batch.experience is None]

    @property
    def policies(self) -> dict[str, PyTree]:
        """name -> LoRA tree: the initial one, those after each iteration, and the last average."""
        after = {f"after {i}": state["lora"] for i, state in enumerate(self.saved, 1)}
        return {"initial": self.initial, **after, "average": self.saved[-1]["ema"]}

    def name(self, print_of_lora: str) -> str:
        """The name of the policy with a fingerprint."""
        names = {fingerprint(lora): name for name, lora in self.policies.items()}
        return names.get(print_of_lora, "unknown")

    def makers(self, groups: list[list[Batch]]) -> list[set[str]]:
        """The names of the policies that made text and video, for each group of batches."""
        policies = [{policy for batch in group for policy in batch.policies} for group in groups]
        return [set(map(self.name, of_group)) for of_group in policies]


@contextmanager
def compilations(patch: pytest.MonkeyPatch) -> Iterator[dict[str, list[str]]]:
    """phase of the run -> the programs that are compiled in it, as in a process that begins."""
    jax.clear_caches()
    compiled: dict[str, list[str]] = {phase: [] for phase in PHASES}
    phase = [PHASES[0]]

    def note(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled[phase[0]].append(details["fun_name"])

    def improve(original, run, state, iteration, clock):
        phase[0] = PHASES[1 if iteration == 0 else 2]
        out = original(run, state, iteration, clock)
        phase[0] = PHASES[3]
        return out

    patch.setattr(train, "improve", partial(improve, train.improve))
    jax.monitoring.register_event_duration_secs_listener(note)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(note)


def random_weights(path: Path, like: PyTree, metadata: dict[str, str]) -> PyTree:
    """Saves random weights of the shapes of `like`, and returns them."""
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda x: rng.normal(scale=0.15, size=x.shape).astype(np.float32), like)
    checkpoint.save_weights(path, tree, metadata)
    return tree


def saved_states(workdir: Path) -> list[dict]:
    """The train state after each iteration, by name."""
    with checkpoint.reader(workdir / "checkpoints") as checkpoints:
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore())
        return [checkpoints.restore(i, args=arguments).state for i in range(1, ITERATIONS + 1)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("loop")
    files = {"weights": folder / "generator.safetensors", "paths.lora": folder / "lora.safetensors"}
    config = configure("configs/tiny.py", {**FIELDS, **files})
    like = jax.eval_shape(partial(init_variables, wan_config(config)), jax.random.key(0))
    random_weights(files["weights"], like["params"], {})
    adapter = {"kind": "wan_lora", "config": json.dumps({"rank": 2, "alpha": 2.0})}
    initial = random_weights(files["paths.lora"], like["lora"], adapter)
    workdir = folder / "run"
    with pytest.MonkeyPatch.context() as patch, compilations(patch) as compiled:
        batches, results = watch(patch)
        train.train_and_evaluate(config, workdir)
    metrics, branches = (
        [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "branches")
    )
    summary = json.loads((workdir / "summary.json").read_text())
    saved = saved_states(workdir)
    return Run(
        config, workdir, batches, results, summary, metrics, branches, initial, saved, compiled
    )


def test_every_iteration_has_a_policy_of_its_own(run):
    """The tests below tell policies apart by their fingerprints."""
    assert len({fingerprint(lora) for lora in run.policies.values()}) == len(run.policies) == 5
    assert [len(batches) for batches in run.training] == [PROMPTS] * ITERATIONS
    assert [len(batches) for batches in run.evaluations] == [HELD_OUT] * 3


# ---------------------------------------------------------------- programs


def test_a_run_compiles_few_programs(run):
    """Every operation between programs is one of its own, which a new process compiles or loads.

    It is 104 at the time of writing. The toy's run has 108, and had 261 when videos, scores and
    advantages were put together one operation at a time.
    """
    count = {phase: len(names) for phase, names in run.compiled.items()}
    assert count["before"] <= 62 and count["first iteration"] <= 44
    assert count["later iterations"] == 0 and count["after an iteration"] <= 8


# ---------------------------------------------------------------- policies


def test_the_old_policy_makes_the_rollouts(run):
    """Two iterations share it; the third has the policy that two updates have made."""
    assert run.makers(run.training) == [{"initial"}, {"initial"}, {"after 2"}]


def test_the_gradient_is_taken_at_the_newest_policy(run):
    trained = [{run.name(batch.trained) for batch in group} for group in run.training]
    assert trained == [{"initial"}, {"after 1"}, {"after 2"}]


def test_every_second_rollout_is_on_policy(run):
    """On policy the loss sets the ratio to 1; off policy it moves."""
    flags = [{bool(batch.experience.on_policy) for batch in group} for group in run.training]
    assert flags == [{True}, {False}, {True}]
    assert [row["ratio_deviation"] > 0 for row in run.metrics] == [False, True, False]


def test_the_passes_are_those_of_the_programs_that_were_called(run):
    """A block takes 5 passes, a recache of 12 frames as many as 4 blocks, with 4 trajectories from
    the fork on. A replay has a row for the first step, and 3 for each of 3 branches.
    """
    passes = {
        "encode_text": 0,
        "shared_block": 5,
        "shared_recache": 4,
        "branch_block": 4 * 5,
        "branch_recache": 4 * 4,
        "energies": 10,
        "gradient": 2 * 10,  # the second one is for the gradient
    }
    backward = forward = 0
    for done, (batches, row) in enumerate(zip(run.training, run.metrics, strict=True), 1):
        for batch in [*batches, *(run.calibration if done == 1 else ())]:
            assert batch.calls.keys() <= passes.keys()
            forward += sum(passes[name] * count for name, count in batch.calls.items())
            backward += 2 * 10 * batch.calls["gradient"]
        assert (row["passes_forward"], row["passes_backward"]) == (forward, backward)
        assert row["videos_scored"] == done * PROMPTS * 4
    assert {name: run.summary[name] for name in ("passes_forward", "videos_scored")} == {
        "passes_forward": forward,
        "videos_scored": ITERATIONS * PROMPTS * 4,
    }
    seconds = [row["seconds_total"] for row in run.metrics]
    assert seconds == sorted(seconds) and seconds[-1] <= run.summary["seconds"]["total"]


@pytest.fixture(scope="module")
def equipment(run):
    return run_lib.load(run.config)


@pytest.fixture(scope="module")
def energies(run, equipment):
    """(name of a policy, Batch) -> its energies float[P, G] of what the batch replays."""

    def energies_under(name: str, batch: Batch) -> np.ndarray:
        return np.asarray(train.energies(equipment, run.policies[name], batch.experience))

    return energies_under


def test_the_reference_energies_are_those_of_the_initial_policy(run, energies):
    for iteration, batches in enumerate(run.training):
        for batch in batches:
            found = batch.experience.energies_ref
            np.testing.assert_allclose(found, energies("initial", batch), rtol=1e-5)
            for done in range(1, iteration + 1):
                assert np.abs(found / energies(f"after {done}", batch) - 1).min() > 0.1


def test_off_policy_the_old_energies_are_those_of_the_rollouts_policy(run, energies):
    for batch in run.training[1]:
        found = batch.experience.energies_old
        np.testing.assert_allclose(found, energies("initial", batch), rtol=1e-5)
        assert np.abs(found / energies("after 1", batch) - 1).min() > 0.1


def recorded(run, iteration: int, name: str) -> np.ndarray:
    """What branches.jsonl has of an iteration, [P, ...]."""
    return np.array([row[name] for row in run.branches if row["iteration"] == iteration])


def test_a_record_per_iteration_and_prompt(run, equipment):
    assert [row["iteration"] for row in run.branches] == [0, 0, 1, 1, 2, 2]
    trained = [batch for group in run.training for batch in group]
    for row, batch in zip(run.branches, trained, strict=True):
        assert row["prompt"] == list(equipment.backbone.prompts(*batch.prompts[0]))


def test_every_record_is_explained_in_the_docs(run):
    evaluations = map(json.loads, (run.workdir / "heldout.jsonl").read_text().splitlines())
    names = {name for row in (*run.metrics, *run.branches, *evaluations) for name in row}
    assert not undocumented(names, run.config.reward.weights)
    assert undocumented(["reward_unheard", "grad", "kl"]) == ["reward_unheard", "grad"]


def test_the_recorded_frames_are_those_that_were_drawn(run, equipment):
    for iteration, metrics in enumerate(run.metrics):
        pivot = int(metrics["pivot"])
        drawn = equipment.programs.draw(
            key_of(SEED, "routing", iteration), np.arange(PROMPTS, dtype=np.int32), 3 * pivot
        )
        np.testing.assert_array_equal(recorded(run, iteration, "routed"), drawn)
        assert set(recorded(run, iteration, "pivot")) == {pivot}
        assert set(recorded(run, iteration, "fork_frame")) == {3 * pivot}
        assert recorded(run, iteration, "window").tolist() == [[pivot, pivot]] * PROMPTS


def test_the_recorded_energies_are_those_of_three_policies(run, energies):
    """At iteration 1 the old policy is the initial one; at the others it is the trained one."""
    trained, old = ("initial", "after 1", "after 2"), ("initial", "initial", "after 2")
    for i, batches in enumerate(run.training):
        for name, policy in (
            ("energy", trained[i]),
            ("energy_old", old[i]),
            ("energy_reference", "initial"),
        ):
            found = recorded(run, i, name)
            expected = np.concatenate([energies(policy, batch) for batch in batches])
            np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"{name} {i}")


def test_the_recorded_policy_is_gibbs_and_its_ratio_is_one_on_policy(run):
    """Eq. 6 and 7 of the recorded energies; the ratio is exactly 1 where theta equals old."""

    def gibbs(energies, tau):
        weights = np.exp(-(energies - energies.min(axis=1, keepdims=True)) / tau)
        return weights / weights.sum(axis=1, keepdims=True)

    for i, metrics in enumerate(run.metrics):
        probability, ratio = (recorded(run, i, name) for name in ("probability", "ratio"))
        np.testing.assert_allclose(probability.sum(axis=1), 1, rtol=1e-6)
        theta, old = (gibbs(recorded(run, i, x), metrics["tau"]) for x in ("energy", "energy_old"))
        np.testing.assert_allclose(probability, theta, rtol=1e-3)
        np.testing.assert_allclose(ratio, theta / old, rtol=1e-3)
        assert np.all(ratio == 1) == (i != 1)
        deviation = np.abs(ratio - 1).max(axis=1).mean()
        assert deviation == pytest.approx(metrics["ratio_deviation"], rel=1e-3)


def test_the_recorded_rewards_are_those_of_the_metrics(run):
    for i, metrics in enumerate(run.metrics):
        reward, anchor, gate_open = (
            recorded(run, i, name) for name in ("reward", "reward_anchor", "gate_open")
        )
        assert reward.mean() == pytest.approx(metrics["reward"], rel=1e-5)
        assert anchor.mean() == pytest.approx(metrics["reward_anchor"], rel=1e-5)
        spread = reward.std(axis=1, keepdims=True)
        expected = (reward - reward.mean(axis=1, keepdims=True)) / spread
        np.testing.assert_allclose(recorded(run, i, "advantage"), expected, atol=1e-2)
        assert gate_open.tolist() == np.any(reward > anchor[:, None], axis=1).tolist()
        for components in recorded(run, i, "components"):
            assert components.keys() == {"VQ", "MQ", "TA"}
        for name in ("VQ", "MQ", "TA"):
            scores = [x[name]["branches"] for x in recorded(run, i, "components")]
            assert np.mean(scores) == pytest.approx(metrics[f"reward_{name}"], rel=1e-5)


def test_the_noise_of_a_reward_is_of_the_iteration_and_of_the_number_of_the_prompt(run):
    for i in range(ITERATIONS):
        key = key_of(SEED, "reward", i)
        keys = [jax.random.fold_in(key, n) for n in range(PROMPTS)]
        drawn = NOISE * np.array([jax.random.normal(k, (1 + 3,)) for k in keys])
        for name, noise in (("reward", drawn[:, 1:]), ("reward_anchor", drawn[:, 0])):
            without = recorded(run, i, name) - noise
            assert np.all((without >= 0) & (without <= 1))
    heldout = run.summary["heldout"]
    assert all(0 <= heldout[policy] <= 1 for policy in ("reference", "online", "ema"))


def test_the_unit_of_tau_is_common_and_is_the_running_mean_of_the_spreads(run):
    """All prompts of an iteration have the same one, which starts as the first one's own spread."""
    units = [{float(batch.experience.energy_unit) for batch in group} for group in run.training]
    assert [len(of_iteration) for of_iteration in units] == [1, 1, 1]
    spreads = [row["energy_old_std_in_group"] for row in run.metrics]
    expected = [spreads[0], spreads[0], 0.9 * spreads[0] + 0.1 * spreads[1]]
    assert [unit for (unit,) in units] == pytest.approx(expected, rel=1e-5)
    assert len(set(spreads)) == 3
    assert [row["tau"] for row in run.metrics] == pytest.approx(expected, rel=1e-5)


def test_the_unit_is_measured_on_the_first_iteration(run):
    """The same prompts, draws, noise and policy as those that are then learnt from."""
    first = run.training[0]
    assert [batch.prompts for batch in run.calibration] == [batch.prompts for batch in first]
    for name in ("policies", "noise", "routing"):
        measured, learnt = (
            [getattr(batch, name) for batch in batches] for batches in (run.calibration, first)
        )
        assert measured == learnt


def test_checkpoints_hold_every_policy(run):
    """The old policy is synced after every second rollout, and the reference stays."""
    old = [run.name(fingerprint(state["old"])) for state in run.saved]
    reference = [run.name(fingerprint(state["reference"])) for state in run.saved]
    assert old == ["initial", "after 2", "after 2"]
    assert reference == ["initial", "initial", "initial"]


def test_the_average_is_of_the_policies_after_each_update(run):
    def mix(average, lora):
        return EMA_DECAY * average + (1 - EMA_DECAY) * lora

    assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    average = run.initial
    for state in run.saved:
        average = jax.tree.map(mix, average, state["lora"])
        jax.tree.map(assert_close, state["ema"], average)


# ---------------------------------------------------------------- prompts and draws


def test_streams_have_their_numbers():
    for name in STREAMS:
        assert numbers(keys.draw_key(SEED, name, 7)) == numbers(key_of(SEED, name, 7))
    assert len(keys.STREAMS) == len(STREAMS)


def test_every_iteration_reads_the_next_training_prompts(run):
    read = [[prompt for batch in batches for prompt in batch.prompts] for batches in run.training]
    assert read == [
        [("train", 0), ("train", 1)],
        [("train", 2), ("train", 3)],
        [("train", 4), ("train", 5)],
    ]


def test_noise_is_of_the_iteration_and_of_the_number_of_the_prompt(run):
    for iteration, batches in enumerate(run.training):
        key = numbers(key_of(SEED, "noise", iteration))
        assert [batch.noise for batch in batches] == [{(key, (0,))}, {(key, (1,))}]


def test_routing_is_of_the_iteration_and_of_the_number_of_the_prompt(run):
    for iteration, batches in enumerate(run.training):
        key = numbers(key_of(SEED, "routing", iteration))
        drawn = [[draw[:2] for draw in batch.routing] for batch in batches]
        assert drawn == [[(key, (0,))], [(key, (1,))]]


def test_every_iteration_draws_its_pivot(run):
    """Every eligible block is as likely; draws, replay and metrics have the same one."""
    drawn = [key_of(SEED, "pivot", iteration) for iteration in range(ITERATIONS)]
    expected = [PIVOTS[int(jax.random.randint(key, (), 0, len(PIVOTS)))] for key in drawn]
    assert len(set(expected)) > 1
    for pivot, batches, row in zip(expected, run.training, run.metrics, strict=True):
        assert {fork for batch in batches for _, _, fork in batch.routing} == {3 * pivot}
        assert {numbers(b.experience.tuples.start_frame) for b in batches} == {(3 * pivot,)}
        assert row["pivot"] == pivot


# ---------------------------------------------------------------- held-out evaluation


def test_every_policy_is_evaluated_on_the_same_held_out_prompts_and_noise(run):
    """Whatever the seed of the run is, so that runs compare."""
    key = numbers(key_of(0, "heldout", 0))
    for batches in run.evaluations:
        assert [batch.prompts for batch in batches] == [[("heldout", 0)], [("heldout", 1)]]
        assert [batch.noise for batch in batches] == [{(key, (0,))}, {(key, (1,))}]


def test_reference_then_online_then_average_are_evaluated(run):
    """What the summary says of a policy is what the evaluation of that policy gave."""
    assert run.makers(run.evaluations) == [{"initial"}, {"after 3"}, {"average"}]
    given = [float(result.reward.mean()) for result in run.results]
    assert len(set(given)) == 3
    names = ("reference", "online", "ema")
    assert [run.summary["heldout"][name] for name in names] == pytest.approx(given, rel=1e-6)
    assert [run.metrics[-1][f"heldout_{name}"] for name in names] == pytest.approx(given, rel=1e-6)


def test_a_finished_run_is_evaluated_alike_again(run):
    """But for its reference, whose evaluation it has kept."""
    with pytest.MonkeyPatch.context() as patch:
        batches, results = watch(patch)
        summary = train.train_and_evaluate(run.config, run.workdir)
    again = dataclasses.replace(run, batches=batches, results=results)
    assert again.training == []
    assert again.makers(again.evaluations) == [{"after 3"}, {"average"}]
    assert summary["components"] == run.summary["components"]
    assert summary["heldout"] == run.summary["heldout"]


# ---------------------------------------------------------------- the learning rate


@pytest.mark.parametrize(
    "warmup, shares",
    [(0, [1, 1, 1, 1, 1, 1]), (1, [1, 1, 1, 1, 1, 1]), (4, [0.25, 0.5, 0.75, 1, 1, 1])],
)
def test_the_learning_rate_rises_in_equal_steps(warmup, shares):
    """Of a gradient that stays the same, Adam takes the sign, and moves by the learning rate."""
    config = config_lib.load("configs/tiny.py")
    config.train.update(learning_rate=LEARNING_RATE, warmup=warmup)
    config.train.update(grad_clip=1e9, weight_decay=0.0)
    optimiser = state_lib.make_optimiser(config.train)
    gradient, lora = jnp.array([0.5, -2.0]), jnp.array([1.0, 1.0])
    state = optimiser.init(lora)
    for share in shares:
        update, state = optimiser.update(gradient, state, lora)
        expected = share * LEARNING_RATE * np.array([-1.0, 1.0])
        np.testing.assert_allclose(update, expected, rtol=1e-4)


def test_the_loop_takes_its_first_step_at_the_first_learning_rate(run):
    """Adam's first step has that length in every entry whose gradient is not tiny."""
    before, after = jax.tree.leaves(run.initial), jax.tree.leaves(run.saved[0]["lora"])
    longest = max(np.abs(a - b).max() for a, b in zip(after, before, strict=True))
    assert longest == pytest.approx(LEARNING_RATE / WARMUP, rel=1e-4)
