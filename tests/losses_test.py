"""Every loss that is taken state by state, and the states it reads, against formulas in float64."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from kvpo_jax.algorithm import flow, kv_cache, losses, objective, replay
from kvpo_jax.runtime import config as config_lib
from kvpo_jax.types import KVCache, ReplayTuples

P, G, W, S = 2, 3, 1, 4
BLOCK = (1, 2, 2, 3)
SIGMA = np.array([1.0, 0.9375, 5 / 6, 0.625])  # 1, .75, .5, .25 after a shift of 5
STRENGTHS = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 1.0}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normals(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def sections(**fields) -> tuple[ml_collections.ConfigDict, ml_collections.ConfigDict]:
    """The sections `replay` and `objective` of the default config with other fields."""
    config = config_lib.load("configs/tiny.py").copy_and_resolve_references().unlock()
    config.objective.update(gate="none", beta=0.3, clip_low=1e-3, clip_high=2e-3)
    for name, value in fields.items():
        section = config.replay if name in config.replay else config.objective
        section[name] = value
    return config.replay, config.objective


def tuples(**fields) -> ReplayTuples:
    """Of a window of one block; nothing of it but the states is read."""
    nothing = KVCache(k=jnp.zeros(()), v=jnp.zeros(()), frame=jnp.zeros((P, 1), jnp.int32))
    return ReplayTuples(
        z=normals(0, P, G, W, S, *BLOCK),
        u=normals(1, P, G, W, S, *BLOCK),
        history=nothing,
        page=nothing,
        frames=jnp.zeros((W, 1), jnp.int32),
        start_frame=jnp.zeros(W, jnp.int32),
        segment=jnp.zeros(W, jnp.int32),
        noise=None,
    ).replace(**fields)


def schedule() -> flow.Schedule:
    sigma = jnp.append(jnp.asarray(SIGMA), 0.0)
    return flow.Schedule(sigma=sigma, sigma_cond=sigma, solver="renoise")


def transition(kernel: str) -> flow.Transition:
    kept, drawn = flow.KERNELS[kernel](SIGMA, STRENGTHS[kernel])
    return flow.Transition(jnp.asarray(kept), jnp.asarray(drawn))


def states_of(source: str, recorded: ReplayTuples, kernel: str = "cps", **fields) -> replay.States:
    options, _ = sections(**fields)
    setting = replay.Setting(options, schedule(), transition(kernel))
    return replay.STATES[source].make(setting, recorded)


def replica(states: replay.States, advantages: jax.Array, seed: int = 3) -> replay.Replica:
    """Random velocities of three policies at flattened states, each with its branch's advantage."""
    advantage = jnp.broadcast_to(advantages[:, :, None, None], states.sigma.shape)
    flat = states.replace(advantage=advantage).flat()
    theta, old, reference = normals(seed, 3, *flat.z.shape)
    return replay.Replica(flat, theta, old, jnp.asarray(False), reference, None)


def mean(x):
    """Over the elements of a block."""
    return np.mean(np.asarray(x), axis=(1, 2, 3, 4))


def spread(x):
    """float[R] as float[R, 1, 1, 1, 1]."""
    return np.asarray(x)[:, None, None, None, None]


def loss_of(kind: str, at: replay.Replica, **fields):
    return losses.bind(losses.KINDS[kind], *sections(**fields))(at)


