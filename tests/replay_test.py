"""Trajectory Velocity Energy by hand, and against a loop over branches, blocks and steps."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from equipment import SMALLEST, bare_run, batch_of, configure

from kvpo_jax import rollout, work
from kvpo_jax.algorithm import flow, keys, objective, replay
from kvpo_jax.algorithm.kv_cache import Context
from kvpo_jax.errors import UsageError
from kvpo_jax.models.wan import Wan, WanConfig, init_variables
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.runtime import sharding
from kvpo_jax.runtime.config import wan_config
from kvpo_jax.types import KVCache, PyTree, ReplayTuples, TextKV

PROMPTS, BRANCHES, WINDOW, STEPS, FRAMES = 2, 3, 2, 4, 3
PIVOT, FORK = 5, 15
EMBEDDINGS = np.random.default_rng(1).normal(size=(PROMPTS, 2, 3, 4)).astype(np.float32)
FIELDS = {
    **SMALLEST,
    "video.blocks": PIVOT + WINDOW,
    "video.switch_frames": (12,),
    "rollout.branches": BRANCHES,
    "rollout.window_blocks": WINDOW,
    "replay.blocks": WINDOW,
    "replay.context": "self_rolled",  # what it reads besides is recorded
}


@dataclasses.dataclass(frozen=True)
class World:
    """A rollout with random weights: the policy that made it and another one, and the unperturbed
    caches.

    Attributes:
      config: with FIELDS.
      variables: of the policy of the rollout.
      policy: another one, of the same base.
      text: float[L, P, M, K, H, D].
      tuples: of two perturbed blocks.
      same: of a rollout whose branches are its anchor.
      histories: the cache before each block of the window, from plain generation.
    """

    config: ml_collections.ConfigDict
    variables: PyTree
    policy: PyTree
    text: TextKV
    tuples: ReplayTuples
    same: ReplayTuples
    histories: list[KVCache]

    @property
    def schedule(self) -> flow.Schedule:
        return flow.schedule(self.config.sampler)

    def settings(self, **fields) -> ml_collections.ConfigDict:
        """Section `replay` of the config with other fields."""
        section = ml_collections.ConfigDict(self.config.replay)
        section.update({"context": "anchor", **fields})
        return section

    def energies(
        self, policy: PyTree, tuples: ReplayTuples, own_starts: int = 0, **fields
    ) -> jax.Array:
        settings = Hashable(self.settings(**fields))
        return energies(settings, self.schedule, policy, self.text, tuples, own_starts)

    def value_and_gradient(
        self, policy: PyTree, tuples: ReplayTuples, own_starts: int = 0, **fields
    ):
        """Energies, and the gradient in LoRA of a sum in which every branch has its own weight."""
        settings = Hashable(self.settings(**fields))
        return value_and_gradient(settings, self.schedule, policy, self.text, tuples, own_starts)


class Hashable(ml_collections.FrozenConfigDict):
    """A section as a static argument."""


@pytest.fixture(scope="module")
def world() -> World:
    config = configure("configs/tiny.py", FIELDS)
    run = bare_run(config, sharding.make_mesh(1, 1, PROMPTS, BRANCHES))
    # Every parameter random: the zeros and ones of the initialisation would hide what depends on
    # them.
    like = jax.eval_shape(partial(init_variables, wan_config(config)), jax.random.key(0))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype), like)
    other = jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), variables["lora"]
    )
    embeddings = EMBEDDINGS
    text = run.programs.encode_text(variables, embeddings)
    noise = keys.NoiseKey(jax.random.key(7), jnp.arange(PROMPTS))
    batch = batch_of(embeddings, np.ones((PROMPTS, 2), bool))
    prompt_at = rollout.script(config, text, batch.changed)

    def roll(config, routed_frames):
        configured = dataclasses.replace(run, config=config)
        rolled = rollout.rollout(configured, variables, batch, noise, routed_frames, PIVOT)
        return rolled.replay

    def history(blocks):
        return rollout.prefix(run, variables, prompt_at, noise, blocks)[1]

    one_block = config_lib.override(config, ["--config.rollout.window_blocks=1"])
    identity = jnp.broadcast_to(jnp.arange(6, 12, dtype=jnp.int32), (PROMPTS, BRANCHES, 6))
    return World(
        config=config,
        variables=variables,
        policy={"params": variables["params"], "lora": other},
        text=text,
        tuples=roll(config, run.programs.draw(jax.random.key(0), jnp.arange(PROMPTS), FORK)),
        same=roll(one_block, identity),
        histories=[history(PIVOT + block) for block in range(WINDOW)],
    )


MODEL = WanConfig(
    dim=16,
    ffn_dim=32,
    num_heads=2,
    num_layers=2,
    freq_dim=16,
    text_dim=4,
    text_len=3,
    channels=2,
    lora_rank=2,
    lora_alpha=2.0,
)


@partial(jax.jit, static_argnums=(0, 5))
def energies(settings, schedule, policy, text, tuples, own_starts=0):
    constants = policy["params"], text
    setting = replay.Setting(settings, schedule, own_starts=own_starts)
    energies_of = replay.CONTEXTS[settings.context]
    return energies_of(as_policy, setting, policy["lora"], constants, tuples)[0]


def as_policy(constants, lora, model=MODEL):
    params, text = constants
    return partial(Wan(model).apply, {"params": params, "lora": lora}), text


@partial(jax.jit, static_argnums=(0, 5))
def value_and_gradient(settings, schedule, policy, text, tuples, own_starts=0):
    def weighted(lora):
        trained = {"params": policy["params"], "lora": lora}
        out = energies(settings, schedule, trained, text, tuples, own_starts)
        return jnp.sum(out * jnp.linspace(-1.0, 2.0, out.size).reshape(out.shape)), out

    (_, out), gradient = jax.value_and_grad(weighted, has_aux=True)(policy["lora"])
    return out, gradient


@jax.jit
def apply(policy, *arguments):
    return Wan(MODEL).apply(policy, *arguments)


def assert_gradients_close(ours, theirs, rtol):
    """Within `rtol` of the largest entry."""
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(theirs))
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=0, atol=rtol * scale, err_msg=jax.tree_util.keystr(path)
        )


# ---------------------------------------------------------------- the loop


def gather(frames, *caches) -> Context:
    """Row 0 of a Context of the absolute `frames` (one prompt), from (cache, prompt) pairs, the
    first that has it.
    """
    k, v = [], []
    for frame in frames:
        cache, prompt, slot = next(
            (c, p, int(np.flatnonzero(c.frame[p] == frame)[0]))
            for c, p in caches
            if frame in np.asarray(c.frame[p])
        )
        k.append(cache.k[:, prompt, slot])
        v.append(cache.v[:, prompt, slot])
    return Context.of(
        k=jnp.stack(k, 1)[:, None],
        v=jnp.stack(v, 1)[:, None],
        frame=jnp.asarray(frames, jnp.int32)[None],
    )


def window_frames(block: int) -> list[int]:
    """The deployment window of a perturbed block: the sink, and the last nine frames."""
    start = FORK + block * FRAMES
    return [0, 1, 2, *range(start - 9, start)]


def text_of(world, prompt: int, segment: int) -> TextKV:
    return jax.tree.map(lambda x: x[:, prompt : prompt + 1, segment], world.text)


def residuals(world, policy, tuples, segments=(1, 1)) -> np.ndarray:
    """v - u, float[P, G, W, S, F, Y, X, C], under the caches of plain generation, one forward after
    the other.
    """
    out = np.empty(tuples.z.shape)
    for p, b in np.ndindex(PROMPTS, WINDOW):
        context = gather(window_frames(b), (world.histories[b], p))
        for g, s in np.ndindex(BRANCHES, STEPS):
            z, sigma = tuples.z[p, g, b, s][None], jnp.array([world.config.sampler.steps[s]])
            start = jnp.array([FORK + b * FRAMES])
            velocity, _ = apply(policy, z, sigma, text_of(world, p, segments[b]), context, start)
            out[p, g, b, s] = velocity[0] - tuples.u[p, g, b, s]
    return out


@pytest.fixture(scope="module")
def residual(world) -> np.ndarray:
    return residuals(world, world.policy, world.tuples)


def step_means(residual) -> np.ndarray:
    """(1/d) |v - u|^2, float[P, G, W, S]."""
    return np.square(residual).mean(axis=(4, 5, 6, 7))


# ---------------------------------------------------------------- the energy of a step


def test_step_energy_by_hand():
    velocity, u = jnp.full((3, 2, 2, 2, 1), 5.0), jnp.full((3, 2, 2, 2, 1), 3.0)
    sigma = jnp.array([1.0, 0.5, 0.1])
    # |v - u|^2 = 4 everywhere; sigma^2 4 / (2 max(sigma, floor)^2)
    by_hand = {
        ("velocity", 1.0): [4, 4, 4],
        ("clean", 1.0): [2, 0.5, 0.02],
        ("clean", 0.2): [2, 2, 0.5],
    }
    for (energy, floor), expected in by_hand.items():
        options = ml_collections.ConfigDict({"sigma_floor": floor})
        np.testing.assert_allclose(
            replay.ENERGIES[energy](velocity, u, sigma, options), expected, rtol=1e-6
        )


def test_unknown_names_are_errors_that_list_the_known_ones(world):
    for fields, message in (
        ({"energy": "l1"}, "replay.energy='l1' is not one of velocity, clean, latent"),
        ({"context": "branch"}, "replay.context='branch' is not one of anchor, own, self_rolled"),
    ):
        with pytest.raises(UsageError, match=message):
            world.energies(world.policy, world.tuples, **fields)


# ---------------------------------------------------------------- energies


@pytest.mark.parametrize("context", ["anchor", "self_rolled"])
def test_the_anchor_has_no_energy(world, context):
    """Branches that were not perturbed, under the policy that made them: it predicts what they
    followed.
    """
    assert float(world.energies(world.variables, world.same, context=context).max()) < 1e-10
    assert float(world.energies(world.policy, world.same, context=context).min()) > 1e-3


def test_energies_are_the_mean_squared_residuals_summed(world, residual):
    expected = step_means(residual).sum(axis=(2, 3))
    np.testing.assert_allclose(world.energies(world.policy, world.tuples), expected, rtol=1e-5)
    assert np.ptp(expected) > 0.01


def test_each_block_reads_the_text_of_its_segment(world):
    tuples = world.tuples.replace(segment=jnp.array([0, 1]))
    expected = step_means(residuals(world, world.policy, tuples, segments=(0, 1))).sum(axis=(2, 3))
    np.testing.assert_allclose(world.energies(world.policy, tuples), expected, rtol=1e-5)


def test_the_perturbed_steps_are_what_the_policy_of_the_rollout_does_not_predict(world):
    """In the first block: only the routed steps have energy. Later the branches read their own
    frames.
    """
    means = step_means(residuals(world, world.variables, world.tuples))
    perturbed = world.config.rollout.perturbed_steps
    assert means[:, :, 0, perturbed:].max() < 1e-10
    assert means[:, :, 0, :perturbed].min() > 1e-5
    assert means[:, :, 1:].min() > 1e-8


def test_noise_on_u_raises_the_energy_by_its_mean_square(world):
    noise = np.random.default_rng(1).normal(size=world.same.u.shape).astype(np.float32)
    raised = world.energies(world.variables, world.same.replace(u=world.same.u + noise))
    np.testing.assert_allclose(raised, step_means(noise).sum(axis=(2, 3)), rtol=1e-5)


def test_clean_energy_weighs_the_steps(world, residual):
    # sigma^2 / (2 max(sigma, 0.6)^2) at 1, 3/4, 1/2, 1/4
    weight = np.array([1 / 2, 1 / 2, 25 / 72, 25 / 288])
    expected = (weight * step_means(residual)).sum(axis=(2, 3))
    ours = world.energies(world.policy, world.tuples, energy="clean", sigma_floor=0.6)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_branches_do_not_meet(world):
    order = jnp.array([2, 0, 1])
    permuted = world.tuples.replace(z=world.tuples.z[:, order], u=world.tuples.u[:, order])
    ours, theirs = (world.energies(world.policy, tuples) for tuples in (permuted, world.tuples))
    np.testing.assert_allclose(ours, theirs[:, order], rtol=1e-6)


# ---------------------------------------------------------------- branches that explore with noise


@pytest.fixture(scope="module")
def noisy(world) -> ReplayTuples:
    """Branches with initial noise of their own in the pivot, and nothing routed; two blocks."""
    fields = {"rollout.explore": "init_noise", "rollout.window_blocks": 1}
    config = configure("configs/tiny.py", FIELDS | fields)
    run = bare_run(config, sharding.make_mesh(1, 1, PROMPTS, BRANCHES))
    noise = keys.NoiseKey(jax.random.key(7), jnp.arange(PROMPTS))
    batch = batch_of(EMBEDDINGS, np.ones((PROMPTS, 2), bool))
    drawn = run.programs.draw(jax.random.key(0), jnp.arange(PROMPTS), FORK)
    return rollout.rollout(run, world.variables, batch, noise, drawn, PIVOT).replay


def test_noise_leaves_the_pivot_without_energy_and_without_gradient(world, noisy):
    """A trap of noise with Trajectory Velocity Energy: in the pivot the branches read what the
    replay reads, so that it predicts what they followed, from whatever noise; the blocks after it
    differ in their past. When each branch reads what it wrote, no block has an energy.
    """
    pivot = noisy.replace(
        z=noisy.z[:, :, :1],
        u=noisy.u[:, :, :1],
        frames=noisy.frames[:1],
        start_frame=noisy.start_frame[:1],
        segment=noisy.segment[:1],
        noise=noisy.noise[:, :1],
    )
    assert np.abs(noisy.z[:, 0, 0, 0] - noisy.z[:, 1, 0, 0]).max() > 0.1
    ours, gradient = value_and_gradient(
        Hashable(world.settings()), world.schedule, world.variables, world.text, pivot, own_starts=1
    )
    assert float(ours.max()) < 1e-9
    _, elsewhere = world.value_and_gradient(world.policy, pivot, own_starts=1)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
    assert largest < 1e-4 * max(float(jnp.abs(x).max()) for x in jax.tree.leaves(elsewhere))
    anchor, own = (
        world.energies(world.variables, noisy, context=context, own_starts=1)
        for context in ("anchor", "self_rolled")
    )
    assert float(own.max()) < 1e-8 < 1e-6 < float(anchor.min())


def test_noise_of_their_own_is_replayed_branch_by_branch(world, noisy):
    """The first step of the pivot is not shared; that of the next block is."""
    expected = step_means(residuals(world, world.policy, noisy)).sum(axis=(2, 3))
    ours = world.energies(world.policy, noisy, own_starts=1)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    # Taken for shared, the first branch's noise would stand for all.
    assert np.abs(world.energies(world.policy, noisy) - expected).max() > 1e-3


# ---------------------------------------------------------------- gradients


def test_the_gradient_is_that_of_the_residuals(world):
    """A directional derivative against central differences."""
    rng = np.random.default_rng(2)
    direction = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), world.policy["lora"]
    )
    step = 1e-2

    def moved(t):
        return {
            "params": world.policy["params"],
            "lora": jax.tree.map(lambda x, d: x + t * d, world.policy["lora"], direction),
        }

    def weighted(e):
        return float(jnp.sum(e * jnp.linspace(-1.0, 2.0, e.size).reshape(e.shape)))

    ahead, behind = (weighted(world.energies(moved(t), world.tuples)) for t in (step, -step))
    _, gradient = world.value_and_gradient(world.policy, world.tuples)
    products = jax.tree.map(lambda g, d: float(jnp.sum(g * d)), gradient, direction)
    assert sum(jax.tree.leaves(products)) == pytest.approx((ahead - behind) / (2 * step), rel=2e-2)


@pytest.mark.parametrize("context", ["anchor", "self_rolled"])
def test_chunks_change_neither_energies_nor_gradients(world, context):
    """Two of the three learned steps' six rows of a branch at a time, and of the others so many as
    divide them.
    """
    fields = {"context": context, "grad_steps": 3}
    whole, gradient = world.value_and_gradient(world.policy, world.tuples, **fields)
    chunked, chunked_gradient = world.value_and_gradient(
        world.policy, world.tuples, **fields, chunk=2
    )
    np.testing.assert_allclose(chunked, whole, rtol=1e-6)
    assert_gradients_close(chunked_gradient, gradient, 1e-6)
    np.testing.assert_allclose(
        world.energies(world.policy, world.tuples, **fields, chunk=5), whole, rtol=1e-6
    )


def test_no_chunk_runs_forward_twice(world):
    """A forward pass has one tanh for all layers. There is one of the first steps and one of the
    others, and with chunks another of the first steps, which are few (`first_step_energies`).
    """

    def forward_passes(chunk):
        settings = Hashable(world.settings(chunk=chunk))
        program = jax.make_jaxpr(value_and_gradient, static_argnums=0)(
            settings, world.schedule, world.policy, world.text, world.tuples
        )
        return str(program).count("= tanh ")

    assert (forward_passes(0), forward_passes(2)) == (2, 3)


@pytest.mark.parametrize("chunk", [0, 4])
def test_a_first_step_is_replayed_once_for_all_branches(world, chunk):
    """Counted in the program: 2 prompts of 2 blocks of 4 steps, for 3 branches."""

    def flops(tuples):
        settings = Hashable(world.settings(chunk=chunk))
        program = jax.make_jaxpr(energies, static_argnums=0)(
            settings, world.schedule, world.policy, world.text, tuples
        )
        return work.of_program(program.jaxpr).flops

    whole, t = flops(world.tuples), world.tuples
    one_branch = t.replace(z=t.z[:, :1], u=t.u[:, :1])
    # 4 + 3 * 12 states against 4 + 12; three times as many would be 3.
    assert whole / flops(one_branch) == pytest.approx(40 / 16, rel=0.03)


@pytest.mark.parametrize("chunk", [0, 4])
def test_steps_that_read_what_the_replay_reads_need_no_gradient(world, chunk):
    """The last two of the first block, under the policy that made them: they are in the energies,
    as what rounding makes of 0, and the gradient is the one of all steps.
    """
    settings = Hashable(world.settings(chunk=chunk))
    perturbed = world.config.rollout.perturbed_steps

    @partial(jax.jit, static_argnums=1)
    def replayed(u, settled_from):
        def weighted(lora):
            total, floor = replay.anchor_energies(
                as_policy,
                replay.Setting(settings, world.schedule, settled_from=settled_from),
                lora,
                (world.variables["params"], world.text),
                world.tuples.replace(u=u),
            )
            return jnp.sum(total * jnp.linspace(-1.0, 2.0, total.size).reshape(total.shape)), (
                total,
                floor,
            )

        return jax.grad(weighted, has_aux=True)(world.variables["lora"])

    gradient, (total, floor) = replayed(world.tuples.u, perturbed)
    of_all, (expected, nothing) = replayed(world.tuples.u, None)
    assert nothing is None and 0 < float(floor.max()) < 1e-10
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert_gradients_close(gradient, of_all, 1e-5)
    # Of other targets it has no gradient, and its energy is what the floor says.
    other = world.tuples.u.at[:, :, 0, perturbed:].add(1.0)
    same, (raised, floor) = replayed(other, perturbed)
    assert_gradients_close(same, gradient, 1e-6)
    np.testing.assert_allclose(floor, 2.0, rtol=1e-4)
    np.testing.assert_allclose(raised - total, 2.0, rtol=1e-4)


def test_steps_without_gradient_are_constants(world, residual):
    """The energies are all there; their gradient is that of the first two steps alone."""
    whole, _ = world.value_and_gradient(world.policy, world.tuples)
    ours, gradient = world.value_and_gradient(world.policy, world.tuples, grad_steps=2)
    np.testing.assert_allclose(ours, whole, rtol=1e-6)
    # With the model's own velocities as targets, the last two steps add nothing to energy or
    # gradient.
    u = world.tuples.u.at[:, :, :, 2:].add(residual[:, :, :, 2:])
    truncated, expected = world.value_and_gradient(world.policy, world.tuples.replace(u=u))
    np.testing.assert_allclose(truncated, step_means(residual)[..., :2].sum(axis=(2, 3)), rtol=1e-5)
    # The velocities of the loop are those of the batch up to rounding, which the gradient feels.
    assert_gradients_close(gradient, expected, 1e-5)


@pytest.mark.parametrize("context", replay.CONTEXTS)
def test_nothing_flows_back_from_steps_without_gradient(world, context):
    """Not through the text either, which may be the policy's own: their targets are of no
    consequence.
    """

    @jax.jit
    def gradient(u):
        settings = Hashable(world.settings(grad_steps=2, context=context))
        tuples = world.tuples.replace(u=u)

        def total(lora, text):
            return jnp.sum(
                energies(
                    settings,
                    world.schedule,
                    {"params": world.policy["params"], "lora": lora},
                    text,
                    tuples,
                )
            )

        return jax.grad(total, argnums=(0, 1))(world.policy["lora"], world.text)

    u = world.tuples.u
    ours, others, first = (
        gradient(u),
        gradient(u.at[:, :, :, 2:].add(1.0)),
        gradient(u.at[:, :, :, :2].add(1.0)),
    )
    assert_gradients_close(others, ours, 1e-6)
    for one, another in zip(ours, first, strict=True):
        with pytest.raises(AssertionError):
            assert_gradients_close(another, one, 1e-2)


# ---------------------------------------------------------------- the release's context


def test_self_rolled_replays_begin_with_the_anchor_context(world, residual):
    t = world.tuples
    first = t.replace(
        z=t.z[:, :, :1],
        u=t.u[:, :, :1],
        frames=t.frames[:1],
        start_frame=t.start_frame[:1],
        segment=t.segment[:1],
        noise=t.noise[:, :1],
    )
    ours = world.energies(world.policy, first, context="self_rolled")
    np.testing.assert_allclose(ours, step_means(residual)[:, :, 0].sum(axis=-1), rtol=1e-5)


def test_self_rolled_replays_go_on_with_what_the_replaying_model_wrote(world, residual):
    """The second block reads keys of the model's own clean prediction of the first, from its last
    step.
    """
    t, sigma = world.tuples, world.config.sampler.steps
    expected = step_means(residual)[:, :, 0].sum(axis=-1)
    for p, g in np.ndindex(PROMPTS, BRANCHES):
        text, fork = text_of(world, p, 1), (world.histories[0], p)
        velocity = t.u[p, g, 0, -1] + residual[p, g, 0, -1]
        clean = (t.z[p, g, 0, -1] - sigma[-1] * velocity)[None]
        _, kv = apply(
            world.policy,
            clean,
            jnp.zeros(1),
            text,
            gather(window_frames(0), fork),
            jnp.array([FORK]),
        )
        written = KVCache(k=kv.k, v=kv.v, frame=jnp.array([[15, 16, 17]]))
        context = gather(window_frames(1), (written, 0), fork)
        for s in range(STEPS):
            z, start = t.z[p, g, 1, s][None], jnp.array([FORK + FRAMES])
            velocity, _ = apply(world.policy, z, jnp.array([sigma[s]]), text, context, start)
            expected[p, g] += np.mean(np.square(velocity[0] - t.u[p, g, 1, s]))
    ours = world.energies(world.policy, t, context="self_rolled")
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert np.any(np.abs(ours - world.energies(world.policy, t)) > 1e-3)


def test_gradient_agrees_with_finite_differences(world):
    """Through cache, transformer, energies, Gibbs policy, clip and KL, in float64.

    JAX's attention has its softmax in float32 whatever the dtype, and a rounding of 1e-7 over a
    step of 1e-4 is what the tolerance allows; algorithm_test holds the objective alone to 1e-6.
    """
    with jax.enable_x64(True):

        def double(tree):
            def wide(x):
                dtype = np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
                return jnp.asarray(np.asarray(x, dtype))

            return jax.tree.map(wide, tree)

        tuples, text, policy, behaviour = map(
            double, (world.tuples, world.text, world.policy, world.variables)
        )
        setting = replay.Setting(Hashable(world.settings()), double(world.schedule))
        in_double = partial(as_policy, model=dataclasses.replace(MODEL, dtype="float64"))
        advantages = jnp.asarray([[1.0, -0.5, -0.5], [-1.2, 0.2, 1.0]], jnp.float64)
        objective_config = ml_collections.ConfigDict(world.config.objective)
        objective_config.update(beta=0.7, tau=2.0)

        def energies_of(lora):
            return replay.anchor_energies(
                in_double, setting, lora, (policy["params"], text), tuples
            )[0]

        old = jax.jit(energies_of)(behaviour["lora"])
        reference = old + jnp.asarray(0.1 * np.random.default_rng(1).normal(size=old.shape))

        @jax.jit
        def loss(lora):
            of_group = partial(objective.loss, objective_config)
            return jax.vmap(of_group)(
                energies_of(lora), old, reference, advantages, jnp.ones(2, bool)
            )[0].sum()

        ends = jax.tree.map(np.asarray, (policy["lora"], behaviour["lora"]))
        lora = jax.tree.map(lambda a, b: b + 0.05 * (a - b), *ends)  # inside the clip
        gradient = jax.jit(jax.grad(loss))(lora)
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(gradient))
        rng = np.random.default_rng(2)

        for _ in range(3):
            direction = jax.tree.map(lambda x: rng.normal(size=x.shape), lora)

            def moved(step, towards=direction):
                return float(loss(jax.tree.map(lambda x, along: x + step * along, lora, towards)))

            def central(step, moved=moved):
                return (moved(step) - moved(-step)) / (2 * step)

            numerical = (
                4 * central(1e-4) - central(2e-4)
            ) / 3  # Richardson: leaves out the error of order step^2
            product = sum(
                np.vdot(g, d)
                for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True)
            )
            np.testing.assert_allclose(product, numerical, rtol=5e-4)