def assert_slope(kind: str, at: replay.Replica, **fields):
    """The gradient in theta along a direction against central differences."""
    direction = normals(9, *at.theta.shape)

    def total(t):
        moved = at._replace(theta=at.theta + t * direction)
        return loss_of(kind, moved, **fields)[0].sum()

    slope = (total(1e-5) - total(-1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(total)(0.0), slope, rtol=1e-6)


# ---------------------------------------------------------------- drawn steps


def published(kernel, z, v, sigma, after):
    """m and std of z' as METHODS write them: in z and v, in clean latents, or as a consistency
    model.
    """
    drop, strength = sigma - after, STRENGTHS[kernel]
    if kernel == "flow_sde":
        q = strength * np.sqrt(sigma / (1 - np.where(sigma == 1, SIGMA[1], sigma)))
        drift = v * drop * (1 + q**2 * (1 - sigma) / (2 * sigma))
        return z * (1 - q**2 * drop / (2 * sigma)) - drift, q * np.sqrt(drop)
    clean = z - sigma * v
    if kernel == "dance_sde":
        score = -(z - (1 - sigma) * clean) / sigma**2
        return z - drop * v + strength**2 / 2 * drop * score, strength * np.sqrt(drop)
    return (1 - after) * clean, after


def drawn_steps(kernel: str):
    """A Replica of drawn steps, and z', sigma, sigma' of each of its rows."""
    recorded = tuples()
    states = states_of("transitions", recorded, kernel)
    reached = recorded.z[:, :, :, 1:].reshape(-1, *BLOCK)
    after = np.tile(SIGMA[1:], P * G * W)
    return replica(states, normals(4, P, G)), np.asarray(reached), spread(after)


@pytest.mark.parametrize("kernel", STRENGTHS)
def test_the_ratio_of_a_drawn_step(kernel):
    at, reached, after = drawn_steps(kernel)
    sigma = spread(at.states.sigma)

    def log_p(v):
        m, std = published(kernel, np.asarray(at.states.z), np.asarray(v), sigma, after)
        return -mean((reached - m) ** 2 / (2 * std**2)), m, std

    (new, m, std), (old, *_), (_, m_ref, _) = map(log_p, (at.theta, at.old, at.reference))
    rho = np.exp(np.clip(new - old, -20, 20))
    advantage = np.asarray(at.states.advantage)
    kl = mean((m - m_ref) ** 2 / (2 * std**2))
    clipped = np.minimum(rho * advantage, np.clip(rho, 1 - 1e-3, 1 + 2e-3) * advantage)
    loss, seen = loss_of("ratio", at)
    np.testing.assert_allclose(loss, -clipped + 0.3 * kl, rtol=1e-8)
    np.testing.assert_allclose(seen["kl"], kl, rtol=1e-8)
    assert set(seen["clip_fraction"].tolist()) <= {0.0, 1.0} and seen["clip_fraction"].max() == 1
    near = at._replace(old=at.theta + 1e-7 * at.old)  # inside the clip
    assert float(loss_of("ratio", near)[1]["ratio_deviation"].max()) < 1e-3
    assert_slope("ratio", near)


def test_on_policy_a_ratio_is_exactly_one():
    at, *_ = drawn_steps("flow_sde")
    near = at._replace(old=at.theta * (1 + 1e-15), on_policy=jnp.asarray(True))
    loss, seen = jax.jit(lambda at: loss_of("ratio", at, beta=0.0))(near)
    np.testing.assert_array_equal(seen["ratio_deviation"], 0)
    np.testing.assert_array_equal(loss, -near.states.advantage)
    # There the gradient is that of REINFORCE.
    ours, theirs = (
        jax.grad(lambda v, k=k: loss_of(k, near._replace(theta=v), beta=0.0)[0].sum())(near.theta)
        for k in ("ratio", "regression")
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def test_regression_of_drawn_steps_is_cm_grpo():
    """The gradient of 100 |x_clean - sg(target)|^2, with CM-GRPO's target."""
    at, reached, after = drawn_steps("cps")
    sigma, advantage = spread(at.states.sigma), spread(at.states.advantage)

    def cm_grpo(v):
        clean = at.states.z - sigma * v
        pull = advantage / 2 * (1 - after) * (reached - (1 - after) * clean) / after**2
        target = jax.lax.stop_gradient(clean + pull)
        return 100 * jnp.mean(jnp.square(clean - target), axis=(1, 2, 3, 4)).sum()

    def ours(v):
        return loss_of("regression", at._replace(theta=v), beta=0.0)[0].sum()

    np.testing.assert_allclose(
        100 * jax.grad(ours)(at.theta), jax.grad(cm_grpo)(at.theta), rtol=1e-8
    )
    assert_slope("regression", at)


@pytest.mark.parametrize("name", replay.STEP_WEIGHTS)
def test_what_a_step_counts(name):
    """As Flow-GRPO and Flash-GRPO write it, in q = std / sqrt(sigma - sigma')."""
    sigma, drop = SIGMA[:-1], -np.diff(SIGMA)
    q = 0.7 * np.sqrt(sigma / (1 - np.where(sigma == 1, SIGMA[1], sigma)))
    rectified = 1 / (np.sqrt(drop) / q + q * np.sqrt(drop) * (1 - sigma) / (2 * sigma))
    weights = {"even": np.ones(S - 1), "flow_grpo": q / np.sqrt(drop)}
    expected = (weights | {"rectified": rectified / rectified.mean()})[name]
    at, *_ = drawn_steps("flow_sde")
    states = states_of("transitions", tuples(), "flow_sde", step_weight=name).flat()
    np.testing.assert_allclose(states.share.reshape(-1, S - 1)[-1], expected, rtol=1e-10)
    weighted = at._replace(states=at.states.replace(share=states.share))
    plain = at._replace(states=at.states.replace(share=None))
    for kind in "ratio", "regression":
        ours, theirs = (loss_of(kind, x)[0].reshape(-1, S - 1) for x in (weighted, plain))
        np.testing.assert_allclose(ours, expected * theirs, rtol=1e-10)


@pytest.mark.parametrize(
    ("steps", "grad_steps", "expected"),
    [
        (None, 4, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (None, 2, [[0, 1], [0, 1]]),
        ([[2], [0]], 4, [[2], [0]]),
        ([[0, 3], [1, 2]], 4, [[0, 3], [1, 2]]),
    ],
)
def test_the_loss_is_the_mean_over_the_drawn_steps_of_each_prompt(steps, grad_steps, expected):
    """The network says its level, and the loss the square of that times 1 + the advantage."""

    def policy(frozen, lora):
        def network(z, sigma, text, context, start_frame):
            return jnp.ones_like(z) * sigma[:, None, None, None, None], None

        return network, jnp.zeros((1, P, 1))

    def loss(at: replay.Replica):
        level = at.theta.mean(axis=(1, 2, 3, 4))
        np.testing.assert_array_equal(at.states.u.shape, at.states.z.shape)
        return level**2 * (1 + at.states.advantage), {"level": level}

    options, _ = sections(grad_steps=grad_steps)
    cache = kv_cache.empty(kv_cache.KVShape(1, 1, 1, 2), (P,), 2, 1, jnp.float64)
    recorded = tuples(history=cache, page=cache)
    recorded = recorded.replace(steps=None if steps is None else jnp.asarray(steps))
    advantages = normals(4, P, G)
    others = replay.Others(advantages, jnp.asarray(True), None, None)
    setting = replay.Setting(options, schedule())
    arguments = policy, setting, {}, (), recorded, False, loss, others, ("level",)
    losses_found, seen = replay.state_losses(*arguments)
    levels = SIGMA[np.asarray(expected)]
    of_prompt = (levels**2).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(losses_found, of_prompt * (1 + np.asarray(advantages)), rtol=1e-6)
    level = np.broadcast_to(levels.mean(axis=1, keepdims=True), (P, G))
    np.testing.assert_allclose(seen["level"], level, rtol=1e-6)


# ---------------------------------------------------------------- end points


def end_points(**fields):
    """A Replica of end points at every level of the solver, and their x0 and noise by row."""
    recorded = tuples(fresh=normals(5, P, W, S, *BLOCK))
    states = states_of("ends", recorded, **fields)
    x0 = recorded.z[:, :, :, -1] - 0.625 * recorded.u[:, :, :, -1]
    x0 = jnp.broadcast_to(x0[:, :, :, None], (P, G, W, S, *BLOCK)).reshape(-1, *BLOCK)
    noise = jnp.broadcast_to(recorded.fresh[:, None], (P, G, W, S, *BLOCK)).reshape(-1, *BLOCK)
    return replica(states, normals(4, P, G)), np.asarray(x0), np.asarray(noise)


def test_end_points_are_noised_anew_with_noise_that_the_branches_share():
    at, x0, noise = end_points()
    t = np.tile(SIGMA, P * G * W)
    np.testing.assert_allclose(at.states.sigma, t)
    np.testing.assert_allclose(at.states.z, (1 - spread(t)) * x0 + spread(t) * noise, rtol=1e-12)
    np.testing.assert_allclose(at.states.u, noise - x0, rtol=1e-12)
    other, *_ = end_points(times=(0.5,) * S)
    np.testing.assert_array_equal(other.states.sigma, 0.5)


@pytest.mark.parametrize("b, adaptive", [(1.0, True), (0.1, True), (1.0, False), (0.1, False)])
def test_both_losses_of_nft(b, adaptive):
    """DiffusionNFT with its adaptive weight and 5 / b; without them Astrolabe's published loss."""
    at, x0, _ = end_points()
    t = spread(at.states.sigma)

    def clean(v):
        return np.asarray(at.states.z) - t * np.asarray(v)

    new, old, base = map(clean, (at.theta, at.old, at.reference))
    share = np.clip(np.asarray(at.states.advantage), -5, 5) / 10 + 0.5
    plus, minus = b * new + (1 - b) * old, (1 + b) * old - b * new

    def loss(x):
        size = np.maximum(mean(np.abs(x - x0)), 1e-5) if adaptive else 1.0
        return mean((x - x0) ** 2) / size

    scale = 5 / b if adaptive else 1.0
    expected = scale * (share * loss(plus) + (1 - share) * loss(minus))
    expected += 1e-4 * mean((new - base) ** 2)
    fields = {"energy": "latent", "mix": b, "adaptive": adaptive, "beta": 1e-4}
    np.testing.assert_allclose(loss_of("nft", at, **fields)[0], expected, rtol=1e-10)
    if b == 1.0:  # the positive one is of theta alone, and both are equal where theta is old
        np.testing.assert_allclose(plus, new)
        same = at._replace(old=at.theta)
        np.testing.assert_allclose(
            loss_of("nft", same, **fields | {"beta": 0.0})[0], scale * loss(new), rtol=1e-10
        )
    if not adaptive:
        assert_slope("nft", at, **fields)


def test_the_update_of_astrolabe_follows_the_advantage():
    """On policy its gradient in v is 2 b t^2 (2 r - 1) (v - u) / d: towards a good end point, away
    from a bad one, and none without an advantage.
    """
    at, *_ = end_points()
    at = at._replace(old=at.theta)
    fields = {"energy": "latent", "mix": 0.1, "adaptive": False, "beta": 0.0}

    def total(v):
        return loss_of("nft", at._replace(theta=v), **fields)[0].sum()

    t, lean = spread(at.states.sigma), spread(np.clip(np.asarray(at.states.advantage), -5, 5) / 5)
    expected = 2 * 0.1 * t**2 * lean * np.asarray(at.theta - at.states.u) / np.prod(BLOCK)
    np.testing.assert_allclose(jax.grad(total)(at.theta), expected, rtol=1e-8, atol=1e-15)


def test_regression_of_end_points_weighs_them():
    at, x0, noise = end_points()
    expected = np.asarray(at.states.advantage) * mean((np.asarray(at.theta) - (noise - x0)) ** 2)
    np.testing.assert_allclose(loss_of("regression", at, beta=0.0)[0], expected, rtol=1e-10)


# ---------------------------------------------------------------- a state of all branches


@pytest.mark.parametrize("kind", ["ratio", "regression"])
def test_the_kl_of_states_holds_the_push_at_a_shared_state(kind):
    """(J) of docs/algorithm.md: on policy the loss is stationary at v_ref + p / beta alone."""
    states, beta = states_of("branch", tuples()), 0.3
    advantages = jax.vmap(objective.group_advantage)(normals(4, P, G))
    at = replica(states, advantages)._replace(on_policy=jnp.asarray(True))
    push = jnp.mean(advantages.reshape(P, G, *6 * (1,)) * states.u, axis=1)
    reference = normals(5, P, W, S, *BLOCK)

    def loss(v):
        theta, still = (
            jnp.repeat(x[:, None], G, axis=1).reshape(at.theta.shape) for x in (v, reference)
        )
        here = at._replace(theta=theta, old=theta, reference=still)
        return loss_of(kind, here, beta=beta)[0].sum()

    held = reference + push / beta
    np.testing.assert_allclose(jax.grad(loss)(held), 0, atol=1e-12)
    # Elsewhere it pulls back by beta times the distance.
    expected = 2 * G / np.prod(BLOCK) * beta * push
    np.testing.assert_allclose(jax.grad(loss)(held + push), expected, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- distances


def test_the_anchors_states_are_compared_with_the_branches_latents():
    """Eq. 21: sigma^2 |v - u|^2 is |the anchor's x_clean - the branch's x0|^2."""
    recorded = tuples(anchor=normals(6, P, W, S, *BLOCK))
    states = states_of("anchor", recorded).flat()
    v = normals(7, *states.z.shape)
    z = jnp.broadcast_to(recorded.anchor[:, None], recorded.z.shape).reshape(-1, *BLOCK)
    x0 = recorded.z[:, :, :, -1] - 0.625 * recorded.u[:, :, :, -1]
    x0 = jnp.broadcast_to(x0[:, :, :, None], recorded.z.shape).reshape(-1, *BLOCK)
    options, _ = sections(energy="latent")
    ours = replay.state_energy(options, v, states.u, states)
    np.testing.assert_allclose(ours, mean((z - spread(states.sigma) * v - x0) ** 2), rtol=1e-8)


def neighbours(anchors: int = 2) -> replay.Replica:
    """Of the states of some branches, with all branches' clean latents."""
    recorded = replay.with_peers(schedule(), tuples(), anchors)
    assert recorded.z.shape[1] == anchors
    states = replay.replay_states(schedule(), recorded)
    advantages = normals(4, P, G)
    advantages -= advantages.mean(axis=1, keepdims=True)
    shape = states.sigma.shape
    of_all = jnp.broadcast_to(advantages[:, None, None, None], (*shape, G))
    row = jnp.arange(P * W * S).reshape(P, 1, W, S)
    flat = states.replace(advantage=of_all, peers=jnp.broadcast_to(row, shape)).flat()
    peers = recorded.peers.reshape(-1, G, *BLOCK)[flat.peers]
    theta, old, reference = normals(3, 3, *flat.z.shape)
    return replay.Replica(flat, theta, old, jnp.asarray(False), reference, peers)


def test_neighbours_against_a_loop():
    at = neighbours()
    recorded, fields = tuples(), {"tau": 0.5, "tau_unit": "group_std", "clip_low": 0.2}
    loss, _ = loss_of("neighbours", at, **fields, clip_high=0.2, beta=0.0)
    expected = []
    for p, k, s in np.ndindex(P, 2, S):
        peers = recorded.z[p, :, 0, s] - SIGMA[s] * recorded.u[p, :, 0, s]
        row = (p * 2 + k) * S + s

        def log_pi(v, tau=None, p=p, k=k, s=s, peers=peers):
            clean = recorded.z[p, k, 0, s] - SIGMA[s] * v
            e = np.mean(np.square(np.asarray(clean - peers)), axis=(1, 2, 3, 4))
            tau = 0.5 * e.std() if tau is None else tau
            return -e / tau - np.log(np.exp(-e / tau).sum()), tau

        old, tau = log_pi(at.old[row])
        rho = np.exp(np.clip(log_pi(at.theta[row], tau)[0] - old, -20, 20))
        a = np.asarray(at.states.advantage[row])
        expected.append(-np.mean(np.minimum(rho * a, np.clip(rho, 0.8, 1.2) * a)))
    np.testing.assert_allclose(loss, expected, rtol=1e-8)
    # Not clipped, so that it has a slope.
    near = at._replace(old=at.theta + 1e-6 * at.old)
    assert_slope("neighbours", near, **fields, clip_high=0.2)


def test_on_policy_a_branch_is_its_own_nearest_neighbour():
    """E[k, k] = 0, the ratio is exactly 1, and the anchor's latent is pulled along sum_i A_i x_i by
    2 / (G tau d).
    """
    at, recorded = neighbours(anchors=G), tuples()
    followed = recorded.u.reshape(-1, *BLOCK)
    at = at._replace(theta=followed, old=followed, on_policy=jnp.asarray(True))
    sigma = spread(at.states.sigma)
    clean = np.asarray(at.states.z) - sigma * np.asarray(followed)
    energies = np.square(clean[:, None] - np.asarray(at.peers)).mean((2, 3, 4, 5))
    own = np.tile(np.repeat(np.arange(G), S), P)
    np.testing.assert_allclose(energies[np.arange(len(own)), own], 0, atol=1e-28)
    fields = {"tau": 0.5, "tau_unit": "absolute", "beta": 0.0}
    loss, seen = loss_of("neighbours", at, **fields)
    np.testing.assert_array_equal(seen["ratio_deviation"], 0)

    def total(v):
        return loss_of("neighbours", at._replace(theta=v), **fields)[0].sum()

    pull = np.einsum("rg,rg...->r...", at.states.advantage, at.peers)
    of_clean = -2 / (G * 0.5 * np.prod(BLOCK)) * pull
    np.testing.assert_allclose(jax.grad(total)(followed), -sigma * of_clean, rtol=1e-7, atol=1e-12)


def test_every_kind_that_is_taken_state_by_state_is_tested():
    taken = {name for name, kind in losses.KINDS.items() if kind.of_state}
    assert taken == {"neighbours", "ratio", "regression", "nft"}
    assert losses.KINDS["gibbs"].of_state is None and objective.loss
